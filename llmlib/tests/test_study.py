"""Plans of many runs, a study of real processes at smoke size, and what is read from its table."""

import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from llmlib import optim, runs, study
from llmlib.config import PRESETS, RECIPES, override, recipe
from llmlib.schedule import SCHEDULES, lr_multiplier
from llmlib.sizing import count_params
from llmlib.study import LADDERS, PLANS, Ladder
from llmlib.supervise import last_metrics

SMOKE = PRESETS["smoke"]
TRAIN = override(SMOKE.train, **recipe("best", "smoke"), eval_sequences=8)
ONE_SIZE = Ladder(sizes=((1, 32),), n_tokens=(16_384, 196_608))  # 16 and 192 steps


# ------------------------------------------------------------------ the ladder's settings


def parts_of_ladder(scale):
    """A scale's ladder as trunks and cool-downs by size, with the tokens of a step."""
    preset = PRESETS[scale]
    settings = study.ladder_settings(preset.model, preset.train, LADDERS[scale])
    tokens_per_step = preset.train.micro_batch * preset.train.grad_accum * preset.model.seq_len
    trunks = {name.split("/")[0]: s for name, s in settings.items() if name.endswith("/trunk")}
    coolings = {name: s for name, s in settings.items() if not name.endswith("/trunk")}
    return trunks, coolings, tokens_per_step


@pytest.mark.parametrize("scale", LADDERS)
def test_snapshot_and_cool_down_add_up_to_the_tokens_asked_for(scale):
    trunks, coolings, tokens_per_step = parts_of_ladder(scale)
    ladder = LADDERS[scale]
    assert len(trunks) == len(ladder.sizes)
    assert len(coolings) == len(ladder.sizes) * len(ladder.n_tokens)
    for name, (_, cooling) in coolings.items():
        start = int(cooling.start_from.rsplit("/", 1)[1])
        n_tokens = (start + cooling.budget_steps) * tokens_per_step
        assert int(name.split("/")[1]) == n_tokens
        assert min(abs(n_tokens - n) for n in ladder.n_tokens) < tokens_per_step
        share = cooling.budget_steps / (start + cooling.budget_steps)
        assert share == pytest.approx(ladder.cooldown, abs=0.5 * tokens_per_step / n_tokens)


@pytest.mark.parametrize("scale", LADDERS)
def test_every_cool_down_starts_from_a_snapshot_that_its_trunk_keeps(scale):
    trunks, coolings, _ = parts_of_ladder(scale)
    for name, (model, cooling) in coolings.items():
        trunk_model, trunk = trunks[name.split("/")[0]]
        kept = [f"{name.split('/')[0]}/trunk/snapshots/{s:08d}" for s in trunk.snapshot_steps]
        assert os.path.normpath(f"{name}/{cooling.start_from}") in kept
        assert max(trunk.snapshot_steps) == trunk.budget_steps  # and takes no step beyond
        assert model == trunk_model
        assert (cooling.lr, cooling.seed) == (trunk.lr, trunk.seed)


@pytest.mark.parametrize("scale", LADDERS)
def test_rate_rises_stays_and_falls_to_zero_as_in_one_run(scale):
    trunks, coolings, _ = parts_of_ladder(scale)
    for _, trunk in trunks.values():
        shape = trunk.schedule, trunk.warmup, trunk.final_lr, trunk.cooldown
        progress = np.linspace(0, 1, trunk.budget_steps)
        shares = np.array([lr_multiplier(shape[0], p, *shape[1:]) for p in progress])
        warm = min(trunk.snapshot_steps)
        assert shares[0] < 0.1 and (shares[warm - 1 :] == 1).all()
    for _, cooling in coolings.values():
        shape = cooling.warmup, cooling.final_lr, cooling.cooldown
        ends = [lr_multiplier(cooling.schedule, p, *shape) for p in (0, 0.5, 1)]
        assert ends == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize("scale", LADDERS)
def test_peak_rates_fall_with_the_root_of_the_width(scale):
    preset = PRESETS[scale]
    trunks, _, _ = parts_of_ladder(scale)
    scaled = {train.lr**2 * model.d_model for model, train in trunks.values()}
    assert list(scaled) == pytest.approx([preset.train.lr**2 * preset.model.d_model] * len(scaled))
    sizes = [(model.n_layer, model.d_model) for model, _ in trunks.values()]
    assert sizes == list(LADDERS[scale].sizes)
    assert {(model.vocab_size, model.seq_len) for model, _ in trunks.values()} == {
        (preset.model.vocab_size, preset.model.seq_len)
    }


