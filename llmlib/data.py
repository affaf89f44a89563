"""Token files, as ``prepare`` writes them, to batches.

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
class Tokens:
    """One split on disk. Files are mapped anew for each batch, so resident memory stays flat."""

    folder: Path
    files: tuple[str, ...]
    lengths: tuple[int, ...]
    dtype: str

    def read(self, file: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Map a file; what was read of it leaves memory with the last view of the result."""
        path = self.folder / self.files[file]
        return np.asarray(np.memmap(path, dtype=self.dtype, mode="r"))[start:stop]

    def streams(self) -> Iterator[np.ndarray]:
        return map(self.read, range(len(self.files)))


def open_split(folder: Path, split: str) -> Tokens:
    """Open a prepared split: "train", "val" (documents held out of it), or an official one."""
    manifest = load_manifest(folder)
    if split not in manifest["splits"]:
        raise ValueError(
            f"split={split!r} is not in these tokens; choose from {', '.join(manifest['splits'])}."
        )
    shards = [shard for shard in manifest["splits"][split] if shard["n_tokens"]]
    itemsize = np.dtype(manifest["dtype"]).itemsize
    for shard in shards:
        path = folder / shard["file"]
        if not path.exists() or path.stat().st_size != shard["n_tokens"] * itemsize:
            raise ValueError(
                f"{shard['file']} is missing or has another size than its manifest says; "
                "run 01_data_prep with verify=True, which rebuilds it."
            )
    files, lengths = (tuple(shard[key] for shard in shards) for key in ("file", "n_tokens"))
    return Tokens(folder, files, lengths, manifest["dtype"])


def load_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of prepared tokens."""
    if not (folder / "manifest.json").exists():
        raise ValueError(f"run 01_data_prep first: there is no manifest in {folder}.")
    return runs.read_json(folder / "manifest.json")


class Batches:
    """Training batches without replacement: each epoch is its own permutation of all windows.

    A window is ``seq_len + 1`` tokens: inputs and, one to the right, targets. What is left at the
    end of a file and too short for a window is not used.
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_len: int,
        n_sequences: int,
        *,
        seed: int = 0,
        align_documents: bool = False,
        end_of_text: int | None = None,
    ):
        self.tokens, self.seq_len, self.n_sequences, self.seed = tokens, seq_len, n_sequences, seed
        starts = [
            _aligned_starts(stream, seq_len, end_of_text)
            if align_documents
            else np.arange(0, len(stream) - seq_len, seq_len)
            for stream in tokens.streams()
        ]
        self.starts = np.concatenate(starts)
        self.first_of_file = np.cumsum([0] + [len(s) for s in starts])
        self.n_windows = len(self.starts)
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
        files = (np.searchsorted(self.first_of_file, mine, side="right") - 1).tolist()
        streams = {file: self.tokens.read(file) for file in set(files)}
        pairs = zip(files, self.starts[mine].tolist(), strict=True)
        windows = np.stack([streams[f][start : start + self.seq_len + 1] for f, start in pairs])
        both = torch.from_numpy(windows.astype(np.int64))
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _aligned_starts(tokens: np.ndarray, seq_len: int, end_of_text: int | None) -> np.ndarray:
    """Start windows at documents: each next start steps back to a document begun in the last one."""
    documents = np.concatenate([[0], np.flatnonzero(tokens == end_of_text) + 1])
    starts, position = [], 0
    while position + seq_len < len(tokens):
        starts.append(position)
        following = position + seq_len
        newest = int(documents[np.searchsorted(documents, following, side="right") - 1])
        position = newest if newest > position else following
    return np.array(starts, dtype=np.int64)


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


def eval_windows(tokens: Tokens, seq_len: int, n_sequences: int | None = None) -> np.ndarray:
    """Read non-overlapping windows (n, seq_len + 1) of a held-out split, evenly spread, always the same."""
    stream = np.concatenate([*tokens.streams()])
    if len(stream) <= seq_len:
        raise ValueError(
            f"the validation split has {len(stream)} tokens, too few for one window of {seq_len + 1}; "
            "bring more text, raise test_size or lower seq_len."
        )
    return _windows(stream, seq_len, n_sequences)


def _windows(stream: np.ndarray, seq_len: int, n_sequences: int | None = None) -> np.ndarray:
    n_windows = (len(stream) - 1) // seq_len
    n_used = min(n_sequences or n_windows, n_windows)
    starts = np.linspace(0, n_windows - 1, n_used).round().astype(np.int64) * seq_len
    return np.stack([stream[s : s + seq_len + 1] for s in starts]).astype(np.int64)


def read_domain(folder: Path, split: str, domain: str) -> np.ndarray:
    """Read the tokens of one domain's documents in a held-out split, in order."""
    shards = [shard for shard in load_manifest(folder)["splits"][split] if shard["n_tokens"]]
    parts = []
    for shard, stream in zip(shards, open_split(folder, split).streams(), strict=True):
        if "documents" not in shard:
            raise ValueError(f"split={split!r} does not list its documents; choose a held-out one.")
        is_wanted = [entry[1] == domain for entry in shard["documents"]]
        n_tokens = [entry[3] for entry in shard["documents"]]
        parts.append(stream[np.repeat(is_wanted, n_tokens)])
    return np.concatenate(parts)


def domain_windows(folder: Path, split: str, seq_len: int) -> dict[str, np.ndarray]:
    """Cut each domain of a held-out split into windows; one too small for a window is left out."""
    shards = load_manifest(folder)["splits"][split]
    domains = sorted({domain for shard in shards for domain in shard["domains"]})
    streams = {domain: read_domain(folder, split, domain) for domain in domains}
    return {d: _windows(stream, seq_len) for d, stream in streams.items() if len(stream) > seq_len}


def shared_documents(folder: Path) -> pd.DataFrame:
    """Count the documents (by the hash of their tokens) of one split that another one holds too."""
    names = [name for name in load_manifest(folder)["splits"] if name != "train"]
    heldout = {name: set(_document_hashes(folder, name)) for name in names}
    n_shared = {(a, b): len(heldout[a] & heldout[b]) for a, b in combinations(names, 2)}
    n_shared |= {("train", name): 0 for name in names}
    for digest in _document_hashes(folder, "train"):
        for name in names:
            n_shared["train", name] += digest in heldout[name]
    return pd.DataFrame(
        [(*pair, n) for pair, n in n_shared.items()], columns=["split", "other", "n_shared"]
    )


def _document_hashes(folder: Path, split: str) -> Iterator[bytes]:
    for stream in open_split(folder, split).streams():
        start = 0
        for stop in _ends(folder, stream).tolist():
            yield hashlib.blake2b(stream[start:stop].tobytes(), digest_size=16).digest()
            start = stop


def _ends(folder: Path, stream: np.ndarray) -> np.ndarray:
    """Find where documents end: behind each end of text."""
    return np.flatnonzero(stream == load_manifest(folder)["tokenizer"]["end_of_text"]) + 1


def document_lengths(folder: Path, split: str) -> pd.DataFrame:
    """Measure the documents of a split's first token file [tokens, end of text included]."""
    ends = _ends(folder, open_split(folder, split).read(0))
    return pd.DataFrame({"tokens": np.diff(ends, prepend=0)})
