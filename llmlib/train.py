"""The training program: ``python -m llmlib.train RUN [RUN ...]``, alone or under torchrun.

On several GPUs or machines the processes share the run's folder. Everything about a run stands in
its ``config.json``; what happens is in ``trainer``; notebooks start this program through ``launch``.
"""

import argparse
import os
import select
import signal
import sys
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from llmlib import devices, runs, step
from llmlib.trainer import Question, Stopped, Trainer

STOPPED = 128 + signal.SIGTERM  # exit status


def watch_signals(is_watched: bool) -> Question:
    """Watch for signals and, if a launcher watches us, for the end of its pipe on stdin."""
    reasons: list[str] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, _: reasons.append(f"received {signal.Signals(n).name}"))

    def must_stop() -> str | None:
        if is_watched and select.select([0], [], [], 0)[0]:
            reasons.append("the watching process is gone")
        return reasons[0] if reasons else None

    return must_stop


def train_run(run: Path, must_stop: Question) -> int:
    """Train one run and return an exit status; what was wrong is printed and kept in its log."""
    try:
        with runs.lock(run) if step.is_main() else nullcontext():
            if runs.read_result(run) is None:
                Trainer(run, must_stop=must_stop).run()
        return 0
    except Stopped as stopped:
        print(stopped, flush=True)
        return STOPPED
    except runs.Locked as error:  # the log is the other's
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except ValueError as error:
        text, status = f"error: {error}", 2
    except Exception as error:
        who, status = f"process {step.rank()} of {step.world_size()}", 1
        text = (
            f"{traceback.format_exc()}error: {who} cannot go on ({error!s:.120}). The last "
            "checkpoint is kept: run the same command again to go on."
        )
    print(text, file=sys.stderr, flush=True)
    with suppress(OSError), open(run / "train.log", "a") as log:
        if not os.path.sameopenfile(2, log.fileno()):  # the launcher's, of the first of its runs
            log.write(f"{text}\n")
    return status


def main(arguments: list[str] | None = None) -> int:
    """Train the runs in folders that hold ``config.json``, in turn.

    Exit status, of several runs the greatest: 0 done, 1 broken, 2 wrong request or diverged, 143
    stopped.
    """
    parser = argparse.ArgumentParser(prog="python -m llmlib.train", description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--watched", action="store_true", help="leave when stdin closes")
    options, status = parser.parse_args(arguments), 0
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64  # of shapes in one process
    devices.keep_freed_memory()
    step.join_processes()
    must_stop = watch_signals(options.watched and step.is_main())
    for run in options.runs:
        status = max(status, train_run(run, must_stop))
        if status == STOPPED or (status and step.world_size() > 1):
            break  # asked to stop, or the other processes have been left waiting
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