def test_longer_ladder_keeps_its_sizes():
    longer = ONE_SIZE.longer(2.5)
    assert longer.sizes == ONE_SIZE.sizes and longer.n_tokens == (40_960, 491_520)


def test_points_of_a_ladder_are_its_finished_cool_downs():
    table = pd.DataFrame(
        {
            "run": ["1x32/trunk", "1x32/8192", "2x64/8192"],
            "status": ["finished", "finished", "failed: no output"],
        }
    )
    table[["n_params", "n_tokens", "flops", "loss"]] = 1.0
    assert study.ladder_points(table)["size"].tolist() == ["1x32"]


# ------------------------------------------------------------------ 04's settings


@pytest.mark.parametrize("scale", PLANS)
def test_recipe_trials_name_what_exists_and_differ(scale):
    preset, plan = PRESETS[scale], PLANS[scale]
    trial = plan.trial(preset.train)
    optimizers = study.optimizer_settings(preset.model, trial, plan.factors)
    assert {train.optimizer for _, train in optimizers.values()} == set(optim.OPTIMIZERS)
    assert len(optimizers) == (len(optim.OPTIMIZERS) - 1) * len(plan.factors) + 1
    schedules = study.schedule_settings(preset.model, trial)
    assert {train.schedule for _, train in schedules.values()} == set(SCHEDULES)
    claims = study.claim_settings(preset.model, trial)
    for settings in (optimizers, schedules, claims):
        assert len({repr(setting) for setting in settings.values()}) == len(settings)
    for name, (_, train) in optimizers.items():
        assert name == f"optimizers/{train.optimizer}-lr{train.lr:.2g}"
    seconds = {train.budget_seconds for _, train in (optimizers | schedules | claims).values()}
    assert seconds == {60 * plan.minutes_per_trial}


def test_each_claim_changes_one_thing():
    claims = study.claim_settings(SMOKE.model, TRAIN)
    model, train = claims.pop("claims/as_it_was")
    changed = {
        name.split("/")[1]: {k for k in vars(t) if getattr(t, k) != getattr(train, k)}
        for name, (m, t) in claims.items()
        if m == model
    }
    assert changed == {
        "half_the_batch": {"micro_batch"},
        "no_clipping": {"grad_clip"},
        "weight_decay_0.5": {"weight_decay"},
        "zero_init": {"zero_init"} if not train.zero_init else set(),
    }
    deeper = claims["claims/deeper"][0]
    assert deeper.n_layer * deeper.d_model**2 == model.n_layer * model.d_model**2
    assert claims["claims/gpt2"][0].arch == "gpt2"


def test_finalists_are_recipes_times_seeds_and_the_later_ones_also_take_shares():
    plan = PLANS["laptop"]
    recipes = {
        name: plan.finalist(override(PRESETS["laptop"].train, **recipe(name, "laptop")))
        for name in RECIPES
    }
    settings = study.finalist_settings(SMOKE.model, recipes, 2, [0.5])
    budgets = {name.split("/")[1]: train.budget_seconds for name, (_, train) in settings.items()}
    whole = 60 * plan.minutes_per_run
    assert budgets == pytest.approx(
        {f"{name}-x1-seed{seed}": whole for name in RECIPES for seed in (0, 1)}
        | {f"best-x0.5-seed{seed}": whole / 2 for seed in (0, 1)}
    )
    assert {train.seed for _, train in settings.values()} == {0, 1}


def test_plan_times_its_runs_and_compiles_and_validates_all_only_where_it_pays():
    plan = study.Plan(minutes_per_run=3.0, minutes_per_trial=0.5, n_seeds=1, n_trials=2)
    final, trial = plan.finalist(PRESETS["a100"].train), plan.trial(PRESETS["a100"].train)
    assert (final.budget_seconds, final.compile, final.eval_all) == (180, True, True)
    assert (trial.budget_seconds, trial.compile, trial.eval_all) == (30, False, False)
    assert trial.n_evals < final.n_evals == PRESETS["a100"].train.n_evals
    assert plan.trial(SMOKE.train).budget_steps is None  # seconds in place of steps
    assert list(plan.some({"a": 1, "b": 2, "c": 3})) == ["a", "b"]
    assert len(override(plan, n_trials=9).some({"a": 1, "b": 2, "c": 3})) == 3


# ------------------------------------------------------------------ running a study


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(study, "POLL_SECONDS", 0.02)


def ladder():
    return study.ladder_settings(SMOKE.model, TRAIN, ONE_SIZE)


def losses(run):
    return runs.read_metrics(run).query("kind == 'step'").loss.tolist()


