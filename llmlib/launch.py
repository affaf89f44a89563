"""Start training in processes of its own, watch it, stop it: the notebook's side of ``train``.

A training process has a pipe from its launcher. When the launcher dies (a kernel that was killed,
say), the pipe closes, and the run saves itself and leaves. Launching the same folder again resumes.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

from IPython.display import DisplayHandle, display
from tqdm import tqdm

from llmlib import analysis, devices, plots, runs

POLL_SECONDS = 0.5
OFTEN = {"mininterval": 5.0, "miniters": 0}  # of what is shown


def start(folders: list[Path], *, n_processes: int = 1, n_threads: int = 0) -> Popen:
    """Start training runs in turn; they save and leave when the returned process's stdin closes.

    What it prints goes to ``train.log`` of the first run, errors of a run to its own.
    """
    torchrun = f"torch.distributed.run --standalone --nproc-per-node={n_processes} -m".split()
    command = [sys.executable, "-m", *(torchrun if n_processes > 1 else [])]
    threads = {"OMP_NUM_THREADS": str(n_threads)} if n_threads else {}
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}  # to save after a signal [s], not 30
    with open(folders[0] / "train.log", "a") as log:
        return Popen(
            [*command, "llmlib.train", "--watched", *map(str, folders)],
            env=patience | os.environ | threads,
            stdin=PIPE,
            stdout=log,
            stderr=STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )


def run_training(run: Path, *, n_processes: int | None = None) -> dict[str, Any]:
    """Train the run in a folder until it is done, show its progress, and return its result.

    Uses one process per accelerator unless ``n_processes`` says otherwise. Raises ``ValueError``
    for what the reader can mend, ``RuntimeError`` for other ends, each with the end of the log.
    """
    log, processes, curve = run / "train.log", [], None
    n_seen = log.stat().st_size if log.exists() else 0
    if runs.read_result(run) is None:
        curve = display({}, raw=True, display_id=True) if plots.is_attended() else None
        processes = [start([run], n_processes=n_processes or devices.n_accelerators() or 1)]
    what, looks = "starting (the first step compiles)", "{percentage:3.0f}% {bar:20} {desc}"
    with tqdm(desc=what, total=1.0, bar_format=looks, **OFTEN) as bar:
        _watch(processes, lambda: _show_run(run, bar, curve))
    if status := processes and processes[0].returncode:
        killed = " (killed; often because memory ended)" if status == -signal.SIGKILL else ""
        raise (ValueError if status == 2 else RuntimeError)(
            f"training ended with status {status}{killed}; run the same cell again to resume.\n"
            f"The end of {run.name}/train.log:\n{log_tail(run, skip=n_seen)}"
        )
    return runs.read_result(run)


def _watch(processes: list[Popen], show: Callable[[], None]) -> None:
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
    show()


def log_tail(run: Path, n_lines: int = 12, *, skip: int = 0) -> str:
    """Return the last lines that a run's process printed, after so many bytes of its log."""
    log = run / "train.log"
    text = log.read_bytes()[skip:].decode(errors="replace") if log.exists() else ""
    return "\n".join(text.strip().splitlines()[-n_lines:]) or "(no output)"


def run_many(folders: list[Path]) -> None:
    """Train runs and show how many are done; a run that fails keeps no other from training.

    On CPUs one worker per core, with one thread each; on a GPU one. A worker takes its runs in turn
    and keeps the graphs it has compiled, so runs of equal shape go to the same one.
    """

    def n_done() -> int:
        return sum(runs.read_result(run) is not None for run in folders)

    waiting = [run for run in folders if runs.read_result(run) is None]
    waiting.sort(key=lambda run: str(runs.read_run(run).model))
    n_workers = 1 if devices.n_accelerators() else runs.n_cores()
    n_each = math.ceil(len(waiting) / n_workers) or 1
    shares = [waiting[i : i + n_each] for i in range(0, len(waiting), n_each)]
    workers = [start(share, n_threads=int(n_workers > 1)) for share in shares]
    with tqdm(total=len(folders), unit=" runs", **OFTEN) as bar:
        _watch(workers, lambda: bar.update(n_done() - bar.n))
    if ended := {worker.returncode for worker in workers} - {0, 1, 2}:
        raise RuntimeError(f"training was stopped (status {min(ended)}); the same cell goes on.")


def _show_run(run: Path, bar: tqdm, curve: DisplayHandle | None) -> None:
    """Say where a run is: step, loss, tokens/s, MFU, time left; draw its curve where one is shown."""
    rows = runs.read_metrics(run, "step", last=True)
    if rows.empty:
        return
    row = rows.iloc[-1]
    mfu = "n/a" if row.mfu is None or math.isnan(row.mfu) else f"{row.mfu:.0%}"
    text = f"step {row.step} | loss {row.loss:.3f} | {row.tokens_per_s:,.0f} tokens/s | MFU {mfu}"
    left = timedelta(seconds=int(row.seconds_left))
    bar.set_description_str(f"{text} | {left} left", refresh=False)
    if bar.update(row.progress - bar.n) and curve:
        curve.update(plots.training_curve(analysis.load_curve(run), None))
