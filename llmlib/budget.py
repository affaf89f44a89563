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


class Ledger:
    """Seconds of the budget by what they were spent on; each moment is booked exactly once."""

    def __init__(self, seconds: dict[str, float] | None = None):
        self.seconds = dict.fromkeys(KINDS, 0.0) | (seconds or {})
        self.start()

    def start(self) -> None:
        """Begin counting now; what came before this moment is not the budget's."""
        self._last = monotonic()

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
        return sum(self.seconds.values()) + monotonic() - self._last


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
        self._recent: deque[float] = deque(maxlen=N_RECENT)

    def observe(self, step_seconds: float) -> None:
        """Learn from a step (without compilation) how long the next may take."""
        self._recent.append(step_seconds)

    @property
    def step_seconds(self) -> float:
        """What nine in ten steps stay below [s], up to two medians; 0 while nothing is known."""
        recent = sorted(self._recent) or [0.0]
        return min(recent[int(0.9 * len(recent))], 2 * recent[len(recent) // 2])

    def fits(self, ledger: Ledger, seconds: float) -> bool:
        """Say whether other work of this length still leaves room for one more step."""
        ahead = seconds + self.step_seconds
        return self.seconds is None or ledger.total + ahead <= self.seconds

    def seconds_left(self, step: int, ledger: Ledger) -> float:
        """Estimate the time until the last step ends [s]."""
        if self.n_steps is not None:
            return (self.n_steps - step) * self.step_seconds
        return max(0.0, self.seconds - ledger.total)

    def next_progress(self, step: int, ledger: Ledger, *, before: float = 0.0) -> float | None:
        """Return the progress of the next step, or None when the budget has no room for it.

        It is 0 on the first step and 1 on the last, so the schedule ends where promised: a step is
        the last if a slow one would leave no room behind it. ``before`` is the progress of the step
        before: without a last step there is always one more. Compilation is spent but is no
        progress: it would swallow the warm-up of a short run.
        """
        if self.n_steps is not None:
            last = self.n_steps - 1
            if step > last:
                return None
            return step / last if last else 1.0
        one, compiling = self.step_seconds, ledger.seconds["compile"]
        slow = min(max(self._recent, default=0.0), 3 * one)
        spent = ledger.total
        left = self.seconds - spent
        if left < one or left <= 0:
            return None if before == 1.0 or step == 1 else 1.0
        if left < one + slow or before == 1.0:
            return 1.0
        progress = (spent - compiling) / max(self.seconds - compiling - one, one)
        return min(max(progress, 0.0), ALMOST) if step else 0.0
