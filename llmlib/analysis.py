"""Loss curves to comparisons: finding runs, smoothing, tables. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmlib import runs
from llmlib.config import ModelConfig
from llmlib.sizing import flops_per_token

CURVE_COLUMNS = ["kind", "step", "tokens", "seconds", "flops", "loss", "val_loss"]


def find_runs(*folders: Path) -> dict[str, Path]:
    """Find the training runs in the folders, finished or not; those of a study lie deeper."""
    return {
        name.parent.as_posix(): path.parent
        for name, path in _find("*/metrics.jsonl", folders)
        if (path.parent / "config.json").exists()
    }


def find_external(*folders: Path) -> dict[str, Path]:
    """Find other people's curves: CSV or JSONL files in any folder named ``external``."""
    return {
        name.as_posix(): path
        for name, path in _find("**/external/*", folders)
        if path.suffix in (".csv", ".jsonl")
    }


def _find(pattern: str, folders: tuple[Path, ...]) -> Iterator[tuple[Path, Path]]:
    """Yield matching files with their names, which begin with the folder's from the second on."""
    for i, folder in enumerate(folders):
        for path in sorted(folder.glob(pattern)):
            yield path.relative_to(folder.parent if i else folder), path


def load_curve(run: Path) -> pd.DataFrame:
    """Read a run's curve: step, tokens, seconds, flops, loss and, where measured, val_loss."""
    curve = runs.read_metrics(run).reindex(columns=CURVE_COLUMNS)
    model = ModelConfig(**runs.read_json(run / "config.json")["model"])
    curve["flops"] = curve.tokens * flops_per_token(model)
    return curve[curve.kind.isin(["step", "eval"])]


def load_external(path: Path) -> pd.DataFrame:
    """Read a file's curve like ``load_curve``: step and loss, and what else it tells; the rest is NaN."""
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_json(path, lines=True)
        curve = table.reindex(columns=CURVE_COLUMNS[1:]).astype(float)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a table of numbers ({error}); mend or remove it."
        ) from error
    if missing := [column for column in ("step", "loss") if column not in table]:
        raise ValueError(
            f"{path} has no column {' and no column '.join(missing)} (it has "
            f"{', '.join(table.columns)}); a curve needs step and loss [nats/token], and may have "
            "tokens, seconds, flops and val_loss."
        )
    steps = curve.dropna(subset="loss").assign(kind="step", val_loss=math.nan)
    evals = curve.dropna(subset="val_loss").assign(kind="eval", loss=math.nan)
    return pd.concat([steps, evals])[CURVE_COLUMNS].sort_values("step", ignore_index=True)


def smooth_share(curve: pd.DataFrame, share: float) -> pd.DataFrame:
    """Add ``smoothed``: the training loss averaged over about this share of the run's steps."""
    steps = curve[curve.kind == "step"]
    return curve.assign(smoothed=smooth(steps.loss, steps.step, share * steps.step.max()))


def smooth(values: pd.Series, at: pd.Series, window: float) -> pd.Series:
    """Average exponentially over about ``window`` tokens or steps, which ``at`` counts, unbiased."""
    per_step = float(at.diff().median()) if len(at) > 1 else window
    return values.ewm(com=max(window / per_step, 1e-9), adjust=True).mean()


def fit_slope(curve: pd.DataFrame, n_bins: int = 16) -> dict[str, float]:
    """Fit loss against ln(tokens) on the middle of a run, by least squares over binned means.

    Returns the slope [nats per e-fold of tokens] and its standard error; NaN for too short a run.
    """
    steps = curve[curve.kind == "step"]
    middle = steps[steps.tokens.between(0.15 * steps.tokens.max(), 0.7 * steps.tokens.max())]
    x, y = np.log(middle.tokens.to_numpy(float)), middle.loss.to_numpy()
    if len(x) < 2 * n_bins:
        return {"slope": math.nan, "standard_error": math.nan}
    parts = np.array_split(np.arange(len(x)), n_bins)
    x, y = (np.array([values[part].mean() for part in parts]) for values in (x, y))
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (slope * x + intercept)
    spread = math.sqrt((residual**2).sum() / (n_bins - 2) / ((x - x.mean()) ** 2).sum())
    return {"slope": slope, "standard_error": spread}


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """Turn a loss [nats/token] into bits per byte of text, which other tokenizers can be held to."""
    return loss * tokens_per_byte / math.log(2)


