"""The clock, on a clock that the test turns."""

import itertools

import numpy as np
import pytest

from llmlib import budget as budget_room
from llmlib.budget import KINDS, Budget, Ledger
from llmlib.config import TrainConfig


class Time:
    """A clock that stands still until it is told otherwise."""

    now = 1000.0

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(budget_room, "monotonic", lambda: time.now)
    return time


def seconds_budget(seconds):
    return Budget(TrainConfig(budget_hours=seconds / 3600), tokens_per_step=1)


def spend(time, budget, step_seconds, ledger=None):
    """Take steps until the budget says stop; return the progress of each and the ledger."""
    ledger, steps, progress = ledger or Ledger(), [], 0.0
    while (progress := budget.next_progress(len(steps), ledger, before=progress)) is not None:
        time.pass_(next(step_seconds))
        budget.observe(ledger.book("training"))
        steps.append(progress)
    return steps, ledger


def test_kinds_sum_to_the_time_from_first_step_to_last_without_the_pause(time):
    ledger = Ledger()
    time.pass_(50)  # before the first step
    ledger.start()
    for i, kind in enumerate(KINDS * 3):
        time.pass_(0.5 + i)
        assert ledger.book(kind) == 0.5 + i
    spent = time.now - 1050
    assert sum(ledger.seconds.values()) == ledger.total == spent
    time.pass_(1000)  # until the restart
    resumed = Ledger(ledger.seconds)
    time.pass_(2)
    assert resumed.total == spent + 2
    assert resumed.book("lost") == 2 and sum(resumed.seconds.values()) == resumed.total


@pytest.mark.parametrize("seconds", [10.0, 10.5, 99.99, 1234.5])
@pytest.mark.parametrize("step", [0.25, 0.7, 1.0, 3.3])
def test_last_step_ends_by_the_deadline_and_at_most_one_step_early(time, seconds, step):
    steps, ledger = spend(time, seconds_budget(seconds), itertools.repeat(step))
    assert seconds - step - 1e-6 <= ledger.total <= seconds + 1e-6
    assert steps[0] == 0 and steps[-1] == 1.0 and steps.count(1.0) <= 2
    steps = [p for p in steps if p < 1]
    assert all(a < b for a, b in itertools.pairwise(steps))


def test_one_slow_step_does_not_end_the_run_early(time):
    seconds = itertools.chain([1.0] * 90, [20.0], itertools.repeat(1.0))
    steps, ledger = spend(time, seconds_budget(120.5), seconds)
    assert len(steps) == 101
    assert ledger.total == pytest.approx(120)


def test_compilation_is_spent_but_is_no_progress(time):
    budget, ledger = seconds_budget(100.0), Ledger()
    time.pass_(40)
    ledger.book("compile")
    assert budget.next_progress(1, ledger) == 0.0
    steps, ledger = spend(time, budget, itertools.repeat(1.0), ledger)
    assert len(steps) == 60 and ledger.total == 100.0
    assert steps[30] == pytest.approx(30 / 59, abs=0.01)  # of what compilation left


def test_deadline_is_met_whatever_is_slow(time):
    """Replay the training loop over seeds, with slow steps, validations and saves, and compiling."""
    for seed in range(300):
        rng = np.random.default_rng(seed)
        seconds, one = rng.uniform(20, 200), rng.uniform(0.05, 2)
        budget, ledger = seconds_budget(seconds), Ledger()
        time.pass_(compiling := rng.uniform(0, 0.4) * seconds)
        ledger.book("compile")
        progress, n, excess, late = 0.0, 0, [0.0], 0.0
        while (after := budget.next_progress(n, ledger, before=progress)) is not None:
            took = one * rng.lognormal(0, 0.05) * (rng.uniform(2, 6) if rng.random() < 0.02 else 1)
            excess.append(max(0.0, took - (budget.step_seconds or took)))
            time.pass_(took)
            budget.observe(ledger.book("training"))
            n, progress = n + 1, after
            work = one * rng.uniform(0, 5)  # a validation or a save
            if rng.random() < 0.1 and progress < 1 and budget.fits(ledger, work):
                late = work * rng.uniform(0, 0.5)
                time.pass_(work + late)
                ledger.book("validation")
        assert progress == 1.0, seed
        over = ledger.total - seconds
        assert over <= excess[-1] + excess[-2] + late + 1e-9, (seed, over, excess[-3:])
        assert -over <= 2 * max(one, budget.step_seconds) * 1.2, (seed, over, one)
        assert ledger.seconds["compile"] == pytest.approx(compiling)


def test_budget_shorter_than_its_first_step_ends_after_it(time):
    steps, ledger = spend(time, seconds_budget(5.0), itertools.repeat(30.0))
    assert len(steps) == 1 and ledger.total == 30.0


def test_work_fits_only_if_a_step_still_follows(time):
    budget, ledger = seconds_budget(100.0), Ledger({"training": 90.0})
    budget.observe(2.0)
    assert budget.fits(ledger, 8.0)
    assert not budget.fits(ledger, 8.1)
    assert Budget(TrainConfig(budget_hours=None, budget_steps=3), 1).fits(ledger, 1e9)


@pytest.mark.parametrize("n_steps", [1, 2, 20])
def test_step_and_token_budgets_count_exactly(time, n_steps):
    for budget in ({"budget_steps": n_steps}, {"budget_tokens": n_steps * 1024 + 1023}):
        config = TrainConfig(budget_hours=None, **budget)
        steps, _ = spend(time, Budget(config, tokens_per_step=1024), itertools.repeat(1.0))
        assert len(steps) == n_steps
        assert steps[-1] == 1.0 and steps.count(1.0) == 1
        assert n_steps == 1 or steps[0] == 0.0


def test_too_few_tokens_for_a_step_are_refused():
    config = TrainConfig(budget_hours=None, budget_tokens=1000)
    with pytest.raises(ValueError, match="budget_tokens=1000 is less than one step of 1024"):
        Budget(config, tokens_per_step=1024)
