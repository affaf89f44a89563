"""Start a training run in a process of its own and watch it: the notebook's side of ``train``.

The training process holds the run's lock and a pipe from its supervisor. When the supervisor dies
(a kernel that was killed, say), the pipe closes, and the run saves itself and leaves. Supervising
the same folder again attaches to the run if it is still there, and otherwise resumes it.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llmlib import runs

POLL_SECONDS = 1.0


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
    if not (run / "tokenizer.json").exists():
        shutil.copy(tokens / "tokenizer.json", run)
    line = LiveLine()
    while not (run / "training.json").exists():
        if runs.lock_owner(run) is not None:  # left by an earlier supervisor, and still at work
            line.show(f"attached to {runs.lock_owner(run)}: {progress_line(run)}")
            time.sleep(POLL_SECONDS)
        else:
            _train(
                run, tokens, peak_flops_per_s, n_processes or torch.cuda.device_count() or 1, line
            )
    line.show(progress_line(run))
    return runs.read_json(run / "training.json")


def _train(run: Path, tokens: Path, peak: float | None, n_processes: int, line: LiveLine) -> None:
    command = [sys.executable, "-m"]
    if n_processes > 1:
        command += [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={n_processes}",
            "-m",
        ]
    command += ["llmlib.train", str(run), "--tokens", str(tokens), "--supervised"]
    command += [] if peak is None else ["--peak-flops", str(peak)]
    with open(run / "train.log", "a") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )
    try:
        while process.poll() is None:
            line.show(progress_line(run))
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        line.show("interrupted: waiting for the run to save itself")
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


class LiveLine:
    """One line that is rewritten in place, in a notebook or on a terminal."""

    def __init__(self) -> None:
        self.handle = None

    def show(self, text: str) -> None:
        try:
            from IPython import get_ipython
        except ImportError:
            get_ipython = lambda: None  # noqa: E731
        if get_ipython() is None:
            print(f"\r{text}", end="", flush=True)
            return
        from IPython.display import display

        if self.handle is None:
            self.handle = display({"text/plain": text}, raw=True, display_id=True)
        else:
            self.handle.update({"text/plain": text}, raw=True)
