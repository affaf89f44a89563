"""Many runs for one question: a recipe sweep, a ladder of sizes. Each is an ordinary, resumable run.

On CPUs every run has one core to itself and as many run at once as there are cores, so that all
meet the same conditions; on a GPU they take turns. What is finished is kept.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from llmlib import runs
from llmlib.config import ModelConfig, TrainConfig, llama_config, override, resize, to_json
from llmlib.sizing import count_params
from llmlib.supervise import Live, last_metrics, start_training

POLL_SECONDS = 0.5

Settings = dict[str, tuple[ModelConfig, TrainConfig]]


def n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run_study(
    folder: Path, settings: Settings, tokens: Path, *, about: dict[str, Any] | None = None
) -> pd.DataFrame:
    """Train every named setting below ``folder`` and return one row for each, failed ones too.

    ``about`` joins every run's config. A run that starts from another's snapshot waits for it.
    """
    for name, (model, train) in settings.items():
        config = {"model": to_json(model), "train": to_json(train), "data": about or {}}
        runs.Record(folder / name, config)
    at_once = 1 if torch.cuda.is_available() else n_cores()
    waiting = sorted(
        (name for name in settings if not (folder / name / "training.json").exists()),
        key=lambda name: settings[name][1].start_from is not None,
    )
    n_waiting, started = len(waiting), time.monotonic()
    running: dict[str, subprocess.Popen] = {}
    line = Live(folder)
    try:
        while waiting or running:
            for name in [n for n, process in running.items() if process.poll() is not None]:
                running.pop(name)
            while len(running) < at_once and (name := _next(folder, waiting, running, settings)):
                waiting.remove(name)
                running[name] = start_training(folder / name, tokens, n_threads=1)
            n_done = n_waiting - len(waiting) - len(running)
            line.show(_progress(folder, n_done, n_waiting, list(running), started))
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():  # interrupted: they notice, save themselves and leave
            process.stdin.close()
        for process in running.values():
            process.wait()
    return study_table(folder, list(settings))


def _next(
    folder: Path, waiting: list[str], running: dict[str, Any], settings: Settings
) -> str | None:
    """Pick a run that nobody else is at and whose trunk is no longer waiting or running."""
    for name in waiting:
        if runs.lock_owner(folder / name) is not None:  # left by an earlier study, still saving
            continue
        start = os.path.normpath(f"{name}/{settings[name][1].start_from}")
        if not any(start.startswith(f"{trunk}/snapshots/") for trunk in [*waiting, *running]):
            return name
    return None


def _progress(folder: Path, n_done: int, n: int, running: list[str], started: float) -> str:
    text = f"{n_done}/{n} runs done"
    if n_done:
        text += f", about {(time.monotonic() - started) / n_done * (n - n_done) / 60:.1f} min left"
    for name in running:
        row = last_metrics(folder / name)
        text += f" | {name}: " + (f"loss {row['loss']:.3f}" if row else "starting")
    return text


def study_table(folder: Path, names: list[str]) -> pd.DataFrame:
    """One row per run: how it ended, its final loss, and what it was."""
    rows = []
    for name in names:
        config = runs.read_json(folder / name / "config.json")
        row: dict[str, Any] = {
            "run": name,
            "loss": np.nan,
            "n_params": count_params(ModelConfig(**config["model"])),
        }
        if (folder / name / "training.json").exists():
            result = runs.read_json(folder / name / "training.json")
            row |= {
                "status": "finished",
                "loss": result["val"]["loss"],
                "accuracy": result["val"]["accuracy"],
                "n_tokens": result["n_tokens"],
                "flops": result["flops"],
                "n_steps": result["n_steps"],
                "seconds": sum(result["seconds"].values()),
                "tokens_per_s": result["tokens_per_s"],
                "n_hessian_passes": result.get("n_hessian_passes"),
                "unclipped_share": result.get("unclipped_share"),
            }
        else:
            log = (folder / name / "train.log").read_text().strip().splitlines()
            row |= {"status": f"failed: {log[-1] if log else 'no output'}"}
        rows.append(row)
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------- 04: recipes

# Where a small grid around it should find each optimizer's best peak rate, as a multiple of AdamW's.
LR_GUESS = {"adamw": 1.0, "muon": 10.0, "ademamix": 0.5, "sophia": 0.5}


def optimizer_settings(model: ModelConfig, train: TrainConfig, factors: list[float]) -> Settings:
    """Every optimizer over a grid of peak learning rates, on the same schedule.

    Sophia as the write-up ran it takes no grid: its learning rate was AdamW's.
    """
    grid = {
        f"optimizers/{optimizer}-lr{(lr := factor * guess * train.lr):.2g}": (
            model,
            replace(train, optimizer=optimizer, lr=lr),
        )
        for optimizer, guess in LR_GUESS.items()
        for factor in factors
    }
    writeup = replace(train, optimizer="sophia_writeup")
    return grid | {f"optimizers/sophia_writeup-lr{train.lr:.2g}": (model, writeup)}


def schedule_settings(model: ModelConfig, train: TrainConfig) -> Settings:
    """The schedules, all else equal: the original's, and what others fall to."""
    final_lr = {"one_cycle_unfinished": 0.1, "one_cycle": 0.1, "cosine": 0.1, "linear": 0, "wsd": 0}
    return {
        f"schedules/{name}": (model, replace(train, schedule=name, final_lr=final))
        for name, final in final_lr.items()
    }


