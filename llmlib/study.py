"""A question as a table of runs: sizes for 03, optimizers and recipes for 04.

Runs are budgeted in tokens, so that a busy machine changes how long they take and not what they
find. Each is an ordinary, resumable run below the record's ``trials/``; what counts is its row.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from llmlib import launch, runs
from llmlib.config import ModelConfig, TrainConfig, override, resize, to_json
from llmlib.sizing import count_params

Setting = tuple[ModelConfig, TrainConfig]
Settings = dict[str, Setting]
Names = tuple[str, ...]  # of fields of TrainConfig
TrainAll = Callable[[Settings], pd.DataFrame]  # gives a loss to each setting
Factors = Callable[[float, float], float]  # of the peak rates, by parameters and time [s]


@dataclass(frozen=True)
class Plan:
    """What 03 and 04 train at a scale."""

    sizes: tuple[tuple[int, int], ...]  # (n_layer, d_model) of 03, the smallest first
    times: tuple[float, ...]  # training time of 03's curves [s], each twice the last
    trial_seconds: float  # training time of each run of 04 [s]
    seeds: tuple[int, ...] = (1, 2, 3)  # of each arm of 04

    def __post_init__(self) -> None:
        if min(len(self.sizes), len(self.times)) < 3:
            raise ValueError(f"{self} has too few; give three sizes and three times or more.")


PLANS = {
    "smoke": Plan(((1, 32), (1, 64), (2, 64)), (0.05, 0.1, 0.2), 0.1, (1, 2)),
    "laptop": Plan(((1, 16), (1, 32), (1, 64), (2, 96)), (2.0, 4.0, 8.0), 6.0),
    "a100": Plan(((8, 640), (10, 896), (12, 1024), (14, 1280)), (300.0, 600.0, 1200.0), 600.0),
}
VAL_TOKENS = 64_000  # that a study's run is scored on, at most
MIN_STEPS = 4  # of a run
MOST_FACTORS = 12  # of a grid that extends itself
RATES = ("lr", "embed_lr", "vector_lr")  # of hidden matrices, embeddings and norm gains


def run_study(record: runs.Record, name: str, settings: Settings, tokens_dir: Path) -> pd.DataFrame:
    """Train the settings that the study's table does not hold; one row each, failed ones too.

    Equal settings are one run. The table is written when the runs end, however they end, so a
    study goes on from its table alone.
    """
    path = record.path / f"{name}.csv"
    read = partial(pd.read_csv, path, float_precision="round_trip")
    table = read() if path.exists() else pd.DataFrame({"id": []})
    ids = pd.Series({label: setting_id(*setting) for label, setting in settings.items()})
    new = ids[~ids.isin(table.id)].drop_duplicates()
    folders = {label: record.path / "trials" / name / i for label, i in new.items()}
    for label, folder in folders.items():
        model, train = settings[label]
        light = override(train, keep_weights=False)  # many would fill a disk
        runs.create_run(folder, model, light, tokens_dir)
    is_over = False
    try:
        launch.run_many([*folders.values()])
        is_over = True
    finally:
        ended = {label: run for label, run in folders.items() if is_over or runs.read_result(run)}
        rows = [{"id": new[label], "run": label} | _row(run) for label, run in ended.items()]
        if rows:
            grown = pd.DataFrame(table.to_dict("records") + rows)
            runs.write_atomic(path, grown.to_csv(index=False))
    return read().set_index("id").loc[ids].reset_index().assign(run=ids.index)


def setting_id(model: ModelConfig, train: TrainConfig) -> str:
    """Name a setting by the hash of all its values."""
    text = json.dumps([to_json(model), to_json(train)]).encode()
    return f"r{hashlib.sha256(text).hexdigest()[:10]}"


def _row(folder: Path) -> dict[str, Any]:
    """Say what a run was and how it ended; a failed one has no loss."""
    run, result = runs.read_run(folder), runs.read_result(folder)
    row = {"n_layer": run.model.n_layer, "d_model": run.model.d_model}
    row |= {"n_params": count_params(run.model)} | to_json(run.train)
    if result is None:
        return row | {"loss": None, "status": f"failed: {launch.log_tail(folder, n_lines=1)}"}
    kept = ("n_tokens", "flops", "n_steps", "tokens_per_s", "unclipped_share", "dtype")
    row |= {"val_sha256": result["val_sha256"]} | {name: result.get(name) for name in kept}
    return row | {"loss": result["val"]["loss"], "status": "finished"}


def in_time(setting: Setting, tokens_per_s: float, seconds: float) -> Setting:
    """Budget a run in the tokens that its speed buys in a time: whole steps, scored at the end."""
    model, train = setting
    per_step = train.n_sequences * model.seq_len
    n_steps = max(round(tokens_per_s * seconds / per_step), MIN_STEPS)
    light = {"eval_all": False, "n_evals": 1, "eval_windows": VAL_TOKENS // model.seq_len}
    return model, override(train, budget_tokens=n_steps * per_step, **light)


def repeated(arms: Settings, seeds: tuple[int, ...]) -> Settings:
    """Every arm with every seed; runs of one seed share their data order."""
    return {
        f"{name}-seed{seed}": (model, override(train, seed=seed))
        for name, (model, train) in arms.items()
        for seed in seeds
    }


def search(train_all: TrainAll, start: Setting, coordinates: Iterable[Names]) -> TrainConfig:
    """Find the best setting on grids by factors of two, coordinate by coordinate.

    The settings named together in a coordinate are scaled together. A grid is extended until its
    best is inside. ``train_all`` gives a loss to each setting; a failed run (NaN) is the worst.
    """
    model, best = start
    for names in coordinates:
        losses, factors = pd.Series(dtype=float), [0.5, 1.0, 2.0]
        while [*losses.index] != factors:
            table = train_all({f"{x}": (model, scaled(best, names, x)) for x in factors})
            losses = pd.Series(table.loss.to_numpy(), factors)
            factors = _wider(losses)
        best = scaled(best, names, losses.idxmin())
    return best


def _wider(losses: pd.Series) -> list[float]:
    """Return a grid of factors (the index), with two more beyond its best if that is at an end."""
    factors, at = [*losses.index], losses.fillna(np.inf).argmin()
    low, high = factors[0], factors[-1]
    beyond = {0: [low / 4, low / 2], len(factors) - 1: [2 * high, 4 * high]}.get(at, [])
    if beyond and len(factors) > MOST_FACTORS:
        raise ValueError(f"no best between {low:g} and {high:g} times a rate; do its runs fail?")
    return sorted(factors + beyond)


def scaled(train: TrainConfig, names: Names, factor: float) -> TrainConfig:
    """Multiply settings by a factor, counts to whole numbers; a rate that is not given stays so."""
    given = {name: getattr(train, name) for name in names if getattr(train, name) is not None}
    return override(train, **{name: type(v)(v * factor) for name, v in given.items()})


def differences(table: pd.DataFrame, base: str, *, is_pooled: bool = True) -> pd.DataFrame:
    """Compare arms with one of them, seed by seed: mean difference in loss with its 95 % interval.

    ``table`` has ``run`` as ``repeated`` names them. The noise of a difference is pooled over all
    arms (what a two-way layout of arms and seeds leaves), which two or three seeds of arms alike
    need, or each arm's own: then it is the paired t interval, as it is for two arms.
    """
    arm = table.run.str.rsplit("-seed", n=1).str[0]
    losses = table.assign(arm=arm).pivot(index="seed", columns="arm", values="loss")
    ours = losses[arm.unique()].sub(losses[base], axis=0).drop(columns=base)
    n, noise, freedom = ours.count(), ours.std(), ours.count() - 1
    if is_pooled:
        whole = losses.dropna(axis=1, how="all").dropna()
        rest = whole.sub(whole.mean(axis=1), axis=0)
        freedom = (len(rest) - 1) * (rest.shape[1] - 1)
        squares = ((rest - rest.mean()) ** 2).to_numpy().sum()
        noise = (2 * squares / freedom) ** 0.5 if freedom else np.nan
    mean, half = ours.mean(), stats.t.ppf(0.975, freedom) * noise / n**0.5
    found = pd.DataFrame({"difference": mean, "low": mean - half, "high": mean + half, "n": n})
    return found.rename_axis("arm").reset_index()


def grids(table: pd.DataFrame, names: Names) -> pd.DataFrame:
    """Take from a search's rows the best grid of each optimizer over each of the named settings.

    A grid is three rows or more that differ in nothing else. Adds ``setting``, ``factor`` (to the
    best of the grid), ``gap`` (loss above its best) and ``is_edge`` (that best is at an end).
    """
    fields, found = {*TrainConfig.__dataclass_fields__} & {*table} - {"budget_tokens"}, []
    for name in names:
        kinds = table.groupby([*fields - {name}], dropna=False)
        lowest = kinds.loss.transform("min")[kinds[name].transform("nunique") > 2]
        for _, own in lowest.groupby(table.optimizer, sort=False):
            part = table.loc[own.index[own == own.min()]].sort_values(name)
            best = part.loc[part.loss.idxmin()]
            is_edge = best[name] in (part[name].min(), part[name].max())
            shown = {"setting": name, "factor": part[name] / best[name], "is_edge": is_edge}
            found.append(part.assign(**shown, gap=part.loss - best.loss))
    return pd.concat(found, ignore_index=True)


def by_shape(tables: dict[str, pd.DataFrame], name: str, base: str, **how: bool) -> pd.DataFrame:
    """Tabulate ``differences`` to the base over all tables called ``<name>_<shape>``."""
    return pd.concat(
        differences(table, base, **how).assign(shape=key.removeprefix(f"{name}_"))
        for key, table in tables.items()
        if key.startswith(f"{name}_")
    )


def size_settings(base: ModelConfig, train: TrainConfig, plan: Plan) -> Settings:
    """Every size of 03; peak rates, but the norm gains', fall with the root of the width."""
    settings = {}
    for n_layer, d_model in plan.sizes:
        model = resize(base, arch=base.arch, n_layer=n_layer, d_model=d_model)
        run = scaled(train, RATES[:2], (base.d_model / d_model) ** 0.5)
        settings[f"{n_layer}x{d_model}"] = model, run
    return settings


