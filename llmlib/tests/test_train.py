"""Runs that are stopped, killed and broken, against runs that are left alone."""

import itertools
import json
import math
import os
import random
import resource
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmlib import checkpoint, clock, prepare, runs, train
from llmlib.config import PRESETS, DataConfig, override
from llmlib.schedule import lr_multiplier
from llmlib.train import MAX_BAD_STEPS, MAX_ROLLBACKS, Diverged, Stopped, Trainer

SMOKE = PRESETS["smoke"]
LONG = override(SMOKE.train, budget_steps=150, micro_batch=4, checkpoint_minutes=0.005, n_evals=10)


def trainer(run, tokens, config, **changes):
    run.mkdir(exist_ok=True)
    return Trainer(run, SMOKE.model, override(config, **changes), tokens)


def table(run, kind="step"):
    rows = runs.read_metrics(run)
    return rows[rows.kind == kind].dropna(axis=1, how="all")


def events(run):
    return table(run, "event").text.tolist()


def assert_same_run(run, reference):
    """Same steps, losses, weights and optimizer, bit by bit."""
    ours, theirs = table(run), table(reference)
    assert ours.step.tolist() == theirs.step.tolist()
    for column in ("loss", "grad_norm", "lr", "progress"):
        assert ours[column].tolist() == theirs[column].tolist()
    assert table(run, "eval").val_loss.tolist() == table(reference, "eval").val_loss.tolist()
    files = ["weights.safetensors", "optimizer.safetensors"]
    last = f"checkpoints/{theirs.step.max():08d}"
    for file in ["model.safetensors", *(f"{last}/{name}" for name in files)]:
        a, b = load_file(run / file), load_file(reference / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), file


def stop_after(trainer, n_steps):
    """Ask for a stop when a step is reached, as a signal does."""
    trainer.must_stop = lambda: "tested" if trainer.progress.step == n_steps else None
    with pytest.raises(Stopped, match=f"tested: saved and stopped at step {n_steps}"):
        trainer.run()


# ------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def undisturbed(smoke_tokens, tmp_path_factory):
    """The long run, left alone."""
    run = tmp_path_factory.mktemp("train") / "undisturbed"
    trainer(run, smoke_tokens, LONG, checkpoint_minutes=10).run()
    return run


def test_resumed_run_matches_uninterrupted_run(tmp_path, smoke_tokens, undisturbed):
    stop_after(trainer(tmp_path, smoke_tokens, LONG), 50)
    stop_after(trainer(tmp_path, smoke_tokens, LONG), 51)
    trainer(tmp_path, smoke_tokens, LONG).run()
    assert_same_run(tmp_path, undisturbed)


def test_killed_run_matches_uninterrupted_run(make_run, start_training, smoke_tokens, undisturbed):
    run = make_run(SMOKE.model, LONG)
    rng = random.Random()
    for least in (1, 35, 75):
        training = start_training(run, smoke_tokens, hold_at=120)
        training.wait_for_step(least + rng.randrange(25))
        training.process.kill()  # cannot be caught
        assert training.finish()[0] == -signal.SIGKILL
        assert not (run / "training.json").exists()
        assert runs.lock_owner(run) is None  # the lock died with its owner
    trainer(run, smoke_tokens, LONG).run()
    assert sum(e.startswith("went back to step") for e in events(run)) == 3
    assert_same_run(run, undisturbed)
    assert runs.read_json(run / "training.json")["seconds"]["lost"] > 0


def test_stopped_run_saves_itself_and_matches_uninterrupted_run(
    make_run, start_training, smoke_tokens, undisturbed
):
    run = make_run(SMOKE.model, LONG)
    for step, how, status in ((5, "SIGTERM", 143), (40, "SIGINT", 130), (80, "pipe", 143)):
        options = ["--supervised"] if how == "pipe" else []
        training = start_training(run, smoke_tokens, *options, hold_at=120)
        training.wait_for_step(step)
        if how == "pipe":
            training.process.stdin.close()  # as when the supervisor dies
            training.process.stdin = None
        else:
            training.process.send_signal(getattr(signal, how))
        found, output = training.finish()
        assert found == status, output
        stopped_at = training.steps()[-1]
        reason = "the supervising process is gone" if how == "pipe" else f"received {how}"
        assert f"{reason}: saved and stopped at step {stopped_at}." in output
        assert "Run the same command again to go on" in output
        assert int(checkpoint.newest_valid(run / "checkpoints").name) == stopped_at
    assert start_training(run, smoke_tokens).finish()[0] == 0
    assert_same_run(run, undisturbed)
    assert runs.read_json(run / "environment.json")["torch"] == torch.__version__


