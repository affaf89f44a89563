"""A run that spends its budget exactly and survives: resume, trouble, several processes.

``Trainer.run`` reads as the algorithm. The step is in ``step``, the budget in ``clock``, saving in
``checkpoint``; notebooks start a run in a process of its own through ``supervise``. As a program:
``python -m llmlib.train RUN --tokens FOLDER``, under torchrun on several GPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import select
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from llmlib import checkpoint, data, runs
from llmlib.clock import Budget, Ledger, Plan
from llmlib.config import ModelConfig, TrainConfig
from llmlib.model import build_model
from llmlib.optim import build_optimizer
from llmlib.schedule import lr_multiplier
from llmlib.sizing import count_params, datasheet_peak, flops_per_token
from llmlib.step import compile_model, compute_dtype, evaluate, pick_device, train_step

MAX_BAD_STEPS = 3  # steps in a row that are not finite before the run goes back
MAX_ROLLBACKS = 2  # times it goes back before it gives up
RETRY_SECONDS = 60.0  # until a checkpoint that could not be saved is tried again


class Stopped(Exception):
    """The run was asked to stop; it has saved itself and can be resumed."""


class Diverged(Exception):
    """The run met losses that are not finite, and going back did not cure it."""


@dataclass(frozen=True)
class Group:
    """The processes of a run; one process is its own group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def join() -> Group:
        """Join the group that torchrun started, if it did."""
        if not dist.is_torchelastic_launched():
            return Group()
        local_rank = int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return Group(dist.get_rank(), dist.get_world_size(), local_rank)

    def follow_rank_0(self, values: list[float]) -> list[float]:
        """Let rank 0 decide for all."""
        if self.size == 1:
            return values
        decision = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(decision, src=0)
        return decision.tolist()

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


