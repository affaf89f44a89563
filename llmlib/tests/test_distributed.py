"""Jobs of two processes, started by torchrun, against one process."""

import os
import signal

import pytest

from llmlib import checkpoint, runs
from llmlib.config import llama_config, override
from llmlib.tests.conftest import FP32, SMOKE, losses, stop_after
from llmlib.trainer import Trainer

JOB = ("--nproc-per-node", "2")
SHORT = override(FP32, micro_batch=4, grad_accum=4, n_evals=1)
LONG = override(SHORT, budget_steps=60, checkpoint_minutes=1e-6)  # saves after every step


@pytest.fixture(scope="module")
def alone(smoke_tokens, tmp_path_factory):
    """The long run in one process."""
    run = tmp_path_factory.mktemp("distributed") / "alone"
    runs.create_run(run, SMOKE.model, override(LONG, checkpoint_minutes=10), smoke_tokens)
    Trainer(run).run()
    return run


def test_two_processes_equal_one_though_one_of_them_is_killed_and_the_job_restarts(
    make_run, start_training, alone
):
    run = make_run(LONG)
    job = start_training(run, job=(*JOB, "--max-restarts", "1"))
    job.wait_for_step(10)
    os.kill(job.workers()[0], signal.SIGKILL)  # the main one
    status, output = job.finish()
    assert status == 0, output
    assert output.count("went back to step") == 1
    assert losses(run)[:20] == pytest.approx(losses(alone)[:20], rel=1e-5)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    result, reference = runs.read_result(run), runs.read_result(alone)
    assert result["n_processes"] == 2 and reference["n_processes"] == 1
    assert result["n_tokens"] == reference["n_tokens"]
    assert result["val"]["loss"] == pytest.approx(reference["val"]["loss"], rel=1e-4)


def test_killed_process_ends_the_job_and_its_checkpoint_serves_other_numbers_of_processes(
    make_run, start_training, alone
):
    run = make_run(LONG)
    stop_after(Trainer(run), 20)  # one process
    job = start_training(run, job=JOB)  # two go on
    job.wait_for_step(35)
    os.kill(job.workers()[1], signal.SIGKILL)
    status, output = job.finish()
    assert status != 0
    assert "error: process 0 of 2 cannot go on" in output
    assert "The last checkpoint is kept: run the same command again to go on." in output
    assert "went back to step 20" in output
    assert 20 < int(checkpoint.newest_valid(run / "checkpoints").stem) <= job.steps()[-1]
    assert not (run / "result.json").exists()
    Trainer(run).run()  # one again
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.parametrize("how", ["signal", "pipe"])
def test_job_that_is_stopped_has_saved(make_run, start_training, how):
    run = make_run(override(LONG, budget_steps=10**6))
    job = start_training(run, watched=True, job=JOB)
    job.wait_for_step(1)
    if how == "signal":
        job.process.send_signal(signal.SIGTERM)
    status, output = job.finish()  # closes the pipe
    assert status != 0
    newest = int(checkpoint.newest_valid(run / "checkpoints").stem)
    reason = "" if how == "signal" else "the watching process is gone"  # the signal, or the pipe
    assert f"{reason}: saved and stopped at step {newest}." in output


def test_two_compiled_processes_equal_one(make_run, start_training):
    config, small = override(SHORT, budget_steps=5), llama_config(1, 32, d_head=32)
    shape = override(small, vocab_size=512, seq_len=64)
    alone, run = make_run(config, shape), make_run(override(config, compile=True), shape)
    Trainer(alone).run()
    status, output = start_training(run, job=JOB).finish()
    assert status == 0, output
    result = runs.read_result(run)
    assert result["is_compiled"] and result["n_processes"] == 2
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    assert result["val"]["loss"] == pytest.approx(runs.read_result(alone)["val"]["loss"], rel=1e-5)
