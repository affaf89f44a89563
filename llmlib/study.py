"""A question as a table of runs: sizes for 03, optimizers and recipes for 04.

Runs are budgeted in tokens, so that a busy machine changes how long they take and not what they
find. Each is an ordinary, resumable run below the record's ``trials/``; what counts is its row.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmlib import launch, runs
from llmlib.config import ModelConfig, TrainConfig, override, resize
from llmlib.sizing import count_params

Settings = dict[str, tuple[ModelConfig, TrainConfig]]


@dataclass(frozen=True)
class Plan:
    """What 03 and 04 train at a scale."""

    sizes: tuple[tuple[int, int], ...]  # (n_layer, d_model) of 03, the smallest first
    times: tuple[float, ...]  # training time of 03's curves [s], each twice the last
    trial_tokens: int  # training tokens of each run of 04
    rate_factors: tuple[float, ...] = (0.5, 1.0, 2.0)  # of each optimizer's guessed rate
    seeds: tuple[int, ...] = (1, 2, 3)  # of each recipe


PLANS = {
    "smoke": Plan(((1, 32), (1, 64), (2, 64)), (0.05, 0.1, 0.2), 16_384, (1.0,), (1, 2)),
    "laptop": Plan(
        sizes=((1, 16), (1, 32), (1, 64), (2, 96)),
        times=(2.0, 4.0, 8.0),
        trial_tokens=65_536,
    ),
    "a100": Plan(
        sizes=((8, 640), (10, 896), (12, 1024), (14, 1280)),
        times=(300.0, 600.0, 1200.0),
        trial_tokens=104_857_600,
    ),
}
RATE_GUESS = {"adamw": 2.0, "muon": 10.0, "sophia": 0.5}  # times the base rate, at "laptop"
LONG_TOKENS = 1_000_000  # in shorter runs, compiling and long validations do not pay
VAL_TOKENS = 64_000  # that a study's run is scored on, at most
MIN_STEPS = 4  # of a run of 03


def run_study(record: runs.Record, name: str, settings: Settings, tokens_dir: Path) -> pd.DataFrame:
    """Train every setting, or read the table of an earlier time: one row each, failed ones too."""
    folders = {label: record.path / "trials" / name / label for label in settings}

    def train_all() -> pd.DataFrame:
        for label, (model, train) in settings.items():
            light = override(train, keep_weights=False)  # many runs' would fill a disk
            runs.create_run(folders[label], model, light, tokens_dir)
        launch.run_many(list(folders.values()))
        return pd.DataFrame([{"run": label} | _row(run) for label, run in folders.items()])

    return record.cached_table(name, train_all)


def _row(folder: Path) -> dict[str, Any]:
    """Say what a run was and how it ended; a failed one has no loss."""
    run, result = runs.read_run(folder), runs.read_result(folder)
    row = {name: getattr(run.train, name) for name in ("optimizer", "lr", "seed")}
    row |= {"n_layer": run.model.n_layer, "d_model": run.model.d_model}
    row |= {"n_params": count_params(run.model)}
    if result is None:
        return row | {"loss": None, "status": f"failed: {launch.log_tail(folder, n_lines=1)}"}
    row |= {"val_sha256": result["val_sha256"]}
    kept = ("n_tokens", "flops", "n_steps", "tokens_per_s", "unclipped_share", "dtype")
    row |= {name: result.get(name) for name in kept}
    return row | {"loss": result["val"]["loss"], "status": "finished"}


def _planned(model: ModelConfig, train: TrainConfig, n_tokens: int, **changes: Any) -> TrainConfig:
    """Budget a run in tokens, with one validation at its end."""
    is_long, most = n_tokens >= LONG_TOKENS, VAL_TOKENS // model.seq_len
    shared = {"n_evals": 1, "eval_all": False, "compile": train.compile and is_long}
    shared |= {"eval_windows": most if is_long else min(most, train.eval_windows)}
    return override(train, budget_tokens=n_tokens, **shared, **changes)


def size_settings(base: ModelConfig, train: TrainConfig, plan: Plan) -> Settings:
    """Every size of 03; peak rates fall with the root of the width."""
    settings = {}
    for n_layer, d_model in plan.sizes:
        model = resize(base, arch=base.arch, n_layer=n_layer, d_model=d_model)
        factor = (base.d_model / d_model) ** 0.5
        embed_lr = train.embed_lr and train.embed_lr * factor
        scaled = override(train, lr=train.lr * factor, embed_lr=embed_lr)
        settings[f"{n_layer}x{d_model}"] = model, scaled
    return settings


def iso_time_settings(
    sizes: Settings,
    speeds: pd.Series,
    plan: Plan,
    *,
    factors: dict[str, float] | None = None,
    best: pd.Series | None = None,
    n_seeds: int = 3,
    max_tokens: float = float("inf"),
) -> Settings:
    """Every size for every time, by its speed [tokens/s], in whole steps; whole runs.

    ``factors`` multiply a size's peak rates. ``n_seeds`` go to the three sizes next to the ``best``
    of each time [parameters, by time]; while it is not known, to the middle size at the shortest
    time, for the noise. Left out are runs of more than ``max_tokens`` and sizes whose speed is NaN
    (the step failed); if that leaves none, it is refused.
    """
    repeated = {(min(plan.times), list(sizes)[len(sizes) // 2])}
    if best is not None:
        n_params = pd.Series({name: count_params(model) for name, (model, _) in sizes.items()})
        far = {seconds: np.log(n_params / n).abs() for seconds, n in best.items()}
        repeated = {(seconds, name) for seconds in far for name in far[seconds].nsmallest(3).index}
    settings = {}
    for name, (model, train) in sizes.items():
        per_step, factor = train.n_sequences * model.seq_len, (factors or {}).get(name, 1.0)
        changes = {"eval_windows": VAL_TOKENS // model.seq_len, "eval_all": False, "n_evals": 1}
        rates = {rate: getattr(train, rate) for rate in ("lr", "embed_lr", "vector_lr")}
        changes |= {rate: factor * value for rate, value in rates.items() if value}
        for seconds in plan.times if speeds[name] > 0 else ():
            n_tokens = per_step * max(round(speeds[name] * seconds / per_step), MIN_STEPS)
            n_runs = n_seeds if (seconds, name) in repeated else 1
            for seed in range(1, n_runs + 1) if n_tokens <= max_tokens else ():
                run = override(train, budget_tokens=n_tokens, seed=seed, **changes)
                settings[f"{name}-{seconds:g}s-x{factor:.3g}-seed{seed}"] = model, run
    if not settings:
        raise ValueError(
            f"every run would train on more than {max_tokens:,.0f} tokens, four epochs of the text; "
            "bring more text, or leave 03 out (--only)."
        )
    return settings


def iso_time_points(trials: pd.DataFrame) -> pd.DataFrame:
    """Read size, time [s] and factor of the rates off the labels of finished runs."""
    parts = trials.run.str.extract("(?P<size>.+)-(?P<seconds>.+)s-x(?P<factor>.+)-seed")
    points = trials.join(parts.astype({"seconds": float, "factor": float}))
    return points[points.status == "finished"].copy()


def optimizer_settings(model: ModelConfig, train: TrainConfig, plan: Plan) -> Settings:
    """Every optimizer over a small grid of peak rates, all else equal.

    Sophia as the write-up ran it takes no grid: its rate was AdamW's.
    """
    grid = [(name, x * guess) for name, guess in RATE_GUESS.items() for x in plan.rate_factors]
    settings = {}
    for name, factor in [*grid, ("sophia_writeup", 1.0)]:
        trial = _planned(model, train, plan.trial_tokens, optimizer=name, lr=factor * train.lr)
        settings[f"{name}-lr{trial.lr:.2g}"] = (model, trial)
    return settings


def recipe_settings(model: ModelConfig, recipes: dict[str, TrainConfig], plan: Plan) -> Settings:
    """Every recipe with every seed; runs of one seed share their data order."""
    return {
        f"{name}-seed{seed}": (model, _planned(model, train, plan.trial_tokens, seed=seed))
        for name, train in recipes.items()
        for seed in plan.seeds
    }
