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
PAIR = re.compile(r"(train loss|val[_ ]loss|loss|tel|trl|train_time|lr|norm)[: ]\s*([-+.\de]+)")


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
    names = {KNOWN.get(re.sub("[/ ]", "_", str(name).lower())): name for name in rows}
    if "val_sha256" in rows and "step" not in names:  # written by ``python -m llmlib evaluate``
        return rows.assign(kind="score", val_loss=rows.loss).reindex(columns=CURVE_COLUMNS)
    if "step" not in names or not {"loss", "val_loss"} & names.keys():
        raise ValueError(
            f"it has the columns {', '.join(map(str, rows))}; a curve needs step and loss or val_loss "
            f"[nats/token], and may have {', '.join(AXES)}, lr and grad_norm."
        )
    curve = pd.DataFrame({ours: rows.get(names.get(ours)) for ours in CURVE_COLUMNS[1:]})
    curve = curve.apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], math.nan)
    curve = curve.dropna(subset="step").groupby("step").last().reset_index()
    if curve[["loss", "val_loss"]].isna().all(axis=None):
        raise ValueError("its losses are not numbers.")
    steps = curve.dropna(subset="loss").assign(kind="step", val_loss=math.nan)
    evals = curve.dropna(subset="val_loss").assign(kind="eval", loss=math.nan)
    return pd.concat([steps, evals])[CURVE_COLUMNS].sort_values("step", ignore_index=True)
