"""Jobs of two processes, started by torchrun, against one process."""

import os
import signal

import pytest

from llmlib import checkpoint, locks, runs
from llmlib.config import override
from llmlib.tests.conftest import FP32, SMOKE
from llmlib.train import Stopped, Trainer

JOB = ("--nproc-per-node", "2")
CONFIG = override(FP32, micro_batch=4, grad_accum=4, n_evals=1)
LONG = override(CONFIG, budget_steps=60, checkpoint_minutes=0.005)


def losses(run):
    rows = runs.read_metrics(run, "step")
    assert rows.step.tolist() == list(range(1, len(rows) + 1))
    return rows.loss.tolist()


def train_alone(run, tokens, config):
    runs.create_run(run, SMOKE.model, config, tokens)
    return Trainer(run)


@pytest.fixture(scope="module")
def alone(smoke_tokens, tmp_path_factory):
    """The losses of the long run in one process."""
    run = tmp_path_factory.mktemp("distributed") / "alone"
    train_alone(run, smoke_tokens, override(LONG, checkpoint_minutes=10)).run()
    return losses(run)


def test_two_processes_reproduce_the_losses_of_one(
    make_run, start_training, smoke_tokens, tmp_path
):
    train_alone(tmp_path / "alone", smoke_tokens, CONFIG).run()
    run = make_run(CONFIG)
    status, output = start_training(run, job=JOB).finish()
    assert status == 0, output
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    result = runs.read_json(run / "result.json")
    reference = runs.read_json(tmp_path / "alone" / "result.json")
    assert result["n_processes"] == 2 and reference["n_processes"] == 1
    assert result["tokens_per_step"] == reference["tokens_per_step"]
    assert result["val"]["loss"] == pytest.approx(reference["val"]["loss"], rel=1e-5)


def test_killed_process_ends_the_job_and_its_checkpoint_serves_other_numbers_of_processes(
    make_run, start_training, smoke_tokens, alone
):
    run = make_run(LONG)
    first = train_alone(run, smoke_tokens, LONG)
    first.must_stop = lambda: "tested" if first.state.step == 20 else None
    with pytest.raises(Stopped):
        first.run()  # one process
    job = start_training(run, job=JOB)  # two go on
    job.wait_for_step(35)
    os.kill(job.workers()[1], signal.SIGKILL)
    status, output = job.finish()
    assert status != 0
    assert "error: process 0 of 2 cannot go on" in output
    assert "The last checkpoint is kept: run the same command again to go on." in output
    assert "went back to step 20" in output
    assert 20 < int(checkpoint.newest_valid(run / "checkpoints").name) <= job.steps()[-1]
    assert not (run / "result.json").exists()
    train_alone(run, smoke_tokens, LONG).run()  # one again
    assert losses(run) == pytest.approx(alone, rel=1e-4)


def test_restarting_job_goes_on_after_a_process_is_killed(
    make_run, start_training, smoke_tokens, alone
):
    run = make_run(LONG)
    job = start_training(run, job=(*JOB, "--max-restarts", "1"))
    job.wait_for_step(20)
    os.kill(job.workers()[0], signal.SIGKILL)  # the one that leads
    status, output = job.finish()
    assert status == 0, output
    assert output.count("went back to step") == 1
    assert losses(run) == pytest.approx(alone, rel=1e-4)


def test_job_stops_on_a_signal_and_has_saved(make_run, start_training, smoke_tokens):
    run = make_run(override(LONG, budget_steps=5000))
    job = start_training(run, watched=True, job=JOB)
    job.wait_for_step(10)
    job.process.send_signal(signal.SIGTERM)
    status, output = job.finish()
    assert status != 0
    newest = int(checkpoint.newest_valid(run / "checkpoints").name)
    assert f": saved and stopped at step {newest}." in output  # by the signal, or by closed stdin


def test_job_whose_launcher_is_gone_saves_and_leaves(make_run, start_training):
    run = make_run(override(LONG, budget_steps=10**6))
    job = start_training(run, watched=True, job=JOB)
    job.wait_for_step(1)
    _, output = job.finish()  # closes the pipe
    newest = int(checkpoint.newest_valid(run / "checkpoints").name)
    assert f"the watching process is gone: saved and stopped at step {newest}." in output


def test_locked_run_refuses_the_whole_job(make_run, start_training, smoke_tokens):
    run = make_run(CONFIG)
    with locks.lock(run):
        status, output = start_training(run, job=JOB).finish()
    assert status != 0
    assert f"error: {run.name} is in use by process {os.getpid()}" in output
    assert not (run / "checkpoints").exists()
