"""Jobs of two processes, started by torchrun, against one process."""

import os
import signal

import pytest
import torch

from llmlib import checkpoint, runs
from llmlib.config import PRESETS, override
from llmlib.optim import compute_dtype
from llmlib.step import pick_device
from llmlib.train import Stopped, Trainer

SMOKE = PRESETS["smoke"]
JOB = ("--nproc-per-node", "2")
CONFIG = override(SMOKE.train, micro_batch=4, grad_accum=4, n_evals=1)
LONG = override(CONFIG, budget_steps=60, checkpoint_minutes=1e-4)


def losses(run):
    rows = runs.read_metrics(run)
    rows = rows[rows.kind == "step"]
    assert rows.step.tolist() == list(range(1, len(rows) + 1))
    return rows.loss.tolist()


def train_alone(run, tokens, config):
    run.mkdir(exist_ok=True)
    return Trainer(run, SMOKE.model, config, tokens)


@pytest.fixture(scope="module")
def alone(smoke_tokens, tmp_path_factory):
    """The losses of the long run in one process."""
    run = tmp_path_factory.mktemp("distributed") / "alone"
    train_alone(run, smoke_tokens, override(LONG, checkpoint_minutes=10)).run()
    return losses(run)


@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-5), ("bfloat16", 2**-9)])
def test_two_processes_reproduce_the_losses_of_one(
    make_run, start_training, smoke_tokens, tmp_path, monkeypatch, dtype, rel
):
    monkeypatch.delenv("LLMLIB_DTYPE")
    if dtype == "bfloat16" and compute_dtype(pick_device()) != torch.bfloat16:
        pytest.skip("this processor has no bf16 units")
    monkeypatch.setenv("LLMLIB_DTYPE", dtype)
    train_alone(tmp_path / "alone", smoke_tokens, CONFIG).run()
    run = make_run(SMOKE.model, CONFIG)
    status, output = start_training(run, smoke_tokens, job=JOB).finish()
    assert status == 0, output
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=rel)
    result = runs.read_json(run / "training.json")
    reference = runs.read_json(tmp_path / "alone" / "training.json")
    assert result["dtype"] == reference["dtype"] == dtype
    assert result["n_processes"] == 2 and reference["n_processes"] == 1
    assert result["tokens_per_step"] == reference["tokens_per_step"]
    assert result["val"]["loss"] == pytest.approx(reference["val"]["loss"], rel=rel)


def test_killed_process_ends_the_job_and_its_checkpoint_serves_other_numbers_of_processes(
    make_run, start_training, smoke_tokens, alone
):
    run = make_run(SMOKE.model, LONG)
    first = train_alone(run, smoke_tokens, LONG)
    first.must_stop = lambda: "tested" if first.progress.step == 20 else None
    with pytest.raises(Stopped):
        first.run()  # one process
    job = start_training(run, smoke_tokens, job=JOB, hold_at=45)  # two go on
    job.wait_for_step(35)
    os.kill(job.workers()[1], signal.SIGKILL)
    status, output = job.finish()
    assert status != 0
    assert "error: process 0 of 2 cannot go on" in output
    assert "The last checkpoint is kept: run the same command again to go on." in output
    assert "went back to step 20" in output
    assert 20 < int(checkpoint.newest_valid(run / "checkpoints").name) <= job.steps()[-1]
    assert not (run / "training.json").exists()
    train_alone(run, smoke_tokens, LONG).run()  # one again
    assert losses(run) == pytest.approx(alone, rel=1e-4)


def test_restarting_job_goes_on_after_a_process_is_killed(
    make_run, start_training, smoke_tokens, alone
):
    run = make_run(SMOKE.model, LONG)
    job = start_training(run, smoke_tokens, job=(*JOB, "--max-restarts", "1"), hold_at=45)
    job.wait_for_step(20)
    os.kill(job.workers()[0], signal.SIGKILL)  # the one that leads
    status, output = job.finish()
    assert status == 0, output
    assert output.count("went back to step") == 1
    assert losses(run) == pytest.approx(alone, rel=1e-4)


def test_job_stops_on_a_signal_and_has_saved(make_run, start_training, smoke_tokens):
    run = make_run(SMOKE.model, override(LONG, budget_steps=10**6))
    job = start_training(run, smoke_tokens, "--supervised", job=JOB)
    job.wait_for_step(10)
    job.process.send_signal(signal.SIGTERM)
    status, output = job.finish()
    assert status != 0
    newest = int(checkpoint.newest_valid(run / "checkpoints").name)
    assert f": saved and stopped at step {newest}." in output  # by the signal, or by closed stdin


def test_locked_run_refuses_the_whole_job(make_run, start_training, smoke_tokens):
    run = make_run(SMOKE.model, CONFIG)
    with runs.lock(run):
        status, output = start_training(run, smoke_tokens, job=JOB).finish()
    assert status != 0
    assert f"error: run {run.name} is in use by process {os.getpid()}" in output
    assert not (run / "checkpoints").exists()


def test_mistake_in_the_config_ends_the_whole_job(make_run, start_training, smoke_tokens):
    run = make_run(SMOKE.model, override(CONFIG, micro_batch=3, grad_accum=1))
    status, output = start_training(run, smoke_tokens, job=JOB).finish()
    assert status != 0
    assert "error: micro_batch x grad_accum = 3 sequences do not divide among 2" in output
