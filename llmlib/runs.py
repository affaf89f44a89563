"""Run records: a folder per run, written so that a half-finished one never looks finished.

``config.json`` says what was asked, ``environment.json`` where it ran, ``metrics.jsonl`` what
happened, and ``summary.json``, written last, means done. Expensive tables are kept as CSV and
reloaded, so a notebook that is run again costs seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent  # the repository, from any working directory


def default_runs_dir(scale: str) -> Path:
    """Where a person's own records go; ``runs/laptop`` and the like are committed evidence."""
    return ROOT / "runs" / "local" / scale


def write_atomic(path: Path, text: str) -> None:
    """Write to a temporary name, sync, rename: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def environment() -> dict[str, Any]:
    """Describe where a run happens: device, versions, commit."""
    import torch

    cuda = torch.cuda.is_available()
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "n_devices": torch.cuda.device_count() if cuda else 1,
        "processor": _processor(),
        "n_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": git.stdout.strip() or None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Record:
    """One run's folder. Opening it claims it for a config; another config is refused."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        config = json.loads(json.dumps(config))  # what a reader of the file would see
        if (path / "config.json").exists():
            _refuse_other_config(path, read_json(path / "config.json"), config)
        else:
            write_json(path / "config.json", config)
            write_json(path / "environment.json", environment())
        self.config = config

    @property
    def is_done(self) -> bool:
        return (self.path / "summary.json").exists()

    def table(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """Return the named table, computing it only if the record does not hold it yet."""
        path = self.path / f"{name}.csv"
        if not path.exists():
            write_atomic(path, make().to_csv(index=False))
        return pd.read_csv(path)

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the named JSON value, computing it only if the record does not hold it yet."""
        path = self.path / f"{name}.json"
        if not path.exists():
            write_json(path, make())
        return read_json(path)

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write the summary, the last file of a record."""
        write_json(self.path / "summary.json", summary)
        return summary


def _refuse_other_config(path: Path, there: dict, here: dict) -> None:
    differing = [k for k in {**there, **here} if there.get(k) != here.get(k)]
    if differing:
        shown = "; ".join(
            f"{k}: {there.get(k)!r} there, {here.get(k)!r} here" for k in differing[:3]
        )
        raise ValueError(
            f"run {path.name} in {path.parent} was made with another config ({shown}); choose "
            "another run_name or runs_dir, or delete that folder."
        )


def open_record(
    name: str, config: dict[str, Any], *, scale: str, runs_dir: str | Path = ""
) -> Record:
    """Open or create the record that a notebook writes."""
    return Record(runs_folder(scale, runs_dir) / name, config)


def runs_folder(scale: str, runs_dir: str | Path = "") -> Path:
    """Resolve the folder that holds a scale's records; "" is the default one."""
    return Path(runs_dir).expanduser().resolve() if runs_dir else default_runs_dir(scale)


def load_summary(name: str, *, scale: str, runs_dir: str | Path = "") -> dict[str, Any]:
    """Read the summary of an earlier notebook's record."""
    path = runs_folder(scale, runs_dir) / name / "summary.json"
    if not path.exists():
        raise ValueError(
            f"run {name} first: there is no finished record at {path.parent} "
            f"(python -m llmlib run --scale {scale} --only {name})."
        )
    return read_json(path)


class Locked(Exception):
    """Another process is at work in the run."""


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Own a run's folder; the operating system frees the lock when its owner dies."""
    with open(path / "lock", "a+") as file:
        for _ in range(20):  # whoever asks for the owner holds the lock for a moment
            if _try_lock(file):
                break
            time.sleep(0.05)
        else:
            raise Locked(
                f"run {path.name} is in use by {_owner(file)}; wait for it, or stop that "
                "process first."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def lock_owner(path: Path) -> str | None:
    """Name the live process that owns a run's folder, if there is one."""
    if not (path / "lock").exists():
        return None
    with open(path / "lock", "r+") as file:
        return None if _try_lock(file) else _owner(file)


def _try_lock(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(file: IO) -> str:
    file.seek(0)
    return file.read() or "another process"


def read_metrics(path: Path) -> pd.DataFrame:
    """Read ``metrics.jsonl``; a last line that a crash cut short is ignored."""
    rows = []
    for line in (path / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return pd.DataFrame(rows)
