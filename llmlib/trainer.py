"""A run that spends its budget exactly and survives: resume, trouble, several processes.

``Trainer.run`` reads as the algorithm. The step is in ``step``, the clock in ``budget``; ``train`` is
the program. Each row of ``metrics.jsonl`` says what was spent, so that a restart knows it, however
the run ended.
"""

import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from llmlib import checkpoint, data, devices, runs, step
from llmlib.budget import KINDS, Budget
from llmlib.model import build_model
from llmlib.optim import build_optimizer, lr_factor
from llmlib.sizing import count_params, flops_per_token

MAX_BAD_STEPS = 3  # steps in a row that are not finite before the run goes back, once
COMPILE_SECONDS = 30.0  # what compiling may take, until it is known
Question = Callable[[], str | None]  # why must the run stop? None: it need not


class Stopped(Exception):
    """The run was asked to stop; it has saved itself and can be resumed."""


@dataclass
class TrainState:
    """What a checkpoint brings back beside weights and optimizer."""

    micro_batch: int  # sequences, smaller than the config's after running out of memory
    step: int = 0  # optimizer steps taken
    progress: float = 0.0  # of the last one
    data_step: int = 0  # batches drawn: never goes back, so no data is met twice after trouble
    n_skipped: int = 0  # steps that took no gradient
    n_rollbacks: int = 0
    is_over: bool = False  # the budget is spent
    seconds: dict[str, float] = field(default_factory=dict)  # the budget's ledger


