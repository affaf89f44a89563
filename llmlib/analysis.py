"""Loss curves to comparisons: finding runs, smoothing, intervals, tables. No torch.

Other people's curves become our own columns: CSV (also semicolons and decimal commas), JSON lines, the
Hugging Face Trainer's ``trainer_state.json``, exports of W&B panels and TensorBoard, Lightning's
``metrics.csv``, and logs of nanoGPT, llm.c and modded-nanogpt. Losses count as nats/token.
"""

import csv
import json
import math
import re
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmlib import runs
from llmlib.config import ModelConfig
from llmlib.sizing import flops_per_token

AXES = ("tokens", "seconds", "flops")
RESULTS = ["run", "arch", "optimizer", "parameters", "tokens", "seconds", "loss", "perplexity"]
RESULTS += ["accuracy", "bits_per_byte", "val_sha256"]
CURVE_COLUMNS = ["kind", "step", *AXES, "loss", "val_loss", "lr", "grad_norm"]
NAMES = {  # ours: theirs, in lower case and with "/" and " " as "_"
    "step": ("step", "_step", "global_step", "trainer_global_step", "iter", "s"),
    "loss": ("loss", "train_loss", "training_loss", "train_loss_step", "trl"),
    "val_loss": ("val_loss", "validation_loss", "eval_loss", "valid_loss", "test_loss", "tel"),
    "tokens": ("tokens", "n_tokens", "train_tokens", "num_input_tokens_seen"),
    "seconds": ("seconds", "_runtime", "train_runtime", "train_time"),
    "flops": ("flops", "total_flos"),
    "lr": ("lr", "learning_rate", "train_lr"),
    "grad_norm": ("grad_norm", "norm"),
}
LINE = re.compile(r"^\s*(?:step|iter|s)[: ]\s*(\d+)(?:/\d+)?\b(.*)")
PAIR = re.compile(r"(train loss|val[_ ]loss|loss|tel|trl|train_time|lr|norm)[: ]\s*([-+.\de]+)")


def find_runs(*folders: Path) -> dict[str, Path]:
    """Find the training runs in the folders, finished or not, without the trials of a study."""
    found = {Path(name).parent: path for name, path in find("**/metrics.jsonl", folders).items()}
    return {str(run): path.parent for run, path in found.items() if "trials" not in run.parts}


def find(pattern: str, folders: tuple[Path, ...]) -> dict[str, Path]:
    """Find files by name; names in the second folder and later begin with that folder's."""
    return {
        str(path.relative_to(folder.parent if i else folder)): path
        for i, folder in enumerate(folders)
        for path in sorted(folder.glob(pattern))
    }


def load_curve(run: Path) -> pd.DataFrame:
    """Read a run's steps, validations and final score: one row each; what it lacks is NaN."""
    curve = runs.read_metrics(run).reindex(columns=CURVE_COLUMNS)
    if result := runs.read_result(run):  # on all held-out documents
        final = {"kind": "final", "step": result["n_steps"], "tokens": result["n_tokens"]}
        final |= {"seconds": sum(result["seconds"].values()), "val_loss": result["val"]["loss"]}
        curve = pd.concat([curve, pd.DataFrame([final])], ignore_index=True)
    model = ModelConfig(**runs.read_config(run)["model"])
    curve["flops"] = curve.tokens * flops_per_token(model)
    return curve[curve.kind.isin(["step", "eval", "final"])]


def load_trials(*folders: Path) -> pd.DataFrame:
    """Read the runs of studies, rows of 03's and 04's tables, as points that know no seconds."""
    names = {"n_steps": "step", "n_tokens": "tokens", "flops": "flops", "loss": "val_loss"}
    paths = find("*/*.csv", folders).values()
    tables = [pd.read_csv(path) for path in paths if (path.parent / "config.json").exists()]
    rows = [t.drop_duplicates("id") for t in tables if {"id", *names} <= set(t)]
    rows = pd.concat([pd.DataFrame(columns=list(names)), *rows]).rename(columns=names)
    return rows.assign(kind="trial", loss=math.nan).reindex(columns=CURVE_COLUMNS)


def smooth(curve: pd.DataFrame, share: float) -> pd.DataFrame:
    """Add ``smoothed``: the training loss, averaged over a centred window of this share of steps."""
    loss = curve.loss[curve.kind == "step"]
    window = max(1, round(share * len(loss)))
    return curve.assign(smoothed=loss.rolling(window, center=True, min_periods=1).mean())


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
    table = pd.DataFrame(rows, columns=["domain", "documents", "bytes", "tokens"])
    table = table.groupby("domain", as_index=False).sum()
    table["share"] = table.tokens / table.tokens.sum()
    table["bytes_per_token"] = table.bytes / table.tokens
    return table.sort_values("tokens", ascending=False, ignore_index=True)


def split_table(manifest: dict[str, Any]) -> pd.DataFrame:
    """Count documents, bytes of text and tokens of every split of a token manifest."""
    tables = {name: domain_table(shards) for name, shards in manifest["splits"].items()}
    counts = ["documents", "bytes", "tokens"]
    return pd.DataFrame([{"split": name, **t[counts].sum()} for name, t in tables.items()])


def file_table(manifest: dict[str, Any]) -> pd.DataFrame:
    """Tell what ``prepare`` read, mended and left out, per kind of file, with the first of each."""
    shards = chain(*manifest["splits"].values())
    rows = [row for shard in shards for row in shard.get("files", [])]
    table = pd.DataFrame(rows, columns=["kind", "what", "count", "first"])
    return table.groupby(["what", "kind"], as_index=False).agg({"count": "sum", "first": "first"})


