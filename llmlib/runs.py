"""Run records: a folder per run, written so that a half-finished one never looks finished.

``config.json`` says what was asked, ``environment.json`` where it ran, ``metrics.jsonl`` what
happened; ``result.json`` (a training run) or ``summary.json`` (a notebook) is written last and means
done. Costly tables are kept as CSV, so a notebook that is run again takes seconds. Whoever trains a
run or prepares tokens holds the lock of the folder. No torch here.
"""

import contextlib
import errno
import json
import math
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import filelock
import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from llmlib.config import ModelConfig, TrainConfig, to_json

FORMAT = 2  # of records and checkpoints
ROOT = Path(__file__).resolve().parent.parent  # the repository, from any working directory
REMEDY = "choose another run_name or runs_dir, or delete that folder."
TAIL_BYTES = 20_000  # of a metrics file: enough for its newest rows


def sync(file: IO) -> None:
    """Bring what was written to the disk, where the file system can."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def write_atomic(path: Path, content: str | bytes | memoryview) -> None:
    """Write to a temporary name, sync, rename: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            sync(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def n_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the cores that this process may use, by its affinity and its container's quota."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    of_v1 = sorted(cgroup.glob("cpu/cpu.cfs_[pq]*_us"), reverse=True)  # quota, period
    files = [cgroup / "cpu.max"] if (cgroup / "cpu.max").exists() else of_v1
    spent, period = " ".join(map(Path.read_text, files)).split() or ("max", "")
    return n if spent in ("max", "-1") else min(n, math.ceil(int(spent) / int(period)))


def environment(folder: Path = ROOT) -> dict[str, Any]:
    """Describe where a run in a folder happens; a remark says what makes a measurement wrong."""
    import torch

    from llmlib import devices

    processor = re.search(r"Model name:\s*(.*)", subprocess.getoutput("LC_ALL=C lscpu"))
    bf16 = devices.ABILITIES["cpu"].has_bf16(torch.device("cpu"))
    git = f"git -C {shlex.quote(str(ROOT))} describe --always --dirty"
    status, commit = subprocess.getstatusoutput(git)
    cores, threads = n_cores(), torch.get_num_threads()
    installed = {package.name: package for package in metadata.distributions()}
    ours = installed["llmlib"].requires if "llmlib" in installed else []
    required = {re.match(r"[\w-]+", line)[0] for line in ours} & installed.keys()
    remarks = [f"torch uses {threads} threads on {cores} cores; see OMP_NUM_THREADS."]
    remarks, version = remarks * (threads != cores), torch.__version__
    pinned = re.search(r"torch==([\d.]+)", " ".join(ours))
    if pinned and version.split("+")[0] != pinned[1]:
        remarks.append(f"torch {version} is loaded; llmlib was tested with {pinned[1]}.")
    return {
        "device": devices.device_name(),
        "memory_bytes": devices.memory_bytes(),
        "processor": processor[1] if processor else platform.machine(),
        "processor_units": torch.backends.cpu.get_cpu_capability() + (", BF16" if bf16 else ""),
        "n_cores": cores,
        "n_threads": threads,
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "file_system": subprocess.getoutput(f"stat -f -c %T {shlex.quote(str(folder))}"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version,
        "packages": {name: installed[name].version for name in sorted(required)},
        "commit": None if status else commit,
        "remarks": remarks,
    }


class Locked(Exception):
    """Another process is at work in the folder."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Own a folder, or raise ``Locked``; the operating system frees it when its owner dies.

    Where a file system has no locks, a file with host and process takes their place: a dead process
    on this host loses it, and another host's is named with the command that removes it.
    """
    soft, owner = folder / "lock.soft", folder / "lock.owner"
    try:
        try:
            held = filelock.FileLock(folder / "lock").acquire(timeout=1.0)
        except OSError as error:
            if isinstance(error, filelock.Timeout):
                raise
            held = filelock.SoftFileLock(soft).acquire(timeout=1.0)
    except filelock.Timeout:
        name = owner.read_text() if owner.exists() else "another process"
        remedy = f"wait for it or stop it. If its host is gone: rm {soft}"
        raise Locked(f"{folder.name} is in use by {name}; {remedy}") from None
    with held:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
        owner.unlink(missing_ok=True)


class Record:
    """One run's folder. Opening it claims it for a config; another config is refused.

    What the config holds under ``measured`` (facts about the machine) is not compared.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        here = json.loads(json.dumps({"format": FORMAT} | config))  # as a reader sees it
        if (path / "config.json").exists():
            there = read_config(path)
            names = sorted((there | here).keys() - {"measured"})
            both = [(name, there.get(name), here.get(name)) for name in names]
            if differing := [f"{name}: {a!r} there, {b!r} here" for name, a, b in both if a != b]:
                why = f"was made with another config ({'; '.join(differing):.600})"
                over = "A finished run takes no more hours: its learning rate is at its last value."
                hint = f"{REMEDY} {over if read_result(path) else ''}"
                raise ValueError(f"run {path.name} in {path.parent} {why}; {hint}")
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "environment.json", environment(path))
            write_json(path / "config.json", here)

    def cached_table(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """Return the named table, computing it only if the record does not hold it yet."""
        path = self.path / f"{name}.csv"
        if not path.exists():
            write_atomic(path, make().to_csv(index=False))
        return pd.read_csv(path, float_precision="round_trip")

    def cached_json(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the named value, computing it only if the record does not hold it yet."""
        path = self.path / f"{name}.json"
        if not path.exists():
            write_json(path, make())
        return read_json(path)

    def figure(self, name: str, figure: Figure, data: pd.DataFrame) -> Figure:
        """Write a figure as PNG and SVG with the data it shows as CSV, and return it."""
        path = self.path / "figures" / name
        write_atomic(path.with_suffix(".csv"), data.to_csv(index=False))
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmlib"}):
            figure.savefig(path.with_suffix(".png"), dpi=200)
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        return figure

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, the last file of a record."""
        write_json(self.path / "summary.json", summary)


def read_config(path: Path) -> dict[str, Any]:
    """Read a record's config; one of another format is refused."""
    config = read_json(path / "config.json")
    if (there := config.get("format", 1)) != FORMAT:
        why = f"has format {there}, this version writes {FORMAT}"
        raise ValueError(f"run {path.name} in {path.parent} {why}; {REMEDY}")
    return config


def runs_folder(scale: str, runs_dir: str | Path = "") -> Path:
    """Resolve the folder that holds a scale's records; "" is ``runs/local/<scale>``."""
    return Path(runs_dir).expanduser().resolve() if runs_dir else ROOT / "runs" / "local" / scale


def load_summary(record: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read the summary of an earlier notebook's record; without one, the default if there is one."""
    if (record / "summary.json").exists():
        read_config(record)
        return read_json(record / "summary.json")
    if default is None:
        name, remedy = record.name, f"python -m llmlib run --only {record.name}, at the same scale"
        raise ValueError(f"run {name} first: {record} is not a finished record ({remedy}).")
    return default


@dataclass(frozen=True)
class RunConfig:
    """All that a training process needs to know; the folder of a run is its only argument."""

    model: ModelConfig
    train: TrainConfig
    tokens_dir: Path
    peak_flops_per_s: float | None  # of one device: what MFU is held against


def create_run(
    path: Path,
    model: ModelConfig,
    train: TrainConfig,
    tokens_dir: Path,
    *,
    peak_flops_per_s: float | None = None,
    data: dict[str, Any] | None = None,
) -> Record:
    """Open or create a training run's folder, with the tokenizer of its tokens beside the config.

    ``data`` holds facts about the tokens, for those who read the record.
    """
    config = {"model": to_json(model), "train": to_json(train), "data": data or {}}
    config["tokens_dir"] = os.path.relpath(tokens_dir.resolve(), path.resolve())
    record = Record(path, config | {"measured": {"peak_flops_per_s": peak_flops_per_s}})
    shutil.copy(tokens_dir / "tokenizer.json", path)
    return record


def read_run(path: Path) -> RunConfig:
    """Read what the run in a folder is made of."""
    try:
        config = read_config(path)
        model, train = ModelConfig(**config["model"]), TrainConfig(**config["train"])
        tokens_dir = (path / config["tokens_dir"]).resolve()
        return RunConfig(model, train, tokens_dir, config["measured"]["peak_flops_per_s"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        why = f"is missing or not a run's config ({error}); 05_full_run writes one."
        raise ValueError(f"{path / 'config.json'} {why}") from error


def read_result(path: Path) -> dict[str, Any] | None:
    """Read how a training run ended; None if it has not."""
    return read_json(path / "result.json") if (path / "result.json").exists() else None


class MetricLog:
    """A run's ``metrics.jsonl``, one row per step, validation, event and phase.

    With ``tracker="tensorboard"`` numbers also go to event files; the JSON lines stay the record.
    """

    def __init__(self, run: Path, tracker: str | None = None):
        self.path, self.tracker, self.writer = run / "metrics.jsonl", tracker, None

    def write(self, kind: str, **values: Any) -> None:
        """Append a row; a full disk costs the row, not the run."""
        with contextlib.suppress(OSError):
            with open(self.path, "a") as file:
                file.write(json.dumps({"kind": kind} | values) + "\n")
            if self.tracker and kind in ("step", "eval"):
                self._copy(kind, values)

    def _copy(self, kind: str, values: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        step, folder = values["step"], self.path.parent / "tensorboard"
        self.writer = self.writer or SummaryWriter(folder, purge_step=step)
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"{kind}/{name}", value, step)
        self.writer.flush()

    def drop_after(self, step: int) -> None:
        """Drop steps and validations that will be met again, and half-written lines."""
        kept = [r for r in _rows(self.path) if r["kind"] in ("event", "phase") or r["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.writer = None  # the next one hides what was dropped


def read_metrics(run: Path, kind: str | None = None, *, last: bool = False) -> pd.DataFrame:
    """Read the rows of ``metrics.jsonl``, all or of one kind; half-written lines are ignored.

    With ``last``, read no more than the end of the file: enough to see where a live run is.
    """
    rows = [r for r in _rows(run / "metrics.jsonl", last) if kind in (None, r["kind"])]
    return pd.DataFrame(rows, columns=None if rows else ["kind", "step"])


def _rows(path: Path, last: bool = False) -> Iterator[dict[str, Any]]:
    if path.exists():
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES) if last else 0)
            for line in file:
                with contextlib.suppress(ValueError):  # a half-written line
                    yield json.loads(line)
