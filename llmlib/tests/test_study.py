"""Plans of many runs, and a study of real processes at smoke size."""

import pytest

from llmlib import runs, study
from llmlib.config import SCALES, override, recipe
from llmlib.study import PLANS
from llmlib.tests.conftest import FP32, SMOKE

TINY = override(FP32, budget_tokens=4096, eval_windows=8, eval_all=False)


@pytest.mark.parametrize("scale", PLANS)
def test_sizes_are_whole_runs_at_planned_token_counts(scale):
    base, plan = SCALES[scale], PLANS[scale]
    settings = study.size_settings(base.model, base.train, plan)
    assert len(settings) == len(plan.sizes) * len(plan.size_tokens)
    counts = {train.budget_tokens for _, train in settings.values()}
    assert counts == set(plan.size_tokens)
    tokens_per_step = base.train.n_sequences * base.model.seq_len
    assert min(counts) >= 8 * tokens_per_step
    for model, train in settings.values():
        expected = base.train.lr * (base.model.d_model / model.d_model) ** 0.5
        assert train.lr == pytest.approx(expected)
        assert (model.vocab_size, model.seq_len) == (base.model.vocab_size, base.model.seq_len)
        assert not train.eval_all and 1 <= train.eval_windows * model.seq_len <= 64_000


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