def test_second_process_on_a_run_is_refused_and_changes_nothing(
    make_run, smoke_tokens, monkeypatch, capsys
):
    monkeypatch.setattr(train, "watch", lambda _: lambda: None)  # leave pytest's signals alone
    run = make_run(SMOKE.model, SMOKE.train)
    with runs.lock(run):
        before = {path: path.read_bytes() for path in run.iterdir()}
        assert train.main([str(run), "--tokens", str(smoke_tokens)]) == 2
        assert {path: path.read_bytes() for path in run.iterdir()} == before
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        assert runs.lock_owner(run) == owner
    assert f"error: run {run.name} is in use by {owner}" in capsys.readouterr().err
    assert runs.lock_owner(run) is None


def test_asking_for_the_owner_does_not_refuse_a_starting_run(tmp_path, monkeypatch):
    """Whoever looks holds the lock for a moment; the run tries again."""
    (tmp_path / "lock").touch()
    with open(tmp_path / "lock", "r+") as looking:
        assert runs._try_lock(looking)
        monkeypatch.setattr(runs.time, "sleep", lambda _: looking.close())
        with runs.lock(tmp_path):
            assert runs.lock_owner(tmp_path).startswith("process ")


def test_finished_run_is_left_as_it_is(make_run, smoke_tokens, monkeypatch):
    monkeypatch.setattr(train, "watch", lambda _: lambda: None)
    run = make_run(SMOKE.model, override(SMOKE.train, budget_steps=2))
    assert train.main([str(run), "--tokens", str(smoke_tokens)]) == 0
    before = (run / "training.json").read_bytes(), (run / "metrics.jsonl").read_bytes()
    assert train.main([str(run), "--tokens", str(smoke_tokens)]) == 0
    assert ((run / "training.json").read_bytes(), (run / "metrics.jsonl").read_bytes()) == before


def test_run_that_dies_while_finishing_takes_no_step_more(tmp_path, smoke_tokens, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "save_file", lambda *_: (_ for _ in ()).throw(SystemExit))
        trainer(tmp_path, smoke_tokens, SMOKE.train).run()
    assert not (tmp_path / "training.json").exists()
    monkeypatch.setattr(train, "train_step", None)  # calling it would fail
    assert trainer(tmp_path, smoke_tokens, SMOKE.train).run()["n_steps"] == 20


def test_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    tmp_path, smoke_tokens, undisturbed
):
    for n_steps in (40, 80):
        stop_after(trainer(tmp_path, smoke_tokens, LONG), n_steps)
    newest = checkpoint.newest_valid(tmp_path / "checkpoints")
    (newest / "weights.safetensors").write_bytes(b"not much")
    with pytest.warns(UserWarning, match="checkpoint 00000080 is skipped"):
        trainer(tmp_path, smoke_tokens, LONG).run()
    assert_same_run(tmp_path, undisturbed)


def test_other_validation_set_is_refused_on_resume(tmp_path, smoke_tokens):
    stop_after(trainer(tmp_path, smoke_tokens, SMOKE.train), 3)
    other = override(SMOKE.train, eval_sequences=7)
    with pytest.raises(ValueError, match=r"validation set is not the one that run .* began with"):
        trainer(tmp_path, smoke_tokens, other).run()


def test_validation_set_is_the_same_at_every_evaluation(tmp_path, smoke_tokens, monkeypatch):
    seen = []

    def note(model, windows, device, dtype):
        seen.append(train._sha256(windows))
        return evaluate(model, windows, device, dtype)

    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", note)
    config = override(SMOKE.train, n_evals=10)
    stop_after(trainer(tmp_path, smoke_tokens, config), 10)
    result = trainer(tmp_path, smoke_tokens, config).run()
    assert len(seen) == 10  # nine in the run, one on the whole split
    assert table(tmp_path, "eval").val_sha256.tolist() == seen[:-1] == seen[:1] * 9
    assert f"validation set sha256 {seen[0]}" in events(tmp_path)
    assert result["val_sha256"] == seen[-1]


