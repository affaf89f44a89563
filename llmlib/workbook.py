"""Execute the notebooks in order with papermill, showing progress, and keep what is finished.

A notebook whose record is done, and whose parameters and source have not changed since, is not run
again; once one has run, those after it run too, and reload what is still valid.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillExecutionError

from llmlib import runs
from llmlib.config import preset
from llmlib.supervise import last_metrics, progress_line

FOLDER = runs.ROOT / "notebooks"


class LocalKernelManager(AsyncKernelManager):
    """Talk to kernels through local sockets: nothing listens on a port."""

    transport = "ipc"


class Failed(Exception):
    """A notebook raised something that is not the reader's mistake."""


def run_all(scale: str, only: str | None, parameters: dict[str, str], runs_dir: str) -> None:
    """Run the selected notebooks at a scale; parameters are given as text."""
    minutes = preset(scale).minutes
    stems = select(only)
    runs_dir = runs_dir and str(Path(runs_dir).expanduser().resolve())  # not a notebook's folder
    if (corpus := Path(parameters.get("corpus", ""))).parts and corpus.exists():
        parameters = parameters | {"corpus": str(corpus.resolve())}
    given = {stem: parse_parameters(stem, parameters) for stem in stems}
    for name in parameters:
        if not any(name in values for values in given.values()):
            known = sorted({n for stem in stems for n in notebook_parameters(stem)})
            raise ValueError(
                f"parameter {name!r} is not in {', '.join(stems)}; choose from {', '.join(known)}."
            )
    must_run = False
    for i, stem in enumerate(stems):
        values = {"scale": scale} | ({"runs_dir": runs_dir} if runs_dir else {}) | given[stem]
        record = runs.runs_folder(scale, runs_dir) / values.get("run_name", stem)
        if not must_run and is_finished(stem, record, values):
            print(f"[{i + 1}/{len(stems)}] {stem}: finished earlier, kept", flush=True)
            continue
        must_run = True
        later = sum(minutes.get(s, 0.0) for s in stems[i + 1 :])
        with StatusLine(f"[{i + 1}/{len(stems)}] {stem}", record, minutes.get(stem, 0.0), later):
            execute(stem, record, values)


def select(only: str | None) -> list[str]:
    """List notebooks in order: all, or those that ``only`` names ("03", "03_sizing", "01-03,05")."""
    stems = sorted(path.stem for path in FOLDER.glob("[0-9]*.ipynb"))
    if only is None:
        return stems
    chosen: set[str] = set()
    for part in only.split(","):
        first, _, last = part.strip().partition("-")
        inside = [s for s in stems if _number(first) <= s[:2] <= _number(last or first)]
        named = [s for s in inside if last or s in (first, s[:2]) or first.isdigit()]
        if not named:
            raise ValueError(
                f"notebook {part.strip()!r} is unknown; choose from {', '.join(stems)}."
            )
        chosen.update(named)
    return [s for s in stems if s in chosen]


def _number(name: str) -> str:
    return name.strip()[:2].rjust(2, "0") if name.strip().isdigit() else name.strip()[:2]


def notebook_parameters(stem: str) -> dict[str, dict[str, Any]]:
    """Read a notebook's parameters with their types and help."""
    return papermill.inspect_notebook(str(FOLDER / f"{stem}.ipynb"))


def parse_parameters(stem: str, texts: dict[str, str]) -> dict[str, Any]:
    """Turn the texts that name parameters of this notebook into values of their declared types."""
    known = notebook_parameters(stem)
    return {
        name: _parse(name, text, known[name]["inferred_type_name"])
        for name, text in texts.items()
        if name in known
    }


def _parse(name: str, text: str, kind: str) -> Any:
    if kind == "str":
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        value = text
    accepted = {"int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict}
    if value is not None and not isinstance(value, accepted.get(kind, object)):
        raise ValueError(f"parameter {name}={text!r} is not a value of type {kind}; give one.")
    return value


def is_finished(stem: str, record: Path, values: dict[str, Any]) -> bool:
    """Say whether the record holds this very notebook, executed with these parameters.

    A notebook whose metadata says ``"reads": "all runs"`` is never finished: runs may have come.
    """
    source = nbformat.read(FOLDER / f"{stem}.ipynb", as_version=4)
    if source.metadata.get("reads") == "all runs":
        return False
    if not ((record / "summary.json").exists() and (record / "notebook.ipynb").exists()):
        return False
    done = nbformat.read(record / "notebook.ipynb", as_version=4)
    own = [c for c in done.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    same_cells = [c.source for c in own] == [c.source for c in source.cells]
    return same_cells and done.metadata.get("papermill", {}).get("parameters") == values


def execute(stem: str, record: Path, values: dict[str, Any]) -> None:
    """Execute one notebook into its record; a failed one stays there as a partial notebook."""
    partial = record / "notebook.partial.ipynb"
    record.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(FOLDER / f"{stem}.ipynb"),
            str(partial),
            parameters=values,
            kernel_name="python3",
            kernel_manager_class=LocalKernelManager,
            extra_arguments=["--log-level=50"],  # its complaints about being shut down
            progress_bar=False,
            cwd=str(FOLDER),
        )
    except PapermillExecutionError as error:
        if error.ename == "ValueError":
            raise ValueError(f"{stem}, cell {error.cell_index + 1}: {error.evalue}") from error
        raise Failed(
            f"{stem} failed in cell {error.cell_index + 1}: {error.ename}: {error.evalue} "
            f"The notebook up to there is {partial}."
        ) from error
    notebook = nbformat.read(partial, as_version=4)
    about = notebook.metadata["papermill"]
    about["input_path"], about["output_path"] = f"notebooks/{stem}.ipynb", "notebook.ipynb"
    nbformat.write(notebook, partial)
    os.replace(partial, record / "notebook.ipynb")


class StatusLine:
    """A line per notebook with cell, elapsed time, time left, and the training run's own progress."""

    def __init__(self, title: str, record: Path, minutes: float, minutes_later: float):
        self.title, self.record = title, record
        self.expected, self.later = 60 * minutes, 60 * minutes_later
        self.is_terminal = sys.stdout.isatty()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> StatusLine:
        self.started = time.monotonic()
        if not self.is_terminal:
            print(self._text(), flush=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        end = "done" if kind is None else "stopped"
        self._print(f"{self.title}: {end} after {_clock(time.monotonic() - self.started)}")
        if self.is_terminal:
            print(flush=True)

    def _watch(self) -> None:
        while not self.ended.wait(1.0 if self.is_terminal else 30.0):
            self._print(self._text())

    def _print(self, text: str) -> None:
        print(
            f"\r\033[K{text}" if self.is_terminal else text,
            flush=True,
            end="" if self.is_terminal else "\n",
        )

    def _text(self) -> str:
        elapsed = time.monotonic() - self.started
        text = f"{self.title}: {self._cell()}{_clock(elapsed)} elapsed"
        if self.expected:
            left = max(self.expected - elapsed, 5.0) + self.later
            text += f", about {_clock(left)} left in all"
        if last_metrics(self.record) and not (self.record / "training.json").exists():
            text += f" | {progress_line(self.record)}"
        return text

    def _cell(self) -> str:
        try:
            cells = json.loads((self.record / "notebook.partial.ipynb").read_text())["cells"]
        except (OSError, ValueError):
            return ""
        states = [c["metadata"].get("papermill", {}).get("status") for c in cells]
        return f"cell {sum(s == 'completed' for s in states) + 1}/{len(cells)}, "


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
