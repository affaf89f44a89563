"""The command line: ``run`` executes the workbook, ``sample`` continues a prompt, ``export`` writes
a run's model for Hugging Face's transformers.

A notebook whose record is done, and whose parameters and source have not changed since, is not run
again; once one has run, those after it run too, and reload what is still valid. Exit status: 0 done,
1 a notebook failed, 2 the request was wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import ast
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillExecutionError

from llmlib import launch, runs
from llmlib.config import SCALES, get_scale

NOTEBOOKS = runs.ROOT / "notebooks"


class LocalKernelManager(AsyncKernelManager):
    """Talk to kernels through local sockets: nothing listens on a port."""

    transport = "ipc"


class Failed(Exception):
    """A notebook raised something that is not the reader's mistake."""


def run_all(scale: str, only: str | None, parameters: dict[str, str], runs_dir: str) -> None:
    """Run the selected notebooks at a scale; parameters are given as text."""
    stems, folder = select(only), runs.runs_folder(scale, runs_dir)
    minutes = dict(zip(select(None), get_scale(scale).minutes, strict=False))
    if (corpus := parameters.get("corpus")) and Path(corpus).exists():
        parameters = parameters | {"corpus": str(Path(corpus).resolve())}
    known = {stem: papermill.inspect_notebook(str(NOTEBOOKS / f"{stem}.ipynb")) for stem in stems}
    names = sorted({name for of_one in known.values() for name in of_one})
    if unknown := sorted(set(parameters) - set(names)):
        raise ValueError(
            f"parameter {unknown[0]!r} is not in {', '.join(stems)}; choose from {', '.join(names)}."
        )
    must_run = False
    for i, stem in enumerate(stems):
        values = {"scale": scale} | ({"runs_dir": str(folder)} if runs_dir else {})
        for name in parameters.keys() & known[stem].keys():
            values[name] = parse(name, parameters[name], known[stem][name]["inferred_type_name"])
        record, title = folder / values.get("run_name", stem), f"[{i + 1}/{len(stems)}] {stem}"
        must_run = must_run or not is_finished(stem, record, values)
        if must_run:
            left = sum(minutes.get(later, 0.0) for later in stems[i:])
            with status_line(title, record, 60 * left):
                execute(stem, record, values)
        else:
            print(f"{title}: finished earlier, kept", flush=True)
    print(f"Everything is in {folder}")


def select(only: str | None) -> list[str]:
    """List notebooks in order: all, or those that ``only`` names ("3", "03_sizing", "01-03,05")."""
    stems = sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb"))
    chosen: set[str] = set()
    for part in ("00-99" if only is None else only).split(","):
        first, _, last = part.strip().partition("-")
        ends = (first, last or first)
        first, last = (name[:2] if name in stems else name.rjust(2, "0") for name in ends)
        named = [stem for stem in stems if first <= stem[:2] <= last and first.isdigit()]
        if not named:
            raise ValueError(f"notebook {part!r} is unknown; choose from {', '.join(stems)}.")
        chosen.update(named)
    return sorted(chosen)


def parse(name: str, text: str, kind: str) -> Any:
    """Turn the text that was given for a parameter into a value of its declared type."""
    if kind == "str":
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        value = text
    if kind == "float" and type(value) is int:
        value = float(value)
    if value is not None and type(value).__name__ != kind:
        raise ValueError(f"parameter {name}={text!r} is not {kind}; give one, or None.")
    return value


