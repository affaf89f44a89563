"""A run that spends its budget exactly and survives: resume, trouble, several processes.

``Trainer.run`` reads as the algorithm. The step is in ``step``, the clock in ``budget``, what is kept
on disk in ``resume``; notebooks start a run in a process of its own through ``launch``. As a program:
``python -m llmlib.train RUN [RUN ...]``, under torchrun on several GPUs or machines (which then
share the run's folder). Everything about a run stands in its ``config.json``.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import stat
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmlib import checkpoint, data, locks, runs, step
from llmlib.resume import ResumableRun, not_saved
from llmlib.schedule import lr_factor

MAX_BAD_STEPS = 3  # steps in a row that are not finite before the run goes back, once
COMPILE_SECONDS = 20.0  # what compiling may take, until it is known


class Stopped(Exception):
    """The run was asked to stop; it has saved itself and can be resumed."""


class Diverged(Exception):
    """The run met losses that are not finite, and going back did not cure it."""


class Trainer(ResumableRun):
    """A run that trains: steps, validations and saves, until its budget is spent."""

    def __init__(self, path: Path, *, local_rank: int = 0):
        super().__init__(path, local_rank)
        # Steps launched and not read yet: number, progress, loss and norm on their way, event.
        self.pending: list[tuple[int, float, Tensor, torch.cuda.Event | None]] = []
        self.lag = 0 if self.device.type == "cpu" else 1  # of them while the next is launched
        self.n_taken = self.n_bad_in_a_row = 0  # steps since the last compilation
        self.eval_seconds = 0.0  # of the last validation
        self.must_stop: Callable[[], str | None] = lambda: None  # asked before every step

    # ------------------------------------------------------------------ the algorithm

    def run(self) -> dict[str, Any]:
        """Train until the budget is spent and return the result."""
        self.begin_or_resume()
        self.fast_model = self._compile()
        tokens, config = data.open_split(self.about.tokens_dir, "train"), self.config
        shape = self.about.model.seq_len, config.n_sequences
        self.batches = data.Batches(tokens, *shape, seed=config.seed)
        share = {"rank": step.rank(), "world_size": step.world_size()}
        batches = data.prefetch(self.batches, self.state.data_step, self.device, **share)
        self.ledger.start()
        while (progress := self._next_progress()) is not None or self.pending:
            if progress is not None:
                self._launch_step(*next(batches), progress)
            self._read_steps(keep=0 if progress is None or self.n_taken <= 2 else self.lag)
            if progress is not None and step.is_main():
                self._validate_if_due(progress)
                self._save_if_due()
        return self._finish()

    def _next_progress(self) -> float | None:
        """Take from the main process how far the run is, None when the budget is spent."""
        state, mine, reason = self.state, None, None
        if not state.is_over:
            way = {"before": state.progress, "n_under_way": len(self.pending)}
            mine = self.budget.next_progress(state.step, self.ledger, **way)
            reason = None if mine is None else self.must_stop()
        progress, stops = step.broadcast(-1.0 if mine is None else mine, reason is not None)
        if stops:
            self._read_steps(keep=0)
            failure = self.save_now() if step.is_main() else None
            step.broadcast(0.0)  # whoever leaves first ends the job
            saved = f"stopped, but {not_saved(failure)}" if failure else "saved and stopped"
            raise Stopped(
                f"{reason or 'stopped by the main process'}: {saved} at step {state.step}. "
                "Run the same command again to go on."
            )
        return None if progress < 0 else progress

    def _launch_step(self, inputs: Tensor, targets: Tensor, progress: float) -> None:
        """Ask the device for a step; its numbers are read when the next one has been launched."""
        if self.n_taken == 0:
            self.write("phase", text="compilation begins")
        numbers = self._take_step(inputs, targets, lr_factor(self.config, progress))
        numbers = numbers.to("cpu", non_blocking=True)
        event = torch.cuda.Event() if self.device.type == "cuda" else None
        if event is not None:
            event.record()
        state = self.state
        state.step, state.data_step, state.progress = state.step + 1, state.data_step + 1, progress
        self.pending.append((state.step, progress, numbers, event))
        self.n_taken += 1

    def _take_step(self, inputs: Tensor, targets: Tensor, factor: float) -> Tensor:
        how = {"grad_clip": self.config.grad_clip, "dtype": self.dtype, "lr_factor": factor}
        while True:
            # Tried again outside of the handler, which keeps what did not fit alive.
            with step.out_of_memory_is_no_error():
                how["micro_batch"] = self.micro_batch
                return step.train_step(self.fast_model, self.optimizer, inputs, targets, **how)
            if self.micro_batch == 1 or step.world_size() > 1:  # the others would wait for ever
                raise ValueError(
                    f"micro_batch={self.micro_batch} does not fit into this device's memory; "
                    "choose a smaller micro_batch, seq_len or model."
                )
            self.state.micro_batch = -(-self.micro_batch // 2)
            self.n_taken = 0  # the new shape is compiled
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.event(f"out of memory: micro_batch is now {self.micro_batch}")

    def _read_steps(self, keep: int) -> None:
        """Wait for all but the last ``keep`` steps, book and log them, and judge their numbers."""
        while len(self.pending) > keep:
            number, progress, numbers, event = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            loss, norm = numbers.tolist()
            seconds = self._book_step(self.n_taken - len(self.pending))
            if torch.isfinite(numbers).all():
                self.n_bad_in_a_row = 0
                self.log_step(number, progress, seconds, loss=loss, grad_norm=norm)
            else:
                self.event(f"step {number} took no gradient: loss {loss}, gradient norm {norm}")
                self._go_back_after_bad_steps()

    def _book_step(self, n_taken: int) -> float:
        """Book a step; what the first took beyond the second was compilation and warm-up."""
        state = self.state
        if n_taken == 1:
            self.first_seconds = self.ledger.book("compile")
            return self.first_seconds
        state.step_seconds = self.ledger.book("training")
        self.budget.observe(state.step_seconds)
        if n_taken == 2:
            usual = min(state.step_seconds, self.first_seconds)
            self.ledger.move(usual, "compile", "training")
            state.compile_seconds = max(state.compile_seconds, self.first_seconds - usual)
        return state.step_seconds

    def _go_back_after_bad_steps(self) -> None:
        """Go back once after several steps in a row that were not finite, with other data ahead."""
        self.state.n_skipped += 1
        self.n_bad_in_a_row += 1
        if self.n_bad_in_a_row < MAX_BAD_STEPS:
            return
        self.saver.wait()
        step.broadcast(0.0)  # the main process has finished writing
        newest = checkpoint.newest_valid(self.saver.folder)
        if self.state.n_rollbacks or newest is None:
            raise Diverged(
                f"losses at step {self.state.step} are not finite, even after going back; the last "
                f"good checkpoint is kept. Lower lr (now {self.config.lr}) or look at the data there."
            )
        kept = {k: getattr(self.state, k) for k in ("data_step", "micro_batch", "n_skipped")}
        self.state = replace(self.load(newest), **kept, n_rollbacks=1)
        self.n_bad_in_a_row = 0
        self.pending.clear()
        self.book_lost()

    def _validate_if_due(self, progress: float) -> None:
        """Validate at even shares of the budget, or as soon after as it fits; the last is off it."""
        due = int(progress * self.config.n_evals)
        guess = self.budget.step_seconds * len(self.windows) / self.config.n_sequences
        fits = self.budget.fits(self.ledger, self.eval_seconds or guess, len(self.pending))
        if progress == 1.0 or due <= self.state.n_evals or not fits:
            return
        self._read_steps(keep=0)
        self.state.n_evals = due
        self.write("phase", text="validation begins")
        result = step.evaluate(self.model, self.windows, self.device, self.dtype)
        self.eval_seconds = self.ledger.book("validation")
        scores = {"val_loss": result["loss"], "val_accuracy": result["accuracy"]}
        self.write("eval", **scores, val_sha256=self.state.val_sha256)

    def _finish(self) -> dict[str, Any]:
        """Evaluate off the clock, on the whole split if so asked, and write weights and result."""
        self.state.is_over, result = True, {}
        if step.is_main():
            if failure := self.save_now():
                self.event(not_saved(failure))
            windows = self.eval_windows(None) if self.config.eval_all else self.windows
            final = step.evaluate(self.model, windows, self.device, self.dtype)
            result = self.summary() | {"val": final, "val_sha256": data.sha256(windows)}
            temporary = self.path / ".model.safetensors.tmp"
            save_file(self.model.state_dict(), temporary)
            checkpoint.sync(temporary)
            os.replace(temporary, self.path / "model.safetensors")
            runs.write_json(self.path / "result.json", result)
            self.log.close()
        step.broadcast(0.0)
        return result

    def _compile(self) -> nn.Module:
        """Compile, if that leaves room for two steps, and spread over the processes.

        Runs of equal shape in one process share their graphs: weights are inputs of a graph.
        """
        seconds, cost = self.state.step_seconds, self.state.compile_seconds or COMPILE_SECONDS
        fits = self.budget.fits(self.ledger, cost + 2 * seconds)
        [compiles] = step.broadcast(self.config.compile and fits)
        model = step.compile_model(self.model, self.device) if compiles else self.model
        self.is_compiled = model is not self.model
        if self.config.compile and not fits:
            self.event("too little time for compiling: going on without")
            seconds *= 2
        if seconds:
            self.budget.observe(seconds)
        return step.average_gradients(model)

    def _save_if_due(self) -> None:
        """Save at fixed times, or as soon after as it fits; a save that failed costs no more."""
        if failure := self.saver.take_failure():
            self.event(f"{not_saved(failure)}; training goes on")
        fits = self.budget.fits(self.ledger, self.save_seconds, len(self.pending))
        if self.ledger.total >= self.save_at and fits:
            self._read_steps(keep=0)
            self.save()


# ------------------------------------------------------------------------- as a program


def watch_signals() -> Callable[[], str | None]:
    """Watch for signals and, if a launcher watches us, for the end of its pipe on stdin.

    A launcher writes ``watched`` into the pipe first. Processes of one job share the pipe: what one
    reads, no other sees, so only the main process watches it.
    """
    reasons: list[str] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, _: reasons.append(f"received {signal.Signals(n).name}"))
    is_pipe = step.is_main() and stat.S_ISFIFO(os.fstat(0).st_mode)
    is_watched = is_pipe and select.select([0], [], [], 0)[0] and os.read(0, 8) == b"watched\n"

    def reason() -> str | None:
        if is_watched and select.select([0], [], [], 0)[0]:
            reasons.append("the watching process is gone")
        return reasons[0] if reasons else None

    return reason


def train_run(run: Path, must_stop: Callable[[], str | None], local_rank: int) -> int:
    """Train one run and return an exit status; what was wrong is printed."""
    try:
        with locks.lock(run) if step.is_main() else nullcontext():
            if runs.read_result(run) is None:
                trainer = Trainer(run, local_rank=local_rank)
                trainer.must_stop = must_stop
                trainer.run()
        return 0
    except (ValueError, locks.Locked, Diverged) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if not isinstance(error, locks.Locked):  # a launcher logs to the first of several runs
            with suppress(OSError), open(run / "train.log", "a") as log:
                log.write(f"error: {error}\n")
        return 3 if isinstance(error, Diverged) else 2
    except (RuntimeError, OSError, AssertionError) as error:
        traceback.print_exc()
        text = (
            f"error: process {step.rank()} of {step.world_size()} cannot go on ({error!s:.120}); if "
            "another one died, its message is above. The last checkpoint is kept: run the same "
            "command again to go on."
        )
        print(text, file=sys.stderr, flush=True)
        return 1


def main(arguments: list[str] | None = None) -> int:
    """Train the runs in folders that hold ``config.json``, in turn.

    Exit status: 0 done, 2 wrong request, 3 diverged, 128 + signal when stopped; of several runs that
    of the first failure.
    """
    parser = argparse.ArgumentParser(prog="python -m llmlib.train", description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    folders = parser.parse_args(arguments).runs
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64  # of shapes in one process
    step.keep_freed_memory()
    local_rank, statuses = step.join_processes(), []
    must_stop = watch_signals()
    try:
        for run in folders:
            statuses.append(train_run(run, must_stop, local_rank))
            if statuses[-1] and step.world_size() > 1:
                break  # the others have been left waiting
    except Stopped as stopped:
        print(stopped, flush=True)
        names = (s for s in signal.Signals if f" {s.name}:" in str(stopped))
        return 128 + next(names, signal.SIGTERM)
    finally:
        step.leave_processes()
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
