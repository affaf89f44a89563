"""Start training in processes of its own, watch it, stop it: the notebook's side of ``train``.

A training process holds the run's lock and a pipe from its launcher. When the launcher dies (a
kernel that was killed, say), the pipe closes, and the run saves itself and leaves. Launching the
same folder again attaches to the run if it is still there, and otherwise resumes it.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from IPython.display import display

from llmlib import analysis, devices, locks, plots, runs

POLL_SECONDS = 0.5
CURVE_SECONDS = 10.0  # between drawings of the live curve


def start(
    folders: list[Path], *, n_processes: int = 1, n_threads: int | None = None
) -> subprocess.Popen:
    """Start training runs in turn; they save and leave when the returned process's stdin closes.

    What it prints goes to ``train.log`` of the first run, errors of a run to its own.
    """
    torchrun = f"torch.distributed.run --standalone --nproc-per-node={n_processes} -m".split()
    command = [sys.executable, "-m", *(torchrun if n_processes > 1 else [])]
    threads = {} if n_threads is None else {"OMP_NUM_THREADS": str(n_threads)}
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}  # to save after a signal [s], not 30
    with open(folders[0] / "train.log", "a") as log:
        return subprocess.Popen(
            [*command, "llmlib.train", "--watched", *map(str, folders)],
            env=patience | os.environ | threads,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )


def run_training(run: Path, *, n_processes: int | None = None) -> dict[str, Any]:
    """Train the run in a folder until it is done, show its progress, and return its result.

    Uses one process per accelerator unless ``n_processes`` says otherwise.
    """
    live = Live()
    while (result := runs.read_result(run)) is None:
        if owner := locks.lock_owner(run):  # left by an earlier launcher, and still at work
            live.show(f"attached to {owner}: {progress_line(run)}", run)
            time.sleep(POLL_SECONDS)
            continue
        seen = len(_log(run))
        process = start([run], n_processes=n_processes or devices.n_accelerators() or 1)
        _watch([process], lambda: live.show(progress_line(run), run))
        if process.returncode:
            _raise_its_error(run, process.returncode, _log(run)[seen:])
    live.show(progress_line(run))
    return result


def _watch(processes: list[subprocess.Popen], show: Callable[[], None]) -> None:
    """Show progress until the processes end; if interrupted, wait until they have saved and left."""
    try:
        while any(process.poll() is None for process in processes):
            show()
            time.sleep(POLL_SECONDS)
    finally:
        for process in processes:
            process.stdin.close()
        for process in processes:
            process.wait()


def _raise_its_error(run: Path, status: int, log: str) -> None:
    if status == 2 and "error: " in log:
        raise ValueError(log.rsplit("error: ", 1)[1].strip())
    killed = " (killed; often because memory ended)" if status == -signal.SIGKILL else ""
    raise RuntimeError(
        f"training ended with status {status}{killed}; run the same cell again to resume from the "
        f"last checkpoint. The end of {run.name}/train.log:\n{_tail(log)}"
    )


def log_tail(run: Path, n_lines: int = 12) -> str:
    """Return the last lines that a run's process printed."""
    return _tail(_log(run), n_lines)


def _log(run: Path) -> str:
    path = run / "train.log"
    return path.read_text(errors="replace") if path.exists() else ""


def _tail(log: str, n_lines: int = 12) -> str:
    return "\n".join(log.strip().splitlines()[-n_lines:]) or "(no output)"


def run_many(folders: list[Path]) -> None:
    """Train runs and show how many are done; a run that fails keeps no other from training.

    On CPUs one worker per core, with one thread each; on a GPU one. A worker takes its runs in turn
    and keeps the graphs it has compiled, so runs of equal shape go to the same one.
    """
    waiting = [run for run in folders if runs.read_result(run) is None]
    waiting.sort(key=lambda run: str(runs.read_run(run).model))
    n_workers = 1 if devices.n_accelerators() else runs.n_cores()
    n_each = math.ceil(len(waiting) / n_workers) or 1
    shares = [waiting[i : i + n_each] for i in range(0, len(waiting), n_each)]
    workers = [start(share, n_threads=1 if len(shares) > 1 else None) for share in shares]
    live = Live()
    _watch(workers, lambda: live.show(_count_done(folders)))
    live.show(_count_done(folders))  # the others failed


def _count_done(folders: list[Path]) -> str:
    n_done = sum(runs.read_result(run) is not None for run in folders)
    return f"{n_done}/{len(folders)} runs done"


def progress_line(run: Path) -> str:
    """Describe in one line where a run is: bar, step, loss, tokens/s, MFU, time left."""
    rows = runs.read_metrics(run, "step", last=True)
    if rows.empty:
        return "starting (the first step compiles the model)"
    row = rows.iloc[-1]
    done = round(20 * row.progress)
    mfu = "n/a" if row.mfu is None or math.isnan(row.mfu) else f"{row.mfu:.0%}"
    left = timedelta(seconds=int(row.seconds_left))
    return (
        f"{'█' * done}{'░' * (20 - done)} {row.progress:4.0%} | step {row.step} | "
        f"loss {row.loss:.3f} | {row.tokens_per_s:,.0f} tokens/s | MFU {mfu} | {left} left"
    )


class Live:
    """A line that is rewritten in place and, where somebody watches a notebook, a curve beneath it."""

    def __init__(self) -> None:
        self.drawn_at, self.places = -math.inf, {}  # of the curve; handles of what is displayed

    def show(self, text: str, run: Path | None = None) -> None:
        """Rewrite the line; draw the run's curve anew if it is older than ``CURVE_SECONDS``."""
        if plots.get_ipython() is None:
            print(f"\r{text}", end="", flush=True)
            return
        self._display("line", {"text/plain": text}, raw=True)
        is_due = run and time.monotonic() > self.drawn_at + CURVE_SECONDS and plots.is_attended()
        if is_due and len(runs.read_metrics(run, "step")) > 1:
            self._display("curve", plots.training_curve(analysis.load_curve(run), None))
            self.drawn_at = time.monotonic()

    def _display(self, name: str, what: Any, **options: Any) -> None:
        if name in self.places:
            self.places[name].update(what, **options)
        else:
            self.places[name] = display(what, display_id=True, **options)
