"""The command line: ``run`` executes the workbook, ``sample`` continues a prompt, ``export`` writes
a run's model for Hugging Face's transformers, ``plan`` says what a run will be.

A notebook whose record is done, and whose parameters and source have not changed since, is not run
again; once one has run, those after it run too, and reload what is still valid. Exit status: 0 done,
1 a notebook failed, 2 the request was wrong, 128 + signal when stopped.
"""

import argparse
import ast
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError

from llmlib import inference, launch, plan, runs
from llmlib.config import SCALES

NOTEBOOKS = runs.ROOT / "notebooks"


class Failed(Exception):
    """A notebook raised something that is not the reader's mistake."""


def run_all(scale: str, only: str | None, parameters: list[list[str]], runs_dir: str) -> None:
    """Run the selected notebooks at a scale; parameters are pairs of a name and a text."""
    stems, folder = select(only), runs.runs_folder(scale, runs_dir)
    given = dict(parameters) | {"scale": scale} | ({"runs_dir": str(folder)} if runs_dir else {})
    must_run = False
    for i, (stem, values) in enumerate(read_parameters(stems, given).items()):
        record, title = folder / values.get("run_name", stem), f"[{i + 1}/{len(stems)}] {stem}"
        must_run = must_run or not is_finished(stem, record, values)
        if must_run:
            with status_line(title, record):
                execute(stem, record, values)
        else:
            print(f"{title}: finished earlier, kept", flush=True)
    print(f"Everything is in {folder}")


def select(only: str | None) -> list[str]:
    """List notebooks in order: all, or those that ``only`` names ("3", "03_sizing", "01-03,05")."""
    stems = sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb"))
    if not stems:
        raise ValueError(
            f"no notebooks in {NOTEBOOKS}; install from a clone, with pip install -e ."
        )
    if only is None:
        return stems
    chosen: set[str] = set()
    for part in only.split(","):
        ends = [name.strip()[:2].zfill(2) for name in part.split("-")]
        named = {stem for stem in stems if ends[0] <= stem[:2] <= ends[-1]}
        if not named:
            raise ValueError(f"notebook {part!r} is unknown; choose from {', '.join(stems)}.")
        chosen |= named
    return sorted(chosen)


