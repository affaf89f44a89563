"""What a run keeps on disk: its checkpoints, its metrics, the clock, and how it goes on from them.

``train.Trainer`` adds the algorithm. A row of ``metrics.jsonl`` carries the ledger and the time, so
that a restart knows what was spent, however the run ended.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmlib import checkpoint, data, runs, step
from llmlib.budget import Budget, Ledger
from llmlib.model import build_model
from llmlib.optim import build_optimizer
from llmlib.schedule import lr_factor
from llmlib.sizing import count_params, datasheet_peak, flops_per_token

SAVE_BYTES_PER_S = 1e9  # what saving may take, until it is known


@dataclass
class TrainState:
    """What a checkpoint brings back beside weights and optimizer."""

    micro_batch: int  # sequences, smaller than the config's after running out of memory
    val_sha256: str  # of the validation windows
    step: int = 0  # optimizer steps taken
    progress: float = 0.0  # of the last one
    data_step: int = 0  # batches drawn: never goes back, so no data is met twice after trouble
    n_skipped: int = 0  # steps that took no gradient
    n_rollbacks: int = 0
    n_evals: int = 0  # validations that were due
    step_seconds: float = 0.0  # what a step takes
    compile_seconds: float = 0.0  # what the first step took beyond that
    is_over: bool = False  # the budget is spent
    seconds: dict[str, float] = field(default_factory=dict)  # the ledger
    format: int = runs.FORMAT


class ResumableRun:
    """A run in a folder: its model, optimizer and clock, as the newest checkpoint left them."""

    def __init__(self, path: Path, local_rank: int = 0):
        self.path, self.about = path, runs.read_run(path)
        self.config, model, n = self.about.train, self.about.model, step.world_size()
        if self.config.n_sequences % n:
            raise ValueError(
                f"micro_batch x grad_accum = {self.config.n_sequences} sequences do not divide "
                f"among {n} processes; make it a multiple of {n}."
            )
        self.tokens_per_step = self.config.n_sequences * model.seq_len
        self.budget, self.ledger = Budget(self.config, self.tokens_per_step), Ledger()
        self.windows = self.eval_windows(self.config.eval_windows)
        self.state = TrainState(self.config.micro_batch, data.sha256(self.windows))
        self.device = step.pick_device(local_rank)
        self.dtype = step.compute_dtype(self.device, self.config.dtype)
        torch.manual_seed(self.config.seed)
        start = {"seed": self.config.seed, "zero_init": self.config.zero_init}
        self.model = build_model(model, **start).to(self.device)
        self.optimizer = build_optimizer(self.model, self.config, self.dtype)
        peak = self.about.peak_flops_per_s
        if peak is None and self.device.type == "cuda":
            peak = datasheet_peak(torch.cuda.get_device_name(self.device))
        self.peak_flops_per_s = peak and peak * n
        self.saver = checkpoint.Saver(path / "checkpoints")
        self.log = runs.MetricLog(path, self.config.tracker if step.is_main() else None)
        self.save_seconds = 12 * count_params(model) / SAVE_BYTES_PER_S
        self.save_at = 0.0

    def eval_windows(self, n_windows: int | None):
        return data.eval_windows(self.about.tokens_dir, "val", self.about.model.seq_len, n_windows)

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass in each process; tokens per step are always the config's."""
        return min(self.state.micro_batch, self.config.n_sequences // step.world_size())

    def begin_or_resume(self) -> None:
        newest = checkpoint.newest_valid(self.saver.folder)
        if newest is not None:
            self.state = self.load(newest)
            self.ledger = Ledger(self.state.seconds if self.state.is_over else self._spent())
            self.book_lost()
        elif step.is_main():
            self.log.drop_after(-1)
            if failure := self.save_now():
                raise ValueError(f"{not_saved(failure)}; free some space and run again.")
            self.ledger = Ledger()
        step.broadcast(0.0)
        self.save_at = self.ledger.total + 60 * self.config.checkpoint_minutes

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

    def load(self, path: Path) -> TrainState:
        state = checkpoint.restore(self.model, self.optimizer, path)
        if (there := state.get("format", 1)) != runs.FORMAT:
            raise ValueError(
                f"checkpoint {path.name} of run {self.path.name} has format {there}, this version "
                f"writes {runs.FORMAT}; start another run."
            )
        if state["val_sha256"] != self.state.val_sha256:
            raise ValueError(
                f"the validation set is not the one that run {self.path.name} began with; give "
                "the tokens that it began with, or start another run."
            )
        return TrainState(**state)

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

    def save_now(self) -> BaseException | None:
        """Save, wait until it is done, and return what failed."""
        self.save()
        self.saver.wait()
        return self.saver.take_failure()

    # ------------------------------------------------------------------ the record

    def summary(self) -> dict[str, Any]:
        """Say what the run was and did, but for its final scores."""
        state, steps = self.state, runs.read_metrics(self.path, "step")
        n_tokens = state.step * self.tokens_per_step
        result = {"n_steps": state.step, "n_tokens": n_tokens, "seconds": state.seconds}
        result |= {"tokens_per_step": self.tokens_per_step, "micro_batch": self.micro_batch}
        result |= {"n_params": count_params(self.about.model), "is_compiled": self.is_compiled}
        result |= {"flops": flops_per_token(self.about.model) * n_tokens}
        result |= {"tokens_per_s": float(steps.tokens_per_s.median())}
        result |= {"mfu": self.peak_flops_per_s and float(steps.mfu.median())}
        result |= {"budget_seconds": self.config.budget_seconds}
        result |= {"n_skipped": state.n_skipped, "n_rollbacks": state.n_rollbacks}
        result |= {"dtype": str(self.dtype)[6:], "n_processes": step.world_size()}
        for name in ("n_hessian_passes", "unclipped_share"):
            if hasattr(self.optimizer, name):
                result[name] = float(getattr(self.optimizer, name))
        return result

    def log_step(self, number: int, progress: float, seconds: float, **values: float) -> None:
        peak, tokens_per_s = self.peak_flops_per_s, self.tokens_per_step / seconds
        values["lr"] = self.config.lr * lr_factor(self.config, progress)
        values["mfu"] = peak and tokens_per_s * flops_per_token(self.about.model) / peak
        left = self.budget.seconds_left(self.state.step, self.ledger)
        about = {"progress": progress, "tokens_per_s": tokens_per_s, "seconds_left": left}
        self.write("step", number, **about, **values)

    def event(self, text: str) -> None:
        if step.is_main():
            with suppress(OSError):  # a full disk
                print(text, flush=True)
        self.write("event", text=text)

    def write(self, kind: str, number: int | None = None, **values: Any) -> None:
        """Write a row, with the ledger as it is and the time, from which a restart goes on."""
        number = self.state.step if number is None else number
        about = {"step": number, "tokens": number * self.tokens_per_step, "time": time.time()}
        spent = {"seconds": round(self.ledger.total, 4), "ledger": dict(self.ledger.seconds)}
        if step.is_main():
            self.log.write(kind, **about, **spent, **values)


def not_saved(failure: BaseException) -> str:
    return f"the checkpoint could not be saved ({failure}; is the disk full?)"
