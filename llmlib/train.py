"""A run that spends its budget exactly and survives: resume, trouble, several processes.

``Trainer.run`` reads as the algorithm. The step is in ``step``, the budget in ``clock``, saving in
``checkpoint``; notebooks start a run in a process of its own through ``supervise``. As a program:
``python -m llmlib.train RUN --tokens FOLDER``, under torchrun on several GPUs or machines (which
then share the run's folder).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmlib import checkpoint, data, runs
from llmlib.clock import Budget, Ledger, heartbeat, last_heartbeat
from llmlib.config import ModelConfig, TrainConfig
from llmlib.model import build_model
from llmlib.optim import build_optimizer, compute_dtype
from llmlib.schedule import lr_multiplier
from llmlib.sizing import count_params, datasheet_peak, flops_per_token
from llmlib.step import (
    Group,
    Reading,
    compile_model,
    evaluate,
    keep_freed_memory,
    pick_device,
    train_step,
)
from llmlib.tracking import open_tracker

MAX_BAD_STEPS = 3  # steps in a row that are not finite before the run goes back
MAX_ROLLBACKS = 2  # times it goes back before it gives up
UNCOMPILED_SLOWDOWN = 2.0  # what a step is expected to take then, until it is measured
RETRY_SECONDS = 60.0  # until a checkpoint that could not be saved is tried again


class Stopped(Exception):
    """The run was asked to stop; it has saved itself and can be resumed."""


class Diverged(Exception):
    """The run met losses that are not finite, and going back did not cure it."""


@dataclass
class Progress:
    """What a checkpoint brings back beside weights and optimizer."""

    micro_batch: int  # sequences, smaller than the config's after running out of memory
    val_sha256: str  # of the validation windows
    step: int = 0  # optimizer steps taken
    steps_before: int = 0  # of the run whose snapshot this one goes on from
    data_step: int = 0  # batches drawn: never goes back, so no data is met twice after trouble
    n_skipped: int = 0
    n_rollbacks: int = 0
    n_evals: int = 0  # validations that were due
    val_loss: float | None = None  # at this very step, if it is the best yet
    best_val_loss: float | None = None
    step_seconds: float = 0.0  # what a step takes
    compile_seconds: float = 0.0  # what the first step took beyond that
    is_over: bool = False  # the budget is spent
    seconds: dict[str, float] = field(default_factory=dict)  # the ledger


@dataclass
class Flight:
    """A step that was asked of the device, and what is known of it once it is over."""

    step: int
    progress: float
    reading: Reading
    numbers: list[float] | None = None  # loss, gradient norm
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return bool(np.isfinite(self.numbers).all())


class Trainer:
    """A run in a folder: built from its config, resumed from its newest checkpoint."""

    def __init__(
        self,
        path: Path,
        model_config: ModelConfig,
        config: TrainConfig,
        tokens: Path,
        *,
        group: Group | None = None,
        peak_flops_per_s: float | None = None,
    ):
        self.path, self.model_config, self.config = path, model_config, config
        self.group = group or Group()
        self._open_data(tokens)
        self.budget = Budget(config, self.tokens_per_step)
        self._lr_at(0.0)  # an unknown schedule is refused now
        self.device = pick_device(self.group.local_rank)
        self.dtype = compute_dtype(self.device)
        model = build_model(model_config, seed=config.seed, zero_init=config.zero_init)
        self.model = self.fast_model = model.to(self.device)
        self.optimizer = build_optimizer(self.model, config)
        torch.manual_seed(config.seed)
        if peak_flops_per_s is None and self.device.type == "cuda":
            peak_flops_per_s = datasheet_peak(torch.cuda.get_device_name(self.device))
        self.flops_per_step = flops_per_token(model_config) * self.tokens_per_step
        self.peak_flops_per_s = peak_flops_per_s and peak_flops_per_s * self.group.size
        self.ledger = Ledger()
        self.saver = checkpoint.Saver(path / "checkpoints", config.keep_checkpoints)
        self.in_flight: deque[Flight] = deque()
        self.n_ahead = 1 if self.device.type == "cuda" else 0  # steps asked for before they are due
        self.n_taken = 0  # in this process
        self.n_bad_in_a_row = 0
        self.tracker = open_tracker(config.tracker if self.group.leads else None, path)
        self.save_at = self.save_seconds = self.eval_seconds = 0.0
        self.must_stop: Callable[[], str | None] = lambda: None  # asked before every step

    def _open_data(self, tokens: Path) -> None:
        config, seq_len, size = self.config, self.model_config.seq_len, self.group.size
        tokenizer = data.load_manifest(tokens)["tokenizer"]
        if tokenizer["vocab_size"] > self.model_config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer['vocab_size']} tokens but the model's vocab_size is "
                f"{self.model_config.vocab_size}; raise vocab_size to a multiple of 64 above it."
            )
        self.n_sequences = config.micro_batch * config.grad_accum
        if self.n_sequences % size:
            raise ValueError(
                f"micro_batch x grad_accum = {self.n_sequences} sequences do not divide among "
                f"{size} processes; make it a multiple of {size}."
            )
        self.tokens_per_step = self.n_sequences * seq_len
        self.batches = data.Batches(
            data.open_split(tokens, "train"),
            seq_len,
            self.n_sequences,
            seed=config.seed,
            align_documents=config.align_documents,
            end_of_text=tokenizer["end_of_text"],
        )
        val = data.open_split(tokens, "val")
        self.windows = data.eval_windows(val, seq_len, config.eval_sequences)
        self.all_windows = data.eval_windows(val, seq_len) if config.eval_all else self.windows
        self.progress = Progress(config.micro_batch, _sha256(self.windows))

    # ------------------------------------------------------------------ the algorithm

    def run(self) -> dict[str, Any]:
        """Train until the budget is spent and return the result."""
        self._begin_or_resume()
        self.fast_model = self._speed_up()
        batches = data.prefetch(
            self.batches,
            self.progress.data_step,
            self.device,
            rank=self.group.rank,
            world_size=self.group.size,
        )
        self.ledger.start()
        beating = heartbeat(self.ledger, self.path / "heartbeat")
        with beating if self.group.leads else contextlib.nullcontext():
            while True:
                progress = self._next_progress()
                if progress is not None:
                    self._begin_step(*next(batches), progress)
                elif not self.in_flight:
                    break
                self._end_steps(n_left=0 if progress is None or self.n_taken <= 2 else self.n_ahead)
                if self.group.leads and progress is not None:
                    self._save_if_due(has_improved=self._validate_if_due(progress))
        return self._finish()

    def _next_progress(self) -> float | None:
        """Take from the leader how far the run is, None when the budget is spent."""
        is_over = self.progress.is_over
        n_in_flight = sum(flight.numbers is None for flight in self.in_flight)
        mine = self.budget.next_progress(self.progress.step, self.ledger, n_in_flight)
        mine = None if is_over else mine
        reason = None if mine is None else self.must_stop()
        progress, stops = self.group.follow_leader(
            -1.0 if mine is None else mine, reason is not None
        )
        if stops:
            self._stop(reason or "the leading process was asked to stop")
        return None if progress < 0 else progress

    def _stop(self, reason: str) -> NoReturn:
        failure = self._save_now() if self.group.leads else None
        self.ledger.book("checkpoint")
        self.group.wait_for_leader()  # whoever leaves first ends the job
        saved = f"stopped, but {_not_saved(failure)}" if failure else "saved and stopped"
        raise Stopped(
            f"{reason}: {saved} at step {self.progress.step}. Run the same command again to go on."
        )

    def _lr_at(self, progress: float) -> float:
        config = self.config
        shape = config.warmup, config.final_lr, config.cooldown
        return config.lr * lr_multiplier(config.schedule, progress, *shape)

    def _begin_step(self, inputs: Tensor, targets: Tensor, progress: float) -> None:
        """Ask the device for a step; a run on CUDA goes on to ask for the next one meanwhile."""
        numbers = self._take_step(inputs, targets, lr=self._lr_at(progress))
        self.n_taken += 1
        self.progress.step += 1
        self.progress.data_step += 1
        self.in_flight.append(Flight(self.progress.step, progress, Reading(*numbers)))
        if self.progress.step in self.config.snapshot_steps and self.group.leads:
            self._keep_snapshot()

    def _take_step(self, inputs: Tensor, targets: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        while True:
            # Tried again outside of the handler, which keeps what did not fit alive.
            with contextlib.suppress(torch.OutOfMemoryError):
                return train_step(
                    self.fast_model,
                    self.optimizer,
                    inputs,
                    targets,
                    micro_batch=self.micro_batch,
                    lr=lr,
                    grad_clip=self.config.grad_clip,
                    dtype=self.dtype,
                )
            self._halve_micro_batch()

    def _end_steps(self, n_left: int) -> None:
        """Wait for all but the last few steps asked for, and judge them."""
        while len(self.in_flight) > n_left:
            self._wait_for(flight := self.in_flight.popleft())
            if flight.is_good:
                self.n_bad_in_a_row = 0
            else:
                self._skip_or_go_back(flight)

    def _wait_for(self, *flights: Flight) -> None:
        """Learn how steps ended, book their time and log them, once."""
        for flight in flights:
            if flight.numbers is None:
                flight.numbers = flight.reading.get()
                flight.seconds = self._book_step()
                if self.group.leads and flight.is_good:
                    self._log_step(flight)

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass in each process."""
        return min(self.progress.micro_batch, self.n_sequences // self.group.size)

    def _halve_micro_batch(self) -> None:
        if self.micro_batch == 1 or self.group.size > 1:  # the others would wait for ever
            raise ValueError(
                f"micro_batch={self.micro_batch} does not fit into this device's memory; "
                "choose a smaller micro_batch, seq_len or model."
            )
        self.progress.micro_batch = -(-self.micro_batch // 2)
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._event(
            f"out of memory: micro_batch is now {self.micro_batch}, "
            f"tokens per step stay {self.tokens_per_step}"
        )

    def _book_step(self) -> float:
        """Book a step; what the first took beyond the second was compilation and warm-up."""
        progress = self.progress
        if self.n_taken == 1:
            self.first_seconds = self.ledger.book("compile")
            return self.first_seconds
        progress.step_seconds = self.ledger.book("training")
        self.budget.observe(progress.step_seconds)
        if self.n_taken == 2:
            usual = min(progress.step_seconds, self.first_seconds)
            self.ledger.move(usual, "compile", "training")
            extra = self.first_seconds - usual
            progress.compile_seconds = max(progress.compile_seconds, extra)
        return progress.step_seconds

    def _skip_or_go_back(self, flight: Flight) -> None:
        """Count a step without a gradient; after several in a row, go back with other data ahead."""
        self.progress.n_skipped += 1
        self.n_bad_in_a_row += 1
        loss, norm = flight.numbers
        self._event(f"step {flight.step} took no gradient: loss {loss}, gradient norm {norm}")
        if self.n_bad_in_a_row < MAX_BAD_STEPS:
            return
        self.saver.wait()
        self.group.wait_for_leader()  # it has finished writing
        newest = checkpoint.newest_valid(self.saver.folder)
        if self.progress.n_rollbacks == MAX_ROLLBACKS or newest is None:
            raise Diverged(
                f"losses at step {self.progress.step} are not finite, even after going back "
                f"{self.progress.n_rollbacks} times; the last good checkpoint is kept. Lower lr "
                f"(now {self.config.lr}) or look at the data around this step."
            )
        self.progress = replace(
            self._load(newest),
            data_step=self.progress.data_step,
            micro_batch=self.progress.micro_batch,
            n_skipped=self.progress.n_skipped,
            n_rollbacks=self.progress.n_rollbacks + 1,
        )
        self.n_bad_in_a_row = 0
        self.in_flight.clear()
        self._go_back()

    def _validate_if_due(self, share: float) -> bool:
        """Validate at even shares of the budget, or as soon after as it fits; say if it is the best.

        The last validation is left to ``_finish``, which uses the whole split off the clock.
        """
        progress = self.progress
        progress.val_loss = None
        due = int(share * self.config.n_evals)
        guess = 0.5 * self.budget.step_seconds * len(self.windows) / self.n_sequences
        fits = self.budget.fits(self.ledger, self.eval_seconds or guess)
        if share == 1.0 or due <= progress.n_evals or not fits:
            return False
        self._wait_for(*self.in_flight)
        result = evaluate(self.model, self.windows, self.device, self.dtype)
        self.eval_seconds = self.ledger.book("validation")
        self._log(
            "eval",
            val_loss=result["loss"],
            val_accuracy=result["accuracy"],
            val_sha256=_sha256(self.windows),
        )
        progress.n_evals = due
        has_improved = result["loss"] < (progress.best_val_loss or np.inf)
        if has_improved:
            progress.val_loss = progress.best_val_loss = result["loss"]
        return has_improved

    def _finish(self) -> dict[str, Any]:
        """Evaluate on the whole validation split, off the clock, and write weights and result."""
        result: dict[str, Any] = {}
        self.progress.is_over = True
        if self.group.leads:
            while failure := self._save_now():
                self._event(f"{_not_saved(failure)}; the run is over and waits for it")
                if reason := self.must_stop():
                    raise Stopped(f"{reason}: the end of the run could not be saved ({failure}).")
                time.sleep(RETRY_SECONDS)
            result = self._result(evaluate(self.model, self.all_windows, self.device, self.dtype))
            temporary = self.path / ".model.safetensors.tmp"
            save_file(self.model.state_dict(), temporary)
            checkpoint.sync(temporary)
            os.replace(temporary, self.path / "model.safetensors")
            runs.write_json(self.path / "training.json", result)
        self.group.wait_for_leader()
        return result

    def _result(self, final: dict[str, Any]) -> dict[str, Any]:
        steps = runs.read_metrics(self.path)
        steps = steps[steps.kind == "step"]
        n_tokens = self._tokens_at(self.progress.step)
        return {
            "val": final,
            "n_steps": self.progress.step,
            "n_tokens": n_tokens,
            "tokens_per_step": self.tokens_per_step,
            "n_params": count_params(self.model_config),
            "flops": flops_per_token(self.model_config) * n_tokens,
            "tokens_per_s": float(steps.tokens_per_s.median()),
            "mfu": None if self.peak_flops_per_s is None else float(steps.mfu.median()),
            "budget_seconds": self.config.budget_seconds,
            "seconds": self.ledger.seconds,
            "n_skipped": self.progress.n_skipped,
            "n_rollbacks": self.progress.n_rollbacks,
            "micro_batch": self.micro_batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "is_compiled": self.is_compiled,
            "n_processes": self.group.size,
            "val_sha256": _sha256(self.all_windows),
        } | {
            name: float(getattr(self.optimizer, name))
            for name in ("n_hessian_passes", "unclipped_share")
            if hasattr(self.optimizer, name)
        }

    # ------------------------------------------------------------------ saving and resuming

    def _begin_or_resume(self) -> None:
        newest = checkpoint.newest_valid(self.saver.folder)
        if newest is not None:
            self.progress = self._load(newest)
            spent = {} if self.progress.is_over else last_heartbeat(self.path / "heartbeat")
            later = max(self.progress.seconds, spent, key=lambda seconds: sum(seconds.values()))
            self.ledger = Ledger(later)
            self._go_back()
        else:
            self._start_from_snapshot()
            if self.group.leads:
                self._keep_metrics(up_to=-1)
                if failure := self._save_now():
                    raise ValueError(f"{_not_saved(failure)}; free some space and run again.")
                self.ledger = Ledger()
        self.group.wait_for_leader()
        self.save_at = self.ledger.total + 60 * self.config.checkpoint_minutes
        self._event(f"validation set sha256 {self.progress.val_sha256}")

    def _start_from_snapshot(self) -> None:
        """Take weights, optimizer and place in the data from another run, if the config says so."""
        if self.config.start_from is None:
            return
        path = self.path / self.config.start_from
        if not path.exists():
            raise ValueError(
                f"start_from={self.config.start_from!r} is not there; run its run first."
            )
        before = self._load(path)
        self.progress.data_step = before.data_step
        self.progress.steps_before = before.steps_before + before.step

    def _keep_snapshot(self) -> None:
        self._wait_for(*self.in_flight)
        tensors = checkpoint.snapshot(self.model, self.optimizer)
        checkpoint.write(self.path / "snapshots", *tensors, asdict(self.progress))
        self.ledger.book("checkpoint")

    def _load(self, path: Path) -> Progress:
        progress = Progress(**checkpoint.restore(self.model, self.optimizer, path))
        if progress.val_sha256 != self.progress.val_sha256:
            raise ValueError(
                f"the validation set is not the one that run {self.path.name} began with; give "
                "the tokens that it began with, or start another run."
            )
        return progress

    def _go_back(self) -> None:
        """Book training since the loaded checkpoint as lost and drop its metrics."""
        self.ledger.book("lost")
        before, now = self.progress.seconds, self.ledger.seconds
        self.ledger.move(max(0.0, now["training"] - before["training"]), "training", "lost")
        if self.group.leads:
            self._keep_metrics(up_to=self.progress.step)
        lost = now["lost"] - before["lost"]
        self._event(f"went back to step {self.progress.step}: {lost:.1f} s since then are lost")

    def _speed_up(self) -> nn.Module:
        """Compile, if that leaves room for two steps, and spread over the processes."""
        step_seconds = self.progress.step_seconds
        fits = self.budget.fits(self.ledger, self.progress.compile_seconds + 2 * step_seconds)
        [compiles] = self.group.follow_leader(self.config.compile and fits)
        model = compile_model(self.model, self.device) if compiles else self.model
        if self.config.compile and not compiles:
            self._event("too little time is left for compiling: going on without")
            step_seconds *= UNCOMPILED_SLOWDOWN
        if step_seconds:
            self.budget.observe(step_seconds)
        self.is_compiled = model is not self.model
        return self.group.share(model)

    def _save_if_due(self, has_improved: bool) -> None:
        """Save at the best validation losses and at fixed times, or as soon after as it fits."""
        if failure := self.saver.take_failure():
            self._event(f"{_not_saved(failure)}; training goes on and tries again in a minute")
            self.save_at = self.ledger.total + RETRY_SECONDS
        is_due = has_improved or self.ledger.total >= self.save_at
        if is_due and self.budget.fits(self.ledger, self.save_seconds):
            self._save()
            self.save_seconds = self.ledger.book("checkpoint")

    def _save(self) -> None:
        self._wait_for(*self.in_flight)
        self.progress.seconds = dict(self.ledger.seconds)
        self.saver.save(self.model, self.optimizer, asdict(self.progress))
        self.save_at = self.ledger.total + 60 * self.config.checkpoint_minutes

    def _save_now(self) -> BaseException | None:
        """Save, wait until it is done, and return what failed."""
        self._save()
        self.saver.wait()
        return self.saver.take_failure()

    # ------------------------------------------------------------------ the record

    def _log_step(self, flight: Flight) -> None:
        loss, norm = flight.numbers
        per_s = 1 / flight.seconds
        self._log(
            "step",
            flight.step,
            progress=flight.progress,
            lr=self._lr_at(flight.progress),
            loss=loss,
            grad_norm=norm,
            tokens_per_s=self.tokens_per_step * per_s,
            mfu=self.peak_flops_per_s and self.flops_per_step * per_s / self.peak_flops_per_s,
            seconds_left=self.budget.seconds_left(self.progress.step, self.ledger),
        )

    def _event(self, text: str) -> None:
        if self.group.leads:
            with contextlib.suppress(OSError):
                print(text, flush=True)
            self._log("event", text=text)

    def _log(self, kind: str, step: int | None = None, **values: Any) -> None:
        step = self.progress.step if step is None else step
        row = {
            "kind": kind,
            "step": step,
            "tokens": self._tokens_at(step),
            "seconds": round(self.ledger.total, 4),
        } | values
        with contextlib.suppress(OSError):  # a full disk must not end the run
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            self.tracker.log(row)

    def _tokens_at(self, step: int) -> int:
        return (self.progress.steps_before + step) * self.tokens_per_step

    def _keep_metrics(self, up_to: int) -> None:
        """Drop steps and validations that will be met again, and half-written lines."""
        path = self.path / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if row["kind"] == "event" or row["step"] <= up_to:
                    kept.append(line + "\n")
        runs.write_atomic(path, "".join(kept))


def _sha256(windows: np.ndarray) -> str:
    return hashlib.sha256(windows.tobytes()).hexdigest()


def _not_saved(failure: BaseException) -> str:
    return f"the checkpoint could not be saved ({failure}; is the disk full?)"


# ------------------------------------------------------------------------- as a program


def watch(is_supervised: bool) -> Callable[[], str | None]:
    """Watch for signals and, if supervised, for the end of the supervisor's pipe on stdin."""
    reasons: list[str] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: reasons.append(f"received {signal.Signals(n).name}"))

    def reason() -> str | None:
        if is_supervised and select.select([sys.stdin], [], [], 0)[0]:
            reasons.append("the supervising process is gone")
        return reasons[0] if reasons else None

    return reason


def read_config(run: Path) -> tuple[ModelConfig, TrainConfig]:
    """Read what the run in a folder is made of."""
    try:
        config = runs.read_json(run / "config.json")
        return ModelConfig(**config["model"]), TrainConfig(**config["train"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{run / 'config.json'} is missing or not a run's config ({error}); 05_full_run writes one."
        ) from error


@contextlib.contextmanager
def lock(run: Path, group: Group) -> Iterator[None]:
    """Own the run's folder as a group, or refuse in all its processes."""
    refusal: runs.Locked | None = None
    with contextlib.ExitStack() as stack:
        if group.leads:
            try:
                stack.enter_context(runs.lock(run))
            except runs.Locked as error:
                refusal = error
        if any(group.follow_leader(refusal is not None)):
            raise refusal or runs.Locked(f"run {run.name} is in use by another process.")
        yield


def main(arguments: list[str] | None = None) -> int:
    """Train the run in a folder that holds ``config.json``; return an exit status."""
    parser = argparse.ArgumentParser(prog="python -m llmlib.train", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder with config.json")
    parser.add_argument("--tokens", type=Path, required=True, help="folder that 01_data_prep wrote")
    parser.add_argument("--peak-flops", type=float, help="the device's peak for MFU [FLOP/s]")
    parser.add_argument("--supervised", action="store_true", help="stop when stdin is closed")
    options = parser.parse_args(arguments)
    must_stop = watch(options.supervised)
    keep_freed_memory()
    group = Group.join()
    if compute_dtype(pick_device(group.local_rank)) != torch.float32:
        torch.set_float32_matmul_precision("high")
    try:
        model_config, config = read_config(options.run)
        with lock(options.run, group):
            if (options.run / "training.json").exists():
                return 0
            trainer = Trainer(
                options.run,
                model_config,
                config,
                options.tokens,
                group=group,
                peak_flops_per_s=options.peak_flops,
            )
            if group.leads and not (options.run / "environment.json").exists():
                runs.write_json(options.run / "environment.json", runs.environment())
            trainer.must_stop = must_stop
            trainer.run()
        return 0
    except Stopped as stopped:
        print(stopped, flush=True)
        return 130 if "SIGINT" in str(stopped) else 143
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 3
    except (ValueError, runs.Locked) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if group.size == 1:
            raise
        traceback.print_exc()
        print(
            f"error: process {group.rank} of {group.size} cannot go on ({error!s:.120}); if another "
            "one died, its message is above. The last checkpoint is kept: run the same command "
            "again to go on.",
            file=sys.stderr,
            flush=True,
        )
        return 1
    finally:
        group.leave()


if __name__ == "__main__":
    sys.exit(main())
