"""The command line: ``run`` executes the workbook, ``sample`` continues a prompt, ``evaluate`` scores
a model, ``export`` writes one for Hugging Face's transformers, ``plan`` says what a run will be.

A notebook whose record is finished reloads it in seconds, and one that was interrupted goes on.
Exit status: 0 done, 1 a notebook failed, 2 the request was wrong, 128 + signal when stopped.
"""

import argparse
import ast
import re
import signal
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import papermill
from papermill.exceptions import PapermillExecutionError

from llmlib import devices, inference, runs, sizing
from llmlib.config import SCALES, get_scale
from llmlib.style import short_number

NOTEBOOKS = runs.ROOT / "notebooks"
ARMS = {  # of 05_full_run, which 06 compares: record -> parameters
    "05_full_run": {"recipe": "best"},
    "05_winner2024": {"recipe": "winner2024"},
    "05_gpt2": {"recipe": "winner2024", "arch": "gpt2"},  # the organisers' baseline
}
MFU = np.array([0.4, 0.6])  # of the datasheet's peak: what models of 100 to 200 M are reported at
TEXT_GB = {"DKYoon/SlimPajama-6B": (24, 12)}  # to download, and on disk as tokens
DISK_BYTES = 3 * 12  # per parameter: two checkpoints, and the next as it is written
READERS = {"str": str, "int": int, "float": float}  # of a parameter's text, by its type


def run_all(scale: str, only: str, parameters: list, runs_dir: str, arms: bool = False) -> None:
    """Run the selected notebooks at a scale; parameters are pairs of a name and a text.

    05 runs once for each of ``ARMS`` that the parameters leave as it is; at ``a100``, where that
    takes hours, only if asked.
    """
    folder = runs.runs_folder(scale, runs_dir)
    given = dict(parameters) | {"scale": scale} | ({"runs_dir": str(folder)} if runs_dir else {})
    chosen = read_parameters(select(only), given)
    for i, (stem, values) in enumerate(chosen.items(), 1):
        is_compared = stem == "05_full_run" and (arms or scale != "a100")
        jobs = [{"run_name": name} | arm for name, arm in ARMS.items() if is_compared]
        for job in [job | values for job in jobs if not job.keys() & values.keys()] or [values]:
            record = folder / job.get("run_name", stem)
            print(f"[{i}/{len(chosen)}] {record.name}", flush=True)
            execute(stem, record, job)
    print(f"Everything is in {folder}")


def select(only: str) -> list[str]:
    """List notebooks in order: those that ``only`` names ("3", "03_sizing", "01,05"), or all."""
    stems = sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb"))
    if not stems:
        raise ValueError(f"no notebooks in {NOTEBOOKS}; install from a clone: pip install -e .")
    wanted = {part.strip().zfill(2) for part in only.split(",")}
    chosen = [stem for stem in stems if not only or stem.startswith(tuple(wanted))]
    if len(chosen) < len(wanted):
        raise ValueError(f"no notebook is called {only!r}; choose from {', '.join(stems)}.")
    return chosen


