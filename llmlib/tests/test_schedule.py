"""Schedules against torch's own, and against what they promise."""

import pytest
import torch

from llmlib.schedule import SCHEDULES, lr_multiplier


def test_one_cycle_matches_torch_on_every_step():
    n_steps, peak = 1000, 1.25e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=peak,
        total_steps=n_steps,
        pct_start=0.05,
        anneal_strategy="cos",
        div_factor=100,
        final_div_factor=0.1,  # of the initial rate: peak / 100 / 0.1 = 0.1 peak
    )
    # torch counts steps from 0 and ends the warm-up one step before the share is full.
    warmup = (0.05 * n_steps - 1) / (n_steps - 1)
    for step in range(n_steps):
        ours = peak * lr_multiplier("one_cycle", step / (n_steps - 1), warmup, final_lr=0.1)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step < n_steps - 1:
            theirs.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
def test_schedule_starts_low_peaks_and_ends_where_promised(schedule, warmup):
    rates = [lr_multiplier(schedule, i / 1000, warmup, 0.1) for i in range(1001)]
    assert rates[-1] == pytest.approx(0.1, abs=1e-15)
    assert rates[round(1000 * warmup)] == max(rates) == 1.0
    assert rates[0] == pytest.approx(0.01 if warmup else 1.0)
    assert lr_multiplier(schedule, 1.7, warmup, 0.1) == rates[-1]


def test_linear_falls_to_zero_along_a_line():
    assert lr_multiplier("linear", 0.775, 0.1, 0.0) == pytest.approx(0.25)
    assert lr_multiplier("linear", 1.0, 0.1, 0.0) == 0.0


def test_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'cosine' is unknown; choose one of one_cycle, linear"):
        lr_multiplier("cosine", 0.5, 0.05, 0.1)
