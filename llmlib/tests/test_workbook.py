"""The command line, and every notebook at smoke scale."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

from llmlib import __main__ as workbook
from llmlib import devices, runs
from llmlib.tests.conftest import newest_checkpoint

STEMS = ["01_data_prep", "02_throughput", "03_sizing", "04_recipe", "05_full_run", "06_loss_curves"]
RECORDS = [*STEMS[:4], *workbook.ARMS, STEMS[5]]


@pytest.fixture
def llmlib(capsys, monkeypatch):
    """Return a function that calls the command line in this process: status, output, errors."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments):
        try:
            status = workbook.main([str(argument) for argument in arguments])
        except SystemExit as wrong:  # argparse
            status = wrong.code
        return status, *capsys.readouterr()

    return call


def source(stem):
    return nbformat.read(workbook.NOTEBOOKS / f"{stem}.ipynb", as_version=4)


def test_notebook_sources_are_clean_typed_and_short():
    n_lines = 0
    for stem in STEMS:
        notebook = source(stem)
        code = [c for c in notebook.cells if c.cell_type == "code"]
        assert not any(c.outputs or c.execution_count for c in code)
        assert "parameters" in code[0].metadata.tags
        assert notebook.metadata.kernelspec.name == "python3"
        assert 12 <= len(notebook.cells) <= 25
        n_lines += sum(len(c.source.splitlines()) for c in code)
        declared = papermill.inspect_notebook(str(workbook.NOTEBOOKS / f"{stem}.ipynb"))
        for name, parameter in declared.items():
            assert parameter["help"], f"{stem}: {name} has no help"
            assert parameter["inferred_type_name"] != "None", f"{stem}: {name} has no type"
    assert n_lines <= 600


def test_notebooks_run_in_order_and_leave_records(smoke_records):
    folder, first = smoke_records
    done = [line for line in first.stdout.splitlines() if "done after" in line]
    assert [line.split(":")[0] for line in done] == RECORDS
    assert "100% ██" in first.stderr  # of 05's training
    for stem in RECORDS:
        names = {path.name for path in (folder / stem).iterdir()}
        assert {"config.json", "environment.json", "summary.json", "notebook.ipynb"} <= names
        for figure in (folder / stem / "figures").glob("*.png"):
            assert figure.with_suffix(".svg").exists() and figure.with_suffix(".csv").exists()
    assert 8 <= sum(len(list((folder / s / "figures").glob("*.png"))) for s in STEMS) <= 15
    trained = [runs.read_run(folder / name) for name in workbook.ARMS]
    assert [run.train.optimizer for run in trained] == ["muon", "adamw", "adamw"]
    assert [run.model.arch for run in trained] == ["llama", "llama", "gpt2"]
    assert len({(run.model.n_layer, run.model.d_model) for run in trained}) == 1
    results = pd.DataFrame(runs.load_summary(folder / "06_loss_curves")["results"])
    assert {*results.run} == {*workbook.ARMS} and results.val_sha256.nunique() == 1


def test_executed_notebooks_hold_no_path_of_this_machine_and_nothing_alive(smoke_records):
    folder, _ = smoke_records
    for stem in RECORDS:
        notebook = nbformat.read(folder / stem / "notebook.ipynb", as_version=4)
        notebook.metadata.papermill.parameters.pop("runs_dir")
        assert "widgets" not in notebook.metadata
        assert str(runs.ROOT) not in json.dumps(notebook.metadata)
        for cell in notebook.cells:
            if "injected-parameters" not in cell.metadata.get("tags", []):
                assert str(runs.ROOT) not in json.dumps(cell)
            figures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
            assert len(figures) <= 1


def test_second_run_reloads_from_any_directory(smoke_records, llmlib, tmp_path, monkeypatch):
    folder, _ = smoke_records
    monkeypatch.chdir(tmp_path)
    kinds = ("*.csv", "metrics.jsonl", "config.json", "environment.json", "tokens/*")
    files = [path for kind in kinds for path in folder.glob(f"*/{kind}") if path.is_file()]
    written = {path: path.stat().st_mtime_ns for path in files}
    summaries = {path: path.read_text() for path in folder.glob("*/summary.json")}
    status, _, errors = llmlib("run", "--scale", "smoke", "--runs-dir", folder)
    assert status == 0, errors
    assert {path: path.stat().st_mtime_ns for path in files} == written
    assert {path: path.read_text() for path in summaries} == summaries