def read_parameters(stems: list[str], given: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Give each notebook the parameters that it has, as values of their declared types."""
    values, known = {stem: {} for stem in stems}, set()
    for stem in stems:
        declared = papermill.inspect_notebook(str(NOTEBOOKS / f"{stem}.ipynb"))
        known |= declared.keys()
        for name in given.keys() & declared.keys():
            kind = declared[name]["inferred_type_name"]
            try:
                values[stem][name] = READERS.get(kind, ast.literal_eval)(given[name])
            except (ValueError, SyntaxError):
                raise ValueError(f"parameter {name}={given[name]!r} is not {kind}.") from None
    if unknown := given.keys() - known:
        raise ValueError(f"no parameter is called {min(unknown)!r}; choose from {sorted(known)}.")
    return values


def execute(stem: str, record: Path, values: dict[str, Any]) -> None:
    """Execute one notebook into its record and show the bars of what it does.

    A failed one stays there as a partial notebook.
    """
    partial = record / "notebook.partial.ipynb"
    record.mkdir(parents=True, exist_ok=True)
    try:
        notebook = papermill.execute_notebook(
            NOTEBOOKS / f"{stem}.ipynb",
            partial,
            parameters=values,
            extra_arguments=["--log-level=50"],  # its complaints about being shut down
            progress_bar=False,
            stderr_file=sys.stderr,  # bars
            coalesce_streams=True,  # keep their last state alone
        )
    except PapermillExecutionError as error:
        text = f"{stem} failed in cell {error.cell_index + 1}: {error.ename}: {error.evalue} "
        if "No space left" in error.evalue or "quota exceeded" in error.evalue:
            text += "Free some space, or move records by --runs-dir, data by HF_HOME. "
        text += f"(The notebook up to there is {partial}.)"
        raise (ValueError if error.ename == "ValueError" else SystemExit)(text) from error
    paths = {"input_path": f"notebooks/{stem}.ipynb", "output_path": "notebook.ipynb"}
    notebook.metadata.papermill.update(paths)  # no path of this machine
    nbformat.write(notebook, partial)
    partial.replace(record / "notebook.ipynb")
    print(f"{record.name}: done after {notebook.metadata.papermill.duration:.0f} s", flush=True)


def sample(run: Path, prompt: str, n_new: int, temperature: float) -> None:
    """Print a prompt and how a run's model continues it."""
    model, encoding = inference.load_run(run)
    print(prompt, end="", flush=True)
    for piece in inference.continue_text(model, encoding, prompt, n_new, temperature=temperature):
        print(piece, end="", flush=True)
    print()


def make_plan(scale: str, hours: float, gpu: str, runs_dir: str = "") -> pd.DataFrame:
    """Tabulate what a run is and needs, and what of it is measured, computed or assumed.

    Without a ``gpu`` ("A100 80GB") it takes the speed that 02_throughput measured, or an A100.
    """
    base, name = get_scale(scale), gpu or "A100"
    n_params, per_token = sizing.count_params(base.model), sizing.flops_per_token(base.model)
    done = runs.load_summary(runs.runs_folder(scale, runs_dir) / "02_throughput", {})
    if done and not gpu:
        speed, source = np.array([done["tokens_per_s"]]), "measured by 02_throughput"
        size, why = done["micro_batch"]["micro_batch"], source
    else:
        if (peak := sizing.datasheet_peak(name)) is None:
            known = ", ".join(sizing.MEMORY_GB)
            raise ValueError(f"gpu={name!r} is unknown; choose one of {known}, or 'A100 80GB'.")
        said = re.search(r"(\d+) ?GB", name)
        gb = int(said[1]) if said else sizing.datasheet_peak(name, sizing.MEMORY_GB)
        speed, source = MFU * peak / per_token, f"assumed: {name}, 40 to 60 % of its peak"
        size = sizing.fitting_micro_batch(base.model, base.train, gb * 1e9)
        why = f"computed for {gb} GB in eager mode; compiled needs less"
    tokens, per_step = speed * hours * 3600, base.train.n_sequences * base.model.seq_len
    optima = pd.concat(sizing.published_optima(n * per_token) for n in tokens)
    download, text = TEXT_GB.get(base.data.corpus, (0, 0))
    rows = [
        ("parameters", [n_params], "computed"),
        ("micro-batch that fits [sequences]", [size], why),
        ("speed [tokens/s]", speed, source),
        ("tokens", tokens, "computed"),
        ("steps", tokens / per_step, "computed"),
        ("tokens per parameter", tokens / n_params, "computed"),
        *((f"best size: {x}", n, "computed") for x, n in optima.groupby("source").n_params),
        ("download [GB]", [download], "assumed"),
        ("tokens on disk [GB]", [text], "assumed"),
        ("checkpoints on disk [GB]", [DISK_BYTES * n_params / 1e9], "computed"),
    ]
    rows = [(what, " to ".join(map(short_number, values)), how) for what, values, how in rows]
    rows.append(("device that torch drives here", devices.device_name(), "measured"))
    return pd.DataFrame(rows, columns=["quantity", "value", "known"])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llmlib", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("run", help="execute the notebooks in order").add_argument
    add("--scale", default="laptop", choices=SCALES, help="size of everything")
    add("--only", default="", metavar="LIST", help="notebooks, such as 03_sizing or 01,05")
    pair = {"nargs": 2, "metavar": ("NAME", "VALUE"), "action": "append", "default": []}
    add("-p", **pair, dest="parameters", help="set a notebook parameter (repeatable)")
    add("--runs-dir", default="", help="where records go (runs/local/SCALE)")
    add("--arms", action="store_true", help=f"at a100, too, run 05 as {', '.join(ARMS)}")

    run = {"type": Path, "help": "a finished run: runs/local/laptop/05_full_run"}
    add = commands.add_parser("sample", help="continue a prompt from a run's weights").add_argument
    add("run", **run)
    add("prompt")
    add("-n", type=int, default=200, dest="n_new", help="tokens to add at most")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest")

    add = commands.add_parser("evaluate", help="score a model on held-out text").add_argument
    add("model", type=Path, help="a finished run, or a Hugging Face folder of a Llama")
    add("--tokens", type=Path, required=True, dest="tokens_dir", help="01_data_prep/tokens")

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
    """Do what the arguments say and return the exit status."""
    options = vars(build_parser().parse_args(arguments))
    commands = {
        "run": run_all,
        "sample": sample,
        "evaluate": lambda **how: print(inference.score(**how).to_csv(index=False), end=""),
        "export": lambda **how: print(f"The model is in {inference.export(**how)}"),
        "plan": lambda **how: print(make_plan(**how).to_string(index=False)),
    }

    def stop(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # Slurm's, too
        signal.signal(number, stop)
    try:
        commands[options.pop("command")](**options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 128 + interrupt.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
