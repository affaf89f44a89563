"""Checkpoints: safetensors and JSON, written aside and renamed, never pickle.

A checkpoint is a folder ``checkpoints/<step>`` with ``weights.safetensors``,
``optimizer.safetensors`` and ``state.json``, which holds the hashes of both and of itself. The newest
one whose hashes agree is used. Saving copies the tensors and writes them in the background.
"""

import hashlib
import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmlib import runs

N_KEEP = 2  # newest ones
FILES = ("weights.safetensors", "optimizer.safetensors")
Tensors = dict[str, torch.Tensor]


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
    """Copy weights and optimizer state to the CPU, where training cannot change them."""
    state = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    return tuple(
        {name: t.to("cpu", copy=True) for name, t in tensors.items()}
        for tensors in (model.state_dict(), state)
    )


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimizer and return its state."""
    weights, tensors = (load_file(path / name) for name in FILES)
    model.load_state_dict(weights)
    state: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return runs.read_json(path / "state.json")["state"]


def newest_valid(folder: Path) -> Path | None:
    """Find the newest checkpoint whose files agree with their hashes; warn about the others."""
    for path in sorted(folder.glob("[0-9]*"), reverse=True):
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
    for name in FILES:
        with open(path / name, "rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def write(folder: Path, weights: Tensors, optimizer: Tensors, state: dict[str, Any]) -> None:
    """Write one checkpoint aside, sync it, rename it, and drop older ones."""
    final = folder / f"{state['step']:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".") as scratch:
        aside = Path(scratch, "new")
        aside.mkdir()
        for name, tensors in zip(FILES, (weights, optimizer), strict=True):
            save_file(tensors, aside / name)
            sync(aside / name)
        runs.write_json(aside / "state.json", {"state": state, "sha256": _hashes(aside, state)})
        if final.exists():  # the same step, saved before
            os.replace(final, Path(scratch, "old"))
        os.replace(aside, final)
        sync(folder)
    for path in [*folder.glob(".*"), *sorted(folder.glob("[0-9]*"))[:-N_KEEP]]:
        shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


class Saver:
    """Write checkpoints in the background, one at a time."""

    def __init__(self, folder: Path):
        self.folder, self.pool = folder, ThreadPoolExecutor(1)
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
