"""Plans of many runs, and a study of real processes at smoke size."""

from dataclasses import replace

import pandas as pd
import pytest

from llmlib import runs, study
from llmlib.config import SCALES, override, recipe
from llmlib.sizing import count_params
from llmlib.study import PLANS
from llmlib.tests.conftest import FP32, SMOKE

TINY = override(FP32, budget_tokens=4096, eval_windows=8, eval_all=False)


@pytest.mark.parametrize("scale", PLANS)
def test_sizes_get_the_tokens_that_their_speed_buys_in_whole_steps(scale):
    base, plan = SCALES[scale], PLANS[scale]
    train = override(base.train, embed_lr=7 * base.train.lr)
    sizes = study.size_settings(base.model, train, plan)
    per_step = base.train.n_sequences * base.model.seq_len
    speeds = pd.Series([1000.4 * per_step / n for n in range(1, len(sizes) + 1)], index=list(sizes))
    settings = study.iso_time_settings(sizes, speeds, plan)
    for name, (model, run) in settings.items():
        size, seconds, *_ = name.split("-")
        factor = (base.model.d_model / model.d_model) ** 0.5
        assert (run.lr, run.embed_lr) == pytest.approx((train.lr * factor, 7 * train.lr * factor))
        bought = speeds[size] * float(seconds[:-1])
        assert run.budget_tokens % per_step == 0 and not run.eval_all
        assert abs(run.budget_tokens - bought) <= per_step / 2
        assert run.eval_windows * model.seq_len <= study.VAL_TOKENS
    assert len(settings) == len(sizes) * len(plan.times) + 2  # seeds, at one size and time
    aspect = [d_model / n_layer for n_layer, d_model in plan.sizes]
    assert max(aspect) <= 4 * min(aspect)


def test_seeds_go_to_the_three_sizes_next_to_the_best_and_factors_to_every_rate():
    plan = replace(PLANS["smoke"], sizes=tuple((1, 32 * n) for n in range(1, 6)), times=(1.0, 2.0))
    sizes = study.size_settings(SMOKE.model, override(SMOKE.train, embed_lr=0.5), plan)
    best = pd.Series({1.0: 1e3, 2.0: count_params(sizes["1x128"][0])})
    named = {"factors": {"1x64": 0.5}, "best": best, "n_seeds": 2}
    settings = study.iso_time_settings(sizes, pd.Series(1e6, index=list(sizes)), plan, **named)
    repeated = [name.removesuffix("-seed2") for name in settings if name.endswith("seed2")]
    assert repeated == ["1x32-1s-x1", "1x64-1s-x0.5", "1x96-1s-x1"] + [
        f"1x{width}-2s-x1" for width in (96, 128, 160)
    ]
    run, before = settings["1x64-1s-x0.5-seed1"][1], sizes["1x64"][1]
    assert (run.lr, run.embed_lr) == (before.lr / 2, before.embed_lr / 2) and run.vector_lr is None
    trials = pd.DataFrame({"run": list(settings), "status": "finished", "loss": 3.0})
    points = study.iso_time_points(trials)
    assert set(points.seconds) == {1.0, 2.0} and points.factor.min() == 0.5
    assert set(points["size"]) == set(sizes)
    assert study.iso_time_points(trials.assign(status="failed: why")).empty


def test_runs_of_more_tokens_than_allowed_are_left_out_and_none_is_refused():
    plan = replace(PLANS["smoke"], times=(1.0, 2.0))
    sizes = study.size_settings(SMOKE.model, SMOKE.train, plan)
    speeds = pd.Series(1e6, index=list(sizes))
    settings = study.iso_time_settings(sizes, speeds, plan, max_tokens=1.5e6)
    assert {name.split("-")[1] for name in settings} == {"1s"}
    with pytest.raises(ValueError, match="more than 1,000 tokens, four epochs"):
        study.iso_time_settings(sizes, speeds, plan, max_tokens=1e3)


def test_a_size_whose_step_failed_is_left_out_and_none_has_fewer_than_the_least_steps():
    sizes = study.size_settings(SMOKE.model, SMOKE.train, PLANS["smoke"])
    speeds = pd.Series(1.0, index=list(sizes))
    failed = next(iter(sizes))
    speeds[failed] = float("nan")
    settings = study.iso_time_settings(sizes, speeds, PLANS["smoke"])
    per_step = SMOKE.train.n_sequences * SMOKE.model.seq_len
    assert {run.budget_tokens for _, run in settings.values()} == {study.MIN_STEPS * per_step}
    assert not any(name.startswith(f"{failed}-") for name in settings)


@pytest.mark.parametrize("scale", PLANS)
def test_every_optimizer_has_the_same_grid_about_its_own_guess(scale):
    base, plan = SCALES[scale], PLANS[scale]
    settings = study.optimizer_settings(base.model, base.train, plan)
    rates = {}
    for model, train in settings.values():
        rates.setdefault(train.optimizer, []).append(train.lr / base.train.lr)
        assert model == base.model and train.budget_tokens == plan.trial_tokens
    assert rates.pop("sophia_writeup") == [1.0]
    for optimizer, guess in study.RATE_GUESS.items():
        assert rates[optimizer] == pytest.approx([guess * f for f in plan.rate_factors])


def test_recipes_meet_the_same_seeds_and_tokens():
    plan = PLANS["smoke"]
    recipes = {n: override(FP32, **recipe(n, "smoke")) for n in ("winner2024", "best")}
    settings = study.recipe_settings(SMOKE.model, recipes, plan)
    assert list(settings) == [f"{n}-seed{s}" for n in recipes for s in plan.seeds]
    assert {train.budget_tokens for _, train in settings.values()} == {plan.trial_tokens}


@pytest.fixture(scope="module")
def studied(smoke_tokens, tmp_path_factory):
    """A study of three runs, one of which fails, and the same again."""
    record = runs.Record(tmp_path_factory.mktemp("study"), {})
    settings = {
        "a": (SMOKE.model, TINY),
        "same": (SMOKE.model, TINY),
        "bad": (SMOKE.model, override(TINY, lr=1e30, grad_clip=1e30, budget_tokens=40_960)),
    }
    table = study.run_study(record, "trials", settings, smoke_tokens)
    return record, settings, table.set_index("run")


def test_equal_settings_give_equal_losses(studied):
    _, _, table = studied
    assert table.loss["a"] == table.loss["same"]
    assert table.status["a"] == "finished" and table.n_tokens["a"] == 4096


def test_finished_run_leaves_its_rows_and_its_result_but_nothing_large(studied):
    record, _, _ = studied
    run = record.path / "trials" / "trials" / "a"
    assert {"config.json", "metrics.jsonl", "result.json"} <= {p.name for p in run.iterdir()}
    assert not (run / "checkpoints").exists() and not (run / "model.safetensors").exists()


def test_failed_run_is_a_row_that_says_why(studied):
    _, _, table = studied
    assert table.status["bad"].startswith("failed: ") and "not finite" in table.status["bad"]
    assert table.loss.isna()["bad"]


def test_finished_study_is_its_table(studied, smoke_tokens, monkeypatch):
    record, settings, table = studied
    monkeypatch.setattr(study.launch, "run_many", lambda _: pytest.fail("trained again"))
    again = study.run_study(record, "trials", settings, smoke_tokens)
    assert again.set_index("run").equals(table)
