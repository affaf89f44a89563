"""Other people's curves: what trackers export and what training scripts print, as our own columns.

Read are CSV (also semicolons and decimal commas), JSON lines, the Hugging Face Trainer's
``trainer_state.json``, exports of W&B panels and TensorBoard, Lightning's ``metrics.csv``, and logs of
nanoGPT, llm.c and modded-nanogpt. Losses count as nats/token.
"""

import csv
import json
import math
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd

from llmlib.analysis import AXES, CURVE_COLUMNS, find

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
KNOWN = {theirs: ours for ours, names in NAMES.items() for theirs in names}
LINE = re.compile(r"^\s*(?:step|iter|s)[: ]\s*(\d+)(?:/\d+)?\b(.*)")
PAIR = re.compile(
    r"(train loss|val[_ ]loss|loss|tel|trl|train_time|lr|norm)[: ]\s*([-+.\de]+)(ms)?"
)


def load_curves(*folders: Path) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Read every file in folders named ``external``: curves by name, and what was not read and why.

    A file with several runs gives a curve for each.
    """
    curves, skipped = {}, []
    for name, path in find("**/external/*", folders).items():
        if path.name[0] == "." or not path.is_file():
            continue
        try:
            for run, rows in read_runs(path).items():
                curves[f"{name}: {run}" if run else name] = to_curve(rows)
        except (ValueError, KeyError, TypeError, csv.Error) as error:
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
        rows = pd.DataFrame(
            {"step": match[1]} | {name: _number(*found) for name, *found in PAIR.findall(match[2])}
            for match in map(LINE.match, text.splitlines())
            if match
        )
    if {"Wall time", "Step", "Value"} <= set(rows):  # TensorBoard, one series in a file
        name = "val_loss" if re.search("val|eval|test", path.name) else "loss"
        seconds = rows["Wall time"] - rows["Wall time"].iloc[0]
        return {"": pd.DataFrame({"step": rows.Step, name: rows.Value, "seconds": seconds})}
    runs = {name.split(" - ")[0] for name in rows if " - " in name}
    if not runs:
        return {"": rows}
    of_run = {run: [name for name in rows if name.startswith(f"{run} - ")] for run in sorted(runs)}
    return {  # a panel of W&B
        run: rows[["Step", *names]].rename(columns=lambda name: name.split(" - ")[-1])
        for run, names in of_run.items()
    }


def _number(text: str, unit: str) -> float:
    return float(text) / (1000 if unit else 1)


def to_curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Turn rows into a curve like ``analysis.load_curve``: of a step that is repeated, the last."""
    names = {name: KNOWN.get(re.sub("[/ ]", "_", str(name).lower())) for name in rows}
    known = {ours: name for name, ours in names.items() if ours}
    if "step" not in known or not {"loss", "val_loss"} & known.keys():
        raise ValueError(
            f"it has the columns {', '.join(map(str, rows))}; a curve needs step and loss or val_loss "
            f"[nats/token], and may have {', '.join(AXES)}, lr and grad_norm."
        )
    curve = rows[list(known.values())].set_axis(list(known), axis=1)
    curve = curve.apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], math.nan)
    curve = curve.dropna(subset="step").groupby("step").last().reset_index()
    if curve.reindex(columns=["loss", "val_loss"]).isna().all(axis=None):
        raise ValueError("its losses are not numbers.")
    curve = curve.reindex(columns=CURVE_COLUMNS[1:])
    steps = curve.dropna(subset="loss").assign(kind="step", val_loss=math.nan)
    evals = curve.dropna(subset="val_loss").assign(kind="eval", loss=math.nan)
    return pd.concat([steps, evals])[CURVE_COLUMNS].sort_values("step", ignore_index=True)
