"""Checkpoints: safetensors and JSON, written aside and renamed, never pickle.

A checkpoint is a folder ``checkpoints/<step>`` with ``weights.safetensors``,
``optimizer.safetensors`` and ``state.json``, which holds the hashes of both and of itself. The newest
one whose hashes agree is used. Saving copies the tensors and writes them in the background.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmlib import runs

N_KEEP = 2  # newest ones
Tensors = dict[str, torch.Tensor]


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
    """Copy weights, optimizer state and RNGs to the CPU, where training cannot change them."""
    weights = {name: _copy(t) for name, t in model.state_dict().items()}
    state = {
        f"{index}.{name}": _copy(torch.as_tensor(value))
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    state["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["rng_cuda"] = torch.cuda.get_rng_state()
    return weights, state


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimizer and return its state."""
    model.load_state_dict(load_file(path / "weights.safetensors"))
    tensors = load_file(path / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng"))
    rng_cuda = tensors.pop("rng_cuda", None)
    if rng_cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng_cuda)
    state: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return runs.read_json(path / "state.json")["state"]


def newest_valid(folder: Path) -> Path | None:
    """Find the newest checkpoint whose files agree with their hashes; warn about the others."""
    for path in reversed(all_checkpoints(folder)):
        try:
            record = runs.read_json(path / "state.json")
            if _hashes(path, record["state"]) == record["sha256"]:
                return path
            damage = "its files do not agree with their hashes"
        except (OSError, ValueError, KeyError, TypeError) as error:
            damage = f"it is incomplete ({type(error).__name__}: {error})"
        warnings.warn(f"checkpoint {path.name} is skipped: {damage}.", stacklevel=2)
    return None


def _hashes(path: Path, state: dict[str, Any]) -> dict[str, str]:
    hashes = {"state": hashlib.sha256(json.dumps(state).encode()).hexdigest()}
    for name in ("weights.safetensors", "optimizer.safetensors"):
        with open(path / name, "rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def all_checkpoints(folder: Path) -> list[Path]:
    """List finished checkpoints by step."""
    return sorted((p for p in folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))


def write(folder: Path, weights: Tensors, optimizer: Tensors, state: dict[str, Any]) -> Path:
    """Write one checkpoint under a temporary name, sync it, rename it, and drop older ones."""
    final = folder / f"{state['step']:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, tensors in (("weights", weights), ("optimizer", optimizer)):
            save_file(tensors, temporary / f"{name}.safetensors")
            sync(temporary / f"{name}.safetensors")
        record = {"state": state, "sha256": _hashes(temporary, state)}
        runs.write_json(temporary / "state.json", record)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():  # the same step, saved before
        os.replace(final, folder / f".{final.name}.old.tmp")
    os.replace(temporary, final)
    sync(folder)
    for path in [*folder.glob(".*.tmp"), *all_checkpoints(folder)[:-N_KEEP]]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Saver:
    """Write checkpoints in the background, one at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Copy what is to be saved and return; the copy is written while training goes on."""
        self.wait()  # memory for one copy is enough
        self.pending = self.pool.submit(write, self.folder, *snapshot(model, optimizer), state)

    def wait(self) -> None:
        """Wait for the background write, if there is one."""
        wait([self.pending] if self.pending else [])

    def take_failure(self) -> BaseException | None:
        """Return, once, why the last write failed; None if it did not or is not done."""
        if self.pending is None or not self.pending.done():
            return None
        failure, self.pending = self.pending.exception(), None
        return failure