@dataclass
class Progress:
    """What a checkpoint brings back beside weights and optimizer."""

    step: int = 0  # optimizer steps taken
    data_step: int = 0  # batches drawn: never goes back, so no data is met twice after trouble
    n_skipped: int = 0
    n_rollbacks: int = 0
    n_evals: int = 0  # validations that were due
    val_loss: float | None = None  # at this very step, if it was measured
    best_val_loss: float | None = None
    micro_batch: int = 0  # sequences, smaller than the config's after running out of memory
    step_seconds: float = 0.0  # what a step took
    is_over: bool = False  # the last step was taken
    seconds: dict[str, float] = field(default_factory=dict)  # the ledger


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
        self.device = pick_device(self.group.local_rank)
        self.dtype = compute_dtype(self.device)
        self.model = build_model(model_config, seed=config.seed).to(self.device)
        self.optimizer = build_optimizer(self.model, config)
        torch.manual_seed(config.seed)
        self.fast_model = compile_model(self.model, self.device) if config.compile else self.model
        if self.group.size > 1:
            self.fast_model = DistributedDataParallel(self.fast_model)
        self.flops_per_step = flops_per_token(model_config) * self.tokens_per_step
        peak = peak_flops_per_s
        if peak is None and self.device.type == "cuda":
            peak = datasheet_peak(torch.cuda.get_device_name(self.device))
        self.peak_flops_per_s = peak and peak * self.group.size
        self.budget = Budget(config, self.tokens_per_step)
        self.ledger = Ledger()
        self.saver = checkpoint.Saver(path / "checkpoints", config.keep_checkpoints)
        self.bad_in_a_row = 0
        self.save_at = self.save_seconds = self.eval_seconds = 0.0
        self.stop_reason: str | None = None
        self.must_stop = lambda: None  # asked before every step: a reason, or None

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
        self.progress = Progress(micro_batch=min(config.micro_batch, self.n_sequences // size))
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
        self.all_windows = data.eval_windows(val, seq_len)

    # ------------------------------------------------------------------ the algorithm

    def run(self) -> dict[str, Any]:
        """Train until the budget is spent and return the result."""
        self._resume_or_begin()
        batches = data.prefetch(
            self.batches,
            self.progress.data_step,
            self.device,
            rank=self.group.rank,
            world_size=self.group.size,
        )
        self.ledger.start()
        n_taken = 0
        while (plan := self._plan()) is not None:
            loss, norm = self._step(*next(batches), plan)
            n_taken += 1
            self._book_step(n_taken)
            if not np.isfinite([loss, norm]).all():
                self._skip_or_go_back(loss, norm)
                continue
            if n_taken == 1:
                self._check_gradients()
            self.bad_in_a_row = 0
            self.progress.step += 1
            self.progress.val_loss = None
            self.progress.is_over = plan.is_last
            if self.group.rank == 0:
                self._log_step(plan, loss, norm)
                self._save_if_due(has_improved=self._validate_if_due(plan))
        return self._finish()

    def _plan(self) -> Plan | None:
        """Ask rank 0 what the next step is; all processes get the same answer."""
        plan = self.budget.plan(self.progress.step, self.ledger.total)
        if self.progress.is_over or plan is None:
            plan = Plan(1.0, True)
            goes_on = False
        else:
            goes_on = True
        reason = self.must_stop()
        answer = [goes_on, plan.progress, plan.is_last, goes_on and reason is not None]
        goes_on, progress, is_last, stops = self.group.follow_rank_0([float(x) for x in answer])
        if stops:
            if self.group.rank == 0:
                self._save()
                self.saver.wait()
            raise Stopped(
                f"{reason or 'rank 0 was asked to stop'}; saved at step {self.progress.step}. "
                "Run the same command again to go on."
            )
        return Plan(progress, bool(is_last)) if goes_on else None

    def _step(self, inputs: Tensor, targets: Tensor, plan: Plan) -> tuple[float, float]:
        config = self.config
        self.progress.data_step += 1
        multiplier = lr_multiplier(config.schedule, plan.progress, config.warmup, config.final_lr)
        while True:
            try:
                return train_step(
                    self.fast_model,
                    self.optimizer,
                    inputs,
                    targets,
                    micro_batch=self.progress.micro_batch,
                    lr=config.lr * multiplier,
                    grad_clip=config.grad_clip,
                    dtype=self.dtype,
                )
            except torch.OutOfMemoryError as error:
                self._halve_micro_batch(error)

    def _halve_micro_batch(self, error: Exception) -> None:
        micro_batch = self.progress.micro_batch
        if micro_batch == 1 or self.group.size > 1:
            raise ValueError(
                f"micro_batch={micro_batch} does not fit into this device's memory; "
                "choose a smaller micro_batch, seq_len or model."
            ) from error
        self.progress.micro_batch = -(-micro_batch // 2)
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._event(
            f"out of memory: micro_batch is now {self.progress.micro_batch}, "
            f"tokens per step stay {self.tokens_per_step}"
        )

    def _book_step(self, n_taken: int) -> None:
        """Book a step; what the first took beyond the second was compilation and warm-up."""
        seconds = self.ledger.book("compile" if n_taken == 1 else "training")
        if n_taken == 2:
            moved = min(seconds, self.ledger.seconds["compile"])
            self.ledger.seconds["compile"] -= moved
            self.ledger.seconds["training"] += moved
        if n_taken > 1:
            self.budget.observe(seconds)
        self.progress.step_seconds = seconds
        self._heartbeat()

    def _check_gradients(self) -> None:
        missing = [name for name, p in self.model.named_parameters() if p.grad is None]
        assert not missing, f"no gradient reached {missing}"

    def _skip_or_go_back(self, loss: float, norm: float) -> None:
        """Skip a step that is not finite; after several in a row, go back with other data ahead."""
        self.progress.n_skipped += 1
        self.bad_in_a_row += 1
        self._event(f"step skipped: loss {loss}, gradient norm {norm}")
        if self.bad_in_a_row < MAX_BAD_STEPS:
            return
        if self.progress.n_rollbacks == MAX_ROLLBACKS:
            raise Diverged(
                f"losses at step {self.progress.step} are not finite even after going back "
                f"{MAX_ROLLBACKS} times; the last good checkpoint is kept. Lower lr (now "
                f"{self.config.lr}) or look at the data around this step."
            )
        self.saver.wait()
        self.group.wait()
        now = self.progress
        self.progress = self._load(checkpoint.newest_valid(self.saver.folder))
        self.progress.data_step, self.progress.n_skipped = now.data_step, now.n_skipped
        self.progress.n_rollbacks = now.n_rollbacks + 1
        self.bad_in_a_row = 0
        lost = self.ledger.lose_training_since(self.progress.seconds)
        self._event(f"went back to step {self.progress.step}: {lost:.1f} s of training are lost")

    def _validate_if_due(self, plan: Plan) -> bool:
        """Validate at even shares of the budget, if that fits; say whether the loss is the best yet.

        The last validation is left to ``_finish``, which uses the whole split off the clock.
        """
        due = int(plan.progress * self.config.n_evals)
        guess = 0.5 * self.budget.step_seconds * len(self.windows) / self.n_sequences
        fits = self.budget.fits(self.ledger.total, self.eval_seconds or guess)
        if plan.is_last or due <= self.progress.n_evals or not fits:
            return False
        self.progress.n_evals = due
        result = evaluate(self.model, self.windows, self.device, self.dtype)
        self.eval_seconds = self._book("validation")
        self._log(kind="eval", val_loss=result["loss"], val_accuracy=result["accuracy"])
        best = self.progress.best_val_loss
        self.progress.val_loss = result["loss"]
        self.progress.best_val_loss = min(result["loss"], best or np.inf)
        return best is None or result["loss"] < best

    def _finish(self) -> dict[str, Any]:
        """Evaluate on the whole validation split, off the clock, and write weights and result."""
        result: dict[str, Any] = {}
        if self.group.rank == 0:
            self._save()
            self.saver.wait()
            final = evaluate(self.model, self.all_windows, self.device, self.dtype)
            result = self._result(final)
            temporary = self.path / ".model.safetensors.tmp"
            save_file(self.model.state_dict(), temporary)
            os.replace(temporary, self.path / "model.safetensors")
            runs.write_json(self.path / "training.json", result)
        self.group.wait()
        return result

    def _result(self, final: dict[str, Any]) -> dict[str, Any]:
        steps = runs.read_metrics(self.path)
        steps = steps[steps.kind == "step"]
        n_tokens = self.progress.step * self.tokens_per_step
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
            "micro_batch": self.progress.micro_batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "is_compiled": self.fast_model is not self.model,
            "n_processes": self.group.size,
            "val_sha256": hashlib.sha256(self.all_windows.tobytes()).hexdigest(),
        }

    # ------------------------------------------------------------------ saving and resuming

    def _resume_or_begin(self) -> None:
        newest = checkpoint.newest_valid(self.saver.folder)
        if newest is None:
            if self.group.rank == 0:
                self._keep_metrics(up_to=-1)
                self._save()
                self.saver.wait()
        else:
            self.progress = self._load(newest)
            self.ledger = Ledger(self._last_heartbeat() or self.progress.seconds)
            lost = self.ledger.lose_training_since(self.progress.seconds)
            self.budget.observe(self.progress.step_seconds)
            if self.group.rank == 0:
                self._keep_metrics(up_to=self.progress.step)
                self._event(f"resumed at step {self.progress.step}: {lost:.1f} s of training lost")
        self.group.wait()
        self.save_at = self.ledger.total + 60 * self.config.checkpoint_minutes
        self._event(f"validation set sha256 {hashlib.sha256(self.windows.tobytes()).hexdigest()}")

    def _load(self, path: Path) -> Progress:
        state = checkpoint.restore(self.model, self.optimizer, path)
        return Progress(**{k: v for k, v in state.items() if k != "sha256"})

    def _save_if_due(self, has_improved: bool) -> None:
        """Save at the best validation losses and at fixed times, if that fits the budget."""
        self.saver.poll()
        if self.saver.failed and self.save_at > self.ledger.total + RETRY_SECONDS:
            self.save_at = self.ledger.total + RETRY_SECONDS
        is_due = has_improved or self.ledger.total >= self.save_at
        if is_due and self.budget.fits(self.ledger.total, self.save_seconds):
            self._save()

    def _save(self) -> None:
        self._book("training")
        self.progress.seconds = dict(self.ledger.seconds)
        self.saver.save(self.model, self.optimizer, asdict(self.progress))
        self.save_seconds = self._book("checkpoint")
        self.save_at = self.ledger.total + 60 * self.config.checkpoint_minutes

    def _book(self, kind: str) -> float:
        seconds = self.ledger.book(kind)
        self._heartbeat()
        return seconds

    def _heartbeat(self) -> None:
        """Note the ledger after every step, so that a crash cannot hide time that was spent."""
        if self.group.rank == 0:
            with open(self.path / "heartbeat", "w") as file:
                file.write(json.dumps(self.ledger.seconds))

    def _last_heartbeat(self) -> dict[str, float] | None:
        try:
            seconds = json.loads((self.path / "heartbeat").read_text())
        except (OSError, json.JSONDecodeError):
            return None
        return seconds if sum(seconds.values()) > sum(self.progress.seconds.values()) else None

    # ------------------------------------------------------------------ the record

    def _log_step(self, plan: Plan, loss: float, norm: float) -> None:
        seconds = self.progress.step_seconds
        left = self.budget.seconds_left(self.progress.step, self.ledger.total)
        self._log(
            kind="step",
            progress=plan.progress,
            lr=self.optimizer.param_groups[0]["lr"],
            loss=loss,
            grad_norm=norm,
            tokens_per_s=self.tokens_per_step / seconds,
            mfu=self.peak_flops_per_s and self.flops_per_step / seconds / self.peak_flops_per_s,
            seconds_left=left,
        )

    def _event(self, text: str) -> None:
        if self.group.rank == 0:
            print(text, flush=True)
            self._log(kind="event", text=text)

    def _log(self, **values: Any) -> None:
        place = {
            "step": self.progress.step,
            "tokens": self.progress.step * self.tokens_per_step,
            "seconds": round(self.ledger.total, 4),
        }
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": values.pop("kind")} | place | values) + "\n")

    def _keep_metrics(self, up_to: int) -> None:
        """Drop lines of steps that will be taken again."""
        path = self.path / "metrics.jsonl"
        rows = runs.read_metrics(self.path).to_dict("records") if path.exists() else []
        kept = [row for row in rows if row["step"] <= up_to]
        lines = [json.dumps({k: v for k, v in row.items() if v == v}) for row in kept]
        runs.write_atomic(path, "".join(line + "\n" for line in lines))


# ------------------------------------------------------------------------- as a program


def stop_reason(is_supervised: bool):
    """Watch for signals and, if supervised, for the end of the supervisor's pipe on stdin."""
    reasons: list[str] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: reasons.append(f"received {signal.Signals(n).name}"))

    def ask() -> str | None:
        if is_supervised and select.select([sys.stdin], [], [], 0)[0] and not reasons:
            reasons.append("the supervising process is gone")
        return reasons[0] if reasons else None

    return ask


def main(arguments: list[str] | None = None) -> int:
    """Train the run in a folder that holds ``config.json``; return an exit status."""
    parser = argparse.ArgumentParser(prog="python -m llmlib.train", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder with config.json")
    parser.add_argument("--tokens", type=Path, required=True, help="folder that 01_data_prep wrote")
    parser.add_argument("--peak-flops", type=float, help="the device's peak for MFU [FLOP/s]")
    parser.add_argument("--supervised", action="store_true", help="stop when stdin is closed")
    options = parser.parse_args(arguments)
    must_stop = stop_reason(options.supervised)
    torch.set_float32_matmul_precision("high")
    group = Group.join()
    try:
        if not (options.run / "config.json").exists():
            raise ValueError(f"{options.run} has no config.json; 05_full_run writes one.")
        config = runs.read_json(options.run / "config.json")
        with runs.lock(options.run) if group.rank == 0 else open(os.devnull):
            trainer = Trainer(
                options.run,
                ModelConfig(**config["model"]),
                TrainConfig(**config["train"]),
                options.tokens,
                group=group,
                peak_flops_per_s=options.peak_flops,
            )
            trainer.must_stop = must_stop
            if not (options.run / "training.json").exists():
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
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