def test_a_sweep_is_a_loop_and_meets_its_runs_and_others_in_06(smoke_records, llmlib, tmp_path):
    folder, _ = smoke_records
    (folder / "external").mkdir()
    (folder / "external" / "theirs.csv").write_text("step,loss\n1,6.0\n2,5.0\n")
    sweep = f"""
for lr in 2e-3; do
    papermill {workbook.NOTEBOOKS}/05_full_run.ipynb $lr.ipynb -p lr $lr -p run_name lr_$lr \\
        -p scale smoke -p runs_dir {folder} || exit
done"""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(sweep, shell=True, check=True, cwd=tmp_path, env=os.environ | {"PATH": path})
    status, _, errors = llmlib("run", "--scale", "smoke", "--runs-dir", folder, "--only", "06")
    assert status == 0, errors
    figures = folder / "06_loss_curves" / "figures"
    expected, others = {*workbook.ARMS, "lr_2e-3"}, {"external/theirs.csv", "runs of 03 and 04"}
    assert set(pd.read_csv(figures / "runs_compared.csv").run) == expected | others
    assert set(pd.read_csv(figures / "domains_compared.csv").run) == expected


def test_another_config_is_refused_and_overwrites_nothing(smoke_records, llmlib):
    folder, _ = smoke_records
    files = [p for p in (folder / "03_sizing").glob("*.*") if "partial" not in p.name]
    before = {p: p.read_bytes() for p in files}
    arguments = ["--scale", "smoke", "--runs-dir", folder, "--only", "03_sizing"]
    status, _, errors = llmlib("run", *arguments, "-p", "budget_hours", "7")
    assert status == 2
    for part in ("03_sizing", "made with another config", "run_name"):
        assert part in errors
    assert {p: p.read_bytes() for p in files} == before


def test_sample_export_evaluate_and_plan_say_what_they_did(smoke_records, llmlib, tmp_path):
    run, tokens = smoke_records[0] / "05_full_run", smoke_records[0] / "01_data_prep" / "tokens"
    first, second = (llmlib("sample", run, "import ", "-n", 20) for _ in range(2))
    status, output, errors = first
    assert status == 0, errors
    assert output.startswith("import ") and len(output) > len("import \n")
    assert second == first
    status, _, errors = llmlib("export", run, tmp_path / "model")
    assert status == 0, errors
    assert (tmp_path / "model" / "model.safetensors").exists()
    status, output, errors = llmlib("evaluate", run, "--tokens", tokens)
    names, values = (line.split(",") for line in output.splitlines())
    loss = runs.read_result(run)["val"]["loss"]
    assert float(dict(zip(names, values, strict=True))["loss"]) == pytest.approx(loss, rel=1e-5)
    status, output, errors = llmlib("plan", "--hours", 1, "--gpu", "H200")
    assert status == 0 and "assumed: H200" in output, errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run --scale huge", ["huge", "laptop"]),
        ("run --only 05,01-03", ["01-03", "03_sizing"]),
        ("run -p learning_rate 1", ["learning_rate", "lr"]),
        ("run --only 05 -p lr fast", ["lr", "fast", "float"]),
        ("sample no/such/run x", ["no/such/run", "finished"]),
        ("evaluate x --tokens no/tokens", ["no/tokens", "01_data_prep"]),
        ("plan --gpu V100", ["V100", "A100"]),
    ],
)
def test_wrong_requests_end_with_status_2_and_the_remedy(arguments, words, llmlib):
    status, _, errors = llmlib(*arguments.split())
    assert status == 2
    assert all(word in errors for word in words), errors


def run_cells(stem, n_cells=None, **values):
    """Execute a notebook's first code cells in this process."""
    parameters, *cells = [c.source for c in source(stem).cells if c.cell_type == "code"][:n_cells]
    exec(parameters, names := {})
    names |= values
    for cell in cells:
        exec(cell, names)


@pytest.mark.parametrize("stem", STEMS)
def test_notebooks_explain_what_is_missing(tmp_path, stem):
    first = {STEMS[0]: "could not be opened.*no/such/folder", STEMS[5]: f"run {STEMS[4]} first"}
    values = {"corpus": "no/such/folder"} if stem == STEMS[0] else {}
    missing = first.get(stem, f"run {STEMS[0]} first: .* --only {STEMS[0]}")
    with pytest.raises(ValueError, match=f"(?s){missing}"):
        run_cells(stem, scale="smoke", runs_dir=str(tmp_path), **values)
    assert not (tmp_path / stem / "summary.json").exists()


@pytest.mark.parametrize("stem", STEMS[1:5])
def test_scale_for_an_accelerator_is_refused_on_a_cpu_unless_allowed(tmp_path, monkeypatch, stem):
    monkeypatch.setattr(devices, "accelerator", lambda: None)
    values = {"scale": "a100", "runs_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"this needs an accelerator.*-p allow_cpu True"):
        run_cells(stem, 3, **values)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="run 01_data_prep first"):
        run_cells(stem, 3, **values, allow_cpu=True)


