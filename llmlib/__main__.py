"""The command line: ``python -m llmlib run`` executes the workbook, ``sample`` continues a prompt.

``export`` writes a run's model for Hugging Face's transformers.

Exit status: 0 done, 1 a notebook failed, 2 the request was wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmlib import runs
from llmlib.config import PRESETS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llmlib", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the notebooks in order")
    run.add_argument("--scale", default="laptop", choices=PRESETS, help="size of everything")
    run.add_argument("--only", metavar="LIST", help="notebooks, such as 03_sizing or 01-03,05")
    run.add_argument(
        "-p", nargs=2, action="append", default=[], dest="parameters", metavar=("NAME", "VALUE"),
        help="set a notebook parameter (repeatable)",
    )  # fmt: skip
    run.add_argument("--runs-dir", default="", help="where records go (runs/local/SCALE)")
    sample = commands.add_parser("sample", help="continue a prompt from a run's weights")
    run_help = "folder of a finished run, such as runs/local/laptop/05_full_run"
    sample.add_argument("run", help=run_help)
    sample.add_argument("prompt")
    sample.add_argument("-n", type=int, default=200, dest="n_new", help="tokens to add at most")
    sample.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    sample.add_argument("--top-k", type=int, default=50, help="choose among so many tokens")
    sample.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="of these, the likeliest with this share of chances",
    )
    sample.add_argument("--seed", type=int, default=0)
    export = commands.add_parser("export", help="write a run's model for Hugging Face")
    export.add_argument("run", help=run_help)
    export.add_argument("dir", help="folder to write: new or empty")
    return parser


def command_run(options: argparse.Namespace) -> None:
    from llmlib.workbook import run_all

    run_all(options.scale, options.only, dict(options.parameters), options.runs_dir)
    print(f"Everything is in {runs.runs_folder(options.scale, options.runs_dir)}")


def command_sample(options: argparse.Namespace) -> None:
    from llmlib.sample import continue_text, load_run

    model, encoding = load_run(find_run(options.run))
    how = {k: getattr(options, k) for k in ("temperature", "top_k", "top_p", "seed")}
    pieces = continue_text(model, encoding, options.prompt, options.n_new, **how)
    print(options.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def command_export(options: argparse.Namespace) -> None:
    from llmlib.export import export

    print(f"The model is in {export(find_run(options.run), Path(options.dir))}")


def find_run(name: str) -> Path:
    """Look for a run where the reader stands, then under the repository's runs/."""
    places = [Path(name), runs.ROOT / "runs" / name]
    return next((p for p in places if p.exists()), places[0])


COMMANDS = {"run": command_run, "sample": command_sample, "export": command_export}


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        COMMANDS[options.command](options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ != "Failed":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
