"""The command line, and every notebook at smoke scale."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
from click.testing import CliRunner
from papermill.cli import papermill as papermill_command

from llmlib import __main__ as workbook
from llmlib import checkpoint, devices, locks, runs

STEMS = ["01_data_prep", "02_throughput", "03_sizing", "04_recipe", "05_full_run", "06_loss_curves"]


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


def parameters_of(stem):
    return papermill.inspect_notebook(str(workbook.NOTEBOOKS / f"{stem}.ipynb"))


# ------------------------------------------------------------------ sources


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
        for name, parameter in parameters_of(stem).items():
            assert parameter["help"], f"{stem}: {name} has no help"
            assert parameter["inferred_type_name"] != "None", f"{stem}: {name} has no type"
    assert n_lines <= 600


def test_papermills_help_explains_every_parameter():
    for stem in STEMS:
        path = str(workbook.NOTEBOOKS / f"{stem}.ipynb")
        shown = CliRunner().invoke(papermill_command, ["--help-notebook", path])
        words = " ".join(shown.output.split())  # long lines are wrapped
        for name, parameter in parameters_of(stem).items():
            kind, default = parameter["inferred_type_name"], parameter["default"]
            assert f"{name}: {kind} (default {default}) {parameter['help']}" in words


# ------------------------------------------------------------------ executed


def test_notebooks_run_in_order_and_leave_records(smoke_records):
    folder, first = smoke_records
    done = [line for line in first.stdout.splitlines() if "done after" in line]
    assert [line.split()[1].rstrip(":") for line in done] == STEMS
    for stem in STEMS:
        names = {path.name for path in (folder / stem).iterdir()}
        assert {"config.json", "environment.json", "summary.json", "notebook.ipynb"} <= names
        for figure in (folder / stem / "figures").glob("*.png"):
            assert figure.with_suffix(".svg").exists() and figure.with_suffix(".csv").exists()
    assert 8 <= len(list(folder.glob("*/figures/*.png"))) <= 15
    assert (folder / "05_full_run" / "model.safetensors").exists()


def test_executed_notebooks_hold_no_path_of_this_machine_and_nothing_alive(smoke_records):
    folder, _ = smoke_records
    for stem in STEMS:
        notebook = nbformat.read(folder / stem / "notebook.ipynb", as_version=4)
        notebook.metadata.papermill.parameters.pop("runs_dir")
        assert "widgets" not in notebook.metadata
        assert str(runs.ROOT) not in json.dumps(notebook.metadata)
        for cell in notebook.cells:
            if "injected-parameters" not in cell.metadata.get("tags", []):
                assert str(runs.ROOT) not in json.dumps(cell)
            figures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
            assert len(figures) <= 1


def test_second_run_keeps_what_is_finished(smoke_records, llmlib):
    folder, _ = smoke_records
    written = {p: p.stat().st_mtime_ns for p in folder.glob("0[1-5]*/**/*") if p.is_file()}
    status, output, errors = llmlib("run", "--scale", "smoke", "--runs-dir", folder)
    assert status == 0, errors
    assert output.count("finished earlier, kept") == 5  # 06 looks for new runs each time
    assert {p: p.stat().st_mtime_ns for p in written} == written


def test_plain_papermill_reloads_a_finished_record_from_any_directory(
    smoke_records, tmp_path, monkeypatch
):
    folder, _ = smoke_records
    monkeypatch.chdir(tmp_path)
    metrics = (folder / "05_full_run" / "metrics.jsonl").read_bytes()
    papermill.execute_notebook(
        str(workbook.NOTEBOOKS / "05_full_run.ipynb"),
        "out.ipynb",
        parameters={"scale": "smoke", "runs_dir": str(folder)},
        progress_bar=False,
    )
    assert (tmp_path / "out.ipynb").exists()
    assert (folder / "05_full_run" / "metrics.jsonl").read_bytes() == metrics


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
    expected = {"05_full_run", "lr_2e-3"}
    assert set(pd.read_csv(figures / "runs_compared.csv").run) == expected | {"external/theirs.csv"}
    assert set(pd.read_csv(figures / "domains_compared.csv").run) == expected


def test_another_config_is_refused_and_overwrites_nothing(smoke_records, llmlib):
    folder, _ = smoke_records
    before = {p: p.read_bytes() for p in (folder / "03_sizing").glob("*.*")}
    arguments = ["--scale", "smoke", "--runs-dir", folder, "--only", "03_sizing"]
    status, _, errors = llmlib("run", *arguments, "-p", "budget_hours", "7")
    assert status == 2
    for part in ("03_sizing", "made with another config", "run_name"):
        assert part in errors
    after = {p: p.read_bytes() for p in before if "partial" not in p.name}
    assert after == {p: raw for p, raw in before.items() if "partial" not in p.name}


def test_sample_and_export_use_a_run(smoke_records, llmlib, tmp_path):
    folder, _ = smoke_records
    run = folder / "05_full_run"
    first, second = (llmlib("sample", run, "import ", "-n", 20, "--seed", 3) for _ in range(2))
    status, output, errors = first
    assert status == 0, errors
    assert output.startswith("import ") and len(output) > len("import \n")
    assert second == first
    status, _, errors = llmlib("export", run, tmp_path / "model")
    assert status == 0, errors
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_plan_prints_where_every_line_is_from(llmlib):
    status, output, errors = llmlib("plan", "--hours", 1, "--gpu", "H200")
    assert status == 0, errors
    kinds = ("measured", "computed", "assumed")
    assert all(any(kind in line for kind in kinds) for line in output.splitlines()[1:])


# ------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--scale", "huge"], ["huge", "laptop"]),
        (["run", "--only", "09_nothing"], ["09_nothing", "03_sizing"]),
        (["run", "-p", "learning_rate", "1"], ["learning_rate", "lr"]),
        (["run", "--only", "05", "-p", "lr", "fast"], ["lr", "fast", "float"]),
        (["sample", "no/such/run", "x"], ["no/such/run", "finished"]),
        (["plan", "--gpu", "V100"], ["V100", "A100"]),
    ],
    ids=lambda value: "-".join(value[:3]) if value[0] in ("run", "sample", "plan") else None,
)
def test_wrong_requests_end_with_status_2_and_the_remedy(arguments, words, llmlib):
    status, _, errors = llmlib(*arguments)
    assert status == 2
    assert all(word in errors for word in words), errors


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        ("01_data_prep", ["could not be opened", "no/such/folder"]),
        ("02_throughput", ["run 01_data_prep first"]),
        ("03_sizing", ["run 01_data_prep first"]),
        ("04_recipe", ["run 01_data_prep first"]),
        ("05_full_run", ["run 01_data_prep first"]),
        ("06_loss_curves", ["run 05_full_run first"]),
    ],
)
def test_notebooks_explain_what_is_missing(tmp_path, stem, words):
    values = {"scale": "smoke", "runs_dir": str(tmp_path)}
    if stem == "01_data_prep":
        values["corpus"] = "no/such/folder/at/all"
    parameters, *cells = (cell.source for cell in source(stem).cells if cell.cell_type == "code")
    exec(parameters, names := {})
    names |= values
    with pytest.raises(ValueError) as error:
        for cell in cells:
            exec(cell, names)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / stem / "summary.json").exists()


@pytest.mark.parametrize("stem", STEMS[1:5])
def test_scale_for_an_accelerator_is_refused_on_a_cpu_unless_allowed(tmp_path, monkeypatch, stem):
    monkeypatch.setattr(devices, "accelerator", lambda: None)
    parameters, *cells = (c.source for c in source(stem).cells if c.cell_type == "code")
    first = "\n".join(cells[:2])
    exec(parameters, names := {})
    names |= {"scale": "a100", "runs_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"this needs an accelerator.*-p allow_cpu True"):
        exec(first, names)
    assert not any(tmp_path.iterdir())
    with suppress(ValueError):  # earlier records are missing
        exec(first, names := names | {"allow_cpu": True})
    assert not names["base"].train.needs_accelerator


def test_a_failing_notebook_leaves_its_cells_and_names_the_one(tmp_path, monkeypatch):
    texts = ['scale: str = ""\nruns_dir: str = ""', "print('as far as here')", "1 / 0"]
    cells = [nbformat.v4.new_code_cell(text) for text in texts]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, tmp_path / "07_broken.ipynb")
    monkeypatch.setattr(workbook, "NOTEBOOKS", tmp_path)
    with pytest.raises(workbook.Failed, match=r"07_broken failed in cell 4: ZeroDivisionError"):
        workbook.run_all("smoke", None, {}, str(tmp_path / "runs"))
    record = tmp_path / "runs" / "07_broken"
    assert not (record / "notebook.ipynb").exists()
    partial = nbformat.read(record / "notebook.partial.ipynb", as_version=4)
    outputs = [output for cell in partial.cells for output in cell.get("outputs", [])]
    assert [o.text for o in outputs if o.output_type == "stream"] == ["as far as here\n"]


def test_a_full_disk_and_missing_notebooks_are_told_with_the_remedy(tmp_path, monkeypatch, llmlib):
    cell = nbformat.v4.new_code_cell("raise OSError(28, 'No space left on device')")
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=kernel)
    nbformat.write(notebook, tmp_path / "07_full.ipynb")
    monkeypatch.setattr(workbook, "NOTEBOOKS", tmp_path)
    with pytest.raises(workbook.Failed, match=r"No space left .* --runs-dir for records, HF_HOME"):
        workbook.execute("07_full", tmp_path / "record", {})
    monkeypatch.setattr(workbook, "NOTEBOOKS", tmp_path / "none")
    status, _, errors = llmlib("run")
    assert status == 2 and "install from a clone, with pip install -e ." in errors


def test_selection_understands_names_lists_and_ranges():
    assert workbook.select(None) == STEMS
    assert workbook.select("03_sizing") == ["03_sizing"]
    assert workbook.select("5,01") == ["01_data_prep", "05_full_run"]
    assert workbook.select("02-05") == STEMS[1:5]


def pretend_data(folder, tokens):
    """Write what 05 reads of 01's record."""
    runs.write_json(folder / "01_data_prep" / "config.json", {"format": 2})
    summary = {
        "tokenizer": {"sha256": "", "vocab_size": 512},
        "n_tokens": 1,
        "val_tokens_per_byte": 0.25,
    }
    runs.write_json(folder / "01_data_prep" / "summary.json", summary)
    (folder / "01_data_prep" / "tokens").symlink_to(tokens)


