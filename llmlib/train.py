"""A run that spends its budget exactly and survives: resume, trouble, several processes.

``Trainer.run`` reads as the algorithm. The step is in ``step``, the clock in ``budget``, what is kept
on disk in ``resume``; notebooks start a run in a process of its own through ``launch``. As a program:
``python -m llmlib.train RUN [RUN ...]``, under torchrun on several GPUs or machines (which then
share the run's folder). Everything about a run stands in its ``config.json``.
"""

import argparse
import math
import os
import select
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmlib import checkpoint, data, devices, optim, runs, schedule, step
from llmlib.resume import ResumableRun
from llmlib.sizing import flops_per_token

MAX_BAD_STEPS = 3  # steps in a row that are not finite before the run goes back, once
COMPILE_SECONDS = 30.0  # what compiling may take, until it is known
CACHED_SHARE = 0.5  # of that with a cached graph; on two CPU cores a third (8 against 24 s)
Question = Callable[[], str | None]  # why must the run stop? None: it need not


class Stopped(Exception):
    """The run was asked to stop; it has saved itself and can be resumed."""


class Diverged(Exception):
    """The run met losses that are not finite, and going back did not cure it."""


class Trainer(ResumableRun):
    """A run that trains until its budget is spent; before every step it asks ``must_stop``."""

    def __init__(self, path: Path, *, local_rank: int = 0, must_stop: Question = lambda: None):
        super().__init__(path, local_rank)
        self.must_stop = must_stop
        self.is_warm = False  # the first step has been taken, and has compiled
        self.n_bad_in_a_row = 0
        self.eval_seconds = 0.0  # of the last validation

    # ------------------------------------------------------------------ the algorithm

    def run(self) -> dict[str, Any]:
        """Train until the budget is spent and return the result."""
        self.begin_or_resume()
        self.fast_model = self._compile()
        tokens, config = data.open_split(self.about.tokens_dir, "train"), self.config
        shape = self.about.model.seq_len, config.n_sequences
        share = {"rank": step.rank(), "world_size": step.world_size()}
        batches = data.Batches(tokens, *shape, seed=config.seed)
        batches = data.prefetch(batches, self.state.data_step, self.device, **share)
        self.ledger.start()
        while (progress := self._next_progress()) is not None:
            self._take_step(*next(batches), progress)
            if self.n_bad_in_a_row == MAX_BAD_STEPS:
                self._go_back()
            elif step.is_main():
                self._validate_if_due()
                self._save_if_due()
        return self._finish()

    def _next_progress(self) -> float | None:
        """Take from the main process how far the run is, None when the budget is spent."""
        state, mine, reason = self.state, None, None
        if not state.is_over:
            mine = self.budget.next_progress(state.step, self.ledger, before=state.progress)
            reason = None if mine is None else self.must_stop()
        progress, stops = step.broadcast(-1.0 if mine is None else mine, reason is not None)
        if stops:
            failure = self.save_now() if step.is_main() else None
            step.broadcast(0.0)  # whoever leaves first ends the job
            saved = f"stopped, but {failure}" if failure else "saved and stopped"
            raise Stopped(
                f"{reason or 'stopped by the main process'}: {saved} at step {state.step}. "
                "Run the same command again to go on."
            )
        return None if progress < 0 else progress

    def _take_step(self, inputs: Tensor, targets: Tensor, progress: float) -> None:
        """Take a step, book it and log it; one that is not finite takes no gradient."""
        if not self.is_warm:
            self.write("phase", text="compilation begins")
        state, factor = self.state, schedule.lr_factor(self.config, progress)
        self.optimizer.momentum = schedule.momentum(self.config, progress)  # Muon's
        loss, norm = self._try_step(inputs, targets, factor).tolist()
        seconds = self._book_step()
        state.step, state.data_step, state.progress = state.step + 1, state.data_step + 1, progress
        if not math.isfinite(loss + norm):
            self.n_bad_in_a_row += 1
            state.n_skipped += 1
            self.event(f"step {state.step} took no gradient: loss {loss}, gradient norm {norm}")
            return
        self.n_bad_in_a_row = 0
        if progress > 1 - self.config.average:
            state.n_averaged += 1
            optim.average_weights(self.optimizer, 1 / state.n_averaged)
        tokens_per_s, peak = self.tokens_per_step / seconds, self.about.peak_flops_per_s
        flops_per_s = tokens_per_s * flops_per_token(self.about.model) / step.world_size()
        row = {"progress": progress, "lr": self.config.lr * factor, "loss": loss, "grad_norm": norm}
        row |= {"tokens_per_s": tokens_per_s, "mfu": peak and flops_per_s / peak}
        self.write("step", **row, seconds_left=self.budget.seconds_left(state.step, self.ledger))

    def _try_step(self, inputs: Tensor, targets: Tensor, factor: float) -> Tensor:
        """Take a step; in smaller micro-batches if memory ends, uncompiled if the compiler fails.

        Returns loss and gradient norm.
        """
        how = {"grad_clip": self.config.grad_clip, "dtype": self.dtype, "lr_factor": factor}
        while True:
            how["micro_batch"] = self.micro_batch
            try:
                return step.train_step(self.fast_model, self.optimizer, inputs, targets, **how)
            except Exception as error:
                fits = not devices.is_out_of_memory(error)
                if fits and (self.is_warm or not self.is_compiled):
                    raise
                why = devices.why_uncompiled(error)
            # Tried again outside of the handler, which keeps what did not fit alive.
            if fits:  # if it was not the compiler's, the error comes back
                self.is_compiled, self.fast_model = False, step.average_gradients(self.model)
                self.event(why)
                continue
            if self.micro_batch == 1 or step.world_size() > 1:  # the others would wait for ever
                raise ValueError(
                    f"micro_batch={self.micro_batch} does not fit into this device's memory; "
                    "choose a smaller micro_batch, seq_len or model."
                )
            self.state.micro_batch = -(-self.micro_batch // 2)
            self.is_warm = False  # the new shape is compiled
            self.optimizer.zero_grad(set_to_none=True)
            devices.empty_cache()
            self.event(f"out of memory: micro_batch is now {self.micro_batch}")

    def _book_step(self) -> float:
        """Book a step [s]; the first of a process compiles and says nothing about the next."""
        if self.is_warm:
            self.state.step_seconds = seconds = self.ledger.book("training")
            self.budget.observe(seconds)
        else:
            seconds = self.ledger.book("compile")
            self.state.compile_seconds = max(self.state.compile_seconds, seconds)
            self.is_warm = True
        return seconds

    def _go_back(self) -> None:
        """Go back once after several steps in a row that were not finite, with other data ahead."""
        self.saver.wait()
        step.broadcast(0.0)  # the main process has finished writing
        newest, state = checkpoint.newest_valid(self.saver.folder), self.state
        if state.n_rollbacks or newest is None:
            raise Diverged(
                f"losses at step {state.step} are not finite, even after going back; the last "
                f"good checkpoint is kept. Lower lr (now {self.config.lr}) or look at the data there."
            )
        kept = {name: getattr(state, name) for name in ("data_step", "micro_batch", "n_skipped")}
        self.load(newest, **kept, n_rollbacks=1)
        self.book_lost()
        self.n_bad_in_a_row = 0

    def _validate_if_due(self) -> None:
        """Validate at even shares of the budget, or as soon after as it fits; the last is off it."""
        due = int(self.state.progress * self.config.n_evals)
        guess = self.budget.step_seconds * len(self.windows) / self.config.n_sequences
        fits = self.budget.fits(self.ledger, self.eval_seconds or guess)
        if self.state.n_evals < due < self.config.n_evals and fits:
            self.state.n_evals = due
            self.write("phase", text="validation begins")
            scores = step.evaluate(self.model, self.windows, self.device, self.dtype)
            self.eval_seconds = self.ledger.book("validation")
            row = {"val_loss": scores["loss"], "val_accuracy": scores["accuracy"]}
            self.write("eval", **row, val_sha256=self.state.val_sha256)

    def _save_if_due(self) -> None:
        """Save at fixed times, or as soon after as it fits; a save that failed costs no more."""
        if failure := self.save_failure():
            self.event(f"{failure}; training goes on")
        if self.ledger.total >= self.save_at and self.budget.fits(self.ledger, self.save_seconds):
            self.save()

    def _finish(self) -> dict[str, Any]:
        """Evaluate off the clock, on the whole split if so asked, and write weights and result.

        A finished run needs no checkpoint.
        """
        self.state.is_over, result = True, {}
        if step.is_main():
            if failure := self.save_now():
                self.event(failure)
            if self.state.n_averaged:
                optim.use_average(self.optimizer)
            windows = self.eval_windows(None) if self.config.eval_all else self.windows
            final = step.evaluate(self.model, windows, self.device, self.dtype)
            result = self.summary() | {"val": final, "val_sha256": data.sha256(windows)}
            if self.config.keep_weights:
                save_file(self.model.state_dict(), self.path / "model.safetensors")
                checkpoint.sync(self.path / "model.safetensors")
            runs.write_json(self.path / "result.json", result)  # it means done
            for folder in (self.saver.folder, self.path / "compiled"):  # for resumes only
                shutil.rmtree(folder, ignore_errors=True)
        step.broadcast(0.0)
        return result

    def _compile(self) -> nn.Module:
        """Compile, if that leaves room for two steps, and spread over the processes.

        Runs of equal shape in one process share their graphs: weights are inputs of a graph. One
        against the clock shares them with none, so that all of a comparison pay for their own.
        """
        seconds, cost = self.state.step_seconds, self.state.compile_seconds or COMPILE_SECONDS
        if (self.path / "compiled").exists():  # by an earlier process of this run
            cost *= CACHED_SHARE
        [fits] = step.broadcast(self.budget.fits(self.ledger, cost + 2 * seconds))
        wants = self.config.compile
        model = self.model
        if wants and fits:
            is_clocked = self.config.budget_hours is not None
            devices.use_compile_cache(self.path / "compiled" if is_clocked else None)
            model = devices.compile_model(model, self.device)
        self.is_compiled = model is not self.model
        if seconds:
            self.budget.observe(2 * seconds if wants and not fits else seconds)
        return step.average_gradients(model)


# ------------------------------------------------------------------------- as a program


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


def train_run(run: Path, must_stop: Question, local_rank: int) -> int:
    """Train one run and return an exit status; what was wrong is printed and kept in its log."""
    try:
        if runs.read_result(run) is None:
            Trainer(run, local_rank=local_rank, must_stop=must_stop).run()
        return 0
    except Stopped as stopped:
        print(stopped, flush=True)
        names = (s for s in signal.Signals if f" {s.name}:" in str(stopped))
        return 128 + next(names, signal.SIGTERM)
    except (ValueError, Diverged) as error:
        text, status = f"error: {error}", 3 if isinstance(error, Diverged) else 2
    except Exception as error:
        text, status = traceback.format_exc(), 1
        text += (
            f"error: process {step.rank()} of {step.world_size()} cannot go on ({error!s:.120}); if "
            "another one died, its message is above. The last checkpoint is kept: run the same "
            "command again to go on."
        )
    print(text, file=sys.stderr, flush=True)
    with suppress(OSError), open(run / "train.log", "a") as log:
        if not os.path.sameopenfile(2, log.fileno()):  # the launcher's, of the first of its runs
            log.write(f"{text}\n")
    return status


def main(arguments: list[str] | None = None) -> int:
    """Train the runs in folders that hold ``config.json``, in turn.

    Exit status: 0 done, 1 broken, 2 wrong request, 3 diverged, 128 + signal when stopped; of several
    runs the greatest.
    """
    parser = argparse.ArgumentParser(prog="python -m llmlib.train", description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--watched", action="store_true", help="leave when stdin closes")
    options, status = parser.parse_args(arguments), 0
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64  # of shapes in one process
    devices.keep_freed_memory()
    local_rank, must_stop = step.join_processes(), watch_signals(options.watched and step.is_main())
    for run in options.runs:
        try:
            with runs.lock(run) if step.is_main() else nullcontext():
                status = max(status, train_run(run, must_stop, local_rank))
        except runs.Locked as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            status = max(status, 2)
        if status > 128 or (status and step.world_size() > 1):
            break  # asked to stop, or the other processes have been left waiting
    step.leave_processes()
    return status


if __name__ == "__main__":
    sys.exit(main())
