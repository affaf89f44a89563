"""What a run keeps on disk: its checkpoints, its metrics, the clock, and how it goes on from them.

``train.Trainer`` adds the algorithm. A row of ``metrics.jsonl`` carries the ledger and the time, so
that a restart knows what was spent, however the run ended.
"""

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmlib import checkpoint, data, devices, runs, step
from llmlib.budget import Budget, Ledger
from llmlib.model import build_model
from llmlib.optim import build_optimizer
from llmlib.sizing import count_params, flops_per_token


@dataclass
class TrainState:
    """What a checkpoint brings back beside weights and optimizer."""

    micro_batch: int  # sequences, smaller than the config's after running out of memory
    val_sha256: str  # of the validation windows
    step: int = 0  # optimizer steps taken
    progress: float = 0.0  # of the last one
    data_step: int = 0  # batches drawn: never goes back, so no data is met twice after trouble
    n_averaged: int = 0  # steps whose weights are in the average
    n_skipped: int = 0  # steps that took no gradient
    n_rollbacks: int = 0
    n_evals: int = 0  # validations that were due
    step_seconds: float = 0.0  # what a step takes
    compile_seconds: float = 0.0  # the most that the first step of a process took
    is_over: bool = False  # the budget is spent
    seconds: dict[str, float] = field(default_factory=dict)  # the ledger
    format: int = runs.FORMAT


class ResumableRun:
    """A run in a folder: its model, optimizer and clock, as the newest checkpoint left them."""

    def __init__(self, path: Path, local_rank: int = 0):
        self.path, self.about = path, runs.read_run(path)
        self.config, n = self.about.train, step.world_size()
        if self.config.n_sequences % n:
            raise ValueError(
                f"micro_batch x grad_accum = {self.config.n_sequences} sequences do not divide "
                f"among {n} processes; make it a multiple of {n}."
            )
        self.tokens_per_step = self.config.n_sequences * self.about.model.seq_len
        self.budget, self.ledger = Budget(self.config, self.tokens_per_step), Ledger()
        self.windows = self.eval_windows(self.config.eval_windows)
        self.state = TrainState(self.config.micro_batch, data.sha256(self.windows))
        self.device = devices.pick_device(local_rank, needed=self.config.needs_accelerator)
        self.dtype = devices.compute_dtype(self.device, self.config.dtype)
        torch.manual_seed(self.config.seed)
        start = {"seed": self.config.seed, "zero_init": self.config.zero_init}
        self.model = build_model(self.about.model, **start).to(self.device)
        self.optimizer = build_optimizer(self.model, self.config, self.dtype)
        self.saver = checkpoint.Saver(path / "checkpoints")
        self.save_seconds = self.save_at = 0.0  # what a save takes; when the next is due
        self.log = runs.MetricLog(path, self.config.tracker)

    def eval_windows(self, n_windows: int | None):
        return data.eval_windows(self.about.tokens_dir, "val", self.about.model.seq_len, n_windows)

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass in each process; tokens per step are always the config's."""
        return min(self.state.micro_batch, self.config.n_sequences // step.world_size())

    # ------------------------------------------------------------------ checkpoints and the clock

    def begin_or_resume(self) -> None:
        newest = checkpoint.newest_valid(self.saver.folder)
        if newest is not None:
            self.load(newest)
            self.ledger = Ledger(self.state.seconds if self.state.is_over else self._spent())
            self.book_lost()
            self.save_seconds = self.ledger.seconds["checkpoint"]  # of all so far: hardly exceeded
        elif step.is_main():
            self.log.drop_after(-1)
            if failure := self.save_now():
                raise ValueError(f"{failure}; free some space and run again.")
            self.ledger = Ledger()
        step.broadcast(0.0)
        self.save_at = self.ledger.total + 60 * self.config.checkpoint_minutes

    def load(self, path: Path, **kept: Any) -> None:
        """Load a checkpoint; of the state, ``kept`` stays as it is."""
        state = checkpoint.restore(self.model, self.optimizer, path)
        self.state = replace(TrainState(**state), **kept)

    def _spent(self) -> dict[str, float]:
        """Read from the last row what a run had spent, and book what it did after as lost.

        That is an open phase, such as a compilation; it lasted at least to the run's last write.
        """
        rows = runs.read_metrics(self.path, last=True)
        if "ledger" not in rows:
            return self.state.seconds
        seconds = dict(rows.ledger.iloc[-1])
        seconds["lost"] += max(0.0, self.last_write() - float(rows.time.iloc[-1]))
        return max(self.state.seconds, seconds, key=lambda spent: sum(spent.values()))

    def last_write(self) -> float:
        files = [self.log.path, *self.saver.folder.rglob("*")]
        return max(path.stat().st_mtime for path in files)

    def book_lost(self) -> None:
        """Book training since the loaded checkpoint as lost and drop its metrics."""
        self.ledger.book("lost")
        before, now = self.state.seconds, self.ledger.seconds
        self.ledger.move(max(0.0, now["training"] - before["training"]), "training", "lost")
        if step.is_main():
            self.log.drop_after(self.state.step)
        lost = now["lost"] - before["lost"]
        self.event(f"went back to step {self.state.step}: {lost:.1f} s since then are lost")

    def save(self) -> None:
        self.write("phase", text="saving begins")
        self.state.seconds = dict(self.ledger.seconds)
        self.saver.save(self.model, self.optimizer, asdict(self.state))
        self.save_seconds = self.ledger.book("checkpoint")
        self.save_at = self.ledger.total + 60 * self.config.checkpoint_minutes
        self.write("phase", text="saving ends")

    def save_now(self) -> str | None:
        """Save, wait until it is done, and say what failed."""
        self.save()
        self.saver.wait()
        return self.save_failure()

    def save_failure(self) -> str | None:
        """Say, once, why the last save failed; None if it did not or is not done."""
        failure = self.saver.take_failure()
        return failure and f"the checkpoint could not be saved ({failure}; is the disk full?)"

    # ------------------------------------------------------------------ the record

    def summary(self) -> dict[str, Any]:
        """Say what the run was and did, but for its final scores."""
        state, steps = self.state, runs.read_metrics(self.path, "step")
        n_tokens = state.step * self.tokens_per_step
        result = {
            "n_steps": state.step,
            "n_tokens": n_tokens,
            "flops": flops_per_token(self.about.model) * n_tokens,
            "n_params": count_params(self.about.model),
            "seconds": state.seconds,
            "budget_seconds": self.config.budget_seconds,
            "tokens_per_s": float(steps.tokens_per_s.median()),
            "mfu": self.about.peak_flops_per_s and float(steps.mfu.median()),
            "micro_batch": self.micro_batch,
            "n_processes": step.world_size(),
            "n_skipped": state.n_skipped,
            "n_rollbacks": state.n_rollbacks,
            "is_compiled": self.is_compiled,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if hasattr(self.optimizer, "unclipped_share"):  # Sophia
            result["unclipped_share"] = float(self.optimizer.unclipped_share)
        return result

    def event(self, text: str) -> None:
        if step.is_main():
            with suppress(OSError):  # a full disk
                print(text, flush=True)
        self.write("event", text=text)

    def write(self, kind: str, **values: Any) -> None:
        """Write a row, with the ledger as it is and the time, from which a restart goes on."""
        now = {"step": self.state.step, "tokens": self.state.step * self.tokens_per_step}
        now |= {"seconds": round(self.ledger.total, 4), "ledger": dict(self.ledger.seconds)}
        if step.is_main():
            self.log.write(kind, **now | {"time": time.time()} | values)