def test_short_runs_can_end_on_the_windows_they_validate_on(tmp_path, smoke_tokens):
    few = override(SMOKE.train, budget_steps=2, eval_sequences=4)
    scores = {
        is_all: trainer(tmp_path / str(is_all), smoke_tokens, few, eval_all=is_all).run()["val"]
        for is_all in (True, False)
    }
    assert scores[False]["n_tokens"] == 4 * SMOKE.model.seq_len < scores[True]["n_tokens"]


# ------------------------------------------------------------------ the clock


class Stage:
    """A trainer whose steps, validations and checkpoints take the seconds that a test says."""

    def __init__(self, monkeypatch, *, step=1.0, compiling=10.0, validation=3.0, saving=0.5):
        self.now, self.taken = 0.0, 0
        self.lrs: list[float] = []

        def take(*_, lr, **__):
            self.now += step + (compiling if self.taken == 0 else 0.0)
            self.taken += 1
            self.lrs.append(lr)
            return torch.ones(()), torch.ones(())

        def validate(*_):
            self.now += validation
            return {"loss": 5.0 - 0.001 * self.now, "accuracy": 0.0, "n_tokens": 1}

        def copy(*tensors):
            self.now += saving
            return snapshot(*tensors)

        snapshot = checkpoint.snapshot
        monkeypatch.setattr(clock, "monotonic", lambda: self.now)
        monkeypatch.setattr(clock, "HEARTBEAT_SECONDS", 0.01)
        monkeypatch.setattr(train, "train_step", take)
        monkeypatch.setattr(train, "evaluate", validate)
        monkeypatch.setattr(checkpoint, "snapshot", copy)

    def restart(self):
        """A new process: compilation comes first again, and the pause does not count."""
        self.taken = 0
        self.now += 5000.0


def hours(seconds, **changes):
    config = {"n_evals": 5, "checkpoint_minutes": 0.5} | changes
    return override(SMOKE.train, budget_hours=seconds / 3600, compile=True, **config)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """What compiling gains is not the matter here."""

    class Compiled(torch.nn.Module):
        def __init__(self, model, device):
            super().__init__()
            self.model = model

        def forward(self, tokens, targets):
            return self.model(tokens, targets)

    monkeypatch.setattr(train, "compile_model", Compiled)


def test_ledger_tells_what_every_second_went_into(tmp_path, smoke_tokens, monkeypatch):
    stage = Stage(monkeypatch)
    result = trainer(tmp_path, smoke_tokens, hours(100)).run()
    evals = table(tmp_path, "eval")
    assert result["seconds"]["compile"] == 10.0
    assert result["seconds"]["training"] == result["n_steps"] == stage.taken
    assert result["seconds"]["validation"] == 3.0 * len(evals)
    assert result["seconds"]["checkpoint"] > 0
    assert result["seconds"]["checkpoint"] % 0.5 == 0
    assert result["seconds"]["lost"] == 0
    assert 99 <= sum(result["seconds"].values()) <= 100
    assert table(tmp_path).seconds.iloc[-1] == sum(result["seconds"].values())
    assert len(evals) == 4  # the fifth is the final one, off the clock


@pytest.mark.parametrize("schedule", ["one_cycle", "linear"])
@pytest.mark.parametrize(
    "budget", [{"budget_hours": 60 / 3600}, {"budget_steps": 9}, {"budget_tokens": 9 * 1024 + 5}]
)
def test_learning_rate_follows_progress_to_its_final_value(
    tmp_path, smoke_tokens, monkeypatch, budget, schedule
):
    stage = Stage(monkeypatch)
    config = override(hours(1), schedule=schedule, **budget)
    trainer(tmp_path, smoke_tokens, config).run()
    progress = table(tmp_path).progress
    expected = [config.lr * lr_multiplier(schedule, p, 0.05, 0.1) for p in progress]
    assert stage.lrs == table(tmp_path).lr.tolist() == expected
    assert stage.lrs[-1] == pytest.approx(config.lr * 0.1, abs=1e-18)
    assert stage.lrs[0] == pytest.approx(config.lr * 0.01)


