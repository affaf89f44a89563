"""Starting, watching, interrupting and attaching to training processes."""

import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from llmlib import checkpoint, launch, locks, plots, runs
from llmlib.config import override
from llmlib.tests.conftest import FP32

ENDLESS = override(FP32, budget_steps=10**6, checkpoint_minutes=0.01)
SHORT = override(FP32, budget_steps=5, eval_all=False)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.02)


class Front(SimpleNamespace):
    """A notebook's front end with a person at it."""

    def get_parent(self):
        return {"content": {"allow_stdin": True}}


def test_notebook_sees_one_line_and_one_curve_updated_in_place(make_run, monkeypatch):
    run, shown = make_run(SHORT), []

    def display(what, **options):
        shown.append(what)
        return SimpleNamespace(update=lambda what, **_: shown.append("update"))

    monkeypatch.setattr(plots, "get_ipython", Front)
    monkeypatch.setattr(launch, "display", display)
    monkeypatch.setattr(launch, "CURVE_SECONDS", 0.0)
    result = launch.run_training(run)
    assert result["n_steps"] == 5 and result == runs.read_result(run)
    assert [type(what).__name__ for what in shown if what != "update"] == ["dict", "Figure"]
    assert shown.count("update") > 0
    monkeypatch.setattr(launch, "start", None)  # calling it would fail
    assert launch.run_training(run) == result
    launch.run_many([run])
    launch.run_many([])


def test_mistake_is_the_readers_and_other_ends_show_this_attempts_log(make_run, monkeypatch):
    run = make_run(SHORT)
    (run / "train.log").write_text("error: yesterday's\n")
    said = "print('error: lr=-1 is not positive', file=log); log.flush(); "
    for end, error, message in (
        (said + "sys.exit(2)", ValueError, "^lr=-1 is not positive$"),
        (said + "sys.exit(3)", RuntimeError, r"(?s)status 3; .*train\.log:.*lr=-1 is not positive"),
        ("os.kill(os.getpid(), 9)", RuntimeError, r"(?s)killed; often because memory.*no output"),
    ):
        code = f"import os, sys; log = open({str(run / 'train.log')!r}, 'a'); {end}"

        def start(*_, code=code, **__):
            return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)

        monkeypatch.setattr(launch, "start", start)
        with pytest.raises(error, match=message):
            launch.run_training(run)


def test_interrupting_the_cell_saves_the_run_first(make_run):
    run = make_run(ENDLESS)

    def press_ctrl_c_once_it_trains():
        while runs.read_metrics(run, "step").empty:
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=press_ctrl_c_once_it_trains, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        launch.run_training(run)
    assert locks.lock_owner(run) is None
    newest = int(checkpoint.newest_valid(run / "checkpoints").stem)
    assert newest == runs.read_metrics(run, "step").step.max()
    assert "the watching process is gone: saved and stopped" in launch.log_tail(run)


def test_launching_again_attaches_to_a_run_that_is_still_there(make_run, capsys, monkeypatch):
    run, polls = make_run(SHORT), []

    def lock_owner(run):  # until it has finished
        polls.append(run)
        if len(polls) == 3:
            runs.write_json(run / "result.json", {"n_steps": 5})
        return "process 1 on here"

    monkeypatch.setattr(launch.locks, "lock_owner", lock_owner)
    assert launch.run_training(run) == {"n_steps": 5}
    assert capsys.readouterr().out.count("attached to process 1 on here") == 3


def test_many_runs_are_trained_and_each_failure_stands_in_its_own_log(
    make_run, capsys, monkeypatch
):
    monkeypatch.setattr(runs, "n_cores", lambda: 2)
    good = [make_run(SHORT) for _ in range(2)]
    bad, broken = make_run(override(FP32, lr=1e30, grad_clip=1e30)), make_run(SHORT)
    (broken / "checkpoints").write_text("in the way")
    launch.run_many([good[0], bad, broken, good[1]])
    assert [runs.read_result(run)["n_steps"] for run in good] == [5, 5]
    assert runs.read_result(bad) is None
    assert capsys.readouterr().out.endswith("2/4 runs done")
    assert "error: losses at step" in launch.log_tail(bad, n_lines=1)
    assert "checkpoint could not be saved" in launch.log_tail(broken, n_lines=1)


def test_only_usable_cards_are_counted_and_a_stopped_job_has_time_to_save(make_run, monkeypatch):
    started, run = [], make_run(SHORT)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    for module in (torch.accelerator, torch.cuda):  # a driver too old for torch still counts them
        monkeypatch.setattr(module, "device_count", lambda: 8)

    def popen(command, env, **_):
        started.append((command, env))
        raise InterruptedError

    monkeypatch.setattr(subprocess, "Popen", popen)
    for n_processes in (None, 2):
        with pytest.raises(InterruptedError):
            launch.run_training(run, n_processes=n_processes)
    (one, _), (two, env) = started
    assert "torch.distributed.run" not in one and "--nproc-per-node=2" in two
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 120


def test_progress_says_where_a_run_is(make_run):
    run = make_run()
    assert launch.progress_line(run).startswith("starting")
    row = {"step": 5, "progress": 0.5, "loss": 3.25, "tokens_per_s": 12_345.6, "mfu": None}
    runs.MetricLog(run).write("step", **row, seconds_left=3723.0)
    line = launch.progress_line(run)
    for part in ("██████████░", " 50% ", "step 5", "3.250", "12,346", "MFU n/a", "1:02:03 left"):
        assert part in line
