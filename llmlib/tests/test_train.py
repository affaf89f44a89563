"""Runs that are stopped, killed and broken, against runs that are left alone."""

import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmlib import budget, checkpoint, data, devices, prepare, resume, runs, step, train
from llmlib.config import DataConfig, llama_config, override
from llmlib.schedule import lr_factor
from llmlib.tests.conftest import FP32, SMOKE
from llmlib.train import MAX_BAD_STEPS, Diverged, Stopped, Trainer

SHORT = override(FP32, eval_all=False)
LONG = override(SHORT, budget_steps=60, micro_batch=4, checkpoint_minutes=0.002, n_evals=6)


def trainer(run, tokens, config, **changes):
    (run / "config.json").unlink(missing_ok=True)
    runs.create_run(run, SMOKE.model, override(config, **changes), tokens)
    return Trainer(run)


def table(run, kind="step"):
    return runs.read_metrics(run, kind)


def events(run):
    return table(run, "event").text.tolist()


def main(*runs):
    """Train as the program does, and give pytest its signals back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        return train.main([str(argument) for argument in runs])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def assert_same_run(run, reference):
    """Same steps, losses and weights, bit by bit."""
    ours, theirs = table(run), table(reference)
    assert ours.step.tolist() == theirs.step.tolist()
    for column in ("loss", "grad_norm", "lr", "progress"):
        assert ours[column].tolist() == theirs[column].tolist()
    assert table(run, "eval").val_loss.tolist() == table(reference, "eval").val_loss.tolist()
    a, b = (load_file(path / "model.safetensors") for path in (run, reference))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_after(trainer, n_steps):
    """Ask for a stop when a step is reached, as a signal does."""
    trainer.must_stop = lambda: "tested" if trainer.state.step == n_steps else None
    with pytest.raises(Stopped, match=f"tested: saved and stopped at step {n_steps}"):
        trainer.run()


def at_call(monkeypatch, n, act):
    """Act before a step is taken: before the n-th of this process, counted from 1."""
    real, counter = step.train_step, itertools.count(1)

    def train_step(*arguments, **settings):
        if next(counter) == n:
            act()
        return real(*arguments, **settings)

    monkeypatch.setattr(step, "train_step", train_step)


# ------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def undisturbed(smoke_tokens, tmp_path_factory):
    """The long run, left alone."""
    run = tmp_path_factory.mktemp("train") / "undisturbed"
    trainer(run, smoke_tokens, LONG, checkpoint_minutes=10).run()
    return run


def test_stopped_run_saves_itself_matches_uninterrupted_run_and_is_then_left_alone(
    make_run, undisturbed, monkeypatch, capfd
):
    run, (reading, writing), stdin = make_run(LONG), os.pipe(), os.dup(0)
    ways = [
        (getattr(signal, f"SIG{name}"), f"received SIG{name}") for name in ("INT", "TERM", "USR1")
    ]
    for n_before, (number, reason) in enumerate(ways):
        with monkeypatch.context() as patch:
            at_call(patch, 10, lambda number=number: signal.raise_signal(number))
            assert main(run) == 128 + number
        reached = 10 * (n_before + 1)
        said = f"{reason}: saved and stopped at step {reached}. Run the same command again to go on"
        assert said in capfd.readouterr().out
        assert int(checkpoint.newest_valid(run / "checkpoints").name) == reached
    os.dup2(reading, 0)
    try:
        with monkeypatch.context() as patch:
            at_call(patch, 1, lambda: os.close(writing))  # as when the launcher dies
            assert main("--watched", run) == 128 + signal.SIGTERM
    finally:
        os.dup2(stdin, 0)
    assert "the watching process is gone: saved and stopped at step 31" in capfd.readouterr().out
    assert main(run) == 0
    assert_same_run(run, undisturbed)
    before = {path: path.read_bytes() for path in run.glob("*.json*")}
    assert main(run) == 0
    assert {path: path.read_bytes() for path in run.glob("*.json*")} == before


KILLED = """
import os, sys, pytest
from llmlib import train
from llmlib.tests.test_train import at_call
at_call(pytest.MonkeyPatch(), int(sys.argv[2]), lambda: os.kill(os.getpid(), 9))
train.main(sys.argv[1:2])
"""


def test_killed_run_matches_uninterrupted_run(make_run, smoke_tokens, undisturbed):
    run, n = make_run(LONG), random.randint(2, 59)
    assert subprocess.run([sys.executable, "-c", KILLED, run, str(n)]).returncode == -signal.SIGKILL
    assert not (run / "result.json").exists()
    with runs.lock(run):  # it died with its owner
        pass
    trainer(run, smoke_tokens, LONG).run()
    assert sum(e.startswith("went back to step") for e in events(run)) == 1
    assert_same_run(run, undisturbed)
    assert runs.read_json(run / "result.json")["seconds"]["lost"] > 0


def test_second_process_on_a_run_is_refused_and_changes_nothing(make_run, capsys):
    run = make_run(FP32)
    with runs.lock(run):
        before = {path: path.read_bytes() for path in run.iterdir()}
        assert main(run) == 2
        assert {path: path.read_bytes() for path in run.iterdir()} == before
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert f"error: {run.name} is in use by {owner}" in capsys.readouterr().err


def test_run_that_dies_while_finishing_takes_no_step_more(tmp_path, smoke_tokens, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "save_file", lambda *_: (_ for _ in ()).throw(SystemExit))
        trainer(tmp_path, smoke_tokens, SHORT).run()
    assert not (tmp_path / "result.json").exists()
    monkeypatch.setattr(step, "train_step", None)  # calling it would fail
    assert trainer(tmp_path, smoke_tokens, SHORT).run()["n_steps"] == 20


def test_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    tmp_path, smoke_tokens, undisturbed
):
    for n_steps in (20, 40):
        stop_after(trainer(tmp_path, smoke_tokens, LONG), n_steps)
    newest = checkpoint.newest_valid(tmp_path / "checkpoints")
    (newest / "weights.safetensors").write_bytes(b"not much")
    with pytest.warns(UserWarning, match=r"checkpoint 00000040 is skipped"):
        trainer(tmp_path, smoke_tokens, LONG).run()
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("is_all", [True, False])
def test_validation_set_is_the_same_at_every_evaluation(
    tmp_path, smoke_tokens, monkeypatch, is_all
):
    seen, evaluate = [], step.evaluate
    note = lambda model, windows, *how: seen.append(windows) or evaluate(model, windows, *how)  # noqa: E731
    monkeypatch.setattr(step, "evaluate", note)
    config = override(FP32, n_evals=10, eval_windows=4, eval_all=is_all)
    stop_after(trainer(tmp_path, smoke_tokens, config), 10)
    result = trainer(tmp_path, smoke_tokens, config).run()
    hashes = [data.sha256(windows) for windows in seen]
    assert len(seen) == 10  # nine in the run, one at its end, on the whole split if so asked
    assert table(tmp_path, "eval").val_sha256.tolist() == hashes[:-1] == hashes[:1] * 9
    assert result["val_sha256"] == hashes[-1] and (hashes[-1] != hashes[0]) == is_all
    assert result["val"]["n_tokens"] == len(seen[-1]) * SMOKE.model.seq_len


# ------------------------------------------------------------------ the clock


class Simulated:
    """A trainer whose steps, validations and checkpoints take the seconds that a test says."""

    def __init__(self, monkeypatch, *, each=1.0, compiling=10.0, validation=3.0, saving=0.5):
        self.now, self.taken, self.died = 0.0, 0, 0.0
        self.lrs: list[float] = []

        def take(*_, lr_factor, **__):
            self.now += each + (compiling if self.taken == 0 else 0.0)
            self.taken += 1
            self.lrs.append(lr_factor)
            return torch.ones(2)

        def validate(*_):
            self.now += validation
            return {"loss": 5.0 - 0.001 * self.now, "accuracy": 0.0, "n_tokens": 1}

        def copy(*tensors):
            self.now += saving
            return snapshot(*tensors)

        snapshot = checkpoint.snapshot
        monkeypatch.setattr(budget, "monotonic", lambda: self.now)
        monkeypatch.setattr(resume.time, "time", lambda: self.now)
        monkeypatch.setattr(Trainer, "last_write", lambda _: self.died)
        monkeypatch.setattr(step, "train_step", take)
        monkeypatch.setattr(step, "evaluate", validate)
        monkeypatch.setattr(checkpoint, "snapshot", copy)

    def restart(self):
        """A new process: compilation comes first again, and the pause does not count."""
        self.taken, self.died = 0, self.now
        self.now += 5000.0


def hours(seconds, **changes):
    config = {"n_evals": 5, "checkpoint_minutes": 0.5, "compile": True} | changes
    return override(SHORT, budget_hours=seconds / 3600, **config)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """What compiling gains is not the matter here: graphs are found, and run as they are."""
    how = {"fullgraph": True, "dynamic": False, "backend": "eager"}
    monkeypatch.setattr(devices, "compile_model", lambda model, _: torch.compile(model, **how))


def test_ledger_tells_what_every_second_went_into(tmp_path, smoke_tokens, monkeypatch):
    clock = Simulated(monkeypatch)
    result = trainer(tmp_path, smoke_tokens, hours(100)).run()
    evals, seconds = table(tmp_path, "eval"), result["seconds"]
    assert seconds["compile"] == 11.0  # with the step that compiles
    assert seconds["training"] == result["n_steps"] - 1 == clock.taken - 1
    assert seconds["validation"] == 3.0 * len(evals)
    assert seconds["checkpoint"] > 0 and seconds["checkpoint"] % 0.5 == 0
    assert seconds["lost"] == 0
    assert 99 <= sum(seconds.values()) <= 100
    assert table(tmp_path).seconds.iloc[-1] == sum(seconds.values())
    assert len(evals) == 4  # the fifth is the final one, off the clock


@pytest.mark.parametrize("schedule", ["one_cycle", "linear"])
@pytest.mark.parametrize(
    "budget", [{"budget_hours": 60 / 3600}, {"budget_steps": 9}, {"budget_tokens": 9 * 1024 + 5}]
)
def test_learning_rate_follows_progress_to_its_final_value(
    tmp_path, smoke_tokens, monkeypatch, budget, schedule
):
    clock = Simulated(monkeypatch)
    config = override(hours(1), schedule=schedule, **budget)
    trainer(tmp_path, smoke_tokens, config).run()
    expected = [lr_factor(config, p) for p in table(tmp_path).progress]
    assert clock.lrs == expected
    assert table(tmp_path).lr.tolist() == [config.lr * share for share in expected]
    assert clock.lrs[-1] == pytest.approx(0.1)
    assert clock.lrs[0] == pytest.approx(0.01)


def test_what_would_not_fit_is_moved_behind_the_end(tmp_path, smoke_tokens, monkeypatch):
    with monkeypatch.context() as patch:
        Simulated(patch, validation=12.0, compiling=0.0)
        run = trainer(tmp_path / "validation", smoke_tokens, hours(100, n_evals=50))
        result = run.run()
        assert run.state.n_evals < int(table(run.path).progress.iloc[-2] * 50)  # what was due
        assert 99 <= sum(result["seconds"].values()) <= 100
        assert result["val"]["n_tokens"] > 0
    Simulated(monkeypatch, saving=20.0, compiling=0.0)
    result = trainer(tmp_path / "saving", smoke_tokens, hours(100, n_evals=1)).run()
    assert result["seconds"]["checkpoint"] == 20.0  # one; the next was due with 20 s left
    assert 99 <= sum(result["seconds"].values()) <= 100
    assert not (tmp_path / "saving" / "checkpoints").exists()  # weights and result are enough
    assert (tmp_path / "saving" / "model.safetensors").exists()


def test_resumed_clock_counts_lost_work_but_not_the_pause(tmp_path, smoke_tokens, monkeypatch):
    clock = Simulated(monkeypatch, saving=0.0)
    first = trainer(tmp_path, smoke_tokens, hours(100, checkpoint_minutes=0.4, n_evals=1))
    first.must_stop = lambda: (_ for _ in ()).throw(SystemExit) if first.state.step == 40 else None
    with pytest.raises(SystemExit):
        first.run()
    first.saver.wait()
    saved = int(checkpoint.newest_valid(tmp_path / "checkpoints").name)
    assert 0 < saved < 40
    clock.restart()
    result = trainer(tmp_path, smoke_tokens, hours(100, n_evals=1)).run()
    seconds = result["seconds"]
    assert seconds["lost"] == 40 - saved
    assert seconds["compile"] == 22.0
    assert seconds["training"] == result["n_steps"] - 2 == 100 - 22 - (40 - saved)
    assert sum(seconds.values()) == 100
    assert f"went back to step {saved}: {40.0 - saved} s since then are lost" in events(tmp_path)


@pytest.mark.parametrize(
    ("stop_at", "compiling", "compiles"), [(50, 10.0, True), (85, 10.0, False), (1, 25.0, True)]
)
def test_run_resumed_near_its_deadline_does_not_compile(
    tmp_path, smoke_tokens, monkeypatch, stop_at, compiling, compiles
):
    clock = Simulated(monkeypatch, compiling=compiling)
    stop_after(trainer(tmp_path, smoke_tokens, hours(100, n_evals=1)), stop_at)
    clock.restart()
    clock.taken = 0 if compiles else 1  # the clock compiles only before its first step
    result = trainer(tmp_path, smoke_tokens, hours(100, n_evals=1)).run()
    assert result["is_compiled"] is compiles
    assert 97 <= sum(result["seconds"].values()) <= 100
    assert clock.lrs[-1] == pytest.approx(0.1)


def test_a_cached_graph_is_used_nearer_the_deadline(tmp_path, smoke_tokens, monkeypatch):
    clock = Simulated(monkeypatch, compiling=10.0)
    stop_after(trainer(tmp_path, smoke_tokens, hours(100, n_evals=1)), 80)
    clock.restart()
    run = trainer(tmp_path, smoke_tokens, hours(100, n_evals=1))
    run.begin_or_resume()
    (tmp_path / "compiled").mkdir(exist_ok=True)
    run._compile()
    assert run.is_compiled
    shutil.rmtree(tmp_path / "compiled")
    run._compile()
    assert not run.is_compiled


def test_open_phase_is_booked_up_to_the_last_write(tmp_path, smoke_tokens):
    stop_after(trainer(tmp_path, smoke_tokens, SHORT), 3)
    ledger = table(tmp_path).ledger.iloc[-1]
    row = {"text": "compilation begins", "time": 1000.0, "ledger": ledger}
    runs.MetricLog(tmp_path).write("phase", step=3, **row)
    for path in [tmp_path / "metrics.jsonl", *(tmp_path / "checkpoints").rglob("*")]:
        os.utime(path, (1060.0, 1060.0))
    spent = trainer(tmp_path, smoke_tokens, SHORT)._spent()
    assert spent["lost"] == pytest.approx(ledger["lost"] + 60.0)


def test_real_run_ends_by_its_deadline(tmp_path, smoke_tokens):
    result = trainer(tmp_path, smoke_tokens, hours(2, n_evals=4, compile=False)).run()
    last = table(tmp_path).iloc[-1]
    assert last.progress == 1.0
    assert last.lr == pytest.approx(0.1 * FP32.lr)
    assert sum(result["seconds"].values()) == pytest.approx(last.seconds, abs=1e-3)
    assert last.seconds <= 2 + table(tmp_path).seconds.diff().max()


# ------------------------------------------------------------------ trouble


def break_steps(monkeypatch, is_bad, value=math.nan):
    """Let some steps meet data that make the loss ``value``; batches are counted from 0."""
    real, counter = step.train_step, itertools.count()

    def broken_step(model, optimizer, inputs, targets, **settings):
        if not is_bad(next(counter)):
            return real(model, optimizer, inputs, targets, **settings)
        broken = lambda x, y: model(x, y) * value  # noqa: E731
        broken.named_parameters = model.named_parameters
        return real(broken, optimizer, inputs, targets, **settings)

    monkeypatch.setattr(step, "train_step", broken_step)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_step_takes_no_gradient_and_is_counted(tmp_path, smoke_tokens, monkeypatch, value):
    break_steps(monkeypatch, lambda n: n in (0, 5, 6, 9), value)
    result = trainer(tmp_path, smoke_tokens, SHORT).run()
    assert result["n_skipped"] == 4 and result["n_rollbacks"] == 0
    good = [step for step in range(1, 21) if step - 1 not in (0, 5, 6, 9)]
    assert table(tmp_path).step.tolist() == good and np.isfinite(table(tmp_path).loss).all()
    assert sum("took no gradient: loss" in e for e in events(tmp_path)) == 4


def test_several_bad_steps_go_back_to_the_checkpoint_with_other_data(
    tmp_path, smoke_tokens, monkeypatch
):
    config = override(SHORT, n_evals=1)
    stop_after(trainer(tmp_path, smoke_tokens, config), 8)
    run = trainer(tmp_path, smoke_tokens, config)
    n_drawn = 12 - 8 + MAX_BAD_STEPS  # after the checkpoint, before going back
    break_steps(monkeypatch, lambda n: 4 <= n < 4 + MAX_BAD_STEPS)
    drawn, batch = [], data.Batches.batch
    note = lambda self, step, **where: drawn.append(step) or batch(self, step, **where)  # noqa: E731
    monkeypatch.setattr(data.Batches, "batch", note)
    result = run.run()
    assert result["n_rollbacks"] == 1 and result["n_skipped"] == MAX_BAD_STEPS
    assert table(tmp_path).step.tolist() == list(range(1, 21))  # each once
    n_steps = n_drawn + 12
    assert drawn[:n_steps] == list(range(8, 8 + n_steps))  # never the same again
    assert run.state.data_step == 8 + n_steps  # nor after a crash
    assert any(e.startswith("went back to step 8") for e in events(tmp_path))


def test_run_that_stays_bad_ends_with_a_verdict(make_run, monkeypatch, capsys):
    break_steps(monkeypatch, lambda n: n >= 5)
    run = make_run(SHORT)
    assert main(run) == 3
    error = capsys.readouterr().err
    assert "not finite, even after going back" in error
    assert f"Lower lr (now {FP32.lr})" in error
    assert not (run / "result.json").exists()
    weights = load_file(checkpoint.newest_valid(run / "checkpoints") / "weights.safetensors")
    assert all(w.isfinite().all() for w in weights.values())
    monkeypatch.setattr(checkpoint, "newest_valid", lambda _: None)  # nor any checkpoint left
    with pytest.raises(Diverged, match="even after going back"):
        Trainer(make_run(SHORT)).run()


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    tmp_path, smoke_tokens, monkeypatch
):
    config = override(SHORT, micro_batch=9, grad_accum=2, budget_steps=5)  # 9, 5, 3
    with monkeypatch.context() as patch:  # 18 sequences in small pieces from the start
        patch.setattr(Trainer, "micro_batch", 3)
        trainer(tmp_path / "small", smoke_tokens, config).run()
    big = trainer(tmp_path / "big", smoke_tokens, config)
    forward = big.model.forward

    def small_device(tokens, targets=None):
        if targets is not None and len(tokens) > 4:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        return forward(tokens, targets)

    big.model.forward = small_device
    result = big.run()
    assert result["micro_batch"] == 3
    assert result["n_tokens"] == 5 * 18 * SMOKE.model.seq_len
    said = "out of memory: micro_batch is now"
    assert [e for e in events(tmp_path / "big") if said in e] == [f"{said} 5", f"{said} 3"]
    assert_same_run(tmp_path / "big", tmp_path / "small")
    never = trainer(tmp_path / "never", smoke_tokens, config)
    never.model.forward = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    with pytest.raises(ValueError, match=r"micro_batch=1 does not fit .* choose a smaller"):
        never.run()


def test_full_disk_costs_checkpoints_and_not_the_run(tmp_path, smoke_tokens, undisturbed):
    """Nothing can be written in the middle third of the run: no checkpoint, no metrics.

    A disk that is full at the start is an error.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = trainer(tmp_path, smoke_tokens, LONG)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    with pytest.raises(ValueError, match=r"File too large.*free some space and run again"):
        run.run()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def fill_disk():
        is_full = 20 <= run.state.step < 40
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 if is_full else limits[0], limits[1]))

    run.must_stop = fill_disk
    try:
        result = run.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result["n_steps"] == 60
    ours, theirs = (load_file(r / "model.safetensors") for r in (tmp_path, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_parameter_that_no_gradient_reaches_stops_the_run(tmp_path, smoke_tokens):
    run = trainer(tmp_path, smoke_tokens, FP32)
    attention = run.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *inputs: forward(*inputs).detach()
    with pytest.raises(AssertionError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        run.run()


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


def test_twenty_steps_reproduce_the_stored_loss_curve(tmp_path, monkeypatch):
    """Stored by running this test with the file absent, then looking at it."""
    (tmp_path / "text.txt").write_text(fixed_text())
    text = {"corpus": str(tmp_path / "text.txt"), "tokenizer": "bpe", "bpe_vocab_size": 512}
    prepare.prepare(DataConfig(**text, test_size=0.1), tmp_path / "tokens")
    trainer(tmp_path / "run", tmp_path / "tokens", FP32).run()
    losses = table(tmp_path / "run").loss.tolist()
    golden = Path(__file__).with_name("golden.json")
    if not golden.exists():
        golden.write_text(json.dumps([round(loss, 6) for loss in losses]) + "\n")
        pytest.fail("stored a new loss curve; look at it and commit it")
    assert losses == pytest.approx(json.loads(golden.read_text()), rel=1e-4)


# ------------------------------------------------------------------ compilation


FAILING = """#!/bin/sh
[ "$1" = --version ] && exec g++ --version
echo "model.cpp:1:10: fatal error: Python.h: No such file or directory" >&2
exit 1
"""


def test_compiler_that_is_found_and_fails_costs_a_line_and_time(
    make_run, start_training, monkeypatch, tmp_path
):
    config = override(SHORT, compile=True, budget_steps=3)
    (tmp_path / "g++").write_text(FAILING)
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cold"))
    run, plain = make_run(config), make_run(override(config, compile=False))
    status, output = start_training(run, plain).finish()
    assert status == 0, output
    [said] = [event for event in events(run) if "compiling failed" in event]
    assert "fatal error: Python.h: No such file" in said and "runs uncompiled" in said
    result = runs.read_result(run)
    assert not result["is_compiled"]
    assert result["seconds"]["compile"] > runs.read_result(plain)["seconds"]["compile"]
    assert table(run).loss.tolist() == table(plain).loss.tolist()


def test_error_in_the_first_step_that_is_not_the_compilers_comes_back(tmp_path, smoke_tokens):
    run = trainer(tmp_path, smoke_tokens, SHORT, compile=True)
    run.model.forward = lambda *_: {}["nothing"]
    with pytest.raises(KeyError, match="nothing"):
        run.run()


@pytest.mark.parametrize("budget", [{"budget_hours": 1.0}, {"budget_steps": 20}])
def test_run_against_the_clock_compiles_for_itself_alone(
    tmp_path, smoke_tokens, monkeypatch, budget
):
    used = []
    monkeypatch.setattr(devices, "use_compile_cache", used.append)
    config, cache = override(SHORT, compile=True, **budget), tmp_path / "compiled"
    stop_after(trainer(tmp_path, smoke_tokens, config), 2)
    cache.mkdir()
    stop_after(trainer(tmp_path, smoke_tokens, config), 4)
    assert used == 2 * [cache if "budget_hours" in budget else None]
    assert cache.exists()  # for another resume
    last = trainer(tmp_path, smoke_tokens, config)
    last.budget.next_progress = lambda *_, before: None if before == 1.0 else 1.0
    last.run()
    assert not cache.exists()


# ------------------------------------------------------------------ several runs


def test_runs_in_turn_share_a_compiled_graph_and_train_as_if_alone(make_run):
    from torch._dynamo.utils import counters

    config, model = override(SHORT, compile=True, budget_steps=5), llama_config(1, 32, d_head=32)
    shape = {"model": override(model, vocab_size=512, seq_len=64)}
    first = make_run(config, **shape)
    second, alone = (make_run(override(config, seed=7, lr=1e-3), **shape) for _ in range(2))
    torch.compiler.reset()
    counters.clear()
    assert main(first, second) == 0
    assert counters["stats"]["unique_graphs"] == 1
    assert main(alone) == 0
    assert table(second).loss.tolist() == table(alone).loss.tolist()
    assert table(first).loss.tolist() != table(second).loss.tolist()


MISTAKES = {
    "schedule='step' is unknown": {"train": {"schedule": "step"}},
    "optimizer='adam' is unknown": {"train": {"optimizer": "adam"}},
    "lr=-1 is not positive": {"train": {"lr": -1}},
    "learning_rate": {"train": {"learning_rate": 1}},
    "-p allow_cpu True": {"train": {"needs_accelerator": True}},
    "run 01_data_prep first": {"tokens_dir": "nowhere"},
    "has format 1": {"format": 1},
    "config.json is missing or not a run's config": {"model": None},
}


def test_each_run_that_fails_says_why_in_its_log_and_keeps_no_other_from_training(
    make_run, monkeypatch, capsys
):
    broken = [make_run(SHORT) for _ in MISTAKES]
    for run, harm in zip(broken, MISTAKES.values(), strict=True):
        config = runs.read_json(run / "config.json")
        harm = {k: config[k] | v if isinstance(v, dict) else v for k, v in harm.items()}
        runs.write_json(run / "config.json", config | harm)
    monkeypatch.setattr(devices, "accelerator", lambda: None)
    good, trouble = make_run(override(SHORT, budget_steps=2)), make_run(SHORT)
    at_call(monkeypatch, 3, lambda: [][0])  # the first step of the last run
    assert main(*broken, good, trouble) == 2
    printed = capsys.readouterr().err
    for run, message in zip(broken, MISTAKES, strict=True):
        assert message in printed and message in (run / "train.log").read_text()
        assert not (run / "checkpoints").exists()
    assert runs.read_result(good)["n_steps"] == 2
    log = (trouble / "train.log").read_text()
    assert "Traceback" in log and "cannot go on (list index out of range)" in log