def claim_settings(model: ModelConfig, train: TrainConfig) -> Settings:
    """The recipe as it was, and the write-up's other choices turned round one at a time."""
    n_layer, d_model = 4 * model.n_layer, model.d_model // 2
    shared = {"vocab_size": model.vocab_size, "seq_len": model.seq_len}
    half = max(train.micro_batch // 2, 1)
    return {
        "claims/as_it_was": (model, train),
        "claims/gpt2": (replace(model, arch="gpt2", d_ff=4 * model.d_model), train),
        "claims/deeper": (llama_config(n_layer, d_model, d_head=model.d_head, **shared), train),
        "claims/half_the_batch": (model, replace(train, micro_batch=half)),
        "claims/no_clipping": (model, replace(train, grad_clip=None)),
        "claims/weight_decay_0.5": (model, replace(train, weight_decay=0.5)),
        "claims/zero_init": (model, replace(train, zero_init=True)),
    }


def finalist_settings(
    model: ModelConfig, recipes: dict[str, TrainConfig], n_seeds: int, shares: list[float]
) -> Settings:
    """Finished recipes over seeds; all but the first also with a share of the budget."""
    first = next(iter(recipes))
    return {
        f"finalists/{name}-x{share:g}-seed{seed}": (
            model,
            replace(train, seed=seed, budget_hours=train.budget_hours * share),
        )
        for name, train in recipes.items()
        for share in ([1.0] if name == first else [1.0, *shares])
        for seed in range(n_seeds)
    }


# What a difference of n paired runs must exceed, in standard errors, at 95 % (Student's t, n - 1).
# More runs than ten are given ten's: a little wide, never too narrow.
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def compare_finalists(table: pd.DataFrame) -> pd.DataFrame:
    """Compare each finalist with the first over the same seeds, with a 95 % interval [nats/token].

    Runs of one seed share their data order, so differences are taken seed by seed.
    """
    parts = table.run.str.extract(r"finalists/(?P<recipe>.+)-x(?P<share>[\d.]+)-seed(?P<seed>\d+)")
    losses = table.assign(**parts).pivot(index="seed", columns=["recipe", "share"], values="loss")
    rows = []
    reference = table.run[0].split("/")[1].split("-x")[0]
    first = losses[(reference, "1")]
    for (recipe, share), values in losses.items():
        difference = (values - first).dropna()
        n = len(difference)
        half_width = T_95[min(n, 10)] * difference.std() / n**0.5 if n > 1 else float("nan")
        rows.append(
            {
                "recipe": recipe,
                "share": float(share),
                "n_seeds": n,
                "loss": values.mean(),
                "sd": values.std(),
                "difference": difference.mean(),
                "low": difference.mean() - half_width,
                "high": difference.mean() + half_width,
            }
        )
    order = {recipe: i for i, recipe in enumerate(dict.fromkeys(parts.recipe))}
    return pd.DataFrame(rows).sort_values(
        ["recipe", "share"], key=lambda c: c.map(order) if c.name == "recipe" else -c,
        ignore_index=True,
    )  # fmt: skip


def share_to_target(
    comparison: pd.DataFrame, recipe: str, target: float
) -> tuple[float | None, bool]:
    """Read off which share of the budget a recipe needs for a loss, by finished runs of several shares.

    Interpolates the mean loss in the logarithm of the share; True if even the least share measured
    was enough, so that the answer is an upper bound. None if the whole budget was not.
    """
    mine = comparison[comparison.recipe == recipe].sort_values("share")
    shares, losses = np.log(mine.share.to_numpy()), np.minimum.accumulate(mine.loss.to_numpy())
    if losses[0] <= target:
        return float(mine.share.iloc[0]), True
    if losses.min() > target:
        return None, False
    return float(np.exp(np.interp(-target, -losses, shares))), False


@dataclass(frozen=True)
class Plan:
    """How long and how often 04 trains at a scale."""

    minutes_per_run: float
    minutes_per_trial: float
    n_seeds: int
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)  # of the guessed learning rates
    shares: tuple[float, ...] = (0.25, 0.5)  # of the budget, for the time to a target
    n_trials: int | None = None  # of each kind; None: all

    def trial(self, train: TrainConfig) -> TrainConfig:
        return _timed(train, self.minutes_per_trial)

    def finalist(self, train: TrainConfig) -> TrainConfig:
        return _timed(train, self.minutes_per_run)

    def some(self, settings: Settings) -> Settings:
        return dict(list(settings.items())[: self.n_trials])