def read_parameters(stems: list[str], given: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Give each notebook the parameters that it has, as values of their declared types."""
    known = {stem: papermill.inspect_notebook(str(NOTEBOOKS / f"{stem}.ipynb")) for stem in stems}
    names = sorted(set().union(*known.values()))
    if unknown := sorted(given.keys() - names):
        raise ValueError(f"no parameter is called {unknown[0]!r}; choose from {', '.join(names)}.")
    values: dict[str, dict[str, Any]] = {stem: {} for stem in stems}
    for stem in stems:
        for name in given.keys() & known[stem].keys():
            kind = known[stem][name]["inferred_type_name"]
            values[stem][name] = parse(name, given[name], kind)
    return values


def parse(name: str, text: str, kind: str) -> Any:
    """Turn the text that was given for a parameter into a value of its declared type."""
    if kind == "str":
        return text
    with suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text)
        if kind == "float" and type(value) is int:
            value = float(value)
        if value is None or type(value).__name__ == kind:
            return value
    raise ValueError(f"parameter {name}={text!r} is not {kind}; write one as in Python, or None.")


def is_finished(stem: str, record: Path, values: dict[str, Any]) -> bool:
    """Say whether a record is done, from this source and with these parameters.

    06 looks for new runs every time.
    """
    files = record / "summary.json", record / "notebook.ipynb"
    if stem.startswith("06") or not all(file.exists() for file in files):
        return False
    source = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4)
    done = nbformat.read(record / "notebook.ipynb", as_version=4)
    own = [c for c in done.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    same_cells = [c.source for c in own] == [c.source for c in source.cells]
    return same_cells and done.metadata.papermill.parameters == values


def execute(stem: str, record: Path, values: dict[str, Any]) -> None:
    """Execute one notebook into its record; a failed one stays there as a partial notebook."""
    partial = record / "notebook.partial.ipynb"
    record.mkdir(parents=True, exist_ok=True)
    try:
        notebook = papermill.execute_notebook(
            NOTEBOOKS / f"{stem}.ipynb",
            partial,
            parameters=values,
            extra_arguments=["--log-level=50"],  # its complaints about being shut down
            progress_bar=False,
        )
    except PapermillExecutionError as error:
        kind = ValueError if error.ename == "ValueError" else Failed
        text = f"{stem} failed in cell {error.cell_index + 1}: {error.ename}: {error.evalue} "
        if "No space left" in error.evalue or "quota exceeded" in error.evalue:
            text += (
                "Free some space, or use another disk: --runs-dir for records, HF_HOME for data. "
            )
        raise kind(f"{text}(The notebook up to there is {partial}.)") from error
    paths = {"input_path": f"notebooks/{stem}.ipynb", "output_path": "notebook.ipynb"}
    notebook.metadata.papermill.update(paths)  # no path of this machine
    nbformat.write(notebook, partial)
    partial.replace(record / "notebook.ipynb")


@contextmanager
def status_line(title: str, record: Path) -> Iterator[None]:
    """Show the time spent, and how far the record's training run is, while a notebook runs."""
    begin, end, pause = ("\r\033[K", "", 1.0) if sys.stdout.isatty() else ("", "\n", 30.0)
    ended, started = threading.Event(), time.monotonic()

    def show(text: str, end: str = "\n") -> None:
        elapsed = timedelta(seconds=int(time.monotonic() - started))
        print(f"{begin}{title}: {text} {elapsed}", end=end, flush=True)

    def watch() -> None:
        while not ended.is_set():
            is_training = (record / "metrics.jsonl").exists() and not runs.read_result(record)
            show(launch.progress_line(record) + " |" if is_training else "running for", end)
            ended.wait(pause)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        print(begin, end="", flush=True)
    show("done after")


def sample(run: Path, prompt: str, n_new: int, **how: Any) -> None:
    """Print a prompt and how a run's model continues it."""
    model, encoding = inference.load_run(run)
    print(prompt, end="", flush=True)
    for piece in inference.continue_text(model, encoding, prompt, n_new, **how):
        print(piece, end="", flush=True)
    print()


def export(run: Path, folder: Path) -> None:
    """Write a run's model for Hugging Face."""
    print(f"The model is in {inference.export(run, folder)}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llmlib", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("run", help="execute the notebooks in order").add_argument
    add("--scale", default="laptop", choices=SCALES, help="size of everything")
    add("--only", metavar="LIST", help="notebooks, such as 03_sizing or 01-03,05")
    help_p, pair = "set a notebook parameter (repeatable)", ("NAME", "VALUE")
    add("-p", action="append", default=[], nargs=2, metavar=pair, dest="parameters", help=help_p)
    add("--runs-dir", default="", help="where records go (runs/local/SCALE)")

    run = {"type": Path, "help": "a finished run: runs/local/laptop/05_full_run"}
    add = commands.add_parser("sample", help="continue a prompt from a run's weights").add_argument
    add("run", **run)
    add("prompt")
    add("-n", type=int, default=200, dest="n_new", help="tokens to add at most")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    add("--top-k", type=int, default=50, help="choose among so many tokens")
    add("--top-p", type=float, default=1.0, help="and among this share of chances")
    add("--seed", type=int, default=0)

    add = commands.add_parser("export", help="write a run's model for Hugging Face").add_argument
    add("run", **run)
    add("folder", type=Path, help="folder to write: new or empty")

    add = commands.add_parser("plan", help="say what a full run will be").add_argument
    add("--scale", default="a100", choices=SCALES)
    add("--hours", type=float, default=3.0)
    add("--gpu", default="", help="a card: 'A100 80GB' (what 02_throughput measured, or an A100)")
    add("--runs-dir", default="", help="where records are (runs/local/SCALE)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = vars(build_parser().parse_args(arguments))
    commands = {"run": run_all, "sample": sample, "export": export}
    commands["plan"] = lambda **how: print(plan.make_plan(**how).to_string(index=False))
    command = commands[options.pop("command")]
    received = [signal.SIGINT]

    def stop(number: int, _: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGUSR1):  # Slurm's, too
        signal.signal(number, stop)
    try:
        command(**options)
    except (ValueError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 128 + received[-1]
    return 0


if __name__ == "__main__":
    sys.exit(main())