def tokens_per_byte(split: list[dict[str, Any]]) -> float:
    """Count tokens per byte of text over a split of a token manifest."""
    domains = [counts for shard in split for counts in shard["domains"].values()]
    return sum(d["tokens"] for d in domains) / sum(d["bytes"] for d in domains)


def domain_table(split: list[dict[str, Any]]) -> pd.DataFrame:
    """Count documents, bytes and tokens per domain over a split of a token manifest."""
    rows = [{"domain": d} | counts for shard in split for d, counts in shard["domains"].items()]
    table = pd.DataFrame(rows).groupby("domain").sum().reset_index()
    table["share"] = table.tokens / table.tokens.sum()
    table["bytes_per_token"] = table.bytes / table.tokens
    return table.sort_values("tokens", ascending=False, ignore_index=True)


def domain_scores(scores: dict[str, dict[str, float]], split: list[dict[str, Any]]) -> pd.DataFrame:
    """Tabulate each domain's scores (as ``step.evaluate`` gives them), with its bits per byte."""
    counts = domain_table(split).set_index("domain")
    table = pd.DataFrame([{"domain": domain} | values for domain, values in scores.items()])
    ratio = 1 / counts.bytes_per_token.loc[table.domain].to_numpy()
    table["bits_per_byte"] = bits_per_byte(table.loss, ratio)
    return table.sort_values("bits_per_byte", ignore_index=True)


def domain_comparison(found: dict[str, Path]) -> pd.DataFrame:
    """Put the domain scores of all finished runs below each other; empty if none has any."""
    summaries = {
        name: runs.read_json(path / "summary.json")
        for name, path in found.items()
        if (path / "summary.json").exists()
    }
    return pd.DataFrame(
        [{"run": name} | row for name, s in summaries.items() for row in s.get("by_domain", [])]
    )


def prediction_verdict(folder: Path) -> str | None:
    """Hold the loss that ``05_full_run`` reached to what ``03_sizing`` predicted, if it did."""
    paths = [folder / name / "summary.json" for name in ("03_sizing", "05_full_run")]
    if not all(path.exists() for path in paths):
        return None
    sizing, full_run = (runs.read_json(path) for path in paths)
    if not sizing.get("predicted_loss"):
        return None
    predicted, loss = sizing["predicted_loss"], full_run["val"]["loss"]
    low, high = predicted["low"], predicted["high"]
    verdict = "below" if loss < low else "above" if loss > high else "inside"
    return (
        f"03_sizing predicted {predicted['loss']:.3f} nats/token, {low:.3f} to {high:.3f}; "
        f"05_full_run reached {loss:.3f}, {verdict} that interval."
    )


def results_table(found: dict[str, Path]) -> pd.DataFrame:
    """One row per finished run: size, tokens, and the final scores on the validation split."""
    rows = []
    for name, path in found.items():
        if not (path / "training.json").exists():
            continue
        result, config = (
            runs.read_json(path / "training.json"),
            runs.read_json(path / "config.json"),
        )
        bytes_ratio = config.get("data", {}).get("val_tokens_per_byte")
        rows.append(
            {
                "run": name,
                "arch": config["model"]["arch"],
                "parameters": result["n_params"],
                "tokens": result["n_tokens"],
                "seconds": sum(result["seconds"].values()),
                "loss": result["val"]["loss"],
                "perplexity": result["val"]["perplexity"],
                "accuracy": result["val"]["accuracy"],
                "bits_per_byte": bytes_ratio and bits_per_byte(result["val"]["loss"], bytes_ratio),
                "val_sha256": result["val_sha256"][:8],
            }
        )
    return pd.DataFrame(rows).sort_values("loss", ignore_index=True) if rows else pd.DataFrame()
