"""Loss curves to comparisons: finding runs, smoothing, intervals, tables. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from llmlib import runs
from llmlib.config import ModelConfig
from llmlib.sizing import flops_per_token

AXES = ["tokens", "seconds", "flops"]
CURVE_COLUMNS = ["kind", "step", *AXES, "loss", "val_loss", "lr", "grad_norm"]


def find_runs(*folders: Path) -> dict[str, Path]:
    """Find the training runs in the folders, finished or not; trials of a study lie deeper."""
    found = [(name.parent, path.parent) for name, path in _find("*/metrics.jsonl", folders)]
    return {str(name): run for name, run in found if (run / "config.json").exists()}


def find_external(*folders: Path) -> dict[str, Path]:
    """Find other people's curves: CSV or JSONL files in any folder named ``external``."""
    found = _find("**/external/*", folders)
    return {str(name): path for name, path in found if path.suffix in (".csv", ".jsonl")}


def _find(pattern: str, folders: tuple[Path, ...]) -> list[tuple[Path, Path]]:
    """List matching files by name; names in the second folder and later begin with that folder's."""
    return [
        (path.relative_to(folder.parent if i else folder), path)
        for i, folder in enumerate(folders)
        for path in sorted(folder.glob(pattern))
    ]


def load_curve(run: Path) -> pd.DataFrame:
    """Read a run's steps and validations: one row each, with what it does not know as NaN."""
    curve = runs.read_metrics(run).reindex(columns=CURVE_COLUMNS)
    model = ModelConfig(**runs.read_config(run)["model"])
    curve["flops"] = curve.tokens * flops_per_token(model)
    return curve[curve.kind.isin(["step", "eval"])]


def load_external(path: Path) -> pd.DataFrame:
    """Read a file's curve like ``load_curve``: step and loss, and what else it tells."""
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_json(path, lines=True)
        curve = table.reindex(columns=CURVE_COLUMNS[1:]).astype(float)
    except ValueError as error:
        raise ValueError(f"{path} is no table of numbers ({error}); mend or remove it.") from error
    if not {"step", "loss"} <= set(table):
        raise ValueError(
            f"{path} has the columns {', '.join(table)}; a curve needs step and loss [nats/token], "
            "and may have tokens, seconds, flops and val_loss."
        )
    steps = curve.dropna(subset="loss").assign(kind="step", val_loss=math.nan)
    evals = curve.dropna(subset="val_loss").assign(kind="eval", loss=math.nan)
    return pd.concat([steps, evals])[CURVE_COLUMNS].sort_values("step", ignore_index=True)


def smooth(curve: pd.DataFrame, share: float) -> pd.DataFrame:
    """Add ``smoothed``: the training loss, averaged over a centred window of this share of steps."""
    loss = curve.loss[curve.kind == "step"]
    window = max(1, round(share * len(loss)))
    return curve.assign(smoothed=loss.rolling(window, center=True, min_periods=1).mean())


def fit_slope(curve: pd.DataFrame, n_bins: int = 16) -> dict[str, float]:
    """Fit loss against ln(tokens) on the middle of a run, by least squares over binned means.

    Returns the slope [nats per e-fold of tokens] and its standard error; NaN for too short a run.
    """
    steps = curve[curve.kind == "step"]
    middle = steps[steps.tokens.between(0.15 * steps.tokens.max(), 0.7 * steps.tokens.max())]
    if len(middle) < 2 * n_bins:
        return {"slope": math.nan, "standard_error": math.nan}
    bins = middle.groupby(np.arange(len(middle)) * n_bins // len(middle))
    means = bins[["tokens", "loss"]].mean()
    fit = stats.linregress(np.log(means.tokens.to_numpy(float)), means.loss)
    return {"slope": float(fit.slope), "standard_error": float(fit.stderr)}


def paired_difference(ours: ArrayLike, theirs: ArrayLike) -> dict[str, float]:
    """Compare n runs seed by seed: mean of ours - theirs with its 95 % interval (Student's t).

    A pair with a failed run (NaN) is left out. One pair has no interval, none no mean (NaN).
    """
    pairs = np.asarray(ours, float) - np.asarray(theirs, float)
    pairs = pairs[np.isfinite(pairs)]
    n, mean = len(pairs), float(pairs.mean()) if len(pairs) else math.nan
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(pairs)) if n > 1 else math.nan
    return {"difference": mean, "low": mean - half, "high": mean + half, "n": n}


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """Turn a loss [nats/token] into bits per byte of text, which compares across tokenizers."""
    return loss * tokens_per_byte / math.log(2)


def tokens_per_byte(split: list[dict[str, Any]]) -> float:
    """Count tokens per byte of text over a split of a token manifest."""
    table = domain_table(split)
    return table.tokens.sum() / table.bytes.sum()


def domain_table(split: list[dict[str, Any]]) -> pd.DataFrame:
    """Count documents, bytes and tokens per domain over a split of a token manifest."""
    rows = [{"domain": d} | counts for shard in split for d, counts in shard["domains"].items()]
    table = pd.DataFrame(rows).groupby("domain").sum().reset_index()
    table["share"] = table.tokens / table.tokens.sum()
    table["bytes_per_token"] = table.bytes / table.tokens
    return table.sort_values("tokens", ascending=False, ignore_index=True)


def split_table(manifest: dict[str, Any]) -> pd.DataFrame:
    """Count documents, megabytes of text and tokens of every split of a token manifest."""
    totals = {
        name: domain_table(shards)[["documents", "bytes", "tokens"]].sum()
        for name, shards in manifest["splits"].items()
    }
    table = pd.DataFrame(totals).T.rename_axis("split").reset_index()
    return table.assign(bytes=table.bytes / 1e6).rename(columns={"bytes": "MB of text"})


def domain_scores(scores: dict[str, dict[str, float]], split: list[dict[str, Any]]) -> pd.DataFrame:
    """Tabulate each domain's scores (as ``step.evaluate`` gives them), with its bits per byte."""
    table = pd.DataFrame([{"domain": domain} | values for domain, values in scores.items()])
    ratio = 1 / domain_table(split).set_index("domain").bytes_per_token.loc[table.domain].to_numpy()
    table["bits_per_byte"] = bits_per_byte(table.loss, ratio)
    return table.sort_values("bits_per_byte", ignore_index=True)


def domain_comparison(found: dict[str, Path]) -> pd.DataFrame:
    """Put the domain scores of all finished runs below each other; empty if none has any."""
    summaries = {name: path / "summary.json" for name, path in found.items()}
    return pd.DataFrame(
        {"run": name} | row
        for name, path in summaries.items()
        if path.exists()
        for row in runs.read_json(path).get("by_domain", [])
    )


def results_table(found: dict[str, Path]) -> pd.DataFrame:
    """One row per finished run: size, tokens, and the final scores on the validation split."""
    rows = []
    for name, path in found.items():
        if (result := runs.read_result(path)) is None:
            continue
        config, val = runs.read_config(path), result["val"]
        row = {"run": name, "arch": config["model"]["arch"], "parameters": result["n_params"]}
        row |= {"tokens": result["n_tokens"], "seconds": sum(result["seconds"].values())}
        row |= {score: val[score] for score in ("loss", "perplexity", "accuracy")}
        if ratio := config["data"].get("val_tokens_per_byte"):
            row["bits_per_byte"] = bits_per_byte(val["loss"], ratio)
        rows.append(row | {"val_sha256": result["val_sha256"][:8]})
    return pd.DataFrame(rows).sort_values("loss", ignore_index=True) if rows else pd.DataFrame()