class Trainer:
    """A run that trains until its budget is spent; before every step it asks ``must_stop``."""

    def __init__(self, path: Path, *, must_stop: Question = lambda: None):
        self.path, self.must_stop = path, must_stop
        self.about = about = runs.read_run(path)
        self.config = config = about.train
        if config.n_sequences % (n := step.world_size()):
            raise ValueError(
                f"a step's {config.n_sequences} sequences do not divide among {n} processes; change "
                "micro_batch or grad_accum."
            )
        self.tokens_per_step = config.n_sequences * about.model.seq_len
        self.budget = Budget(config, self.tokens_per_step)
        self.split = about.tokens_dir, "val", about.model.seq_len  # of the validation windows
        self.windows = data.eval_windows(*self.split, config.eval_windows)
        self.device = devices.pick_device(needed=config.needs_accelerator)
        self.dtype = devices.compute_dtype(self.device, config.dtype)
        model = build_model(about.model, seed=config.seed, zero_init=config.zero_init)
        self.model = model.to(self.device)
        self.optimizer = build_optimizer(self.model, config, self.dtype)
        self.state = TrainState(config.micro_batch)
        self.saver = checkpoint.Saver(path / "checkpoints")
        self.log = runs.MetricLog(path, config.tracker)
        self.is_warm = False  # the first step has been taken, and has compiled
        self.n_bad_in_a_row = 0

    def run(self) -> dict[str, Any]:
        """Train until the budget is spent and return the result."""
        self._begin_or_resume()
        self.fast_model = self._compile()
        tokens, n = data.open_split(self.about.tokens_dir, "train"), self.config.n_sequences
        batches = data.Batches(tokens, self.about.model.seq_len, n, seed=self.config.seed)
        share = {"rank": step.rank(), "world_size": step.world_size()}
        batches = data.prefetch(batches, self.state.data_step, self.device, **share)
        self.budget.start()
        while not self.state.is_over and (progress := self._next_progress()) is not None:
            before = self.state.progress
            self._take_step(*next(batches), progress)
            if self.n_bad_in_a_row == MAX_BAD_STEPS:
                self._go_back()
            elif step.is_main():
                self._validate_if_due(before)
                self._save_if_due()
        return self._finish()

    def _next_progress(self) -> float | None:
        """Take from the main process how far the run is, None when the budget is spent."""
        state = self.state
        mine = self.budget.next_progress(state.step, before=state.progress)
        reason = None if mine is None else self.must_stop()
        progress, stops = step.broadcast(-1.0 if mine is None else mine, reason is not None)
        if stops:
            failure = self._save(waits=True) if step.is_main() else None
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
        state, factor = self.state, lr_factor(self.config, progress)
        loss, norm = self._try_step(inputs, targets, factor).tolist()
        seconds = self.budget.book("training" if self.is_warm else "compile")
        self.is_warm = True
        state.step, state.data_step, state.progress = state.step + 1, state.data_step + 1, progress
        if not math.isfinite(loss + norm):
            self.n_bad_in_a_row += 1
            state.n_skipped += 1
            self.event(f"step {state.step} took no gradient: loss {loss}, gradient norm {norm}")
            return
        self.n_bad_in_a_row = 0
        tokens_per_s, peak = self.tokens_per_step / seconds, self.about.peak_flops_per_s
        flops_per_s = tokens_per_s * flops_per_token(self.about.model) / step.world_size()
        row = {"progress": progress, "lr": self.config.lr * factor, "loss": loss, "grad_norm": norm}
        row |= {"tokens_per_s": tokens_per_s, "mfu": peak and flops_per_s / peak}
        self.write("step", **row, seconds_left=self.budget.seconds_left(state.step))

    def _try_step(self, inputs: Tensor, targets: Tensor, factor: float) -> Tensor:
        """Take a step; in smaller micro-batches if memory ends, uncompiled if the compiler fails.

        Returns loss and gradient norm.
        """
        how = {"grad_clip": self.config.grad_clip, "dtype": self.dtype, "lr_factor": factor}
        while True:
            how["micro_batch"] = n = self.state.micro_batch
            try:
                return step.train_step(self.fast_model, self.optimizer, inputs, targets, **how)
            except Exception as error:
                if devices.is_out_of_memory(error):
                    if n == 1 or step.world_size() > 1:  # the others would wait for ever
                        raise ValueError(
                            f"micro_batch={n} does not fit into this device's memory; choose a "
                            "smaller micro_batch, seq_len or model."
                        ) from error
                    self.state.micro_batch = -(-n // 2)
                    change = f"out of memory: micro_batch is now {self.state.micro_batch}"
                elif self.is_warm or not self.is_compiled:
                    raise
                else:  # if it was not the compiler's, the error comes back
                    self.is_compiled, self.fast_model = False, step.average_gradients(self.model)
                    change = devices.why_uncompiled(error)
            # Outside of the handler, which keeps what did not fit alive.
            self.is_warm = False  # the new shape is compiled
            self.optimizer.zero_grad()
            if devices.accelerator():
                torch.accelerator.empty_cache()
            self.event(change)

    def _go_back(self) -> None:
        """Go back once after several steps in a row that were not finite, with other data ahead."""
        self.saver.wait()
        step.broadcast(0.0)  # the main process has finished writing
        newest, state = checkpoint.newest_valid(self.saver.folder), self.state
        if state.n_rollbacks or newest is None:
            raise ValueError(
                f"losses at step {state.step} are not finite, even after going back; the last good "
                f"checkpoint is kept. Lower lr (now {self.config.lr}) or look at the data there."
            )
        kept = {name: getattr(state, name) for name in ("data_step", "micro_batch", "n_skipped")}
        self._go_on_from(newest, None, **kept, n_rollbacks=1)
        self.n_bad_in_a_row = 0

    def _validate_if_due(self, before: float) -> None:
        """Validate at even shares of the budget, where it fits; the last one is off the clock."""
        n, progress = self.config.n_evals, self.state.progress
        guess = self.budget.step_seconds * len(self.windows) / self.config.n_sequences
        if int(before * n) < int(progress * n) < n and self.budget.fits("validation", guess):
            scores = step.evaluate(self.model, self.windows, self.device, self.dtype)
            self.budget.book("validation")
            row = {"val_loss": scores["loss"], "val_accuracy": scores["accuracy"]}
            self.write("eval", **row, val_sha256=data.sha256(self.windows))

    def _save_if_due(self) -> None:
        """Save at fixed times, or as soon after as it fits; a save that failed costs no more."""
        # After a restart, the time of the last save is among the lost.
        guess = self.budget.seconds["checkpoint"] + self.budget.seconds["lost"]
        fits = self.budget.fits("checkpoint", guess)
        if self.budget.total >= self.save_at and fits and (failure := self._save()):
            self.event(failure)

    def _finish(self) -> dict[str, Any]:
        """Evaluate off the clock, on the whole split if so asked, and write weights and result.

        A finished run needs no checkpoint.
        """
        result = {}
        if step.is_main():
            if not self.state.is_over:
                self.state.is_over = True
                if failure := self._save(waits=True):
                    self.event(failure)
            windows = data.eval_windows(*self.split) if self.config.eval_all else self.windows
            final = step.evaluate(self.model, windows, self.device, self.dtype)
            result = self._summary() | {"val": final, "val_sha256": data.sha256(windows)}
            if self.config.keep_weights:
                weights = safetensors.torch.save(self.model.state_dict())
                runs.write_atomic(self.path / "model.safetensors", weights)
            runs.write_json(self.path / "result.json", result)  # it means done
            for name in ("checkpoints", "compiled"):  # for resumes only
                shutil.rmtree(self.path / name, ignore_errors=True)
        step.broadcast(0.0)
        return result

    def _compile(self) -> nn.Module:
        """Compile, if that leaves room for a step, and spread over the processes.

        Runs of equal shape in one process share their graphs: weights are inputs of a graph. One
        against the clock shares them with none, so that all of a comparison pay for their own.
        """
        cache, model = self.path / "compiled", self.model
        again = self.budget.seconds["compile"] / 2 if cache.exists() else 0.0  # a third on two CPUs
        [fits] = step.broadcast(self.budget.fits("compile", again or COMPILE_SECONDS))
        if self.config.compile and fits:
            devices.use_compile_cache(cache if self.config.budget_hours else None)
            model = devices.compile_model(model, self.device)
        self.is_compiled = model is not self.model
        return step.average_gradients(model)

    def _begin_or_resume(self) -> None:
        newest = checkpoint.newest_valid(self.saver.folder)
        if newest:
            self._go_on_from(newest, self._logged_seconds())
        elif step.is_main():
            self.log.drop_after(-1)
            if failure := self._save(waits=True):
                raise ValueError(f"{failure}; free some space and run again.")
            self.budget.seconds = dict.fromkeys(KINDS, 0.0)
        self.save_at = self.budget.total + 60 * self.config.checkpoint_minutes

    def _logged_seconds(self) -> float:
        """Read what was spent by the last row; what was begun then lasted at least to the last write."""
        rows = runs.read_metrics(self.path, last=True)
        if rows.empty:
            return 0.0
        files = [self.log.path, *self.saver.folder.rglob("*"), *(self.path / "compiled").rglob("*")]
        written = [path.stat().st_mtime for path in files]
        return float(rows.seconds.iloc[-1]) + max(written) - written[0]

    def _go_on_from(self, path: Path, spent: float | None, **kept: Any) -> None:
        """Load a checkpoint, but for what is ``kept`` of the state; what was spent since is lost."""
        state = checkpoint.restore(self.model, self.optimizer, path)
        self.state = TrainState(**state | kept)
        spent = self.budget.total if spent is None else spent
        lost = self.budget.go_back(self.state.seconds, self.state.step, spent)
        if step.is_main():
            self.log.drop_after(self.state.step)
        self.event(f"went back to step {self.state.step}: {lost:.1f} s since then are lost")

    def _save(self, *, waits: bool = False) -> str | None:
        """Save, and say why that failed, if it ``waits``, or why the save before did."""
        self.state.seconds = dict(self.budget.seconds)
        failure = self.saver.save(self.model, self.optimizer, asdict(self.state))
        failure = self.saver.wait() if waits else failure
        self.budget.book("checkpoint")
        self.save_at = self.budget.total + 60 * self.config.checkpoint_minutes
        return failure and f"the checkpoint could not be saved ({failure}; is the disk full?)"

    def _summary(self) -> dict[str, Any]:
        """Say what the run was and did, but for its final scores."""
        state, model = self.state, self.about.model
        steps = runs.read_metrics(self.path, "step").reindex(columns=["tokens_per_s", "mfu"])
        n_tokens, n = state.step * self.tokens_per_step, step.world_size()
        micro_batch = min(state.micro_batch, self.config.n_sequences // n)
        result = {"n_steps": state.step, "n_tokens": n_tokens, "n_params": count_params(model)}
        result |= {"n_skipped": state.n_skipped, "n_rollbacks": state.n_rollbacks}
        result |= {"seconds": state.seconds, "budget_seconds": self.config.budget_seconds}
        result |= {"flops": flops_per_token(model) * n_tokens}
        result |= {"tokens_per_s": float(steps.tokens_per_s.median())}
        result |= {"mfu": self.about.peak_flops_per_s and float(steps.mfu.median())}
        result |= {"micro_batch": micro_batch, "n_processes": n, "is_compiled": self.is_compiled}
        result |= {"dtype": str(self.dtype).removeprefix("torch.")}
        if hasattr(self.optimizer, "unclipped_share"):  # Sophia
            result["unclipped_share"] = float(self.optimizer.unclipped_share)
        return result

    def event(self, text: str) -> None:
        if step.is_main():
            with suppress(OSError):  # a full disk
                print(text, flush=True)
        self.write("event", text=text)

    def write(self, kind: str, **values: Any) -> None:
        """Write a row, with what was spent so far, from which a restart goes on."""
        n, seconds = self.state.step, round(self.budget.total, 4)
        if step.is_main():
            row = {"step": n, "tokens": n * self.tokens_per_step, "seconds": seconds}
            self.log.write(kind, **row | values)
