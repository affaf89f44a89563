"""Loss curves to comparisons: finding runs, smoothing, tables. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmlib import runs
from llmlib.config import ModelConfig
from llmlib.sizing import flops_per_token


def find_runs(*folders: Path) -> dict[str, Path]:
    """Find every training run below the folders, finished or not, named by its path."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("metrics.jsonl")):
            if (path.parent / "config.json").exists():
                found[path.parent.relative_to(folder).as_posix()] = path.parent
    return found


def load_curve(run: Path) -> pd.DataFrame:
    """Read a run's curve: step, tokens, seconds, flops, loss and, where measured, val_loss."""
    curve = runs.read_metrics(run)
    curve = curve[curve.kind.isin(["step", "eval"])].copy()
    model = ModelConfig(**runs.read_json(run / "config.json")["model"])
    curve["flops"] = curve.tokens * flops_per_token(model)
    for column in ("loss", "val_loss"):
        if column not in curve:
            curve[column] = np.nan
    return curve[["kind", "step", "tokens", "seconds", "flops", "loss", "val_loss"]]


def smooth(values: pd.Series, tokens: pd.Series, window_tokens: float) -> pd.Series:
    """Average exponentially over about ``window_tokens`` tokens, unbiased at the start."""
    per_step = float(tokens.diff().median()) if len(tokens) > 1 else window_tokens
    return values.ewm(com=max(window_tokens / per_step, 1e-9), adjust=True).mean()


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
