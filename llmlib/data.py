"""A prepared folder, as ``prepare`` writes it: splits, batches, evaluation windows.

Batches are a pure function of (seed, step, rank), so resuming means knowing the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from llmlib import runs


@dataclass(frozen=True)
class TokenFiles:
    """One split on disk. Files are mapped anew for each batch, so resident memory stays flat."""

    folder: Path
    files: tuple[str, ...]
    lengths: tuple[int, ...]
    dtype: str

    def read(self, file: int) -> np.ndarray:
        """Map a file; what was read of it leaves memory with the last view of the result."""
        return np.asarray(np.memmap(self.folder / self.files[file], dtype=self.dtype, mode="r"))

    def streams(self) -> Iterator[np.ndarray]:
        return map(self.read, range(len(self.files)))


def open_split(tokens_dir: Path, split: str) -> TokenFiles:
    """Open a prepared split: "train", "val" (documents held out of it), or an official one."""
    manifest = load_manifest(tokens_dir)
    if split not in manifest["splits"]:
        raise ValueError(
            f"split={split!r} is not in these tokens; choose from {', '.join(manifest['splits'])}."
        )
    shards = [shard for shard in manifest["splits"][split] if shard["n_tokens"]]
    itemsize = np.dtype(manifest["dtype"]).itemsize
    for shard in shards:
        path = tokens_dir / shard["file"]
        if not path.exists() or path.stat().st_size != shard["n_tokens"] * itemsize:
            raise ValueError(
                f"{shard['file']} is missing or has another size than its manifest says; "
                "run 01_data_prep with verify=True, which rebuilds it."
            )
    files, lengths = (tuple(shard[key] for shard in shards) for key in ("file", "n_tokens"))
    return TokenFiles(tokens_dir, files, lengths, manifest["dtype"])


def load_manifest(tokens_dir: Path) -> dict[str, Any]:
    """Read the manifest of prepared tokens."""
    if not (tokens_dir / "manifest.json").exists():
        raise ValueError(f"run 01_data_prep first: there is no manifest in {tokens_dir}.")
    return runs.read_json(tokens_dir / "manifest.json")


class Batches:
    """Training batches without replacement: each epoch is its own permutation of all windows.

    A window is ``seq_len + 1`` tokens: inputs and, one to the right, targets. What is left at the
    end of a file and too short for a window is not used.
    """

    def __init__(self, tokens: TokenFiles, seq_len: int, n_sequences: int, *, seed: int = 0):
        self.tokens, self.seq_len, self.n_sequences, self.seed = tokens, seq_len, n_sequences, seed
        counts = [max(0, (length - 1) // seq_len) for length in tokens.lengths]
        self.first_of_file = np.cumsum([0, *counts])
        self.n_windows = int(self.first_of_file[-1])
        if self.n_windows == 0:
            raise ValueError(
                f"{sum(tokens.lengths)} tokens are too few for one window of {seq_len + 1}; "
                "bring more text or lower seq_len."
            )
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.n_windows)

    def indices(self, step: int) -> np.ndarray:
        """Return the windows of one step: a pure function of (seed, step)."""
        position = np.arange(step * self.n_sequences, (step + 1) * self.n_sequences)
        epochs, places = position // self.n_windows, position % self.n_windows
        return np.array([self._permutation(int(e))[p] for e, p in zip(epochs, places, strict=True)])

    def batch(
        self, step: int, *, rank: int = 0, world_size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read this rank's share of a step: inputs and targets, each (n_sequences / world_size, T)."""
        share = self.n_sequences // world_size
        mine = self.indices(step)[rank * share : (rank + 1) * share]
        files = np.searchsorted(self.first_of_file, mine, side="right") - 1
        starts = (mine - self.first_of_file[files]) * self.seq_len
        streams = {file: self.tokens.read(file) for file in set(files.tolist())}
        pairs = zip(files.tolist(), starts.tolist(), strict=True)
        windows = np.stack([streams[f][start : start + self.seq_len + 1] for f, start in pairs])
        both = torch.from_numpy(windows.astype(np.int64))
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def prefetch(
    batches: Batches, step: int, device: torch.device, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches from ``step`` on, preparing the next one while the device computes."""

    def load(step: int) -> tuple[torch.Tensor, ...]:
        both = batches.batch(step, rank=rank, world_size=world_size)
        return tuple(t.pin_memory() for t in both) if device.type == "cuda" else both

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, step)
        while True:
            step += 1
            inputs, targets = ahead.result()
            ahead = pool.submit(load, step)
            yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def eval_windows(
    tokens_dir: Path, split: str, seq_len: int, n_windows: int | None = None
) -> np.ndarray:
    """Read non-overlapping windows (n, seq_len + 1) of a split, evenly spread, always the same."""
    stream = np.concatenate([*open_split(tokens_dir, split).streams()])
    if len(stream) <= seq_len:
        raise ValueError(
            f"the {split} split has {len(stream)} tokens, too few for one window of {seq_len + 1}; "
            "bring more text, raise test_size or lower seq_len."
        )
    return _windows(stream, seq_len, n_windows)


def _windows(stream: np.ndarray, seq_len: int, n_sequences: int | None = None) -> np.ndarray:
    n_windows = (len(stream) - 1) // seq_len
    n_used = min(n_sequences or n_windows, n_windows)
    starts = np.linspace(0, n_windows - 1, n_used).round().astype(np.int64) * seq_len
    return np.stack([stream[s : s + seq_len + 1] for s in starts]).astype(np.int64)


def sha256(windows: np.ndarray) -> str:
    """Hash evaluation windows: losses compare between runs whose hashes are equal."""
    return hashlib.sha256(windows.tobytes()).hexdigest()


def domain_windows(tokens_dir: Path, split: str, seq_len: int) -> dict[str, np.ndarray]:
    """Cut each domain of a held-out split into windows; one too small for a window is left out."""
    parts: dict[str, list[np.ndarray]] = {}
    for (domain, _), document in documents(tokens_dir, split):
        parts.setdefault(domain, []).append(document)
    streams = {domain: np.concatenate(found) for domain, found in sorted(parts.items())}
    return {d: _windows(stream, seq_len) for d, stream in streams.items() if len(stream) > seq_len}


def documents(tokens_dir: Path, split: str) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
    """Yield the documents of a held-out split: domain, bytes of text, and tokens."""
    shards = [shard for shard in load_manifest(tokens_dir)["splits"][split] if shard["n_tokens"]]
    for shard, stream in zip(shards, open_split(tokens_dir, split).streams(), strict=True):
        if "documents" not in shard:
            raise ValueError(f"split={split!r} does not list its documents; choose a held-out one.")
        stops = np.cumsum([entry[3] for entry in shard["documents"]])
        for entry, tokens in zip(shard["documents"], np.split(stream, stops), strict=False):
            yield (entry[1], entry[2]), tokens


def shared_documents(tokens_dir: Path) -> pd.DataFrame:
    """Count the documents (by the hash of their tokens) of one split that another one holds too."""
    hashes = {split: _hashes(tokens_dir, split) for split in load_manifest(tokens_dir)["splits"]}
    rows = [(a, b, len(hashes[a] & hashes[b])) for a, b in combinations(hashes, 2)]
    return pd.DataFrame(rows, columns=["split", "other", "n_shared"])


def _hashes(tokens_dir: Path, split: str) -> set[bytes]:
    end_of_text = load_manifest(tokens_dir)["tokenizer"]["end_of_text"]
    return {
        hashlib.blake2b(document.tobytes(), digest_size=16).digest()
        for stream in open_split(tokens_dir, split).streams()
        for document in np.split(stream, np.flatnonzero(stream == end_of_text) + 1)
        if len(document)
    }
