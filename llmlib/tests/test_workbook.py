"""The command line, and every notebook at smoke scale, twice."""

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

from llmlib import runs, workbook
from llmlib.supervise import last_metrics

STEMS = [
    "01_data_prep", "02_throughput", "03_sizing", "04_recipe", "05_full_run", "06_loss_curves",
]  # fmt: skip


def llmlib(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "llmlib", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=1800,
    )


def papermill_command(*arguments, cwd=None):
    command = [sys.executable, "-m", "papermill", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def workbook_run(tmp_path_factory):
    """All notebooks at smoke scale, started from a directory that is not the repository."""
    folder = tmp_path_factory.mktemp("runs")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    first = llmlib("run", "--scale", "smoke", "--runs-dir", str(folder), cwd=elsewhere)
    assert first.returncode == 0, first.stdout + first.stderr
    return folder, first


def test_notebooks_run_in_order_and_leave_records(workbook_run):
    folder, first = workbook_run
    assert [
        line.split()[1].rstrip(":") for line in first.stdout.splitlines() if "done after" in line
    ] == STEMS
    for stem in STEMS:
        record = folder / stem
        assert {"config.json", "environment.json", "summary.json", "notebook.ipynb"} <= {
            p.name for p in record.iterdir()
        }
        for figure in (record / "figures").glob("*.png"):
            assert figure.with_suffix(".svg").exists()
            assert figure.with_suffix(".csv").exists()
    assert len(list(folder.glob("*/figures/*.png"))) >= 15
    assert (folder / "05_full_run" / "model.safetensors").exists()


def test_executed_notebooks_hold_no_path_of_this_machine(workbook_run):
    folder, _ = workbook_run
    for stem in STEMS:
        notebook = nbformat.read(folder / stem / "notebook.ipynb", as_version=4)
        notebook.metadata.papermill.parameters.pop("runs_dir")
        for cell in notebook.cells:
            if "injected-parameters" not in cell.metadata.get("tags", []):
                assert str(runs.ROOT) not in json.dumps(cell)
        assert str(runs.ROOT) not in json.dumps(notebook.metadata)


def test_second_run_keeps_what_is_finished(workbook_run):
    folder, _ = workbook_run
    written = {p: p.stat().st_mtime_ns for p in folder.glob("0[1-5]*/**/*") if p.is_file()}
    second = llmlib("run", "--scale", "smoke", "--runs-dir", str(folder))
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("finished earlier, kept") == 5  # 06 looks for new runs each time
    assert {p: p.stat().st_mtime_ns for p in written} == written


def test_plain_papermill_reloads_a_finished_record_from_any_directory(
    workbook_run, tmp_path, monkeypatch
):
    folder, _ = workbook_run
    monkeypatch.chdir(tmp_path)
    metrics = (folder / "05_full_run" / "metrics.jsonl").read_bytes()
    papermill.execute_notebook(
        str(workbook.FOLDER / "05_full_run.ipynb"),
        "out.ipynb",
        parameters={"scale": "smoke", "runs_dir": str(folder)},
        progress_bar=False,
    )
    assert (tmp_path / "out.ipynb").exists()
    assert (folder / "05_full_run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("is_absolute", [True, False])
def test_papermills_command_writes_where_it_is_told(workbook_run, tmp_path, is_absolute):
    folder, _ = workbook_run
    output = tmp_path / "out" / "curves.ipynb" if is_absolute else Path("out/curves.ipynb")
    (tmp_path / "out").mkdir()
    source = workbook.FOLDER / "06_loss_curves.ipynb"
    parameters = ["-p", "scale", "smoke", "-p", "runs_dir", folder, "-p", "run_name", output.stem]
    assert papermill_command(source, output, *parameters, cwd=tmp_path).returncode == 0
    cells = nbformat.read(tmp_path / "out" / "curves.ipynb", as_version=4).cells
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code")


@pytest.mark.parametrize("stem", STEMS)
def test_papermills_help_explains_every_parameter(stem):
    result = papermill_command("--help-notebook", workbook.FOLDER / f"{stem}.ipynb")
    assert result.returncode == 0, result.stderr
    words = " ".join(result.stdout.split())  # long lines are wrapped
    for name, parameter in workbook.notebook_parameters(stem).items():
        kind, default = parameter["inferred_type_name"], parameter["default"]
        assert f"{name}: {kind} (default {default}) {parameter['help']}" in words


def test_nobody_watching_sees_figures_and_nothing_alive(workbook_run):
    folder, _ = workbook_run
    for stem in STEMS:
        notebook = nbformat.read(folder / stem / "notebook.ipynb", as_version=4)
        assert "widgets" not in notebook.metadata
        for cell in notebook.cells:
            figures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
            assert len(figures) <= 1
            assert not (figures and "supervise(" in cell.source)


def test_a_sweep_is_a_loop_and_meets_its_runs_and_others_in_06(workbook_run, tmp_path):
    folder, _ = workbook_run
    (folder / "external").mkdir()
    (folder / "external" / "theirs.csv").write_text("step,loss\n1,6.0\n2,5.0\n")
    sweep = f"""
for lr in 1e-3 2e-3; do
    papermill {workbook.FOLDER}/05_full_run.ipynb $lr.ipynb -p lr $lr -p run_name lr_$lr \\
        -p scale smoke -p runs_dir {folder} || exit
done"""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(sweep, shell=True, check=True, cwd=tmp_path, env=os.environ | {"PATH": path})
    again = llmlib("run", "--scale", "smoke", "--runs-dir", str(folder), "--only", "06")
    assert again.returncode == 0, again.stderr
    figures = folder / "06_loss_curves" / "figures"
    expected = {"05_full_run", "lr_1e-3", "lr_2e-3"}
    assert set(pd.read_csv(figures / "runs_compared.csv").run) == expected | {"external/theirs.csv"}
    assert set(pd.read_csv(figures / "domains_compared.csv").run) == expected


def test_another_config_is_refused_and_overwrites_nothing(workbook_run):
    folder, _ = workbook_run
    before = {p: p.read_bytes() for p in (folder / "03_sizing").glob("*.*")}
    arguments = ["--scale", "smoke", "--runs-dir", str(folder), "--only", "03_sizing"]
    refused = llmlib("run", *arguments, "-p", "budget_hours", "7")
    assert refused.returncode == 2
    assert "03_sizing" in refused.stderr
    assert "made with another config" in refused.stderr
    assert "run_name" in refused.stderr
    assert {p: p.read_bytes() for p in before} == before


def test_sample_continues_a_prompt_from_a_run(workbook_run):
    folder, _ = workbook_run
    run = str(folder / "05_full_run")
    first = llmlib("sample", run, "import ", "-n", "20", "--seed", "3")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("import ")
    assert len(first.stdout) > len("import \n")
    assert llmlib("sample", run, "import ", "-n", "20", "--seed", "3").stdout == first.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--scale", "huge"], ["huge", "laptop"]),
        (["run", "--only", "09_nothing"], ["09_nothing", "03_sizing"]),
        (["run", "-p", "learning_rate", "1"], ["learning_rate", "lr"]),
        (["run", "--only", "05", "-p", "lr", "fast"], ["lr", "fast", "float"]),
        (["sample", "no/such/run", "x"], ["no/such/run", "finished run"]),
    ],
    ids=lambda value: "-".join(value[:3]) if isinstance(value[0], str) else None,
)
def test_wrong_requests_end_with_status_2_and_the_remedy(arguments, words):
    result = llmlib(*arguments)
    assert result.returncode == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("only", "parameters", "words"),
    [
        ("01_data_prep", {"corpus": "no/such/folder/at/all"}, ["does not exist", "no/such/folder"]),
        ("03_sizing", {}, ["run 02_throughput first"]),
        ("04_recipe", {}, ["run 01_data_prep first"]),
        ("05_full_run", {}, ["run 01_data_prep first"]),
        ("06_loss_curves", {}, ["run 05_full_run first"]),
    ],
)
def test_notebooks_explain_what_is_missing(tmp_path, only, parameters, words):
    with pytest.raises(ValueError) as error:
        workbook.run_all("smoke", only, parameters, str(tmp_path))
    assert all(word in str(error.value) for word in [only, *words]), str(error.value)
    assert not (tmp_path / only / "summary.json").exists()


