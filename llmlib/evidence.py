"""What a GPU has to show, one command per step: each is short, and goes on where it was stopped.

``python -m llmlib.evidence STEP --out FOLDER`` executes the workbook's own notebooks, with papermill
where it is installed and cell by cell where it is not, and packs the small files of all records into
``records.tar.gz``. Unpacked into an empty folder, that archive is where the next step can go on.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

from llmlib import runs
from llmlib.supervise import last_metrics

try:
    from llmlib import workbook
except ImportError:  # there is no papermill
    workbook = None

# Minutes at "a100", estimated for an H100 at 40 % of its peak and 20 s for every process that starts.
MINUTES = {"tests": 3, "data": 1, "throughput": 17, "beside": 3, "winner2024": 6, "best": 6}
MINUTES |= {"ladder": 10, "compare": 1}
NOTEBOOKS = {"throughput": "02_throughput", "ladder": "03_sizing", "compare": "06_loss_curves"}
BUDGETED = ("winner2024", "best")
BUDGET_HOURS = {"smoke": 0.004, "a100": 0.075}  # of these two
LADDER_FACTOR = {"smoke": 1.0, "a100": 0.2}  # of the tokens of 03's ladder
BESIDE = {
    "smoke": "--n-layer 1 --d-model 64 --vocab-size 512 --seq-len 64 --rounds 2 --steps 1",
    "a100": "--check-losses 20",
}
HELD_OUT = 0.01  # share of a corpus of one's own, which may be small
LEFT_OUT = {
    "tokens",
    "checkpoints",
    "snapshots",
    "lock",
    "heartbeat",
    "train.log",
    "records.tar.gz",
}


def take_step(step: str, out: Path, scale: str, corpus: str) -> None:
    """Take one step; what it needs of earlier ones must be in ``out``, but for the tokens."""
    shared = {"scale": scale, "runs_dir": str(out)}
    if step in ("data", "winner2024", "best", "ladder"):
        own = {"corpus": corpus, "test_size": HELD_OUT} if corpus else {}
        execute("01_data_prep", shared | own)
    if step == "tests":
        file = runs.ROOT / "llmlib" / "tests" / "test_gpu.py"
        command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", str(file)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        runs.write_atomic(out / "tests" / "output.txt", done.stdout)
        runs.write_json(out / "tests" / "environment.json", runs.environment())
        if done.returncode:
            raise ValueError(f"the tests ended with status {done.returncode}; see above.")
    elif step == "beside":
        path = out / "bench" / f"{runs.environment()['device'].replace(' ', '-')}.json"
        if not path.exists():
            command = [sys.executable, "-m", "llmlib.bench", *BESIDE[scale].split()]
            subprocess.run([*command, "--output", path], check=True)
    elif step in BUDGETED:
        budget = {"recipe": step, "budget_hours": BUDGET_HOURS[scale], "prompt": "The "}
        execute_and_kill("05_full_run", shared | {"run_name": step} | budget, out / step)
    elif step in NOTEBOOKS:
        factor = {"ladder_factor": LADDER_FACTOR[scale]} if step == "ladder" else {}
        execute(NOTEBOOKS[step], shared | factor)


def execute(stem: str, values: dict[str, Any]) -> None:
    """Execute a notebook with parameters, as ``llmlib run`` does, or else its cells alone."""
    print(f"--- {stem} {values}", flush=True)
    if workbook:
        record = Path(values["runs_dir"]) / values.get("run_name", stem)
        return workbook.execute(stem, record, values)
    namespace = {"__name__": "__main__", "display": lambda what: None}  # the record has it
    for i, cell in enumerate(runs.read_json(runs.ROOT / "notebooks" / f"{stem}.ipynb")["cells"]):
        if cell["cell_type"] == "code":
            source, place = "".join(cell["source"]), f"{stem}, cell {i + 1}"
            exec(compile(source, place, "exec", dont_inherit=True), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            namespace |= values


def execute_and_kill(stem: str, values: dict[str, Any], run: Path) -> None:
    """Execute a training notebook, kill its run once at half its budget, and execute it again."""
    note, is_over = run / "killed.json", threading.Event()
    was_killed = note.exists()

    def kill_halfway() -> None:
        while not (is_over.wait(0.1) or note.exists()):
            row = last_metrics(run)
            if row and row["progress"] >= 0.5 and (owner := runs.lock_owner(run)):
                runs.write_json(note, row)
                os.kill(int(owner.split()[1]), signal.SIGKILL)  # "process 123 on ..."

    threading.Thread(target=kill_halfway, daemon=True).start()
    try:
        execute(stem, values)
    except Exception as error:
        if was_killed or not note.exists():
            raise
        print(f"\n{error}")
        execute(stem, values)
    finally:
        is_over.set()


def pack(out: Path) -> Path:
    """Archive what is small enough to be committed: no text, no weights."""
    path, aside = out / "records.tar.gz", out / ".records.tmp"
    with tarfile.open(aside, "w:gz") as archive:
        for file in sorted(out.rglob("*")):
            name = file.relative_to(out)
            is_bulky = name.suffix in (".safetensors", ".bin") or LEFT_OUT & set(name.parts)
            if file.is_file() and not is_bulky and not name.name.startswith("."):
                archive.add(file, name)
    os.replace(aside, path)
    print(f"{path.stat().st_size / 1e6:.1f} MB to keep: {path}")
    return path


def main(arguments: list[str] | None = None) -> int:
    """Take one step of the evidence; status 130: the time was up, and the same command goes on."""
    parser = argparse.ArgumentParser(prog="python -m llmlib.evidence", description=main.__doc__)
    parser.add_argument("step", choices=MINUTES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--scale", choices=BUDGET_HOURS, default="a100")
    parser.add_argument("--corpus", default="", help='as in 01_data_prep; "": the scale\'s own')
    parser.add_argument("--minutes", type=float, default=8.5, help="stop after so many")
    options = parser.parse_args(arguments)
    if options.scale == "a100":
        print(
            f"{options.step}: about {MINUTES[options.step]} min on an H100 (estimated)", flush=True
        )
    out = options.out.expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
    try:
        take_step(options.step, out, options.scale, options.corpus)
        return 0
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, and the same command goes on")
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        pack(out)


if __name__ == "__main__":
    sys.exit(main())