def domain_scores(scores: dict[str, np.ndarray], split: list[dict[str, Any]]) -> pd.DataFrame:
    """Tabulate loss and bits per byte by domain, with 95 % intervals by bootstrap over windows.

    ``scores`` are ``step.score_windows`` of ``data.domain_windows``.
    """
    counts, rows = domain_table(split), []
    counts["domain"] = counts.domain.where(counts.domain.isin(scores), "others")
    counts = counts.groupby("domain")[["tokens", "bytes"]].sum()
    for domain, (losses, hits) in ((domain, values.T) for domain, values in scores.items()):
        means = np.random.default_rng(0).choice(losses, (1000, len(losses))).mean(1)
        found = np.array([losses.mean(), *np.quantile(means, (0.025, 0.975))])
        in_bits = bits_per_byte(found, counts.tokens[domain] / counts.bytes[domain])
        row = {"domain": domain, "n_windows": len(losses), "accuracy": hits.mean()}
        for name, values in {"loss": found, "bits_per_byte": in_bits}.items():
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), values.tolist(), strict=True))
        rows.append(row)
    return pd.DataFrame(rows).sort_values("bits_per_byte", ignore_index=True)


def domain_comparison(found: dict[str, Path]) -> pd.DataFrame:
    """Put the domain scores of all finished runs below each other; empty if none has any."""
    scores = {n: runs.load_summary(path, {}).get("by_domain", []) for n, path in found.items()}
    return pd.DataFrame({"run": name} | row for name, rows in scores.items() for row in rows)


def results_table(found: dict[str, Path]) -> pd.DataFrame:
    """One row per finished run, the best first: size, tokens, final scores on the validation split."""
    rows = []
    for name, path in found.items():
        if result := runs.read_result(path):
            config = runs.read_config(path)
            row = config["model"] | config["train"] | result["val"] | {"run": name}
            row |= {"parameters": result["n_params"], "tokens": result["n_tokens"]}
            ratio = config["data"].get("val_tokens_per_byte", math.nan)
            row |= {"bits_per_byte": bits_per_byte(row["loss"], ratio)}
            row |= {"seconds": sum(result["seconds"].values())}
            rows.append(row | {"val_sha256": result["val_sha256"][:8]})
    return pd.DataFrame(sorted(rows, key=lambda row: row["loss"]), columns=RESULTS)


def load_curves(*folders: Path) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Read every file in folders named ``external``: curves by name, and what was not read and why.

    A file with several runs gives a curve for each.
    """
    curves, skipped = {}, []
    for name, path in find("**/external/[!.]*", folders).items():
        try:
            for run, rows in read_runs(path).items():
                curves[f"{name}: {run}" if run else name] = to_curve(rows)
        except (ValueError, LookupError, TypeError, OSError, csv.Error) as error:
            skipped.append(f"{name} was not read: {f'{error}'.splitlines()[0]}")
    return curves, skipped


def read_runs(path: Path) -> dict[str, pd.DataFrame]:
    """Read a file's rows, by the name of the run ("" where there is one)."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix in (".csv", ".tsv"):
        comma = ";" in text.partition("\n")[0]
        rows = pd.read_csv(StringIO(text), sep=None, engine="python", decimal="," if comma else ".")
    elif path.suffix == ".json":
        rows = pd.DataFrame(json.loads(text)["log_history"])
    elif path.suffix == ".jsonl":
        rows = pd.read_json(StringIO(text), lines=True)
    else:
        steps = [match for match in map(LINE.match, text.splitlines()) if match]
        rows = pd.DataFrame({"step": step[1]} | dict(PAIR.findall(step[2])) for step in steps)
        if "train_time" in rows:
            rows["train_time"] = pd.to_numeric(rows.train_time) / 1000  # from ms
    if {"Wall time", "Step", "Value"} <= set(rows):  # TensorBoard, one series in a file
        name = "val_loss" if re.search("val|eval|test", path.name) else "loss"
        rows = rows.rename(columns={"Wall time": "seconds", "Value": name})
        rows["seconds"] -= rows.seconds.iloc[0]
    if not any(" - " in str(name) for name in rows):
        return {"": rows}
    panel = rows.set_index("Step").filter(like=" - ")  # of W&B, with a column a run
    panel.columns = panel.columns.str.rsplit(" - ", n=1, expand=True)
    return {run: panel[run].reset_index() for run in panel.columns.levels[0]}


def to_curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Turn rows into a curve like ``analysis.load_curve``: of a step that is repeated, the last.

    What ``evaluate`` printed is a score, which knows no axis.
    """
    theirs = {re.sub("[/ ]", "_", str(name).lower()): name for name in rows}
    first = {ours: next(filter(theirs.get, known), None) for ours, known in NAMES.items()}
    names = {ours: theirs[known] for ours, known in first.items() if known}
    if "val_sha256" in rows and "step" not in names:  # written by ``python -m llmlib evaluate``
        return rows.assign(kind="score", val_loss=rows.loss).reindex(columns=CURVE_COLUMNS)
    curve = rows[[*names.values()]].set_axis([*names], axis=1).reindex(columns=CURVE_COLUMNS[1:])
    curve = curve.apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], math.nan)
    curve = curve.dropna(subset="step").groupby("step").last().reset_index()
    if curve[["loss", "val_loss"]].isna().all(axis=None):
        raise ValueError(
            f"it has the columns {', '.join(map(str, rows))}; a curve needs step and loss or val_loss "
            f"[nats/token] as numbers, and may have {', '.join(AXES)}, lr and grad_norm."
        )
    steps = curve.dropna(subset="loss").assign(kind="step", val_loss=math.nan)
    evals = curve.dropna(subset="val_loss").assign(kind="eval", loss=math.nan)
    return pd.concat([steps, evals])[CURVE_COLUMNS].sort_values("step", ignore_index=True)
