"""One clock: what the budget was spent on, how far the run is, and whether another step fits.

The clock is strict. Everything from the first step to the last counts: compilation, validation,
checkpoints, and work that a crash threw away. Data preparation, starting the process and the final
evaluation do not. Time between a crash and the restart does not count.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from llmlib.config import TrainConfig

KINDS = ("training", "compile", "validation", "checkpoint", "lost")


class Ledger:
    """Seconds of the budget by what they were spent on; each moment is booked exactly once."""

    def __init__(self, seconds: dict[str, float] | None = None):
        self.seconds = dict.fromkeys(KINDS, 0.0) | (seconds or {})
        self._last = time.monotonic()

    def start(self) -> None:
        """Begin counting now; what came before this moment is not the budget's."""
        self._last = time.monotonic()

    def book(self, kind: str) -> float:
        """Book the time since the last booking to one kind and return it [s]."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        self.seconds[kind] += elapsed
        return elapsed

    def lose_training_since(self, seconds: dict[str, float]) -> float:
        """Rebook training done since an earlier state of the ledger as lost; return how much [s]."""
        lost = max(0.0, self.seconds["training"] - seconds["training"])
        self.seconds["training"] -= lost
        self.seconds["lost"] += lost
        return lost

    @property
    def total(self) -> float:
        """Seconds booked so far."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Plan:
    """What rank 0 decided about the next step."""

    progress: float  # 0 on the first step, 1 on the last
    is_last: bool


class Budget:
    """A budget of seconds, tokens or steps, behind one question: what is the next step?"""

    def __init__(self, config: TrainConfig, tokens_per_step: int):
        self.seconds = config.budget_seconds
        self.n_steps = config.budget_steps
        if config.budget_tokens is not None:
            self.n_steps = config.budget_tokens // tokens_per_step
            if self.n_steps == 0:
                raise ValueError(
                    f"budget_tokens={config.budget_tokens} is less than one step of "
                    f"{tokens_per_step} tokens; raise it or lower micro_batch or grad_accum."
                )
        self._recent: deque[float] = deque(maxlen=10)

    def observe(self, step_seconds: float) -> None:
        """Learn from a step (without compilation) how long the next may take."""
        self._recent.append(step_seconds)

    @property
    def step_seconds(self) -> float:
        """The slowest recent step: what the next one is allowed to take [s]."""
        return max(self._recent, default=0.0)

    def fits(self, spent: float, seconds: float) -> bool:
        """Say whether other work of this length still leaves room for one more step."""
        return self.seconds is None or spent + seconds + self.step_seconds <= self.seconds

    def seconds_left(self, step: int, spent: float) -> float:
        """Estimate the time until the last step ends [s]."""
        if self.seconds is not None:
            return max(0.0, self.seconds - spent)
        return (self.n_steps - step) * self.step_seconds

    def plan(self, step: int, spent: float) -> Plan | None:
        """Plan the next step, or return None when the budget has no room for it.

        A step is the last if no other would fit behind it, so the schedule ends where promised.
        """
        if self.n_steps is not None:
            if step >= self.n_steps:
                return None
            return Plan(step / max(self.n_steps - 1, 1), step == self.n_steps - 1)
        one, left = self.step_seconds, self.seconds - spent
        if left < one or left <= 0:
            return None
        if left < 2 * one:
            return Plan(1.0, True)
        return Plan(min(spent / (self.seconds - one), 1.0), False)
