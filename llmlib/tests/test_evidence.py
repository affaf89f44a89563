"""The GPU's commands, rehearsed at smoke scale without Jupyter, papermill or transformers."""

import os
import subprocess
import sys
import tarfile

import pandas as pd
import pytest

from llmlib import evidence, runs

ABSENT = """
import sys

NAMES = {"IPython", "papermill", "nbformat", "nbclient", "ipykernel", "jupyter_client", "jupyterlab",
         "ipywidgets", "transformers", "tensorboard"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def take(tmp_path_factory):
    """Return a function that takes a step in a Python without those packages."""
    hidden = tmp_path_factory.mktemp("absent")
    (hidden / "sitecustomize.py").write_text(ABSENT)

    def take(step, out, *options):
        command = [sys.executable, "-m", "llmlib.evidence", step, "--out", str(out), *options]
        path = os.pathsep.join([str(hidden), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [*command, "--scale", "smoke"],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )

    return take


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory, take):
    """Every step in order, each with its output."""
    out = tmp_path_factory.mktemp("evidence")
    outputs = {}
    for step in evidence.MINUTES:
        done = take(step, out)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs[step] = done.stdout
    return out, outputs


def test_every_step_leaves_its_record(rehearsal):
    out, outputs = rehearsal
    for name in ("01_data_prep", "02_throughput", "winner2024", "best", "03_sizing"):
        assert (out / name / "summary.json").exists()
        assert list((out / name / "figures").glob("*.png"))
    assert not list(out.rglob("notebook*.ipynb"))  # there was no papermill
    assert "skipped" in (out / "tests" / "output.txt").read_text()
    [beside] = (out / "bench").glob("*.json")
    rows = {row["name"]: row for row in runs.read_json(beside)["rows"]}
    assert "transformers" in rows["transformers, compiled"]["note"]
    assert rows["ours"]["tokens_per_s"] > 0
    compared = runs.read_json(out / "06_loss_curves" / "summary.json")["results"]
    assert {row["run"] for row in compared} == {"winner2024", "best"}
    assert "validation loss" in outputs["best"]


@pytest.mark.parametrize("recipe", ["winner2024", "best"])
def test_each_recipe_is_killed_halfway_and_spends_its_budget(rehearsal, recipe):
    out, outputs = rehearsal
    run = out / recipe
    events = runs.read_metrics(run).query("kind == 'event'").text
    assert sum(text.startswith("went back to step") for text in events) == 1
    assert 0.5 <= runs.read_json(run / "killed.json")["progress"] < 1
    assert "status -9" in outputs[recipe]
    result = runs.read_json(run / "training.json")
    budget = 3600 * evidence.BUDGET_HOURS["smoke"]
    assert result["budget_seconds"] == budget
    assert sum(result["seconds"].values()) <= budget
    steps = runs.read_metrics(run).query("kind == 'step'").step.tolist()
    assert steps == list(range(1, result["n_steps"] + 1))
    optimizer = runs.read_json(run / "config.json")["train"]["optimizer"]
    assert optimizer == {"winner2024": "adamw", "best": "muon"}[recipe]


def test_what_is_packed_is_small_and_enough_to_go_on(rehearsal, take, tmp_path):
    out, _ = rehearsal
    with tarfile.open(out / "records.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    names = {path.name for path in tmp_path.rglob("*")}
    assert not names & {"tokens", "checkpoints", "snapshots", "model.safetensors", "train.bin"}
    kept = list(tmp_path.rglob("*"))
    assert sum(path.stat().st_size for path in kept) < 20e6
    levers = tmp_path / "02_throughput" / "levers.csv"
    levers.unlink()
    (tmp_path / "02_throughput" / "summary.json").unlink()
    shapes = tmp_path / "02_throughput" / "shapes.csv"
    before = shapes.read_bytes(), shapes.stat().st_mtime_ns
    assert take("throughput", tmp_path).returncode == 0
    assert len(pd.read_csv(levers)) == len(pd.read_csv(out / "02_throughput" / "levers.csv"))
    assert (shapes.read_bytes(), shapes.stat().st_mtime_ns) == before
    assert take("compare", tmp_path).returncode == 0


def test_a_step_stops_at_its_limit_and_says_how_to_go_on(take, tmp_path):
    done = take("best", tmp_path, "--minutes", "0.02")  # with a budget of 0.24 minutes
    assert done.returncode == 130, done.stdout + done.stderr
    assert "the same command goes on" in done.stdout
    assert (tmp_path / "records.tar.gz").exists()


def test_with_papermill_the_executed_notebook_is_there_too(rehearsal):
    out, _ = rehearsal
    assert evidence.main(["compare", "--out", str(out), "--scale", "smoke"]) == 0
    assert (out / "06_loss_curves" / "notebook.ipynb").exists()
