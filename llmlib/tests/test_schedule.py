"""Schedules against torch's own, and against what they promise."""

import pytest
import torch
from torch.optim import lr_scheduler

from llmlib.config import SCHEDULES, TrainConfig
from llmlib.schedule import lr_factor

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")  # no optimizer steps here


def rate(schedule, progress, warmup, final_lr, cooldown=0.5):
    shape = {"warmup": warmup, "final_lr": final_lr, "cooldown": cooldown}
    return lr_factor(TrainConfig(schedule=schedule, **shape), progress)


def optimizer(lr):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates_of(scheduler, n_steps):
    """The rates that torch gives to steps 0 to ``n_steps``."""
    yield from scheduler.get_last_lr()
    for _ in range(n_steps):
        scheduler.step()
        yield from scheduler.get_last_lr()


@pytest.mark.parametrize(
    ("schedule", "n_steps"), [("one_cycle", 1000), ("one_cycle_unfinished", 878)]
)
def test_one_cycle_of_1000_steps_matches_torch_as_far_as_it_gets(schedule, n_steps):
    peak = 1.25e-3
    theirs = lr_scheduler.OneCycleLR(
        optimizer(1.0),
        max_lr=peak,
        total_steps=1001,
        pct_start=0.05,
        anneal_strategy="cos",
        div_factor=100,
        final_div_factor=0.1,  # of the initial rate: peak / 100 / 0.1 = 0.1 peak
    )
    warmup = (0.05 * 1001 - 1) / 1000  # torch ends it one step before the share is full
    for step, expected in enumerate(rates_of(theirs, n_steps)):
        ours = peak * rate(schedule, step / n_steps, warmup, final_lr=0.1)
        assert ours == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("cosine", lambda o: lr_scheduler.CosineAnnealingLR(o, 900, eta_min=0.1)),
        ("linear", lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 900)),
    ],
)
def test_after_the_warmup_the_fall_is_torchs(schedule, theirs):
    for step, expected in enumerate(rates_of(theirs(optimizer(1.0)), 900)):
        assert rate(schedule, 0.1 + step / 1000, 0.1, 0.1) == pytest.approx(expected)


def test_wsd_stays_at_the_peak_and_falls_along_a_line_at_the_end():
    progress = [0.0, 0.05, 0.1, 0.5, 0.75, 0.8, 0.9, 1.0]
    rates = [rate("wsd", p, 0.1, 0.2, cooldown=0.25) for p in progress]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 1.0, 0.84, 0.52, 0.2])
    assert rate("wsd", 1.0, 0.1, 0.2, cooldown=0.0) == 1.0
    for p in progress:  # too long a one begins behind the warm-up
        assert rate("wsd", p, 0.1, 0.2, cooldown=0.95) == rate("linear", p, 0.1, 0.2)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "one_cycle_unfinished"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("final_lr", [0.0, 0.1])
def test_schedule_starts_low_peaks_and_ends_where_promised(schedule, warmup, final_lr):
    rates = [rate(schedule, i / 1000, warmup, final_lr) for i in range(1001)]
    assert rates[-1] == pytest.approx(final_lr, abs=1e-15)
    assert rates[round(1000 * warmup)] == max(rates) == 1.0
    assert rates[0] == pytest.approx(0.01 if warmup else 1.0)
    assert rate(schedule, 1.7, warmup, final_lr) == rates[-1]