@pytest.fixture(scope="module")
def finished(smoke_tokens, tmp_path_factory):
    """A ladder of one size, and before it a run that can't begin."""
    folder = tmp_path_factory.mktemp("study")
    small = override(SMOKE.model, vocab_size=256)
    settings = {"no_room": (small, TRAIN), **ladder()}
    return folder, settings, study.run_study(folder, settings, smoke_tokens, about={"n_tokens": 7})


def test_study_has_a_row_for_every_run_and_goes_on_past_a_failed_one(finished):
    folder, settings, table = finished
    assert table.run.tolist() == list(settings)
    rows = table.set_index("run")
    assert rows.status["no_room"].startswith("failed: error: the tokenizer has 512 tokens")
    assert math.isnan(rows.loss["no_room"])
    others = rows.drop("no_room")
    assert (others.status == "finished").all() and np.isfinite(others.loss).all()
    assert rows.n_params.tolist() == [count_params(model) for model, _ in settings.values()]
    assert rows.n_steps["1x32/trunk"] == settings["1x32/trunk"][1].budget_steps
    assert runs.read_json(folder / "1x32/trunk/config.json")["data"] == {"n_tokens": 7}


def test_cool_downs_wait_for_their_trunk_and_count_its_tokens(finished):
    folder, settings, table = finished
    rows = table.set_index("run")
    trunk = losses(folder / "1x32/trunk")
    for n_tokens in ONE_SIZE.n_tokens:
        assert rows.n_tokens[f"1x32/{n_tokens}"] == n_tokens
        start = n_tokens // 1024 - settings[f"1x32/{n_tokens}"][1].budget_steps
        first = losses(folder / f"1x32/{n_tokens}")[0]
        if start < len(trunk):  # the trunk met the same data with the same weights
            assert first == trunk[start]


def test_no_run_is_picked_before_the_trunk_it_starts_from_is_over(tmp_path):
    settings = ladder()
    trunk, *coolings = settings
    assert study._next(tmp_path, coolings, {trunk: None}, settings) is None
    assert study._next(tmp_path, [*coolings, trunk], {}, settings) == trunk
    assert study._next(tmp_path, coolings, {"2x32/trunk": None}, settings) == coolings[0]


def test_finished_study_trains_nothing_again(finished, smoke_tokens, quick):
    folder, settings, table = finished
    kept = {name: s for name, s in settings.items() if name != "no_room"}
    before = {p: p.stat().st_mtime_ns for p in folder.glob("**/*") if p.is_file()}
    again = study.run_study(folder, kept, smoke_tokens, about={"n_tokens": 7})
    assert {p: p.stat().st_mtime_ns for p in folder.glob("**/*") if p.is_file()} == before
    columns = ["run", "status", "loss", "n_tokens", "seconds"]
    assert again[columns].values.tolist() == table[columns][table.run != "no_room"].values.tolist()


def test_runs_of_another_config_are_refused(finished, smoke_tokens):
    folder, settings, _ = finished
    model, train = settings["1x32/trunk"]
    with pytest.raises(ValueError, match=r"run trunk in .* was made with another config"):
        study.run_study(folder, {"1x32/trunk": (model, override(train, lr=1.0))}, smoke_tokens)


