"""One clock: what the budget was spent on, how far the run is, and whether another step fits.

The clock is strict. Everything from the first step to the last counts: compilation, validation,
checkpoints, and work that a crash threw away. Data preparation, starting the process and the final
evaluation do not. Time between a crash and the restart does not count.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import numpy as np

from llmlib import runs
from llmlib.config import TrainConfig

KINDS = ("training", "compile", "validation", "checkpoint", "lost")
HEARTBEAT_SECONDS = 1.0  # at most so much spent time escapes the ledger in a crash


class Ledger:
    """Seconds of the budget by what they were spent on; each moment is booked exactly once."""

    def __init__(self, seconds: dict[str, float] | None = None):
        self.seconds = dict.fromkeys(KINDS, 0.0) | (seconds or {})
        self.start()

    def start(self) -> None:
        """Begin counting now; what came before this moment is not the budget's."""
        self._before = sum(self.seconds.values())
        self._first = self._last = monotonic()

    def book(self, kind: str) -> float:
        """Book the time since the last booking to one kind and return it [s]."""
        now = monotonic()
        elapsed, self._last = now - self._last, now
        self.seconds[kind] += elapsed
        return elapsed

    def move(self, seconds: float, source: str, target: str) -> None:
        """Rebook seconds from one kind to another."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    @property
    def total(self) -> float:
        """Seconds spent up to this moment, booked or not."""
        return self._before + monotonic() - self._first

    def so_far(self) -> dict[str, float]:
        """What the books would say if the run died now: unfinished work is lost."""
        seconds = dict(self.seconds)
        seconds["lost"] += self.total - sum(seconds.values())
        return seconds


@contextlib.contextmanager
def heartbeat(ledger: Ledger, path: Path) -> Iterator[None]:
    """Note the ledger every second, so that a crash cannot hide time that was spent."""
    is_over = threading.Event()

    def note() -> None:
        with contextlib.suppress(OSError):  # a full disk
            runs.write_json(path, ledger.so_far())

    def beat() -> None:
        while not is_over.wait(HEARTBEAT_SECONDS):
            note()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        note()


def last_heartbeat(path: Path) -> dict[str, float]:
    """Read what a run had spent when it ended, however it ended; empty if it never began."""
    try:
        return runs.read_json(path)
    except (OSError, ValueError):
        return {}


class Budget:
    """A budget of seconds, tokens or steps, behind one question: is there a next step?"""

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
        self._recent: deque[float] = deque(maxlen=20)

    def observe(self, step_seconds: float) -> None:
        """Learn from a step (without compilation) how long the next may take."""
        self._recent.append(step_seconds)

    @property
    def step_seconds(self) -> float:
        """What the next step will hardly exceed [s], 0 while nothing is known.

        The median of recent steps and three times the way from there to their 90th percentile:
        just the step time if it is steady, more if it varies, and unmoved by a lone slow step.
        """
        if not self._recent:
            return 0.0
        median, high = np.quantile(self._recent, [0.5, 0.9])
        return float(median + 3 * (high - median))

    def fits(self, ledger: Ledger, seconds: float) -> bool:
        """Say whether other work of this length still leaves room for one more step."""
        return self.seconds is None or ledger.total + seconds + self.step_seconds <= self.seconds

    def seconds_left(self, step: int, ledger: Ledger) -> float:
        """Estimate the time until the last step ends [s]."""
        if self.n_steps is not None:
            return (self.n_steps - step) * float(np.median(self._recent or [0.0]))
        return max(0.0, self.seconds - ledger.total)

    def next_progress(self, step: int, ledger: Ledger, n_in_flight: int = 0) -> float | None:
        """Return the progress of the next step, or None when the budget has no room for it.

        Steps in flight have been asked of the device and are not over yet.

        It is 0 on the first step and 1 on the last, so the schedule ends where promised: a step is
        the last if no other may fit behind it (should one fit after all, it is another last one).
        Compilation is spent but is no progress: it would eat the warm-up of a short run.
        """
        if self.n_steps is not None:
            if step >= self.n_steps:
                return None
            return 1.0 if step == self.n_steps - 1 else step / (self.n_steps - 1)
        one, compiling = self.step_seconds, ledger.seconds["compile"]
        spent = ledger.total + n_in_flight * one
        left = self.seconds - spent
        if left < one or left <= 0:
            return None
        if left < 2 * one:
            return 1.0
        return min((spent - compiling) / (self.seconds - compiling - one), 1.0)
