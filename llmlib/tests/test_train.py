"""Runs that are stopped, killed and broken, against runs that are left alone."""

import itertools
import json
import math
import os
import random
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

from llmlib import budget, checkpoint, data, devices, prepare, runs, step, train
from llmlib.config import DataConfig, llama_config, override
from llmlib.optim import lr_factor
from llmlib.tests.conftest import FP32, SMOKE, losses, stop_after
from llmlib.trainer import MAX_BAD_STEPS, Trainer

SHORT = override(FP32, eval_all=False)
LONG = override(SHORT, budget_steps=60, micro_batch=4, checkpoint_minutes=0.002, n_evals=6)


@pytest.fixture
def run(tmp_path):
    """The folder of the run under test."""
    return tmp_path / "run"


@pytest.fixture
def trainer(run, smoke_tokens):
    """Return a function that opens the run, as each process does, or another one."""

    def trainer(config, run=run, **changes):
        (run / "config.json").unlink(missing_ok=True)
        runs.create_run(run, SMOKE.model, override(config, **changes), smoke_tokens)
        return Trainer(run)

    return trainer


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


def assert_same_weights(run, reference):
    weights = (load_file(path / "model.safetensors") for path in (run, reference))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def assert_same_run(run, reference):
    """Same steps, losses and weights, bit by bit."""
    ours, theirs = table(run), table(reference)
    for column in ("step", "loss", "grad_norm", "lr", "progress"):
        assert ours[column].tolist() == theirs[column].tolist()
    assert table(run, "eval").val_loss.tolist() == table(reference, "eval").val_loss.tolist()
    assert_same_weights(run, reference)


def at_call(monkeypatch, n, act):
    """Act before a step is taken: before the n-th of this process, counted from 1."""
    real, counter = step.train_step, itertools.count(1)

    def train_step(*arguments, **settings):
        if next(counter) == n:
            act()
        return real(*arguments, **settings)

    monkeypatch.setattr(step, "train_step", train_step)


def give_up(*_):
    raise SystemExit


# ------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def undisturbed(smoke_tokens, tmp_path_factory):
    """The long run, left alone."""
    run = tmp_path_factory.mktemp("train") / "undisturbed"
    config = override(LONG, checkpoint_minutes=10)
    runs.create_run(run, SMOKE.model, config, smoke_tokens)
    Trainer(run).run()
    return run


def test_stopped_run_saves_itself_matches_uninterrupted_run_and_is_then_left_alone(
    make_run, undisturbed, monkeypatch, capfd
):
    run, (reading, writing), stdin = make_run(LONG), os.pipe(), os.dup(0)
    for n, number in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), 1):
        with monkeypatch.context() as patch:
            at_call(patch, 10, lambda number=number: signal.raise_signal(number))
            assert main(run) == train.STOPPED
        said = f"received {number.name}: saved and stopped at step {10 * n}. Run the same command"
        assert said in capfd.readouterr().out
        assert int(checkpoint.newest_valid(run / "checkpoints").stem) == 10 * n
    os.dup2(reading, 0)
    try:
        with monkeypatch.context() as patch:
            at_call(patch, 1, lambda: os.close(writing))  # as when the launcher dies
            assert main("--watched", run) == train.STOPPED
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


def test_killed_run_matches_uninterrupted_run(make_run, undisturbed):
    run, n = make_run(LONG), random.randint(2, 59)
    assert subprocess.run([sys.executable, "-c", KILLED, run, str(n)]).returncode == -signal.SIGKILL
    assert not (run / "result.json").exists()
    with runs.lock(run):  # it died with its owner
        pass
    result = Trainer(run).run()
    assert sum(e.startswith("went back to step") for e in events(run)) == 1
    assert_same_run(run, undisturbed)
    assert result["seconds"]["lost"] > 0


def test_second_process_on_a_run_is_refused_and_changes_nothing(make_run, capsys):
    run = make_run(FP32)
    with runs.lock(run):
        before = {path: path.read_bytes() for path in run.iterdir()}
        assert main(run) == 2
        assert {path: path.read_bytes() for path in run.iterdir()} == before
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert f"error: {run.name} is in use by {owner}" in capsys.readouterr().err


