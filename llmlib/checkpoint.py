"""Checkpoints: safetensors and JSON, written aside and renamed, never pickle.

A checkpoint is a folder ``checkpoints/<step>`` with ``weights.safetensors``,
``optimizer.safetensors`` and ``state.json``, which holds the hashes of both. The newest one whose
hashes agree is used. Saving copies the tensors and writes them in the background.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmlib import runs

Tensors = dict[str, torch.Tensor]


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
    """Copy weights, optimizer state and the RNG to the CPU, where training cannot change them."""
    weights = {name: _copy(t) for name, t in model.state_dict().items()}
    state = {
        f"{index}.{name}": _copy(torch.as_tensor(value))
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    return weights, state | {"rng": torch.get_rng_state()}


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimizer and return its state."""
    model.load_state_dict(load_file(path / "weights.safetensors"))
    state: dict[int, dict[str, torch.Tensor]] = {}
    tensors = load_file(path / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng"))
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return runs.read_json(path / "state.json")


def newest_valid(folder: Path) -> Path | None:
    """Find the newest checkpoint whose files agree with their hashes; warn about the others."""
    for path in reversed(all_checkpoints(folder)):
        try:
            hashes = runs.read_json(path / "state.json")["sha256"]
            bad = [name for name, digest in hashes.items() if _sha256(path / name) != digest]
        except (OSError, ValueError, KeyError) as error:
            bad = [f"state.json ({type(error).__name__})"]
        if not bad:
            return path
        warnings.warn(f"checkpoint {path.name} is damaged ({bad[0]}) and skipped.", stacklevel=2)
    return None


def all_checkpoints(folder: Path) -> list[Path]:
    """List finished checkpoints by step."""
    if not folder.exists():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path, weights: Tensors, optimizer: Tensors, state: dict[str, Any]) -> Path:
    """Write one checkpoint under a temporary name, sync it, rename it."""
    final = folder / f"{state['step']:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        hashes = {}
        for name, tensors in (("weights", weights), ("optimizer", optimizer)):
            path = temporary / f"{name}.safetensors"
            save_file(tensors, path)
            _sync(path)
            hashes[path.name] = _sha256(path)
        runs.write_json(temporary / "state.json", state | {"sha256": hashes})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)  # the same step, saved again after a resume
    os.replace(temporary, final)
    _sync(folder)
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(folder: Path, n_keep: int) -> None:
    """Keep the newest ``n_keep`` checkpoints and the one with the lowest validation loss."""
    paths = all_checkpoints(folder)
    losses = {p: json.loads((p / "state.json").read_text()).get("val_loss") for p in paths}
    known = {p: loss for p, loss in losses.items() if loss is not None}
    kept = {*paths[-n_keep:], *([min(known, key=known.get)] if known else [])}
    for path in paths:
        if path not in kept:
            shutil.rmtree(path)


class Saver:
    """Write checkpoints in the background; a failed one is warned about and tried again."""

    def __init__(self, folder: Path, n_keep: int):
        self.folder, self.n_keep = folder, n_keep
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future | None = None
        self.failed = False  # the last attempt: save again soon

    def save(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Copy what is to be saved and return; the copy is written while training goes on."""
        self.wait()
        self.pending = self.pool.submit(self._write, *snapshot(model, optimizer), state)

    def _write(self, weights: Tensors, optimizer: Tensors, state: dict[str, Any]) -> None:
        write(self.folder, weights, optimizer, state)
        prune(self.folder, self.n_keep)

    def poll(self) -> None:
        """Notice the end of a background write without waiting for it."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the background write, if there is one."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        error = pending.exception()
        self.failed = error is not None
        if error is not None:
            warnings.warn(
                f"the checkpoint could not be saved ({error}); training goes on and saving is "
                "tried again in a minute. Is the disk full?",
                stacklevel=3,
            )