def test_validation_that_would_not_fit_is_moved_behind_the_end(tmp_path, smoke_tokens, monkeypatch):
    Stage(monkeypatch, validation=12.0, compiling=0.0)
    run = trainer(tmp_path, smoke_tokens, hours(100, n_evals=50))
    result = run.run()
    was_due = int(table(tmp_path).progress.iloc[-2] * 50)
    assert run.progress.n_evals < was_due
    assert 99 <= sum(result["seconds"].values()) <= 100
    assert result["val"]["n_tokens"] > 0


def test_checkpoint_that_would_not_fit_is_moved_behind_the_end(tmp_path, smoke_tokens, monkeypatch):
    Stage(monkeypatch, saving=20.0, compiling=0.0)
    result = trainer(tmp_path, smoke_tokens, hours(100, n_evals=1)).run()
    assert result["seconds"]["checkpoint"] == 20.0  # one; the next was due with 20 s left
    assert 99 <= sum(result["seconds"].values()) <= 100
    newest = checkpoint.newest_valid(tmp_path / "checkpoints")
    assert int(newest.name) == result["n_steps"]


def test_resumed_clock_counts_lost_work_but_not_the_pause(tmp_path, smoke_tokens, monkeypatch):
    stage = Stage(monkeypatch, saving=0.0)
    first = trainer(tmp_path, smoke_tokens, hours(100, checkpoint_minutes=0.4, n_evals=1))
    first.must_stop = lambda: (
        (_ for _ in ()).throw(SystemExit) if first.progress.step == 40 else None
    )
    with pytest.raises(SystemExit):
        first.run()
    first.saver.wait()
    saved = int(checkpoint.newest_valid(tmp_path / "checkpoints").name)
    assert 0 < saved < 40
    stage.restart()
    result = trainer(tmp_path, smoke_tokens, hours(100, n_evals=1)).run()
    seconds = result["seconds"]
    assert seconds["lost"] == 40 - saved
    assert seconds["compile"] == 20.0
    assert seconds["training"] == result["n_steps"] == 100 - 20 - (40 - saved)
    assert sum(seconds.values()) == 100
    assert f"went back to step {saved}: {40.0 - saved} s since then are lost" in events(tmp_path)


def test_heartbeat_older_than_the_checkpoint_takes_nothing_off_the_clock(
    tmp_path, smoke_tokens, monkeypatch
):
    """Killed right after a checkpoint, before the next beat."""
    stage = Stage(monkeypatch)
    stop_after(trainer(tmp_path, smoke_tokens, hours(100)), 30)
    runs.write_json(tmp_path / "heartbeat", {"training": 1.0})
    stage.restart()
    result = trainer(tmp_path, smoke_tokens, hours(100)).run()
    assert result["seconds"]["training"] == result["n_steps"]
    assert 99 <= sum(result["seconds"].values()) <= 100


@pytest.mark.parametrize(("stop_at", "compiles"), [(50, True), (85, False)])
def test_run_resumed_near_its_deadline_does_not_compile(
    tmp_path, smoke_tokens, monkeypatch, stop_at, compiles
):
    stage = Stage(monkeypatch)
    stop_after(trainer(tmp_path, smoke_tokens, hours(100, n_evals=1)), stop_at)
    stage.restart()
    stage.taken = 0 if compiles else 1  # the stage compiles only before its first step
    result = trainer(tmp_path, smoke_tokens, hours(100, n_evals=1)).run()
    assert result["is_compiled"] is compiles
    assert 97 <= sum(result["seconds"].values()) <= 100
    assert stage.lrs[-1] == pytest.approx(0.1 * SMOKE.train.lr)
    assert any("too little time is left for compiling" in e for e in events(tmp_path)) != compiles


def test_checkpoint_after_the_first_step_does_not_mistake_compiling_for_a_step(
    tmp_path, smoke_tokens, monkeypatch
):
    stage = Stage(monkeypatch, compiling=60.0)
    stop_after(trainer(tmp_path, smoke_tokens, hours(200, n_evals=1)), 1)
    stage.restart()
    result = trainer(tmp_path, smoke_tokens, hours(200, n_evals=1)).run()
    assert 199 <= sum(result["seconds"].values()) <= 200
    assert result["n_steps"] > 70


