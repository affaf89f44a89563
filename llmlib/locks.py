"""One owner per folder: whoever trains a run or prepares tokens holds its lock."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock

KINDS = {"lock": "FileLock", "lock.soft": "SoftFileLock"}  # the second where there is no first


class Locked(Exception):
    """Another process is at work in the folder."""


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Own a folder; the operating system frees the lock when its owner dies.

    Where a file system has no locks, a file with host and process takes their place: a dead process
    on this host loses it, and another host's is named with the command that removes it.
    """
    held, owner = _acquire(path, timeout=1.0), path / "lock.owner"
    if held is None:
        raise Locked(
            f"{path.name} is in use by {_owner(path)}; wait for it, or stop that process first. "
            f"If that host is gone: rm {path / 'lock.soft'}"
        )
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        held.release()


def lock_owner(path: Path) -> str | None:
    """Name the live process that owns a folder, if there is one."""
    if not any((path / name).exists() for name in KINDS):
        return None
    if (held := _acquire(path, timeout=0.0)) is None:
        return _owner(path)
    held.release()
    return None


def _acquire(path: Path, timeout: float) -> filelock.BaseFileLock | None:
    for name, kind in KINDS.items():
        with contextlib.suppress(OSError):  # the file system has none of this kind
            held = getattr(filelock, kind)(path / name, is_singleton=False)
            try:
                return held.acquire(timeout=timeout).lock
            except filelock.Timeout:
                return None
    raise OSError(f"{path} is not a place where a lock can be kept; is it writable?")


def _owner(path: Path) -> str:
    owner = path / "lock.owner"
    return owner.read_text() if owner.exists() else "another process"
