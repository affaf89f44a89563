"""The clock, on a clock that the test turns."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from llmlib import budget as budget_room
from llmlib.budget import KINDS, Budget
from llmlib.config import TrainConfig


@pytest.fixture
def time(monkeypatch):
    """A clock that stands still until it is told otherwise."""
    time = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(budget_room, "monotonic", lambda: time.now)
    return time


def seconds_budget(seconds):
    return Budget(TrainConfig(budget_hours=seconds / 3600), tokens_per_step=1)


def spend(time, budget, step_seconds):
    """Take steps until the budget says stop; return the progress of each."""
    steps, progress = [], 0.0
    while (progress := budget.next_progress(len(steps), before=progress)) is not None:
        time.now += next(step_seconds)
        budget.book("training")
        steps.append(progress)
    return steps


def test_kinds_sum_to_the_time_from_first_step_to_last_without_the_pause(time):
    budget = seconds_budget(100)
    time.now += 50  # before the first step
    budget.start()
    for i, kind in enumerate(KINDS * 3):
        time.now += 0.5 + i
        assert budget.book(kind) == 0.5 + i
    spent = time.now - 1050
    assert sum(budget.seconds.values()) == budget.total == spent
    time.now += 1000  # until the restart
    resumed = seconds_budget(100)
    assert resumed.go_back(budget.seconds, 10, spent + 3) == 3
    time.now += 2
    assert resumed.total == spent + 3 + 2
    assert resumed.seconds == budget.seconds | {"lost": budget.seconds["lost"] + 3}
    assert resumed.step_seconds == budget.seconds["training"] / 10


@pytest.mark.parametrize("seconds", [10.0, 10.5, 99.99, 1234.5])
@pytest.mark.parametrize("step", [0.25, 0.7, 1.0, 3.3])
def test_last_step_ends_by_the_deadline_and_at_most_one_step_early(time, seconds, step):
    steps = spend(time, budget := seconds_budget(seconds), itertools.repeat(step))
    assert seconds - step - 1e-6 <= budget.total <= seconds + 1e-6
    assert steps[0] == 0 and steps[-1] == 1.0 and steps.count(1.0) <= 2
    steps = [p for p in steps if p < 1]
    assert all(a < b for a, b in itertools.pairwise(steps))


def test_one_slow_step_does_not_end_the_run_early(time):
    seconds = itertools.chain([1.0] * 90, [20.0], itertools.repeat(1.0))
    assert len(spend(time, budget := seconds_budget(120.5), seconds)) == 101
    assert budget.total == pytest.approx(120)


def test_compilation_is_spent_but_is_no_progress(time):
    budget = seconds_budget(100.0)
    time.now += 40
    budget.book("compile")
    assert budget.next_progress(1) == 0.0
    steps = spend(time, budget, itertools.repeat(1.0))
    assert len(steps) == 60 and budget.total == 100.0
    assert steps[30] == pytest.approx(30 / 59, abs=0.01)  # of what compilation left


def test_deadline_is_met_whatever_is_slow(time):
    """Replay the training loop over seeds, with slow steps, validations and saves, and compiling."""
    for seed in range(300):
        rng = np.random.default_rng(seed)
        seconds, one = rng.uniform(20, 200), rng.uniform(0.05, 2)
        budget = seconds_budget(seconds)
        compiling = rng.uniform(0, 0.4) * seconds
        time.now += compiling
        budget.book("compile")
        progress, n, excess, last, late = 0.0, 0, [0.0], None, 0.0
        while (after := budget.next_progress(n, before=progress)) is not None:
            took = one * rng.lognormal(0, 0.05) * (rng.uniform(2, 6) if rng.random() < 0.02 else 1)
            excess.append(max(0.0, took - (budget.step_seconds or took)))
            time.now += took
            budget.book("training")
            n, progress = n + 1, after
            work = one * rng.uniform(0, 5)  # a validation or a save
            if rng.random() < 0.1 and progress < 1 and budget.fits("validation", work):
                late, last = max(0.0, work - (last or work)), work
                time.now += work
                budget.book("validation")
        assert progress == 1.0, seed
        over = budget.total - seconds
        assert over <= excess[-1] + excess[-2] + late + 1e-9, (seed, over, excess[-3:])
        assert -over <= 2 * max(one, budget.step_seconds) * 1.2, (seed, over, one)
        assert budget.seconds["compile"] == pytest.approx(compiling)


def test_budget_shorter_than_its_first_step_ends_after_it(time):
    assert len(spend(time, budget := seconds_budget(5.0), itertools.repeat(30.0))) == 1
    assert budget.total == 30.0


def test_work_fits_only_if_a_step_still_follows(time):
    budget = seconds_budget(100.0)
    for kind, seconds in (("training", 2.0), ("validation", 88.0)):
        time.now += seconds
        budget.book(kind)
    assert budget.fits("checkpoint", 8.0) and not budget.fits("checkpoint", 8.1)
    assert not budget.fits("validation", 8.0)  # the last one took longer
    assert Budget(TrainConfig(budget_hours=None, budget_steps=3), 1).fits("checkpoint", 1e9)


@pytest.mark.parametrize("n_steps", [1, 2, 20])
def test_step_and_token_budgets_count_exactly(time, n_steps):
    for budget in ({"budget_steps": n_steps}, {"budget_tokens": n_steps * 1024 + 1023}):
        config = TrainConfig(budget_hours=None, **budget)
        steps = spend(time, Budget(config, tokens_per_step=1024), itertools.repeat(1.0))
        assert len(steps) == n_steps
        assert steps[-1] == 1.0 and steps.count(1.0) == 1
        assert n_steps == 1 or steps[0] == 0.0


def test_too_few_tokens_for_a_step_are_refused():
    config = TrainConfig(budget_hours=None, budget_tokens=1000)
    with pytest.raises(ValueError, match="budget_tokens=1000 is less than one step of 1024"):
        Budget(config, tokens_per_step=1024)