def test_real_run_ends_by_its_deadline(tmp_path, smoke_tokens):
    result = trainer(tmp_path, smoke_tokens, hours(3, n_evals=4)).run()
    last = table(tmp_path).iloc[-1]
    assert last.progress == 1.0
    assert last.lr == pytest.approx(0.1 * SMOKE.train.lr)
    assert sum(result["seconds"].values()) == pytest.approx(last.seconds, abs=1e-3)
    assert last.seconds <= 3


# ------------------------------------------------------------------ trouble


def break_steps(monkeypatch, is_bad, value=math.nan):
    """Let some steps meet data that make the loss ``value``; batches are counted from 0."""
    real, counter = train.train_step, itertools.count()

    def step(model, optimizer, inputs, targets, **settings):
        if not is_bad(next(counter)):
            return real(model, optimizer, inputs, targets, **settings)
        broken = lambda x, y: model(x, y) * value  # noqa: E731
        broken.named_parameters = model.named_parameters
        return real(broken, optimizer, inputs, targets, **settings)

    monkeypatch.setattr(train, "train_step", step)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_step_takes_no_gradient_and_is_counted(tmp_path, smoke_tokens, monkeypatch, value):
    break_steps(monkeypatch, lambda n: n in (0, 5, 6, 9), value)
    result = trainer(tmp_path, smoke_tokens, SMOKE.train).run()
    assert result["n_skipped"] == 4 and result["n_rollbacks"] == 0
    good = [step for step in range(1, 21) if step - 1 not in (0, 5, 6, 9)]
    assert table(tmp_path).step.tolist() == good and np.isfinite(table(tmp_path).loss).all()
    assert sum("took no gradient: loss" in e for e in events(tmp_path)) == 4


@pytest.mark.parametrize("n_bad", [0, 2, MAX_BAD_STEPS])
def test_asking_the_device_for_the_next_step_early_changes_nothing(
    tmp_path, smoke_tokens, monkeypatch, n_bad
):
    for n_ahead in (0, 1):
        with monkeypatch.context() as patch:
            # what was in flight when the run goes back is dropped with it
            break_steps(patch, lambda n: 10 <= n < 10 + n_bad)
            run = trainer(tmp_path / str(n_ahead), smoke_tokens, SMOKE.train, n_evals=4)
            run.n_ahead = n_ahead
            result = run.run()
            assert result["n_skipped"] == n_bad and result["n_steps"] == 20
    if n_bad < MAX_BAD_STEPS:
        assert_same_run(tmp_path / "0", tmp_path / "1")
    else:
        assert result["n_rollbacks"] == 1 and table(tmp_path / "1").step.is_unique


def test_several_bad_steps_go_back_to_the_checkpoint_with_other_data(
    tmp_path, smoke_tokens, monkeypatch
):
    config = override(SMOKE.train, n_evals=1)
    stop_after(trainer(tmp_path, smoke_tokens, config), 8)
    run = trainer(tmp_path, smoke_tokens, config)
    n_drawn = 12 - 8 + MAX_BAD_STEPS  # after the checkpoint, before going back
    break_steps(monkeypatch, lambda n: 4 <= n < 4 + MAX_BAD_STEPS)
    drawn = []
    batch = run.batches.batch
    run.batches.batch = lambda step, **where: drawn.append(step) or batch(step, **where)
    result = run.run()
    assert result["n_rollbacks"] == 1 and result["n_skipped"] == MAX_BAD_STEPS
    assert table(tmp_path).step.tolist() == list(range(1, 21))  # each once
    n_steps = n_drawn + 12
    assert drawn[:n_steps] == list(range(8, 8 + n_steps))  # never the same again
    assert run.progress.data_step == 8 + n_steps  # nor after a crash
    assert any(e.startswith("went back to step 8") for e in events(tmp_path))