def test_a_failing_notebook_leaves_its_cells_and_names_the_one(tmp_path, monkeypatch):
    cells = [
        nbformat.v4.new_code_cell('scale: str = ""\nruns_dir: str = ""'),
        nbformat.v4.new_code_cell("print('as far as here')"),
        nbformat.v4.new_code_cell("1 / 0"),
    ]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, tmp_path / "07_broken.ipynb")
    monkeypatch.setattr(workbook, "FOLDER", tmp_path)
    with pytest.raises(workbook.Failed, match=r"07_broken failed in cell 4: ZeroDivisionError"):
        workbook.run_all("smoke", None, {}, str(tmp_path / "runs"))
    record = tmp_path / "runs" / "07_broken"
    assert not (record / "notebook.ipynb").exists()
    partial = nbformat.read(record / "notebook.partial.ipynb", as_version=4)
    outputs = [output for cell in partial.cells for output in cell.get("outputs", [])]
    assert [o.text for o in outputs if o.output_type == "stream"] == ["as far as here\n"]
    assert [o.ename for o in outputs if o.output_type == "error"] == ["ZeroDivisionError"]


def test_selection_understands_names_lists_and_ranges():
    assert workbook.select(None) == STEMS
    assert workbook.select("03_sizing") == ["03_sizing"]
    assert workbook.select("5,01") == ["01_data_prep", "05_full_run"]
    assert workbook.select("02-05") == STEMS[1:5]


