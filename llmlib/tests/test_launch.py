"""Starting, watching and interrupting training processes."""

import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from llmlib import devices, launch, plots, runs
from llmlib.config import override
from llmlib.tests.conftest import FP32, newest_checkpoint

ENDLESS = override(FP32, budget_steps=10**6, checkpoint_minutes=0.01)
SHORT = override(FP32, budget_steps=5, eval_all=False)


def test_notebook_sees_one_bar_and_one_curve_updated_in_place(make_run, monkeypatch, capsys):
    run, drawn = make_run(SHORT), []
    monkeypatch.setattr(plots, "is_attended", lambda: True)
    monkeypatch.setattr(launch, "display", lambda *_, **__: SimpleNamespace(update=drawn.append))
    monkeypatch.setitem(launch.OFTEN, "mininterval", 0.0)
    result = launch.run_training(run)
    assert result["n_steps"] == 5 and result == runs.read_result(run)
    assert drawn and {type(figure) for figure in drawn} == {Figure}
    first, *_, last = capsys.readouterr().err.strip().split("\r")
    assert "starting" in first
    for part in ("100% ██", "step 5 | loss ", "tokens/s | MFU n/a | 0:00:00 left"):
        assert part in last
    monkeypatch.setattr(launch, "start", None)  # calling it would fail
    assert launch.run_training(run) == result
    assert "100% ██" in capsys.readouterr().err
    launch.run_many([run])
    launch.run_many([])


def test_mistake_is_the_readers_and_other_ends_show_this_attempts_log(make_run, monkeypatch):
    run = make_run(SHORT)
    (run / "train.log").write_text("error: yesterday's\n")
    for end, error, message in (
        ("echo error: lr=-1; exit 2", ValueError, r"(?s)status 2; .*log:\nerror: lr=-1$"),
        ("echo error: no loss; exit 3", RuntimeError, r"(?s)status 3; .*log:\nerror: no loss$"),
        ("kill -9 $$", RuntimeError, r"(?s)killed; often because memory.*log:\n\(no output\)$"),
    ):

        def start(*_, end=end, **__):
            with open(run / "train.log", "a") as log:
                return subprocess.Popen(end, shell=True, stdin=subprocess.PIPE, stdout=log)

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
    assert newest_checkpoint(run) == runs.read_metrics(run, "step").step.max()
    assert "the watching process is gone: saved and stopped" in launch.log_tail(run)


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
    assert " 2/4 " in capsys.readouterr().err.rsplit("\r", 1)[1]
    assert "error: losses at step" in launch.log_tail(bad, n_lines=1)
    assert "checkpoint could not be saved" in launch.log_tail(broken, n_lines=1)


def test_a_worker_that_was_killed_is_told_and_its_runs_have_not_failed(make_run, monkeypatch):
    start = launch.start

    def start_and_kill(*arguments, **how):
        process = start(*arguments, **how)
        process.kill()
        return process

    monkeypatch.setattr(launch, "start", start_and_kill)
    with pytest.raises(RuntimeError, match=r"stopped \(status -9\); the same cell goes on"):
        launch.run_many([make_run(SHORT)])


@pytest.mark.parametrize(("n_usable", "asked", "n"), [(0, None, 1), (2, None, 2), (0, 2, 2)])
def test_each_usable_card_has_a_process_and_a_stopped_job_time_to_save(
    make_run, monkeypatch, n_usable, asked, n
):
    monkeypatch.setattr(devices, "n_accelerators", lambda: n_usable)

    def popen(command, env, **_):
        assert (
            ("torch.distributed.run" in command) == (f"--nproc-per-node={n}" in command) == (n > 1)
        )
        assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 120
        raise InterruptedError

    monkeypatch.setattr(launch, "Popen", popen)
    with pytest.raises(InterruptedError):
        launch.run_training(make_run(SHORT), n_processes=asked)