def iso_time_settings(
    sizes: Settings,
    speeds: pd.Series,
    plan: Plan,
    *,
    factors: Factors = lambda n_params, seconds: 1.0,
    best: pd.Series | None = None,
    n_seeds: int = 3,
    max_tokens: float = float("inf"),
) -> Settings:
    """Every size for every time, by its speed [tokens/s], in whole steps; whole runs.

    ``factors`` multiply a size's peak rates at a time. ``n_seeds`` go to the three sizes next to the
    ``best`` of each time [parameters, by time]; while it is not known, to the middle size at the
    shortest time, for the noise. Left out are runs of more than ``max_tokens`` and sizes whose speed
    is NaN (the step failed); if that leaves none, it is refused.
    """
    n_params = pd.Series({name: count_params(model) for name, (model, _) in sizes.items()})
    repeated, settings = {min(plan.times): [[*sizes][len(sizes) // 2]]}, {}
    if best is not None:
        repeated = {t: [*np.log(n_params / n).abs().nsmallest(3).index] for t, n in best.items()}
    for name, (model, train) in sizes.items():
        for seconds in plan.times if speeds[name] > 0 else ():
            factor = factors(n_params[name], seconds)
            _, run = in_time((model, scaled(train, RATES, factor)), speeds[name], seconds)
            n_runs = n_seeds if name in repeated.get(seconds, []) else 1
            for seed in range(1, n_runs + 1) if run.budget_tokens <= max_tokens else ():
                label = f"{name}-{seconds:g}s-x{factor:.3g}-seed{seed}"
                settings[label] = model, override(run, seed=seed)
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


def tune_sizes(train_all: TrainAll, sizes: Settings, speeds: pd.Series, plan: Plan) -> pd.DataFrame:
    """Search the peak rates of both end sizes at the first time and the last but one.

    Four rows: n_params, seconds and the factor of the size's own rates, the vertex of a parabola
    through the best of a grid, which is extended until that is inside, and its neighbours.
    """
    known = [name for name in sizes if speeds[name] > 0]
    times, tried = (plan.times[0], plan.times[-2]), {}
    grids = {(size, t): [0.5, 1.0, 2.0] for size in (known[0], known[-1]) for t in times}
    while {corner: [*own.index] for corner, own in tried.items()} != grids:
        settings = {}
        for (size, seconds), factors in grids.items():
            model, run = in_time(sizes[size], speeds[size], seconds)
            for factor in factors:
                settings[f"{size}-{seconds:g}s-x{factor:g}"] = model, scaled(run, RATES, factor)
        losses = iter(train_all(settings).loss)
        tried = {c: pd.Series([next(losses) for _ in grid], grid) for c, grid in grids.items()}
        grids = {corner: _wider(own) for corner, own in tried.items()}
    rows = []
    for (size, seconds), own in tried.items():
        near = own.iloc[own.argmin() - 1 : own.argmin() + 2].fillna(own.max())
        c, b, _ = np.polyfit(np.log(near.index), near, 2)
        rows.append((count_params(sizes[size][0]), seconds, np.exp(-b / (2 * c))))
    return pd.DataFrame(rows, columns=["n_params", "seconds", "factor"])


def interpolate_factors(tuned: pd.DataFrame) -> Factors:
    """Let log factor be linear in log N, in log t and in their product, through four corners."""

    def terms(n_params: ArrayLike, seconds: ArrayLike) -> np.ndarray:
        x, y = np.log(n_params), np.log(seconds)
        return np.stack([x**0, x, y, x * y], axis=-1)

    constants = np.linalg.solve(terms(tuned.n_params, tuned.seconds), np.log(tuned.factor))
    return lambda n_params, seconds: float(np.exp(terms(n_params, seconds) @ constants))


def load_tables(parts: list[Path], names: dict[str, str]) -> dict[str, pd.DataFrame]:
    """Read the tables of a study's parts by name, with ``arm``, renamed by ``names``; later ones win."""
    tables: dict[str, pd.DataFrame] = {}
    for path in sorted(path for part in parts for path in part.glob("*_*.csv")):
        rows = pd.read_csv(path)
        arm = rows.run.str.rsplit("-seed", n=1).str[0].replace(names)
        rows = rows.assign(arm=arm, run=arm + "-seed" + rows.seed.astype(str))
        rows = pd.concat([tables.get(path.stem), rows], ignore_index=True)
        tables[path.stem] = rows.drop_duplicates("id", keep="last")
    return tables