def test_a_failing_notebook_leaves_its_cells_and_names_the_one(tmp_path, monkeypatch, llmlib):
    failing = "raise OSError(28, 'No space left on device')"
    texts = ('scale: str = ""\nruns_dir: str = ""', "print('as far as here')", failing)
    cells = [nbformat.v4.new_code_cell(text) for text in texts]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, tmp_path / "07_broken.ipynb")
    monkeypatch.setattr(workbook, "NOTEBOOKS", tmp_path)
    words = (
        r"07_broken failed in cell 4: OSError: .*No space left .* by --runs-dir, data by HF_HOME"
    )
    with pytest.raises(SystemExit, match=words):
        workbook.run_all("smoke", "", [], str(tmp_path / "runs"))
    record = tmp_path / "runs" / "07_broken"
    assert not (record / "notebook.ipynb").exists()
    partial = nbformat.read(record / "notebook.partial.ipynb", as_version=4)
    outputs = [output for cell in partial.cells for output in cell.get("outputs", [])]
    assert [o.text for o in outputs if o.output_type == "stream"] == ["as far as here\n"]
    monkeypatch.setattr(workbook, "NOTEBOOKS", tmp_path / "none")
    status, _, errors = llmlib("run")
    assert status == 2 and "install from a clone: pip install -e ." in errors


ARMS_OF = {  # arguments: records of 05
    "--scale laptop": [*workbook.ARMS],
    "--scale laptop -p d_model 192": [*workbook.ARMS],
    "--scale laptop -p run_name wide -p d_model 192": ["wide"],
    "--scale laptop -p recipe winner2024": ["05_full_run"],
    "--scale a100": ["05_full_run"],
    "--scale a100 --arms": [*workbook.ARMS],
}


@pytest.mark.parametrize("arguments", ARMS_OF)
def test_full_run_has_arms_where_they_are_cheap_or_asked_for(arguments, llmlib, monkeypatch):
    done = {}
    note = lambda stem, record, values: done.update({record.name: values})  # noqa: E731
    monkeypatch.setattr(workbook, "execute", note)
    status, _, errors = llmlib("run", "--only", "05", *arguments.split())
    assert (status, [*done]) == (0, ARMS_OF[arguments]), errors
    assert all(values.get("run_name", "05_full_run") == name for name, values in done.items())
    assert all(values.get("d_model", 192) == 192 for values in done.values())


def test_selection_understands_numbers_and_lists_in_any_order():
    assert workbook.select("5,01") == ["01_data_prep", "05_full_run"]


def test_05_without_02_takes_a_datasheets_peak_and_what_fits(tmp_path, smoke_records, monkeypatch):
    (tmp_path / STEMS[0]).symlink_to(smoke_records[0] / STEMS[0])
    for name, device, memory, fits, peak in (
        ("cpu", "CPU", None, 8, None),
        ("gpu", "NVIDIA A100-SXM4-80GB", 85e9, 16, 312e12),
    ):
        here = {"device": device, "memory_bytes": memory}
        monkeypatch.setattr(runs, "environment", lambda *_, here=here: here)
        run_cells("05_full_run", 6, scale="smoke", runs_dir=str(tmp_path), run_name=name)
        run = runs.read_run(tmp_path / name)
        assert (run.train.micro_batch, run.train.n_sequences) == (fits, 16)
        assert run.peak_flops_per_s == peak


def test_an_interrupted_workbook_has_saved_and_goes_on_where_it_stopped(tmp_path, smoke_records):
    """The budget is far longer than the test: the signal comes when the run has taken a step.

    SIGTERM comes to a shell's background job, which ignores SIGINT.
    """
    for stem in STEMS[:2]:
        (tmp_path / stem).symlink_to(smoke_records[0] / stem)
    record, seen = tmp_path / "05_full_run", 0
    command = [sys.executable, "-m", "llmlib", "run", "--scale", "smoke", "--only", "05"]
    command += ["--runs-dir", str(tmp_path), "-p", "budget_tokens", str(10**9)]
    for how, inherited in ((signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_IGN)):
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, inherited),
        )
        while len(runs.read_metrics(record, "step")) == seen:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(how)
        _, errors = process.communicate()
        assert process.returncode == 128 + how
        assert b"goes on where this one stopped" in errors
        seen = newest_checkpoint(record)
        assert len(runs.read_metrics(record, "step")) == seen
    steps = runs.read_metrics(record, "step").step.tolist()
    assert steps == list(range(1, seen + 1))
    assert "went back to step" in (record / "train.log").read_text()
