"""Plans of many runs, and a study of real processes at smoke size."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from llmlib import runs, study
from llmlib.config import SCALES, override
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
    widths = tuple((1, 32 * n) for n in range(1, 6))
    plan = replace(PLANS["smoke"], sizes=widths, times=(1.0, 2.0, 4.0))
    sizes = study.size_settings(SMOKE.model, override(SMOKE.train, embed_lr=0.5), plan)
    best = pd.Series({1.0: 1e3, 2.0: count_params(sizes["1x128"][0])})
    middle = count_params(sizes["1x64"][0])
    halved = lambda n_params, seconds: 0.5 if (n_params, seconds) == (middle, 1.0) else 1.0  # noqa: E731
    named = {"factors": halved, "best": best, "n_seeds": 2}
    settings = study.iso_time_settings(sizes, pd.Series(1e6, index=list(sizes)), plan, **named)
    repeated = [name.removesuffix("-seed2") for name in settings if name.endswith("seed2")]
    assert repeated[:3] == ["1x32-1s-x1", "1x64-1s-x0.5", "1x96-1s-x1"]
    assert repeated[3:] == ["1x96-2s-x1", "1x128-2s-x1", "1x160-2s-x1"]
    run, before = settings["1x64-1s-x0.5-seed1"][1], sizes["1x64"][1]
    assert (run.lr, run.embed_lr) == (before.lr / 2, before.embed_lr / 2) and run.vector_lr is None
    trials = pd.DataFrame({"run": list(settings), "status": "finished", "loss": 3.0})
    points = study.iso_time_points(trials)
    assert set(points.seconds) == {1.0, 2.0, 4.0} and points.factor.min() == 0.5
    assert set(points["size"]) == set(sizes)
    assert study.iso_time_points(trials.assign(status="failed: why")).empty


def test_runs_of_more_tokens_than_allowed_are_left_out_and_none_is_refused():
    plan = replace(PLANS["smoke"], times=(1.0, 2.0, 4.0))
    sizes = study.size_settings(SMOKE.model, SMOKE.train, plan)
    speeds = pd.Series(1e6, index=list(sizes))
    settings = study.iso_time_settings(sizes, speeds, plan, max_tokens=1.5e6)
    assert {name.split("-")[1] for name in settings} == {"1s"}
    with pytest.raises(ValueError, match="more than 1,000 tokens, four epochs"):
        study.iso_time_settings(sizes, speeds, plan, max_tokens=1e3)


def test_a_size_whose_step_failed_is_left_out_and_none_has_fewer_than_the_least_steps():
    sizes = study.size_settings(SMOKE.model, SMOKE.train, PLANS["smoke"])
    speeds = pd.Series(1.0, index=list(sizes))
    speeds["1x32"] = math.nan
    settings = study.iso_time_settings(sizes, speeds, PLANS["smoke"])
    per_step = SMOKE.train.n_sequences * SMOKE.model.seq_len
    assert {run.budget_tokens for _, run in settings.values()} == {study.MIN_STEPS * per_step}
    assert {name.split("-")[0] for name in settings} == {"1x64", "2x64"}


def bowl(lr, embed_lr):
    """A loss whose best rates are 0.02 and 0.3; above 0.2 the first one diverges."""
    loss = math.log(lr / 0.02) ** 2 + math.log(embed_lr / 0.3) ** 2
    return math.nan if lr > 0.2 else loss


@pytest.mark.parametrize("start", [(0.001, 0.001), (0.1, 10.0), (0.02, 0.3)])
def test_search_extends_its_grids_until_the_best_is_inside(start):
    met = []

    def train_all(settings):
        trains = [train for _, train in settings.values()]
        met.extend((t.lr, t.embed_lr) for t in trains)
        return pd.DataFrame({"loss": [bowl(t.lr, t.embed_lr) for t in trains]})

    train = override(FP32, lr=start[0], embed_lr=start[1])
    best = study.search(train_all, (SMOKE.model, train), (("lr",), ("embed_lr",)))
    assert abs(math.log2(best.lr / 0.02)) <= 0.5 and abs(math.log2(best.embed_lr / 0.3)) <= 0.5
    assert {(best.lr / 2, start[1]), (best.lr * 2, start[1])} <= set(met)
    assert {(best.lr, best.embed_lr / 2), (best.lr, best.embed_lr * 2)} <= set(met)
    rows = [{"optimizer": "adamw", "lr": lr, "embed_lr": e, "loss": bowl(lr, e)} for lr, e in met]
    grids = study.grids(pd.DataFrame(rows), ("lr", "embed_lr"))
    assert not grids.is_edge.any() and set(grids.setting) == {"lr", "embed_lr"}
    assert (grids.gap.dropna() >= 0).all() and (grids[grids.gap == 0].factor == 1).all()


def test_settings_named_together_are_scaled_together_and_counts_stay_whole():
    scaled = study.scaled(override(FP32, embed_lr=0.5), (*study.RATES, "micro_batch"), 0.5)
    assert (scaled.lr, scaled.embed_lr, scaled.vector_lr) == (FP32.lr / 2, 0.25, None)
    assert scaled.micro_batch == FP32.micro_batch // 2


def test_end_sizes_are_tuned_at_two_times_and_the_others_lie_between():
    """Of losses with a known best rate, c N^-0.5 t^-0.25 with a product, the search finds it."""
    plan = replace(PLANS["smoke"], times=(1.0, 2.0, 8.0, 16.0))
    sizes = study.size_settings(SMOKE.model, override(SMOKE.train, embed_lr=0.5), plan)
    speeds, n_runs = pd.Series(1e6, index=list(sizes)), []
    start = {count_params(model): train.lr for model, train in sizes.values()}

    def best_factor(n_params, seconds):
        log_n, log_t = math.log(n_params), math.log(seconds)
        return 30 * math.exp(-0.25 * log_n - 0.5 * log_t + 0.02 * log_n * log_t)

    def loss(model, train):
        n_params = count_params(model)
        best = start[n_params] * best_factor(n_params, round(train.budget_tokens / 1e6))
        return math.log(train.lr / best) ** 2

    def train_all(settings):
        n_runs.append(len(settings))
        return pd.DataFrame({"loss": [loss(*setting) for setting in settings.values()]})

    tuned = study.tune_sizes(train_all, sizes, speeds, plan)
    assert len(n_runs) > 1 and set(tuned.seconds) == {1.0, 8.0}
    factors = study.interpolate_factors(tuned)
    for model, _ in sizes.values():
        for seconds in plan.times:
            expected = best_factor(count_params(model), seconds)
            assert factors(count_params(model), seconds) == pytest.approx(expected, rel=1e-2)
    with pytest.raises(ValueError, match=r"no best between .* do its runs fail"):
        study.tune_sizes(lambda s: pd.DataFrame({"loss": [math.nan] * len(s)}), sizes, speeds, plan)


def table_of(losses):
    return pd.DataFrame(
        {"run": f"{arm}-seed{seed}", "seed": seed, "loss": loss}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    )


def test_difference_of_two_arms_is_the_paired_t_interval():
    ours, theirs = [3.1, 3.3, 3.2, 3.35], [3.4, 3.5, 3.6, 3.55]
    both, other = {"b": theirs, "a": ours}, {"noisy": [1.0, 9.0, 4.0, 2.0]}
    [row] = study.differences(table_of(both), "b").itertuples()
    apart = study.differences(table_of(both | other), "b", is_pooled=False).set_index("arm")
    assert apart.low["a"] == pytest.approx(row.low) and apart.high["noisy"] > 2
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert row.arm == "a" and (row.low, row.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("n_arms", [2, 5, 10])
def test_intervals_over_arms_cover_the_truth(n_arms):
    rng, inside = np.random.default_rng(0), []
    for _ in range(500):
        seeds = rng.normal(size=3)
        losses = {f"{i}": seeds + 0.1 * i + 0.05 * rng.normal(size=3) for i in range(n_arms)}
        found = study.differences(table_of(losses), "0")
        inside += (0.1 * found.arm.astype(int)).between(found.low, found.high).tolist()
    assert 0.93 < np.mean(inside) < 0.97


def test_a_failed_seed_is_not_counted():
    losses = {"base": [3.0, 3.1, 3.3], "arm": [2.9, math.nan, 3.25]}
    [row] = study.differences(table_of(losses), "base", is_pooled=False).itertuples()
    expected = stats.ttest_rel([2.9, 3.25], [3.0, 3.3]).confidence_interval(0.95)
    assert (row.n, row.low, row.high) == pytest.approx((2, expected.low, expected.high))


def test_a_plan_of_too_few_sizes_or_times_is_refused():
    for few in ({"sizes": ((1, 32), (1, 64))}, {"times": (1.0, 2.0)}):
        with pytest.raises(ValueError, match="give three sizes and three times or more"):
            replace(PLANS["smoke"], **few)


@pytest.fixture(scope="module")
def studied(smoke_tokens, tmp_path_factory):
    """A study of three settings: two are equal, one fails."""
    record = runs.Record(tmp_path_factory.mktemp("study"), {})
    diverging = override(TINY, lr=1e30, grad_clip=1e30, budget_tokens=40_960)
    settings = {"a": TINY, "same": TINY, "bad": diverging}
    settings = {label: (SMOKE.model, train) for label, train in settings.items()}
    table = study.run_study(record, "trials", settings, smoke_tokens)
    return record, settings, table.set_index("run")


def test_equal_settings_are_one_run_and_a_failed_one_is_a_row_that_says_why(studied):
    record, _, table = studied
    assert table.loss["a"] == table.loss["same"] and table.loss.isna()["bad"]
    assert table.status["a"] == "finished" and table.n_tokens["a"] == 4096
    assert table.status["bad"].startswith("failed: ") and "not finite" in table.status["bad"]
    assert pd.read_csv(record.path / "trials.csv").run.tolist() == ["a", "bad"]


def test_finished_run_leaves_its_rows_and_its_result_but_nothing_large(studied):
    run = studied[0].path / "trials" / "trials" / study.setting_id(SMOKE.model, TINY)
    assert {"config.json", "metrics.jsonl", "result.json"} <= {p.name for p in run.iterdir()}
    assert not (run / "checkpoints").exists() and not (run / "model.safetensors").exists()


def test_study_goes_on_from_its_table_alone(studied, smoke_tokens, monkeypatch):
    record, settings, table = studied
    shutil.rmtree(record.path / "trials")
    more = settings | {"new": (SMOKE.model, override(TINY, seed=5))}
    again = study.run_study(record, "trials", more, smoke_tokens).set_index("run")
    trained = [path.name for path in (record.path / "trials" / "trials").iterdir()]
    assert trained == [again.id["new"]]
    assert again.loc[table.index].equals(table) and again.loss["new"] != again.loss["a"]
    never = lambda runs: runs and pytest.fail("trained again")  # noqa: E731
    monkeypatch.setattr(study.launch, "run_many", never)
    study.run_study(record, "trials", more, smoke_tokens)


def test_interrupted_study_keeps_the_rows_of_ended_runs(smoke_tokens, tmp_path, monkeypatch):
    def stop_early(folders):
        run_many(folders[:1])
        raise KeyboardInterrupt

    run_many, record = study.launch.run_many, runs.Record(tmp_path, {})
    monkeypatch.setattr(study.launch, "run_many", stop_early)
    settings = study.repeated({"a": (SMOKE.model, TINY)}, (1, 2))
    with pytest.raises(KeyboardInterrupt):
        study.run_study(record, "rows", settings, smoke_tokens)
    assert list(pd.read_csv(tmp_path / "rows.csv").run) == ["a-seed1"]
