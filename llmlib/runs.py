"""Run records: a folder per run, written so that a half-finished one never looks finished.

``config.json`` says what was asked, ``environment.json`` where it ran, ``metrics.jsonl`` what
happened; ``result.json`` (a training run) or ``summary.json`` (a notebook) is written last and means
done. Costly tables are kept as CSV, so a notebook that is run again takes seconds. No torch here.
"""

import contextlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any, NoReturn

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from llmlib.config import ModelConfig, TrainConfig, to_json

FORMAT = 2  # of records and checkpoints
ROOT = Path(__file__).resolve().parent.parent  # the repository, from any working directory
TAIL_BYTES = 20_000  # of a metrics file: enough for its newest rows


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


def n_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Count the cores that this process may use, by its affinity and its container's quota."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    spent, _, period = quota.read_text().partition(" ") if quota.exists() else ("max", "", "")
    by_quota = len(allowed) if spent == "max" else math.ceil(int(spent) / int(period))
    return min(len(allowed), by_quota)


def environment() -> dict[str, Any]:
    """Describe where a run happens: device and its memory, processor, versions, commit.

    Of the processor, where Linux tells: its name and the units that decide its data type. A remark
    says what makes a measurement here wrong.
    """
    import torch

    from llmlib import devices

    cpuinfo = Path("/proc/cpuinfo")
    about = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*: (.*)", about)
    units = [unit for unit in ("avx2", "avx512_bf16", "amx_bf16") if f" {unit} " in about]
    status, commit = subprocess.getstatusoutput(f"git -C '{ROOT}' describe --always --dirty")
    return {
        "device": devices.device_name(),
        "memory_bytes": devices.memory_bytes(),
        "n_devices": devices.n_accelerators() or 1,
        "processor": f"{name[1] if name else platform.machine()} ({', '.join(units)})",
        "n_cores": n_cores(),
        "n_threads": torch.get_num_threads(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "file_system": subprocess.getoutput(f"stat -f -c %T '{ROOT}'"),
        "remarks": _remarks(n_cores(), torch.get_num_threads(), torch.__version__),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": None if status else commit,
    }


def _remarks(n_cores: int, n_threads: int, torch_version: str) -> list[str]:
    remarks, [pinned] = [], [r for r in requires("llmlib") if r.startswith("torch==")]
    if n_threads < n_cores:
        remarks.append(f"torch uses {n_threads} of {n_cores} cores; is OMP_NUM_THREADS set?")
    if n_threads > n_cores:
        remarks.append(f"torch uses {n_threads} threads on {n_cores} cores; set OMP_NUM_THREADS.")
    if torch_version.split("+")[0] != pinned.removeprefix("torch=="):
        remarks.append(f"torch is {torch_version}; this project is tested with {pinned}.")
    return remarks


class Record:
    """One run's folder. Opening it claims it for a config; another config is refused.

    What the config holds under ``measured`` (facts about the machine) is not compared.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        self.config = json.loads(json.dumps({"format": FORMAT} | config))  # as a reader sees it
        if (path / "config.json").exists():
            there, here = read_config(path), self.config
            names = sorted((there | here).keys() - {"measured"})
            both = [(name, _given(there.get(name)), _given(here.get(name))) for name in names]
            differing = [f"{name}: {a!r} there, {b!r} here" for name, a, b in both if a != b]
            if differing:
                _refuse(path, f"was made with another config ({'; '.join(differing):.600})")
        else:
            write_json(path / "config.json", self.config)
        if not (path / "environment.json").exists():
            write_json(path / "environment.json", environment())

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
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmlib"}):
            figure.savefig(path.with_suffix(".png"), dpi=200)
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        write_atomic(path.with_suffix(".csv"), data.to_csv(index=False))
        return figure

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write the summary, the last file of a record."""
        write_json(self.path / "summary.json", summary)
        return summary


def _given(value: Any) -> Any:
    """Drop what is None, so that a setting that is new and not used tells no configs apart."""
    if isinstance(value, dict):
        return {name: _given(v) for name, v in value.items() if v is not None}
    return value


def read_config(path: Path) -> dict[str, Any]:
    """Read a record's config; one of another format is refused."""
    config = read_json(path / "config.json")
    if (there := config.get("format", 1)) != FORMAT:
        _refuse(path, f"has format {there}, this version writes {FORMAT}")
    return config


def _refuse(path: Path, why: str) -> NoReturn:
    remedy = "choose another run_name or runs_dir, or delete that folder."
    raise ValueError(f"run {path.name} in {path.parent} {why}; {remedy}")


def runs_folder(scale: str, runs_dir: str | Path = "") -> Path:
    """Resolve the folder that holds a scale's records; "" is ``runs/local/<scale>``.

    The other folders of ``runs/`` hold committed evidence.
    """
    return Path(runs_dir).expanduser().resolve() if runs_dir else ROOT / "runs" / "local" / scale


def open_record(
    name: str, config: dict[str, Any], *, scale: str, runs_dir: str | Path = ""
) -> Record:
    """Open or create the record that a notebook writes."""
    return Record(runs_folder(scale, runs_dir) / name, config)


def load_summary(
    name: str, *, scale: str, runs_dir: str | Path = "", default: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Read the summary of an earlier notebook's record; without one, the default if there is one."""
    folder = runs_folder(scale, runs_dir) / name
    if not (folder / "summary.json").exists():
        if default is not None:
            return default
        raise ValueError(
            f"run {name} first: there is no finished record at {folder} "
            f"(python -m llmlib run --scale {scale} --only {name})."
        )
    read_config(folder)
    return read_json(folder / "summary.json")


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
    vocab_size = read_json(tokens_dir / "manifest.json")["tokenizer"]["vocab_size"]
    if vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} tokens but the model's vocab_size is "
            f"{model.vocab_size}; give it {-(-vocab_size // 64) * 64} (config.fit_vocabulary does)."
        )
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
        raise ValueError(
            f"{path / 'config.json'} is missing or not a run's config ({error}); "
            "05_full_run writes one."
        ) from error


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
        with contextlib.suppress(OSError), open(self.path, "a") as file:
            file.write(json.dumps({"kind": kind} | values) + "\n")
        if self.tracker and kind in ("step", "eval"):
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


def _rows(path: Path, last: bool = False) -> list[dict[str, Any]]:
    rows = []
    if path.exists():
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES) if last else 0)
            for line in file:
                with contextlib.suppress(ValueError):  # a half-written line
                    rows.append(json.loads(line))
    return rows
