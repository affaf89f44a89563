"""One clock: what the budget was spent on, how far the run is, and whether another step fits.

The clock is strict. Everything from the first step to the last counts: compilation, validation,
checkpoints, and work that a crash threw away. Preparing data, starting the process and the final
evaluation do not, nor does the time between a crash and the restart.
"""

from collections import deque
from time import monotonic

from llmlib.config import TrainConfig

KINDS = ("training", "compile", "validation", "checkpoint", "lost")
N_RECENT = 50  # steps that the estimate of the next one rests on
ALMOST = 1 - 1e-6  # the most that a step before the last can be


class Budget:
    """A budget of seconds, tokens or steps: the ledger of what was spent, and what still fits."""

    def __init__(self, config: TrainConfig, tokens_per_step: int):
        self.limit, self.n_steps = config.budget_seconds, config.budget_steps  # None: not limited
        if config.budget_tokens is not None:
            self.n_steps = config.budget_tokens // tokens_per_step
            if self.n_steps == 0:
                raise ValueError(
                    f"budget_tokens={config.budget_tokens} is less than one step of "
                    f"{tokens_per_step} tokens; raise it or lower micro_batch or grad_accum."
                )
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._lasted: dict[str, float] = {}  # what was booked last, by kind
        self._recent: deque[float] = deque(maxlen=N_RECENT)
        self.start()

    def start(self) -> None:
        """Begin counting now; what came before this moment is not the budget's."""
        self._last = monotonic()

    def book(self, kind: str) -> float:
        """Book the time since the last booking to one kind and return it [s].

        Each moment is booked exactly once, and training in one booking a step.
        """
        now = monotonic()
        elapsed, self._last = now - self._last, now
        self.seconds[kind] += elapsed
        self._lasted[kind] = elapsed
        if kind == "training":
            self._recent.append(elapsed)
        return elapsed

    def go_back(self, before: dict[str, float], n_steps: int, spent: float) -> float:
        """Go back to when ``n_steps`` had been taken; what was spent since is lost; return it [s]."""
        lost = max(0.0, spent - sum(before.values()))
        self.seconds = before | {"lost": before["lost"] + lost}
        self._recent.extend([before["training"] / n_steps] if n_steps else [])
        self.start()
        return lost

    @property
    def total(self) -> float:
        """Seconds spent up to this moment, booked or not."""
        return sum(self.seconds.values()) + monotonic() - self._last

    @property
    def step_seconds(self) -> float:
        """What nine in ten steps stay below [s], up to two medians; 0 while nothing is known."""
        recent = sorted(self._recent) or [0.0]
        return min(recent[int(0.9 * len(recent))], 2 * recent[len(recent) // 2])

    def fits(self, kind: str, guess: float) -> bool:
        """Say whether work of a kind, if it takes as long as last time, leaves room for one more step.

        ``guess`` serves where there was no last time [s].
        """
        ahead = self._lasted.get(kind, guess) + self.step_seconds
        return self.limit is None or self.total + ahead <= self.limit

    def seconds_left(self, step: int) -> float:
        """Estimate the time until the last step ends [s]."""
        if self.n_steps is not None:
            return (self.n_steps - step) * self.step_seconds
        return max(0.0, self.limit - self.total)

    def next_progress(self, step: int, *, before: float = 0.0) -> float | None:
        """Return the progress of the next step, or None when the budget has no room for it.

        It is 0 on the first step and 1 on the last, so the schedule ends where promised: a step is
        the last if a slow one would leave no room behind it. ``before`` is the progress of the step
        before: without a last step there is always one more. Compilation is spent but is no
        progress: it would swallow the warm-up of a short run.
        """
        if self.n_steps is not None:
            last = self.n_steps - 1
            return None if step > last else step / last if last else 1.0
        one, spent, compiling = self.step_seconds, self.total, self.seconds["compile"]
        slow, left = min(max(self._recent, default=0.0), 3 * one), self.limit - spent
        if left < one or left <= 0:
            return None if before == 1.0 or step == 1 else 1.0
        if left < one + slow or before == 1.0:
            return 1.0
        progress = (spent - compiling) / max(self.limit - compiling - one, one)
        return min(max(progress, 0.0), ALMOST) if step else 0.0
