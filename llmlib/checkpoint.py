"""Checkpoints: written aside, synced and renamed; the newest one that is whole is used.

``checkpoints/<step>.<sha256>`` holds weights, optimizer and state as ``torch.save`` writes them. It is
loaded as data only, and a file that is not what its name says is damaged. Saving takes a copy in
memory and writes it in the background.
"""

import hashlib
import io
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from llmlib.runs import write_atomic

N_KEEP = 2  # newest ones


def pack(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> memoryview:
    """Copy weights, optimizer and state to bytes, where training cannot change them."""
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
    torch.save(parts, buffer := io.BytesIO())
    return buffer.getbuffer()


def restore(model: nn.Module, optimizer: Optimizer, path: Path) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimizer and return its state."""
    parts = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(parts["model"])
    optimizer.load_state_dict(parts["optimizer"])
    return parts["state"]


def newest_valid(folder: Path) -> Path | None:
    """Find the newest checkpoint that agrees with its hash; warn about the others."""
    for path in sorted(folder.glob("[0-9]*"), reverse=True):
        with open(path, "rb") as file:
            if path.suffix == f".{hashlib.file_digest(file, 'sha256').hexdigest()}":
                return path
        warnings.warn(f"checkpoint {path.stem} is skipped: it is damaged.", stacklevel=2)
    return None


def write(folder: Path, step: int, packed: memoryview) -> None:
    """Write one checkpoint, and drop older ones and what a killed process left half-written."""
    for path in folder.glob(".*.tmp"):
        path.unlink()
    final = folder / f"{step:08d}.{hashlib.sha256(packed).hexdigest()}"
    write_atomic(final, packed)
    for path in set(folder.glob(f"{final.stem}.*")) - {final}:  # the same step, saved before
        path.unlink()
    for path in sorted(folder.glob("[0-9]*"))[:-N_KEEP]:
        path.unlink()


class Saver:
    """Write checkpoints in the background, one at a time."""

    def __init__(self, folder: Path):
        self.folder, self.pool = folder, ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(self, model: nn.Module, optimizer: Optimizer, state: dict) -> BaseException | None:
        """Copy what is to be saved, written while training goes on; say what ``wait`` says."""
        failure = self.wait()  # memory for one copy is enough
        packed = pack(model, optimizer, state)
        self.pending = self.pool.submit(write, self.folder, state["step"], packed)
        return failure

    def wait(self) -> BaseException | None:
        """Wait for the write under way, if there is one; say, once, why it failed."""
        pending, self.pending = self.pending, None
        return pending.exception() if pending else None
