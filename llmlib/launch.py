"""Start training in processes of its own, watch it, stop it: the notebook's side of ``train``.

A training process holds the run's lock and a pipe from its launcher. When the launcher dies (a
kernel that was killed, say), the pipe closes, and the run saves itself and leaves. Launching the
same folder again attaches to the run if it is still there, and otherwise resumes it.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llmlib import analysis, locks, panels, plots, runs

POLL_SECONDS = 0.5
CURVE_SECONDS = 10.0  # between drawings of the live curve


def start(
    folders: list[Path], *, n_processes: int = 1, n_threads: int | None = None
) -> subprocess.Popen:
    """Start training runs in turn; they save and leave when the returned process's stdin closes.

    What it prints goes to ``train.log`` of the first run.
    """
    torchrun = f"torch.distributed.run --standalone --nproc-per-node={n_processes} -m".split()
    command = [sys.executable, "-m", *(torchrun if n_processes > 1 else [])]
    command += ["llmlib.train", *map(str, folders)]
    threads = {} if n_threads is None else {"OMP_NUM_THREADS": str(n_threads)}
    with open(folders[0] / "train.log", "a") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | threads,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )
    process.stdin.write(b"watched\n")
    process.stdin.flush()
    return process


def run_training(run: Path, *, n_processes: int | None = None) -> dict[str, Any]:
    """Train the run in a folder until it is done, show its progress, and return its result.

    Uses one process per CUDA device unless ``n_processes`` says otherwise.
    """
    live = Live(run)
    while (result := runs.read_result(run)) is None:
        if owner := locks.lock_owner(run):  # left by an earlier launcher, and still at work
            live.show(f"attached to {owner}: {progress_line(run)}")
            time.sleep(POLL_SECONDS)
            continue
        process = start([run], n_processes=n_processes or torch.cuda.device_count() or 1)
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
    live.show(progress_line(run), is_last=True)
    return result


def _raise_its_error(run: Path, status: int) -> None:
    tail = log_tail(run)
    if status == 2 and "error: " in tail:
        raise ValueError(tail.rsplit("error: ", 1)[1])
    raise RuntimeError(
        f"training ended with status {status}; run the same cell again to resume from the last "
        f"checkpoint. The end of {run.name}/train.log:\n{tail}"
    )


def log_tail(run: Path, n_lines: int = 12) -> str:
    """Return the last lines that a run's process printed."""
    path = run / "train.log"
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return "\n".join(lines[-n_lines:]) or "(no output)"


def run_many(folders: list[Path]) -> None:
    """Train runs and show how many are done; a run that fails keeps no other from training.

    On CPUs one worker per core, with one thread each; on a GPU one. A worker takes its runs in turn
    and keeps the graphs it has compiled, so runs of equal shape go to the same one.
    """
    waiting = [run for run in folders if runs.read_result(run) is None]
    n_workers = 1 if torch.cuda.is_available() else min(runs.n_cores(), max(len(waiting), 1))
    waiting.sort(key=lambda run: str(runs.read_run(run).model))
    shares = [list(share) for share in _split(waiting, n_workers) if share]
    workers = [start(share, n_threads=None if n_workers == 1 else 1) for share in shares]
    live, started = Live(folders[0]), time.monotonic()
    try:
        while any(worker.poll() is None for worker in workers):
            n_done = sum(runs.read_result(run) is not None for run in waiting)
            elapsed = time.monotonic() - started
            text = f"{n_done}/{len(waiting)} runs done"
            if n_done:
                left = elapsed / n_done * (len(waiting) - n_done) / 60
                text += f", about {left:.1f} min left"
            live.show(text)
            time.sleep(POLL_SECONDS)
    finally:
        for worker in workers:  # interrupted: they notice, save themselves and leave
            worker.stdin.close()
        for worker in workers:
            worker.wait()
    n_done = sum(runs.read_result(run) is not None for run in folders)
    live.show(f"{n_done}/{len(folders)} runs done")  # the others failed


def _split(items: list, n: int) -> list[list]:
    bounds = [round(i * len(items) / n) for i in range(n + 1)]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


def progress_line(run: Path) -> str:
    """Describe in one line where a run is: bar, step, loss, tokens/s, MFU, time left."""
    rows = runs.read_metrics(run, "step", last=True)
    if rows.empty:
        return "starting (the first step compiles the model)"
    row = rows.iloc[-1]
    done = round(20 * row.progress)
    mfu = "n/a" if row.mfu is None or math.isnan(row.mfu) else f"{row.mfu:.0%}"
    left = int(row.seconds_left)
    clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    return (
        f"{'█' * done}{'░' * (20 - done)} {row.progress:4.0%} | step {row.step} | "
        f"loss {row.loss:.3f} | {row.tokens_per_s:,.0f} tokens/s | MFU {mfu} | {clock} left"
    )


class Live:
    """A line that is rewritten in place and, where somebody watches a notebook, a curve beneath it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.line = self.curve = None  # where they are displayed
        self.drawn_at = -math.inf

    def show(self, text: str, is_last: bool = False) -> None:
        if panels.shell() is None:
            print(f"\r{text}", end="", flush=True)
            return
        self.line = _display({"text/plain": text}, self.line, raw=True)
        is_due = is_last or time.monotonic() > self.drawn_at + CURVE_SECONDS
        if is_due and panels.is_attended() and (self.run / "metrics.jsonl").exists():
            curve = analysis.load_curve(self.run)
            if (curve.kind == "step").sum() > 1:
                self.curve = _display(plots.training_curve(curve, None), self.curve)
                self.drawn_at = time.monotonic()


def _display(what: Any, handle: Any, **options: Any) -> Any:
    """Display something new, or in the place of what the handle displays."""
    if handle is None:
        return panels.display(what, display_id=True, **options)
    handle.update(what, **options)
    return handle
