"""A question as a table of runs: sizes for 03, optimizers and recipes for 04.

Runs are budgeted in tokens, so that a busy machine changes how long they take and not what they
find. Each is an ordinary, resumable run below the record's ``trials/``; what counts is its row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from llmlib import launch, runs
from llmlib.config import ModelConfig, TrainConfig, override, resize
from llmlib.sizing import count_params

Settings = dict[str, tuple[ModelConfig, TrainConfig]]


@dataclass(frozen=True)
class Plan:
    """What 03 and 04 train at a scale."""

    sizes: tuple[tuple[int, int], ...]  # (n_layer, d_model) of 03
    size_tokens: tuple[int, ...]  # training tokens per size
    trial_tokens: int  # of each of 04's trials
    rate_factors: tuple[float, ...]  # of each optimizer's guessed rate
    seeds: tuple[int, ...]  # of each recipe


PLANS = {
    "smoke": Plan(((1, 32), (1, 64), (2, 64)), (8_192, 16_384, 32_768), 16_384, (1.0,), (1, 2)),
    "laptop": Plan(
        sizes=((1, 64), (2, 96), (2, 128), (2, 192)),
        size_tokens=(32_768, 65_536, 131_072),
        trial_tokens=65_536,
        rate_factors=(0.5, 1.0, 2.0),
        seeds=(1, 2, 3),
    ),
    "a100": Plan(
        sizes=((6, 512), (10, 640), (10, 768), (10, 1024)),
        size_tokens=(52_428_800, 104_857_600, 209_715_200),
        trial_tokens=104_857_600,
        rate_factors=(0.5, 1.0, 2.0),
        seeds=(1, 2, 3),
    ),
}
RATE_GUESS = {"adamw": 2.0, "muon": 10.0, "sophia": 0.5}  # times the base rate, at "laptop"


def run_study(record: runs.Record, name: str, settings: Settings, tokens_dir) -> pd.DataFrame:
    """Train every setting, or read the table of an earlier time: one row each, failed ones too."""

    def train_all() -> pd.DataFrame:
        folders = {label: record.path / "trials" / name / label for label in settings}
        for label, (model, train) in settings.items():
            runs.create_run(folders[label], model, train, tokens_dir)
        launch.run_many(list(folders.values()))
        return pd.DataFrame([_row(label, folder) for label, folder in folders.items()])

    return record.cached_table(name, train_all)


def _row(label: str, folder) -> dict:
    """Say in a row how a run ended and what it was."""
    run, result = runs.read_run(folder), runs.read_result(folder)
    row = {"run": label, "optimizer": run.train.optimizer, "lr": run.train.lr}
    row |= {"seed": run.train.seed, "n_layer": run.model.n_layer, "d_model": run.model.d_model}
    row |= {"n_params": count_params(run.model), "loss": np.nan, "status": "finished"}
    if result is None:
        return row | {"status": f"failed: {launch.log_tail(folder, n_lines=1)}"}
    kept = ("n_tokens", "flops", "n_steps", "tokens_per_s", "unclipped_share", "dtype")
    row |= {key: result.get(key) for key in kept}
    row |= {"loss": result["val"]["loss"], "accuracy": result["val"]["accuracy"]}
    return row | {"seconds": sum(result["seconds"].values())}


def _short(train: TrainConfig, n_tokens: int) -> TrainConfig:
    """Plan a run of so many tokens; in a short one, compiling and long validations do not pay."""
    is_long = n_tokens >= 1_000_000
    return override(
        train,
        budget_tokens=n_tokens,
        n_evals=1,
        eval_all=is_long,
        compile=train.compile and is_long,
    )


def size_settings(base: ModelConfig, train: TrainConfig, plan: Plan) -> Settings:
    """Every size at every token count, whole runs; peak rates fall with the root of the width."""
    settings: Settings = {}
    for n_layer, d_model in plan.sizes:
        model = resize(base, arch=base.arch, n_layer=n_layer, d_model=d_model)
        scaled = replace(train, lr=train.lr * (base.d_model / d_model) ** 0.5)
        for n_tokens in plan.size_tokens:
            settings[f"{n_layer}x{d_model}-{n_tokens}"] = (model, _short(scaled, n_tokens))
    return settings


def optimizer_settings(model: ModelConfig, train: TrainConfig, plan: Plan) -> Settings:
    """Every optimizer over a small grid of peak rates, all else equal.

    Sophia as the write-up ran it takes no grid: its rate was AdamW's.
    """
    rates = {
        optimizer: [factor * guess * train.lr for factor in plan.rate_factors]
        for optimizer, guess in RATE_GUESS.items()
    }
    rates["sophia_writeup"] = [train.lr]
    return {
        f"{optimizer}-lr{lr:.2g}": (
            model,
            _short(replace(train, optimizer=optimizer, lr=lr), plan.trial_tokens),
        )
        for optimizer, grid in rates.items()
        for lr in grid
    }


def recipe_settings(model: ModelConfig, recipes: dict[str, TrainConfig], plan: Plan) -> Settings:
    """Every recipe with every seed; runs of one seed share their data order."""
    return {
        f"{name}-seed{seed}": (model, replace(_short(train, plan.trial_tokens), seed=seed))
        for name, train in recipes.items()
        for seed in plan.seeds
    }
