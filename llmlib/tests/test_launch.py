"""Starting, watching, interrupting and attaching to training processes."""

import signal
import threading
import time
from types import SimpleNamespace

import pytest

from llmlib import checkpoint, launch, locks, plots, runs
from llmlib.config import override
from llmlib.tests.conftest import FP32

ENDLESS = override(FP32, budget_steps=10**6, checkpoint_minutes=0.01)
SHORT = override(FP32, budget_steps=5)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.02)


def test_run_is_trained_and_its_result_returned_once(make_run, capsys):
    run = make_run(SHORT)
    result = launch.run_training(run)
    assert result["n_steps"] == 5 and result == runs.read_result(run)
    assert "100%" in capsys.readouterr().out
    metrics = (run / "metrics.jsonl").read_bytes()
    assert launch.run_training(run) == result
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_mistake_is_the_readers_and_other_ends_show_the_log(make_run):
    run = make_run(override(FP32, lr=1e30, grad_clip=1e30))
    with pytest.raises(RuntimeError, match=r"(?s)status 3; .*train\.log.*not finite"):
        launch.run_training(run)
    broken = make_run(SHORT)
    config = runs.read_json(broken / "config.json")
    runs.write_json(broken / "config.json", config | {"tokens_dir": "nowhere"})
    with pytest.raises(ValueError, match="run 01_data_prep first"):
        launch.run_training(broken)


def once_it_trains(run, act):
    """Act when the run has logged a step."""

    def wait():
        while runs.read_metrics(run, "step").empty:
            time.sleep(0.02)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_interrupting_the_cell_saves_the_run_first(make_run):
    run = make_run(ENDLESS)
    once_it_trains(run, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        launch.run_training(run)
    assert locks.lock_owner(run) is None
    newest = int(checkpoint.newest_valid(run / "checkpoints").name)
    assert newest == runs.read_metrics(run, "step").step.max()
    assert "received SIGINT: saved and stopped" in launch.log_tail(run)


def test_run_whose_launcher_is_gone_saves_and_leaves(make_run):
    run = make_run(ENDLESS)
    process = launch.start([run])
    while runs.read_metrics(run, "step").empty:
        assert process.poll() is None, launch.log_tail(run)
        time.sleep(0.02)
    process.stdin.close()
    assert process.wait() == 143
    assert "the watching process is gone: saved and stopped" in launch.log_tail(run)


def test_launching_again_attaches_to_a_run_that_is_still_there(make_run, capsys, monkeypatch):
    run = make_run(SHORT)
    owners = iter(["process 1 on here", "process 1 on here"])
    monkeypatch.setattr(launch.locks, "lock_owner", lambda _: next(owners, None))
    assert launch.run_training(run)["n_steps"] == 5
    assert "attached to process 1 on here" in capsys.readouterr().out


def test_many_runs_are_trained_and_a_failure_keeps_no_other(make_run, capsys):
    good = [make_run(SHORT) for _ in range(3)]
    bad = make_run(override(FP32, lr=1e30, grad_clip=1e30))
    launch.run_many([bad, *good])
    assert [runs.read_result(run)["n_steps"] for run in good] == [5, 5, 5]
    assert runs.read_result(bad) is None
    assert capsys.readouterr().out.endswith("3/4 runs done")


def test_interrupting_many_runs_stops_them_all(make_run):
    many = [make_run(ENDLESS) for _ in range(2)]
    once_it_trains(many[0], lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        launch.run_many(many)
    assert [locks.lock_owner(run) for run in many] == [None, None]


def test_progress_says_where_a_run_is(make_run):
    run = make_run()
    assert launch.progress_line(run).startswith("starting")
    row = {"step": 5, "progress": 0.5, "loss": 3.25, "tokens_per_s": 12_345.6, "mfu": None}
    runs.MetricLog(run).write("step", **row, seconds_left=3723.0)
    line = launch.progress_line(run)
    for part in ("██████████░", " 50% ", "step 5", "3.250", "12,346", "MFU n/a", "1:02:03 left"):
        assert part in line


class Front(SimpleNamespace):
    """A notebook's front end with a person at it, which notes what it is shown."""

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
    launch.run_training(run)
    assert [type(what).__name__ for what in shown if what != "update"] == ["dict", "Figure"]
    assert shown.count("update") > 0
