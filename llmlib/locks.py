"""One owner per folder: whoever trains a run or prepares tokens holds its lock."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock


class Locked(Exception):
    """Another process is at work in the folder."""

    def __init__(self, path: Path):
        owner = path / "lock.owner"
        self.owner = owner.read_text() if owner.exists() else "another process"
        super().__init__(
            f"{path.name} is in use by {self.owner}; wait for it, or stop that process first. "
            f"If that host is gone: rm {path / 'lock.soft'}"
        )


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Own a folder, or raise ``Locked``; the operating system frees it when its owner dies.

    Where a file system has no locks, a file with host and process takes their place: a dead process
    on this host loses it, and another host's is named with the command that removes it.
    """
    held, owner = _acquire(path), path / "lock.owner"
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        held.release()


def _acquire(path: Path) -> filelock.BaseFileLock:
    for kind, name in ((filelock.FileLock, "lock"), (filelock.SoftFileLock, "lock.soft")):
        held = kind(path / name, timeout=1.0, is_singleton=False)
        try:
            return held.acquire().lock
        except filelock.Timeout:
            raise Locked(path) from None
        except OSError:  # the file system has none of this kind
            continue
    raise OSError(f"{path} is not a place where a lock can be kept; is it writable?")


def lock_owner(path: Path) -> str | None:
    """Name the live process that owns a folder, if there is one."""
    try:
        with lock(path):
            return None
    except Locked as locked:
        return locked.owner