def is_finished(stem: str, record: Path, values: dict[str, Any]) -> bool:
    """Say whether a record is done, from this source and with these parameters.

    06 looks for new runs every time.
    """
    if not (record / "summary.json").exists() or not (record / "notebook.ipynb").exists():
        return False
    source = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4)
    done = nbformat.read(record / "notebook.ipynb", as_version=4)
    own = [c for c in done.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    same_cells = [c.source for c in own] == [c.source for c in source.cells]
    same_values = done.metadata.get("papermill", {}).get("parameters") == values
    return same_cells and same_values and not stem.startswith("06")


def execute(stem: str, record: Path, values: dict[str, Any]) -> None:
    """Execute one notebook into its record; a failed one stays there as a partial notebook."""
    partial = record / "notebook.partial.ipynb"
    record.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(NOTEBOOKS / f"{stem}.ipynb"),
            str(partial),
            parameters=values,
            kernel_name="python3",
            kernel_manager_class=LocalKernelManager,
            extra_arguments=["--log-level=50"],  # its complaints about being shut down
            progress_bar=False,
            cwd=str(NOTEBOOKS),
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


@contextmanager
def status_line(title: str, record: Path, seconds_left: float) -> Iterator[None]:
    """Show time spent and left, and how far the record's training run is, while a notebook runs."""
    begin, end, pause = ("\r\033[K", "", 1.0) if sys.stdout.isatty() else ("", "\n", 30.0)
    ended, started, outcome = threading.Event(), time.monotonic(), "stopped"

    def elapsed() -> timedelta:
        return timedelta(seconds=int(time.monotonic() - started))

    def watch() -> None:
        while not ended.is_set():
            text = f"{begin}{title}: {elapsed()} elapsed"
            if seconds_left:
                left = timedelta(seconds=int(seconds_left)) - elapsed()
                text += f", about {max(left, timedelta(seconds=5))} left in all"
            if (record / "metrics.jsonl").exists() and runs.read_result(record) is None:
                text += f" | {launch.progress_line(record)}"
            print(text, end=end, flush=True)
            ended.wait(pause)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
        outcome = "done"
    finally:
        ended.set()
        thread.join()
        print(f"{begin}{title}: {outcome} after {elapsed()}", flush=True)


def find_run(name: str) -> Path:
    """Look for a run where the reader stands, then under the repository's runs/."""
    places = [Path(name), runs.ROOT / "runs" / name]
    return next((p for p in places if p.exists()), places[0])


def command_sample(options: argparse.Namespace) -> None:
    from llmlib.inference import continue_text, load_run

    model, encoding = load_run(find_run(options.run))
    how = {k: getattr(options, k) for k in ("temperature", "top_k", "top_p", "seed")}
    print(options.prompt, end="", flush=True)
    for piece in continue_text(model, encoding, options.prompt, options.n_new, **how):
        print(piece, end="", flush=True)
    print()


def command_export(options: argparse.Namespace) -> None:
    from llmlib.inference import export

    print(f"The model is in {export(find_run(options.run), Path(options.dir))}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llmlib", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the notebooks in order")
    run.add_argument("--scale", default="laptop", choices=SCALES, help="size of everything")
    run.add_argument("--only", metavar="LIST", help="notebooks, such as 03_sizing or 01-03,05")
    what = "set a notebook parameter (repeatable)"
    pair = {"nargs": 2, "metavar": ("NAME", "VALUE")}
    run.add_argument("-p", action="append", default=[], help=what, **pair)
    run.add_argument("--runs-dir", default="", help="where records go (runs/local/SCALE)")
    run.set_defaults(call=lambda o: run_all(o.scale, o.only, dict(o.p), o.runs_dir))
    sample = commands.add_parser("sample", help="continue a prompt from a run's weights")
    sample.add_argument("run", help="folder of a finished run: runs/local/laptop/05_full_run")
    sample.add_argument("prompt")
    sample.add_argument("-n", type=int, default=200, dest="n_new", help="tokens to add at most")
    sample.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    sample.add_argument("--top-k", type=int, default=50, help="choose among so many tokens")
    sample.add_argument("--top-p", type=float, default=1.0, help="and among this share of chances")
    sample.add_argument("--seed", type=int, default=0)
    sample.set_defaults(call=command_sample)
    export = commands.add_parser("export", help="write a run's model for Hugging Face")
    export.add_argument("run", help="folder of a finished run: runs/local/laptop/05_full_run")
    export.add_argument("dir", help="folder to write: new or empty")
    export.set_defaults(call=command_export)
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also where SIGINT is ignored
    try:
        options.call(options)
    except (ValueError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
