"""Start a training run in a process of its own and watch it: the notebook's side of ``train``.

The training process holds the run's lock and a pipe from its supervisor. When the supervisor dies
(a kernel that was killed, say), the pipe closes, and the run saves itself and leaves. Supervising
the same folder again attaches to the run if it is still there, and otherwise resumes it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmlib import analysis, plots, runs
from llmlib.widgets import display, is_attended, shell

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

POLL_SECONDS = 1.0
CURVE_SECONDS = 10.0  # between drawings of the live curve


def supervise(
    run: Path,
    tokens: Path,
    *,
    peak_flops_per_s: float | None = None,
    n_processes: int | None = None,
) -> dict[str, Any]:
    """Train the run in ``run`` until it is done, show its progress, and return its result.

    Uses one process per CUDA device unless ``n_processes`` says otherwise.
    """
    live = Live(run)
    while not (run / "training.json").exists():
        if runs.lock_owner(run) is not None:  # left by an earlier supervisor, and still at work
            live.show(f"attached to {runs.lock_owner(run)}: {progress_line(run)}")
            time.sleep(POLL_SECONDS)
        else:
            n = n_processes or torch.cuda.device_count() or 1
            process = start_training(run, tokens, peak_flops_per_s=peak_flops_per_s, n_processes=n)
            _watch(process, run, live)
    live.show(progress_line(run), is_last=True)
    return runs.read_json(run / "training.json")


def start_training(
    run: Path,
    tokens: Path,
    *,
    peak_flops_per_s: float | None = None,
    n_processes: int = 1,
    n_threads: int | None = None,
) -> subprocess.Popen:
    """Start the run's training; it saves itself and leaves when the returned process's stdin closes."""
    if not (run / "tokenizer.json").exists():
        shutil.copy(tokens / "tokenizer.json", run)
    command = [sys.executable, "-m"]
    if n_processes > 1:
        torchrun = f"torch.distributed.run --standalone --nproc-per-node={n_processes} -m"
        command += torchrun.split()
    command += ["llmlib.train", str(run), "--tokens", str(tokens), "--supervised"]
    command += [] if peak_flops_per_s is None else ["--peak-flops", str(peak_flops_per_s)]
    threads = {} if n_threads is None else {"OMP_NUM_THREADS": str(n_threads)}
    with open(run / "train.log", "a") as log:
        return subprocess.Popen(
            command,
            env=os.environ | threads,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )


def _watch(process: subprocess.Popen, run: Path, live: Live) -> None:
    try:
        while process.poll() is None:
            live.show(progress_line(run))
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        live.show("interrupted: waiting for the run to save itself")
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        process.stdin.close()
    if process.returncode:
        _raise_its_error(run, process.returncode)


def _raise_its_error(run: Path, status: int) -> None:
    lines = (run / "train.log").read_text().strip().splitlines() or ["(no output)"]
    errors = [text.split("error: ", 1)[1] for text in lines if text.startswith("error: ")]
    if status == 2 and errors:
        raise ValueError(errors[-1])
    raise RuntimeError(
        f"training ended with status {status}: {errors[-1] if errors else lines[-1]} The whole log is "
        f"{run.name}/train.log; run the same cell again to resume from the last checkpoint."
    )


def last_metrics(run: Path, kind: str = "step") -> dict[str, Any] | None:
    """Read the newest line of one kind from the end of ``metrics.jsonl``."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        lines = file.read().decode(errors="replace").splitlines()
    for text in reversed(lines):
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            continue
        if row.get("kind") == kind:
            return row
    return None


def progress_line(run: Path) -> str:
    """Describe in one line where a run is: bar, step, loss, tokens/s, MFU, time left."""
    row = last_metrics(run)
    if row is None:
        return "starting (the first step compiles the model)"
    done = round(20 * row["progress"])
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.0%}"
    left = int(row["seconds_left"])
    clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    return (
        f"{'█' * done}{'░' * (20 - done)} {row['progress']:4.0%} | step {row['step']} | "
        f"loss {row['loss']:.3f} | {row['tokens_per_s']:,.0f} tokens/s | MFU {mfu} | {clock} left"
    )


class Live:
    """A line that is rewritten in place and, where somebody watches a notebook, a curve beneath it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.line = self.curve = None  # where they are displayed
        self.drawn_at = -math.inf

    def show(self, text: str, is_last: bool = False) -> None:
        if shell() is None:
            print(f"\r{text}", end="", flush=True)
            return
        self.line = _display({"text/plain": text}, self.line, raw=True)
        is_due = is_last or time.monotonic() > self.drawn_at + CURVE_SECONDS
        if is_due and is_attended() and (self.run / "metrics.jsonl").exists():
            self._draw()

    def _draw(self) -> None:
        curve = analysis.smooth_share(analysis.load_curve(self.run), share=1 / 40)
        smoothed = curve.smoothed.dropna()
        if len(smoothed):
            figure = plots.training_curve(curve, smoothed, final_loss=None)
            self.curve = _display(figure, self.curve)
            self.drawn_at = time.monotonic()


def _display(what: Any, handle: DisplayHandle | None, **options: Any) -> DisplayHandle:
    """Display something new, or in the place of what the handle displays."""
    if handle is None:
        return display(what, display_id=True, **options)
    handle.update(what, **options)
    return handle