def test_notebook_sources_are_clean_and_have_parameters():
    for stem in STEMS:
        notebook = nbformat.read(workbook.FOLDER / f"{stem}.ipynb", as_version=4)
        code = [c for c in notebook.cells if c.cell_type == "code"]
        assert not any(c.outputs or c.execution_count for c in code)
        assert "parameters" in code[0].metadata.tags
        assert notebook.metadata.kernelspec.name == "python3"
        for name, parameter in workbook.notebook_parameters(stem).items():
            assert parameter["help"], f"{stem}: {name} has no help"
            assert parameter["inferred_type_name"] != "None", f"{stem}: {name} has no type"


def test_an_interrupted_workbook_goes_on_where_it_stopped(tmp_path):
    """Ctrl-C while 05 trains: the run saves itself, and the same command finishes it.

    What is left of its budget is shortened meanwhile: it was more than any machine trains on.
    """
    arguments = ["run", "--scale", "smoke", "--runs-dir", str(tmp_path), "--only", "01,05"]
    arguments += ["-p", "budget_tokens"]
    record = tmp_path / "05_full_run"
    measured = {"peak_flops_per_s": 1e11, "micro_batch": {"micro_batch": 8, "grad_accum": 2}}
    runs.write_json(tmp_path / "02_throughput" / "summary.json", measured)
    process = subprocess.Popen(
        [sys.executable, "-m", "llmlib", *arguments, str(10**12)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while last_metrics(record) is None:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert b"goes on where this one stopped" in errors
    while runs.lock_owner(record):
        time.sleep(0.1)
    assert not (record / "training.json").exists()
    config = runs.read_json(record / "config.json")
    config["train"]["budget_tokens"] = last_metrics(record)["tokens"] + 50_000
    runs.write_json(record / "config.json", config)
    assert llmlib(*arguments, str(config["train"]["budget_tokens"])).returncode == 0
    result = runs.read_json(record / "training.json")
    steps = runs.read_metrics(record).query("kind == 'step'").step.tolist()
    assert steps == list(range(1, result["n_steps"] + 1))
    assert "went back to step" in (record / "train.log").read_text()