def test_interrupted_study_goes_on_where_it_stopped(finished, smoke_tokens, tmp_path, monkeypatch):
    """Ctrl-C while the trunk trains: it saves itself, and the same call ends with the same model."""
    undisturbed, _, _ = finished
    settings = {name: s for name, s in ladder().items() if "16384" not in name}
    trunk, cooling = (tmp_path / name for name in settings)

    def start(run, tokens, **_):  # it can't end before the interrupt
        command = [sys.executable, Path(__file__).with_name("held_train.py"), run, "--supervised"]
        with open(run / "train.log", "a") as log:
            return subprocess.Popen(
                [*command, "--tokens", tokens],
                env=os.environ | {"HOLD_AT": "50"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    def sleep(_):
        time.sleep(0.02)
        if last_metrics(trunk) is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        patch.setattr(study, "start_training", start)
        study.run_study(tmp_path, settings, smoke_tokens)
    assert runs.lock_owner(trunk) is None  # nobody is left behind
    assert "the supervising process is gone: saved and stopped" in (trunk / "train.log").read_text()
    assert not (trunk / "training.json").exists() and not (cooling / "train.log").exists()

    monkeypatch.setattr(study, "POLL_SECONDS", 0.02)
    table = study.run_study(tmp_path, settings, smoke_tokens)
    assert table.status.tolist() == ["finished", "finished"]
    assert "went back to step" in (trunk / "train.log").read_text()
    for name in settings:
        ours, theirs = (load_file(f / name / "model.safetensors") for f in (tmp_path, undisturbed))
        assert all((ours[weight] == theirs[weight]).all() for weight in theirs)


# ------------------------------------------------------------------ reading its table


def finals(losses):
    """A table of finished finalists from losses by (recipe, share), seed by seed."""
    return pd.DataFrame(
        [
            {"run": f"finalists/{recipe}-x{share}-seed{i}", "status": "finished", "loss": loss}
            for (recipe, share), values in losses.items()
            for i, loss in enumerate(values)
        ]
    )


FINALS = finals(
    {
        ("winner2024", "1"): [3.00, 3.10, 3.20],
        ("best", "1"): [2.90, 2.98, 3.12],
        ("best", "0.25"): [3.30, 3.40, 3.20],
    }
)


def test_finalists_are_compared_seed_by_seed_with_students_interval():
    comparison = study.compare_finalists(FINALS)
    assert comparison.recipe.tolist() == ["winner2024", "best", "best"]
    assert comparison.share.tolist() == [1, 1, 0.25]
    best = comparison.iloc[1]
    differences = [-0.10, -0.12, -0.08]
    half_width = 4.303 * statistics.stdev(differences) / math.sqrt(3)  # t(0.975, 2 df), NIST
    assert best.loss == pytest.approx(3.0) and best.n_seeds == 3
    assert best.sd == pytest.approx(statistics.stdev([2.90, 2.98, 3.12]))
    assert best.difference == pytest.approx(-0.10)
    expected = [-0.10 - half_width, -0.10 + half_width]
    assert [best.low, best.high] == pytest.approx(expected, rel=1e-3)


def test_seed_that_failed_leaves_the_pair_out():
    failed = FINALS.assign(loss=FINALS.loss.where(FINALS.run != "finalists/best-x1-seed2"))
    best = study.compare_finalists(failed).iloc[1]
    assert (best.n_seeds, best.difference) == (2, pytest.approx(-0.11))
    one = FINALS[FINALS.run.str.endswith("seed0")].reset_index(drop=True)
    assert study.compare_finalists(one).low.isna().all()  # one seed has no interval


def coverage_of_t(limit, df):
    """P(|T| < limit) for Student's t, by integrating its density."""
    x = np.linspace(-limit, limit, 20_001)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    return np.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x)


@pytest.mark.parametrize("n", [*range(2, 11), 12, 30])
def test_intervals_cover_95_percent_whatever_the_number_of_seeds(n):
    table = finals({("one", "1"): [0.0] * n, ("two", "1"): [float(i % 2) for i in range(n)]})
    two = study.compare_finalists(table).iloc[1]
    limit = (two.high - two.difference) / (two.sd / math.sqrt(n))
    assert 0.9495 < coverage_of_t(limit, n - 1) < (0.9505 if n <= 10 else 0.97)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (3.2, (math.exp(-1), False)),
        (3.0, (1.0, False)),
        (3.3, (0.25, True)),
        (2.99, (None, False)),
    ],
)
def test_share_to_target_is_read_off_a_loss_that_is_linear_in_the_logarithm(target, expected):
    losses = {("winner", "1"): [9.0]}
    for share in (1, 0.5, 0.25):
        losses["best", share] = [3.0 - 0.2 * math.log(share)] * 2
    comparison = study.compare_finalists(finals(losses))
    share, is_bound = study.share_to_target(comparison, "best", target)
    assert (share, is_bound) == (expected[0] and pytest.approx(expected[0]), expected[1])


def test_whole_runs_are_the_finished_ones_with_all_of_the_budget():
    table = FINALS.copy()
    table.loc[0, "status"] = "failed: no output"
    whole = study.whole_runs(table)
    assert whole[:2] == [
        ("finalists/winner2024-x1-seed1", "winner2024", "1"),
        ("finalists/winner2024-x1-seed2", "winner2024", "2"),
    ]
    assert [(recipe, seed) for _, recipe, seed in whole[2:]] == [("best", str(i)) for i in range(3)]


@pytest.mark.parametrize(
    ("share", "is_bound", "words"),
    [
        (0.37, False, "best needs 37% of the time"),
        (0.25, True, "best needs at most 25% of the time"),
        (None, False, "best needs more than the whole time"),
    ],
)
def test_verdict_tells_the_difference_its_interval_and_the_time_saved(share, is_bound, words):
    summary = {
        "plan": {"minutes_per_run": 5.0},
        "finalists": study.compare_finalists(FINALS).to_dict("records"),
        "share_to_target": share,
        "share_is_bound": is_bound,
    }
    assert study.verdict(summary) == (
        "After 5 min, best ends at 3.000 and winner2024 at 3.100 nats/token: -0.100 (95 % interval "
        f"-0.150 to -0.050, 3 seeds); {words} to reach winner2024's loss."
    )