def test_run_that_stays_bad_ends_with_a_verdict(make_run, smoke_tokens, monkeypatch, capsys):
    monkeypatch.setattr(train, "watch", lambda _: lambda: None)
    break_steps(monkeypatch, lambda n: n >= 5)
    run = make_run(SMOKE.model, SMOKE.train)
    assert train.main([str(run), "--tokens", str(smoke_tokens)]) == 3
    error = capsys.readouterr().err
    assert f"not finite, even after going back {MAX_ROLLBACKS} times" in error
    assert f"Lower lr (now {SMOKE.train.lr})" in error
    assert not (run / "training.json").exists()
    weights = load_file(checkpoint.newest_valid(run / "checkpoints") / "weights.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


def test_verdict_is_also_given_when_no_checkpoint_is_left(tmp_path, smoke_tokens, monkeypatch):
    break_steps(monkeypatch, lambda n: n >= 2)
    broken = trainer(tmp_path, smoke_tokens, SMOKE.train)
    monkeypatch.setattr(broken.saver, "_write", lambda *_: None)
    with pytest.raises(Diverged, match="after going back 0 times"):
        broken.run()


@pytest.mark.parametrize("limit", [3, 4, 5])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    tmp_path, smoke_tokens, monkeypatch, limit
):
    config = override(SMOKE.train, micro_batch=9, grad_accum=2)  # 9, 5, 3
    fits = {3: 3, 4: 3, 5: 5}[limit]
    reference = override(config, micro_batch=fits, grad_accum=1)
    with monkeypatch.context() as patch:  # 18 sequences in small pieces from the start
        patch.setattr(Trainer, "micro_batch", fits)
        trainer(tmp_path / "small", smoke_tokens, config).run()
    assert reference.micro_batch == fits
    big = trainer(tmp_path / "big", smoke_tokens, config)
    forward = big.model.forward

    def small_device(tokens, targets=None):
        if targets is not None and len(tokens) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(tokens, targets)

    big.model.forward = small_device
    result = big.run()
    assert result["micro_batch"] == fits
    assert result["tokens_per_step"] == 18 * SMOKE.model.seq_len
    said = [
        e for e in events(tmp_path / "big") if e.startswith("out of memory: micro_batch is now")
    ]
    assert said[-1].endswith(f"now {fits}, tokens per step stay {18 * SMOKE.model.seq_len}")
    assert_same_run(tmp_path / "big", tmp_path / "small")


def test_what_never_fits_is_the_readers_to_change(tmp_path, smoke_tokens):
    run = trainer(tmp_path, smoke_tokens, SMOKE.train)
    run.model.forward = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    with pytest.raises(ValueError, match=r"micro_batch=1 does not fit .* choose a smaller"):
        run.run()


