"""Fixtures that several test modules share: tokens, run folders, training processes, records."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import filelock
import pytest
import tiktoken

os.environ["OMP_NUM_THREADS"] = "1"  # at these sizes, threads only wait for each other

from llmlib import checkpoint, runs
from llmlib.config import SCALES, ModelConfig, TrainConfig, override
from llmlib.trainer import Stopped, Trainer

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
SMOKE = SCALES["smoke"]
FP32 = override(SMOKE.train, dtype="float32")  # where numbers are compared, on any processor


@pytest.fixture(scope="session")
def smoke_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens of the smoke scale, prepared once."""
    from llmlib import prepare

    folder = tmp_path_factory.mktemp("smoke") / "tokens"
    prepare.prepare(SMOKE.data, folder)
    return folder


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> tiktoken.Encoding:
    """GPT-2's encoding, where a checkout has its vocabulary."""
    from llmlib import data

    cache = runs.ROOT.parent / "shared" / "tiktoken-cache"
    if not cache.exists():
        pytest.skip("GPT-2's vocabulary is not at hand")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    return data.load_tiktoken("gpt2")


@pytest.fixture
def make_run(tmp_path: Path, smoke_tokens: Path) -> Callable[..., Path]:
    """Return a function that makes a run folder on the smoke tokens, each in its own place."""
    numbers = count(1)

    def make(train: TrainConfig = FP32, model: ModelConfig = SMOKE.model) -> Path:
        run = tmp_path / f"run-{next(numbers)}"
        runs.create_run(run, model, train, smoke_tokens)
        return run

    return make


@pytest.fixture
def limit_files() -> Iterator[Callable[..., None]]:
    """Return a function that limits what a file can hold [bytes]: more fails, as on a full disk."""
    usual, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n=usual: resource.setrlimit(resource.RLIMIT_FSIZE, (n, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (usual, most))


class Training:
    """A training process, or a job of several, beside the test.

    ``watched`` gives it a launcher's pipe, ``training.process.stdin``; ``job`` are options of
    torchrun, such as ``("--nproc-per-node=2",)``.
    """

    def __init__(self, *runs: Path, watched: bool = False, job: tuple[str, ...] = ()):
        self.run = runs[0]
        launcher = ("torch.distributed.run", "--standalone", *job, "-m") if job else ()
        options = ("--watched",) if watched else ()
        self.process = subprocess.Popen(
            [sys.executable, "-m", *launcher, "llmlib.train", *options, *map(str, runs)],
            stdin=subprocess.PIPE if watched else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has logged a step; a process that ends before is a failure."""
        while self.steps()[-1:] < [step]:
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.02)

    def steps(self) -> list[int]:
        """The steps that the run has logged."""
        return runs.read_metrics(self.run, "step").step.tolist()

    def workers(self) -> list[int]:
        """The process ids of a job's members, by rank."""
        pid = self.process.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def finish(self) -> tuple[int, str]:
        """Wait for the end and return exit status and output."""
        output, _ = self.process.communicate(timeout=600)
        return self.process.returncode, output


def stop_after(trainer: Trainer, n_steps: int) -> None:
    """Ask for a stop when a step is reached, as a signal does."""
    trainer.must_stop = lambda: "tested" if trainer.state.step == n_steps else None
    with pytest.raises(Stopped, match=f"tested: saved and stopped at step {n_steps}"):
        trainer.run()


def losses(run: Path) -> list[float]:
    """The loss of each step of a run, which has logged every step once."""
    rows = runs.read_metrics(run, "step")
    assert rows.step.tolist() == list(range(1, len(rows) + 1))
    return rows.loss.tolist()


def newest_checkpoint(run: Path) -> int:
    """The step of a run's newest valid checkpoint, once its process has left."""
    with filelock.FileLock(run / "lock", is_singleton=False):
        return int(checkpoint.newest_valid(run / "checkpoints").stem)


@pytest.fixture
def start_training() -> Iterator[Callable[..., Training]]:
    """Return a function that starts a ``Training``; what a failed test leaves is killed."""
    started: list[Training] = []

    def start(*arguments: Path, **options: object) -> Training:
        started.append(Training(*arguments, **options))
        return started[-1]

    yield start
    for training in started:
        if training.process.poll() is None:
            members = training.workers()
            training.process.kill()
            for pid in members:
                os.kill(pid, 9)


@pytest.fixture(scope="session")
def smoke_records(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """All notebooks at smoke scale, executed once from a directory that is not the repository."""
    folder = tmp_path_factory.mktemp("records")
    command = [sys.executable, "-m", "llmlib", "run", "--scale", "smoke", "--runs-dir", str(folder)]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    first = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    return folder, first