def test_full_run_without_02_takes_the_datasheets_peak_and_what_fits(
    tmp_path, smoke_tokens, monkeypatch
):
    pretend_data(tmp_path, smoke_tokens)
    cells = [cell.source for cell in source("05_full_run").cells if cell.cell_type == "code"]
    for name, device, memory, fits, peak in (
        ("cpu", "CPU", None, 8, None),
        ("gpu", "NVIDIA A100-SXM4-80GB", 85e9, 16, 312e12),
    ):
        here = {"device": device, "memory_bytes": memory}
        monkeypatch.setattr(runs, "environment", lambda here=here: here)
        exec(cells[0], names := {})
        names |= {"scale": "smoke", "runs_dir": str(tmp_path), "run_name": name}
        for cell in cells[1:6]:
            exec(cell, names)
        run = runs.read_run(tmp_path / name)
        assert (run.train.micro_batch, run.train.n_sequences) == (fits, 16)
        assert run.peak_flops_per_s == peak


def newest_step(run):
    rows = runs.read_metrics(run, "step")
    return 0 if rows.empty else rows.step.max()


def test_an_interrupted_workbook_has_saved_and_goes_on_where_it_stopped(tmp_path, smoke_tokens):
    """The budget is far longer than the test: the signal comes when the run has taken a step.

    SIGTERM comes to a shell's background job, which ignores SIGINT.
    """
    pretend_data(tmp_path, smoke_tokens)
    runs.write_json(tmp_path / "02_throughput" / "config.json", {"format": 2})
    measured = {"peak_flops_per_s": 1e11, "micro_batch": {"micro_batch": 8, "grad_accum": 2}}
    runs.write_json(tmp_path / "02_throughput" / "summary.json", measured)
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
        while newest_step(record) == seen:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(how)
        _, errors = process.communicate()
        assert process.returncode == 128 + how
        assert b"goes on where this one stopped" in errors
        while locks.lock_owner(record):
            time.sleep(0.1)
        seen = newest_step(record)
        assert int(checkpoint.newest_valid(record / "checkpoints").stem) == seen
    steps = runs.read_metrics(record, "step").step.tolist()
    assert steps == list(range(1, seen + 1))
    assert "went back to step" in (record / "train.log").read_text()