def test_full_disk_does_not_stop_training_and_saving_is_tried_again(
    tmp_path, smoke_tokens, monkeypatch, undisturbed
):
    """Nothing can be written in the middle third of the run: no checkpoint, metrics, heartbeat."""
    monkeypatch.setattr(train, "RETRY_SECONDS", 0.01)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = trainer(tmp_path, smoke_tokens, LONG)

    def fill_disk():
        is_full = 50 <= run.progress.step < 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 if is_full else limits[0], limits[1]))

    run.must_stop = fill_disk
    try:
        result = run.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result["n_steps"] == 150
    assert load_file(tmp_path / "model.safetensors").keys()
    ours, theirs = (load_file(r / "model.safetensors") for r in (tmp_path, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_failed_checkpoint_is_reported_and_written_later(tmp_path, smoke_tokens, monkeypatch):
    monkeypatch.setattr(train, "RETRY_SECONDS", 0.01)
    run = trainer(tmp_path, smoke_tokens, LONG)
    write, failures = checkpoint.write, []

    def full(folder, weights, optimizer, state):
        if state["step"] > 0 and len(failures) < 3:
            failures.append(state["step"])
            raise OSError(28, "No space left on device")
        return write(folder, weights, optimizer, state)

    monkeypatch.setattr(checkpoint, "write", full)
    stop_after(run, 120)
    said = [e for e in events(tmp_path) if "No space left on device" in e]
    assert len(said) == 3 and all("training goes on and tries again" in e for e in said)
    assert int(checkpoint.newest_valid(tmp_path / "checkpoints").name) == 120


def test_finished_run_waits_for_a_disk_that_is_full(tmp_path, smoke_tokens, monkeypatch):
    waited = []
    monkeypatch.setattr(train.time, "sleep", waited.append)
    write = checkpoint.write

    def full(folder, weights, optimizer, state):
        if state["is_over"] and len(waited) < 2:
            raise OSError(28, "No space left on device")
        return write(folder, weights, optimizer, state)

    monkeypatch.setattr(checkpoint, "write", full)
    assert trainer(tmp_path, smoke_tokens, SMOKE.train).run()["n_steps"] == 20
    assert waited == [train.RETRY_SECONDS] * 2
    assert sum("the run is over and waits" in e for e in events(tmp_path)) == 2


def test_disk_that_is_full_at_the_start_is_an_error(tmp_path, smoke_tokens, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(ValueError, match=r"No space left on device.*free some space and run again"):
        trainer(tmp_path, smoke_tokens, SMOKE.train).run()


# ------------------------------------------------------------------ loud about silence


def test_parameter_that_no_gradient_reaches_stops_the_run(tmp_path, smoke_tokens):
    run = trainer(tmp_path, smoke_tokens, SMOKE.train)
    attention = run.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *inputs: forward(*inputs).detach()
    with pytest.raises(AssertionError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        run.run()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({"schedule": "step"}, "schedule='step' is unknown"),
        ({"optimizer": "adam"}, "optimizer='adam' is unknown"),
        ({"lr": -1}, "lr=-1 is not positive"),
        ({"learning_rate": 1}, "learning_rate"),
    ],
)
def test_mistake_in_the_config_is_an_error_before_training(
    make_run, smoke_tokens, monkeypatch, capsys, harm, message
):
    monkeypatch.setattr(train, "watch", lambda _: lambda: None)
    run = make_run(SMOKE.model, SMOKE.train)
    config = runs.read_json(run / "config.json")
    runs.write_json(run / "config.json", config | {"train": config["train"] | harm})
    assert train.main([str(run), "--tokens", str(smoke_tokens)]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "checkpoints").exists()


def test_folder_without_config_is_an_error_that_says_where_it_comes_from(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "watch", lambda _: lambda: None)
    assert train.main([str(tmp_path), "--tokens", str(tmp_path)]) == 2
    assert "config.json is missing or not a run's config" in capsys.readouterr().err


# ------------------------------------------------------------------ golden


def fixed_text(n_words=60_000):
    """English-like text that is the same on every machine and Python."""
    syllables = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
    state, words = 1, []
    for _ in range(n_words):
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        rank = int(60 * ((state >> 40) / (1 << 24)) ** 3)  # few syllables are common
        words.append(syllables[rank] + ("\n\n" if state >> 33 & 127 == 0 else " "))
    return "".join(words)


def test_twenty_steps_reproduce_the_stored_loss_curve(tmp_path):
    """Stored by running this test with the file absent, then looking at it."""
    (tmp_path / "text.txt").write_text(fixed_text())
    data = DataConfig(corpus=str(tmp_path / "text.txt"), tokenizer="bpe", bpe_vocab_size=512)
    data = override(data, test_size=0.1)
    prepare.prepare(data, tmp_path / "tokens")
    trainer(tmp_path / "run", tmp_path / "tokens", SMOKE.train).run()
    losses = table(tmp_path / "run").loss.tolist()
    golden = Path(__file__).with_name("golden.json")
    if not golden.exists():
        golden.write_text(json.dumps([round(loss, 6) for loss in losses]) + "\n")
        pytest.fail("stored a new loss curve; look at it and commit it")
    assert losses == pytest.approx(json.loads(golden.read_text()), rel=1e-4)


# ------------------------------------------------------------------ cool-downs


def test_run_that_goes_on_from_a_snapshot_is_the_run_that_was_left_alone(tmp_path, smoke_tokens):
    flat = override(SMOKE.train, schedule="wsd", warmup=0.0, cooldown=0.0)
    trainer(tmp_path / "whole", smoke_tokens, flat, budget_steps=20).run()
    trainer(tmp_path / "trunk", smoke_tokens, flat, budget_steps=12, snapshot_steps=(8, 12)).run()
    branch = trainer(
        tmp_path / "branch",
        smoke_tokens,
        flat,
        budget_steps=12,
        start_from="../trunk/snapshots/00000008",
    )
    result = branch.run()
    whole, ours = table(tmp_path / "whole"), table(tmp_path / "branch")
    assert ours.loss.tolist() == whole.loss.tolist()[8:]
    assert ours.tokens.tolist() == whole.tokens.tolist()[8:]
    assert result["n_tokens"] == runs.read_json(tmp_path / "whole" / "training.json")["n_tokens"]


def test_missing_snapshot_is_named(tmp_path, smoke_tokens):
    with pytest.raises(ValueError, match=r"start_from='\.\./no' is not there"):
        trainer(tmp_path / "run", smoke_tokens, SMOKE.train, start_from="../no").run()