def test_run_that_dies_while_finishing_takes_no_step_more(run, trainer, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("safetensors.torch.save", give_up)
        trainer(SHORT).run()
    assert not (run / "result.json").exists()
    monkeypatch.setattr(step, "train_step", None)  # calling it would fail
    assert trainer(SHORT).run()["n_steps"] == 20


@pytest.mark.parametrize("is_all", [True, False])
def test_validation_set_is_the_same_at_every_evaluation(run, trainer, monkeypatch, is_all):
    seen, evaluate = [], step.evaluate
    note = lambda model, windows, *how: seen.append(windows) or evaluate(model, windows, *how)  # noqa: E731
    monkeypatch.setattr(step, "evaluate", note)
    config = override(FP32, n_evals=10, eval_windows=4, eval_all=is_all)
    stop_after(trainer(config), 10)
    result = trainer(config).run()
    hashes = [data.sha256(windows) for windows in seen]
    assert len(seen) == 10  # nine in the run, one at its end, on the whole split if so asked
    assert table(run, "eval").val_sha256.tolist() == hashes[:-1] == hashes[:1] * 9
    assert result["val_sha256"] == hashes[-1] and (hashes[-1] != hashes[0]) == is_all
    assert result["val"]["n_tokens"] == len(seen[-1]) * SMOKE.model.seq_len


# ------------------------------------------------------------------ the clock


class Simulated:
    """A trainer whose steps, validations and checkpoints take the seconds that a test says."""

    def __init__(self, monkeypatch, *, compiling=10.0, validation=3.0, saving=0.5):
        self.now, self.compiling, self.lrs = 0.0, compiling, []
        self.is_warm = False

        def take(*_, lr_factor, **__):
            self.now += 1.0 if self.is_warm else 1.0 + self.compiling
            self.is_warm = True
            self.lrs.append(lr_factor)
            return torch.ones(2)

        def validate(*_):
            self.now += validation
            return {"loss": 5.0 - 0.001 * self.now, "accuracy": 0.0, "n_tokens": 1}

        def pack(*parts):
            self.now += saving
            return real_pack(*parts)

        real_pack = checkpoint.pack
        monkeypatch.setattr(budget, "monotonic", lambda: self.now)
        monkeypatch.setattr(step, "train_step", take)
        monkeypatch.setattr(step, "evaluate", validate)
        monkeypatch.setattr(checkpoint, "pack", pack)

    def restart(self, run, compiling):
        """A new process: compilation comes first again, and the pause does not count."""
        for path in run.rglob("*"):  # written by another clock
            os.utime(path, (0, 0))
        self.is_warm, self.compiling = False, compiling
        self.now += 5000.0


def hours(seconds, **changes):
    config = {"n_evals": 5, "checkpoint_minutes": 0.5, "compile": True} | changes
    return override(SHORT, budget_hours=seconds / 3600, **config)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """What compiling gains is not the matter here: graphs are found, and run as they are."""
    how = {"fullgraph": True, "dynamic": False, "backend": "eager"}
    monkeypatch.setattr(devices, "compile_model", lambda model, _: torch.compile(model, **how))


def test_ledger_tells_what_every_second_went_into(run, trainer, monkeypatch):
    clock = Simulated(monkeypatch)
    result = trainer(hours(100)).run()
    evals, seconds = table(run, "eval"), result["seconds"]
    assert seconds["compile"] == 11.0  # with the step that compiles
    assert seconds["training"] == result["n_steps"] - 1 == len(clock.lrs) - 1
    assert seconds["validation"] == 3.0 * len(evals)
    assert seconds["checkpoint"] > 0 and seconds["checkpoint"] % 0.5 == 0
    assert seconds["lost"] == 0
    assert 99 <= sum(seconds.values()) <= 100
    assert table(run).seconds.iloc[-1] == sum(seconds.values())
    assert len(evals) == 4  # the fifth is the final one, off the clock


@pytest.mark.parametrize("schedule", ["one_cycle", "linear"])
@pytest.mark.parametrize(
    "budget", [{"budget_hours": 60 / 3600}, {"budget_steps": 9}, {"budget_tokens": 9 * 1024 + 5}]
)
def test_learning_rate_follows_progress_to_its_final_value(
    run, trainer, monkeypatch, budget, schedule
):
    clock = Simulated(monkeypatch)
    config = override(hours(1), schedule=schedule, **budget)
    trainer(config).run()
    expected = [lr_factor(config, p) for p in table(run).progress]
    assert clock.lrs == expected
    assert table(run).lr.tolist() == [config.lr * share for share in expected]
    assert (clock.lrs[0], clock.lrs[-1]) == (pytest.approx(0.01), pytest.approx(0.1))


def test_what_would_not_fit_is_moved_behind_the_end(run, trainer, monkeypatch):
    with monkeypatch.context() as patch:
        Simulated(patch, validation=12.0, compiling=0.0)
        result = trainer(hours(100, n_evals=50), run / "validation").run()
        assert len(table(run / "validation", "eval")) == 7  # and then 9 s are left
        assert 99 <= sum(result["seconds"].values()) <= 100
        assert result["val"]["n_tokens"] > 0
    Simulated(monkeypatch, saving=20.0, compiling=0.0)
    result = trainer(hours(100, n_evals=1)).run()
    assert result["seconds"]["checkpoint"] == 20.0  # one; the next was due with 20 s left
    assert 99 <= sum(result["seconds"].values()) <= 100
    assert not (run / "checkpoints").exists()  # weights and result are enough
    assert (run / "model.safetensors").exists()


def test_resumed_clock_counts_lost_work_but_not_the_pause(run, trainer, monkeypatch):
    clock = Simulated(monkeypatch, saving=0.0)
    first = trainer(hours(100, checkpoint_minutes=0.4, n_evals=1))
    first.must_stop = lambda: give_up() if first.state.step == 40 else None
    with pytest.raises(SystemExit):
        first.run()
    first.saver.wait()
    saved = int(checkpoint.newest_valid(run / "checkpoints").stem)
    assert 0 < saved < 40
    clock.restart(run, 10.0)
    result = trainer(hours(100, n_evals=1)).run()
    seconds = result["seconds"]
    assert seconds["lost"] == 40 - saved
    assert seconds["compile"] == 22.0
    assert seconds["training"] == result["n_steps"] - 2 == 100 - 22 - (40 - saved)
    assert sum(seconds.values()) == 100
    assert f"went back to step {saved}: {40.0 - saved} s since then are lost" in events(run)


@pytest.mark.parametrize(
    ("stop_at", "is_cached", "compiles"),
    [(50, False, True), (80, False, False), (80, True, True), (85, True, False)],
)
def test_run_resumed_near_its_deadline_compiles_only_if_that_fits(
    run, trainer, monkeypatch, stop_at, is_cached, compiles
):
    clock = Simulated(monkeypatch)
    stop_after(trainer(hours(100, n_evals=1)), stop_at)
    if not is_cached:
        shutil.rmtree(run / "compiled")
    clock.restart(run, (3.0 if is_cached else 10.0) if compiles else 0.0)
    result = trainer(hours(100, n_evals=1)).run()
    assert result["is_compiled"] is compiles
    assert 97 <= sum(result["seconds"].values()) <= 100
    assert clock.lrs[-1] == pytest.approx(0.1)


def test_open_phase_counts_up_to_the_last_write(run, trainer):
    stop_after(trainer(SHORT), 3)
    runs.write_atomic(run / "compiled" / "graph", "")
    for path in run.rglob("*"):
        os.utime(path, (0, 1060) if "compiled" in path.parts else (0, 1000))
    assert trainer(SHORT)._logged_seconds() == pytest.approx(table(run).seconds.iloc[-1] + 60)


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
def test_bad_step_takes_no_gradient_and_is_counted(run, trainer, monkeypatch, value):
    break_steps(monkeypatch, lambda n: n in (0, 5, 6, 9), value)
    result = trainer(SHORT).run()
    assert result["n_skipped"] == 4 and result["n_rollbacks"] == 0
    good = [step for step in range(1, 21) if step - 1 not in (0, 5, 6, 9)]
    assert table(run).step.tolist() == good and np.isfinite(table(run).loss).all()
    assert sum("took no gradient: loss" in e for e in events(run)) == 4


def test_several_bad_steps_go_back_to_the_checkpoint_with_other_data(run, trainer, monkeypatch):
    stop_after(trainer(SHORT, n_evals=1), 8)
    second = trainer(SHORT, n_evals=1)
    n_drawn = 12 - 8 + MAX_BAD_STEPS  # after the checkpoint, before going back
    break_steps(monkeypatch, lambda n: 4 <= n < 4 + MAX_BAD_STEPS)
    drawn, batch = [], data.Batches.batch
    note = lambda self, step, **where: drawn.append(step) or batch(self, step, **where)  # noqa: E731
    monkeypatch.setattr(data.Batches, "batch", note)
    result = second.run()
    assert result["n_rollbacks"] == 1 and result["n_skipped"] == MAX_BAD_STEPS
    assert table(run).step.tolist() == list(range(1, 21))  # each once
    n_steps = n_drawn + 12
    assert drawn[:n_steps] == list(range(8, 8 + n_steps))  # never the same again
    assert second.state.data_step == 8 + n_steps  # nor after a crash
    assert any(e.startswith("went back to step 8") for e in events(run))


def test_run_that_stays_bad_ends_with_a_verdict(make_run, monkeypatch, capsys):
    break_steps(monkeypatch, lambda n: n >= 5)
    run = make_run(SHORT)
    assert main(run) == 2
    error = capsys.readouterr().err
    assert "not finite, even after going back" in error
    assert f"Lower lr (now {FP32.lr})" in error
    assert not (run / "result.json").exists()
    kept = torch.load(checkpoint.newest_valid(run / "checkpoints"), weights_only=True)
    assert all(w.isfinite().all() for w in kept["model"].values())
    monkeypatch.setattr(checkpoint, "newest_valid", lambda _: None)  # nor any checkpoint left
    with pytest.raises(ValueError, match="even after going back"):
        Trainer(make_run(SHORT)).run()


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(run, trainer):
    config = override(SHORT, micro_batch=9, grad_accum=2, budget_steps=5)  # 9, 5, 3
    small, big = (trainer(config, run / name) for name in ("small", "big"))
    small.state.micro_batch = 3  # 18 sequences in small pieces from the start
    small.run()
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
    assert [e for e in events(big.path) if said in e] == [f"{said} 5", f"{said} 3"]
    assert_same_run(big.path, small.path)
    never = trainer(config, run / "never")
    never.model.forward = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    with pytest.raises(ValueError, match=r"micro_batch=1 does not fit .* choose a smaller"):
        never.run()


def test_full_disk_costs_checkpoints_and_not_the_run(run, trainer, undisturbed, limit_files):
    """Nothing can be written in the middle third of the run: no checkpoint, no metrics.

    A disk that is full at the start is an error.
    """
    ours = trainer(LONG)
    limit_files(1000)
    with pytest.raises(ValueError, match=r"File too large.*free some space and run again"):
        ours.run()
    limit_files()
    ours.must_stop = lambda: limit_files(10) if 20 <= ours.state.step < 40 else limit_files()
    assert ours.run()["n_steps"] == 60
    assert_same_weights(run, undisturbed)


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


def test_twenty_steps_reproduce_the_stored_loss_curve(make_run, tmp_path):
    """Stored by running this test with the file absent, then looking at it."""
    (tmp_path / "text.txt").write_text(fixed_text())
    text = {"corpus": str(tmp_path / "text.txt"), "tokenizer": "bpe", "bpe_vocab_size": 512}
    prepare.prepare(DataConfig(**text, test_size=0.1), tmp_path / "tokens")
    runs.create_run(tmp_path / "run", SMOKE.model, FP32, tmp_path / "tokens")
    Trainer(tmp_path / "run").run()
    found = losses(tmp_path / "run")
    golden = Path(__file__).with_name("golden.json")
    if not golden.exists():
        golden.write_text(json.dumps([round(loss, 6) for loss in found]) + "\n")
        pytest.fail("stored a new loss curve; look at it and commit it")
    assert found == pytest.approx(json.loads(golden.read_text()), rel=1e-4)


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
    result, reference = runs.read_result(run), runs.read_result(plain)
    assert not result["is_compiled"]
    assert result["seconds"]["compile"] > reference["seconds"]["compile"]
    assert losses(run) == losses(plain)


def test_error_in_the_first_step_that_is_not_the_compilers_comes_back(trainer):
    run = trainer(SHORT, compile=True)
    run.model.forward = lambda *_: {}["nothing"]
    with pytest.raises(KeyError, match="nothing"):
        run.run()


@pytest.mark.parametrize("budget", [{"budget_hours": 1.0}, {"budget_steps": 20}])
def test_run_against_the_clock_compiles_for_itself_alone(run, trainer, monkeypatch, budget):
    used, cache = [], run / "compiled"
    monkeypatch.setattr(devices, "use_compile_cache", used.append)
    config = override(SHORT, compile=True, **budget)
    stop_after(trainer(config), 2)
    cache.mkdir()
    last = trainer(config)
    assert used == [cache if "budget_hours" in budget else None]
    last.budget.next_progress = lambda *_, before: None if before == 1.0 else 1.0
    last.run()
    assert used == 2 * used[:1] and not cache.exists()


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
    assert losses(first) != losses(second) == losses(alone)


MISTAKES = {
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