def _timed(train: TrainConfig, minutes: float) -> TrainConfig:
    """Give a run its minutes; within less than one, compiling and long validations do not pay."""
    is_long = minutes >= 1
    return override(
        train,
        budget_hours=minutes / 60,
        compile=train.compile and is_long,
        n_evals=train.n_evals if is_long else 3,
        eval_all=is_long,
    )


PLANS = {
    "smoke": Plan(0.02, 0.02, 2, factors=(1.0,), shares=(0.5,), n_trials=2),
    "laptop": Plan(0.15, 0.08, 3),
    "a100": Plan(30.0, 6.0, 3),
}


def whole_runs(finals: pd.DataFrame) -> list[tuple[str, str, str]]:
    """List name, recipe and seed of the finalists that had the whole budget and finished."""
    parts = finals.run.str.extract(r"finalists/(.+)-x1-seed(\d+)")
    known = parts[0].notna() & (finals.status == "finished")
    return list(zip(finals.run[known], parts[0][known], parts[1][known], strict=True))


def verdict(summary: dict[str, Any]) -> str:
    """Say in a sentence what the finalists showed."""
    whole = {row["recipe"]: row for row in summary["finalists"] if row["share"] == 1}
    best, winner, minutes = whole["best"], whole["winner2024"], summary["plan"]["minutes_per_run"]
    share, most = summary["share_to_target"], "at most " if summary["share_is_bound"] else ""
    needed = "more than the whole" if share is None else f"{most}{share:.0%} of the"
    return (
        f"After {minutes:g} min, best ends at {best['loss']:.3f} and winner2024 at "
        f"{winner['loss']:.3f} nats/token: {best['difference']:+.3f} (95 % interval "
        f"{best['low']:+.3f} to {best['high']:+.3f}, {best['n_seeds']} seeds); best needs "
        f"{needed} time to reach winner2024's loss."
    )


# ------------------------------------------------------------------------- 03: the ladder


@dataclass(frozen=True)
class Ladder:
    """Sizes and token counts whose final losses show how loss falls with both."""

    sizes: tuple[tuple[int, int], ...]  # (n_layer, d_model)
    n_tokens: tuple[int, ...]  # per size; several from one trunk
    cooldown: float = 0.3  # share of each count that its cool-down takes

    def longer(self, factor: float) -> Ladder:
        return replace(self, n_tokens=tuple(int(factor * n) for n in self.n_tokens))


LADDERS = {
    "smoke": Ladder(((1, 32), (2, 32), (2, 64)), (8_192, 16_384, 32_768)),
    "laptop": Ladder(((1, 48), (2, 64), (2, 96), (2, 128), (3, 192)), (32_768, 65_536, 131_072)),
    "a100": Ladder(
        ((6, 320), (6, 512), (10, 640), (10, 768), (10, 1024)),
        (26_214_400, 52_428_800, 104_857_600),
    ),
}


def ladder_settings(base: ModelConfig, train: TrainConfig, ladder: Ladder) -> Settings:
    """For every size a trunk at constant rate, and from it a cool-down to zero for every token count.

    Peak rates fall with the root of the width. Cooled-down runs are whole runs: their losses are those
    of a run of that length (Hägele et al. 2024, arXiv:2405.18392). In short ladders, compiling and long
    validations do not pay.
    """
    settings: Settings = {}
    tokens_per_step = train.micro_batch * train.grad_accum * base.seq_len
    ends = [n // tokens_per_step for n in ladder.n_tokens]
    starts = [round((1 - ladder.cooldown) * end) for end in ends]
    for n_layer, d_model in ladder.sizes:
        model = resize(base, arch=base.arch, n_layer=n_layer, d_model=d_model)
        lr = train.lr * (base.d_model / d_model) ** 0.5
        is_long = ladder.n_tokens[-1] >= 1_000_000
        shared = override(
            train, lr=lr, n_evals=1, compile=train.compile and is_long, eval_all=is_long
        )
        trunk = override(shared, budget_steps=starts[-1], schedule="wsd")
        warmup = train.warmup * ends[0] / starts[-1]
        name = f"{n_layer}x{d_model}"
        settings[f"{name}/trunk"] = (
            model,
            replace(trunk, warmup=warmup, cooldown=0.0, snapshot_steps=tuple(starts)),
        )
        for start, end in zip(starts, ends, strict=True):
            cooling = override(shared, budget_steps=end - start, schedule="linear")
            place = f"../trunk/snapshots/{start:08d}"
            cooling = replace(cooling, warmup=0.0, final_lr=0.0, start_from=place)
            settings[f"{name}/{end * tokens_per_step}"] = (model, cooling)
    return settings


def ladder_points(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the cooled-down runs that finished, each with its size as a label."""
    points = table[~table.run.str.endswith("/trunk") & (table.status == "finished")].copy()
    points["size"] = points.run.str.split("/").str[0]
    return points[["size", "n_params", "n_tokens", "flops", "loss"]].reset_index(drop=True)
