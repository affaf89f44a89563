"""Fixtures that several test modules share: prepared tokens, run folders, training processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiktoken

os.environ["OMP_NUM_THREADS"] = "1"  # at these sizes, threads only wait for each other

os.environ["LLMLIB_DTYPE"] = "float32"  # the same numbers on every machine

from llmlib import prepare, runs
from llmlib.config import PRESETS, ModelConfig, TrainConfig, to_json
from llmlib.tokenizer import load_tiktoken

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
HELD_TRAIN = Path(__file__).with_name("held_train.py")


@pytest.fixture(scope="session")
def smoke_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens of the smoke preset, prepared once."""
    folder = tmp_path_factory.mktemp("smoke") / "tokens"
    prepare.prepare(PRESETS["smoke"].data, folder)
    return folder


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> tiktoken.Encoding:
    """GPT-2's encoding, where a checkout has its vocabulary."""
    cache = runs.ROOT.parent / "shared" / "tiktoken-cache"
    if not cache.exists():
        pytest.skip("GPT-2's vocabulary is not at hand")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    return load_tiktoken("gpt2")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[ModelConfig, TrainConfig], Path]:
    """Return a function that makes a run folder for ``llmlib.train``, each in its own place."""
    n_made = 0

    def make(model: ModelConfig, train: TrainConfig) -> Path:
        nonlocal n_made
        n_made += 1
        run = tmp_path / f"run-{n_made}"
        runs.write_json(run / "config.json", {"model": to_json(model), "train": to_json(train)})
        return run

    return make


class Training:
    """A training process, or a job of several, that runs beside the test.

    With ``hold_at`` it goes no further than that step until a signal comes.
    """

    def __init__(
        self,
        run: Path,
        tokens: Path,
        *options: str,
        job: tuple[str, ...] = (),
        hold_at: int | None = None,
    ):
        self.run = run
        launcher = ("-m", "torch.distributed.run", "--standalone", *job) if job else ()
        program = ("-m", "llmlib.train") if hold_at is None else (str(HELD_TRAIN),)
        command = [sys.executable, *launcher, *program, str(run)]
        command += ["--tokens", str(tokens), *options]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"HOLD_AT": str(hold_at)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has taken a step."""
        while self.steps()[-1:] < [step]:
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.02)

    def steps(self) -> list[int]:
        if not (self.run / "metrics.jsonl").exists():
            return []
        table = runs.read_metrics(self.run)
        return table[table.kind == "step"].step.tolist() if len(table) else []

    def workers(self) -> list[int]:
        """The process ids of a job's members, by rank."""
        pid = self.process.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def finish(self, timeout: float = 600) -> tuple[int, str]:
        """Wait for the end and return exit status and output."""
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output


@pytest.fixture
def start_training() -> Iterator[Callable[..., Training]]:
    """Return a function that starts a training process; what a failed test leaves is killed."""
    started: list[Training] = []

    def start(*arguments: object, **options: object) -> Training:
        started.append(Training(*arguments, **options))
        return started[-1]

    yield start
    for training in started:
        if training.process.poll() is None:
            members = training.workers()
            training.process.kill()
            for pid in members:
                os.kill(pid, 9)
