import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from importlib import metadata

import filelock
import pandas as pd
import pytest
import torch

from llmlib import runs
from llmlib.tests.conftest import SMOKE


def test_record_claims_its_config_and_refuses_another_one_or_format(tmp_path):
    path = tmp_path / "a"
    about = {"lr": 0.1, "betas": (0.9, 0.95), "data": {"a": 1}, "measured": {"peak": 1.0}}
    runs.Record(path, about)
    before = (path / "config.json").read_bytes()
    runs.Record(path, about | {"measured": {"peak": 2.0}})
    for other, shown in ({"lr": 0.2}, "lr: 0.1 there, 0.2 here"), ({"x": 1}, "x: None there"):
        with pytest.raises(ValueError, match=rf"run a in .*{shown}.*choose another run_name"):
            runs.Record(path, about | other)
    runs.write_json(path / "result.json", {"val": {}})
    with pytest.raises(ValueError, match=r"A finished run takes no more hours: its learning rate"):
        runs.Record(path, about | {"lr": 0.2})
    assert (path / "config.json").read_bytes() == before
    (path / "config.json").write_text('{"lr": 0.1}')
    with pytest.raises(ValueError, match=r"run a in .* has format 1, this version writes 2"):
        runs.Record(path, about)


def test_cores_are_those_of_the_containers_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert runs.n_cores(tmp_path / "none") == 64
    for text, n in ("max 100000\n", 64), ("200000 100000\n", 2), ("50000 100000\n", 1):
        (tmp_path / "cpu.max").write_text(text)
        assert runs.n_cores(tmp_path) == n
        old = tmp_path / "version 1"
        (old / "cpu").mkdir(parents=True, exist_ok=True)
        for name, value in zip(("quota", "period"), text.replace("max", "-1").split(), strict=True):
            (old / "cpu" / f"cpu.cfs_{name}_us").write_text(f"{value}\n")
        assert runs.n_cores(old) == n


def test_environment_has_facts_and_remarks_on_what_makes_a_measurement_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for n_cores, remarks in (
        (3, []),
        (64, ["torch uses 3 threads on 64 cores; see OMP_NUM_THREADS."]),
    ):
        monkeypatch.setattr(runs, "n_cores", lambda n=n_cores: n)
        found = runs.environment()
        assert (found["n_cores"], found["n_threads"], found["remarks"]) == (n_cores, 3, remarks)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    assert runs.environment()["remarks"][-1].startswith("torch 2.6.0+cu124 is loaded; llmlib was")
    assert {"device", "processor", "commit", "file_system", "torch"} <= found.keys()
    (odd := tmp_path / "it's").mkdir()
    names = {runs.environment(folder)["file_system"] for folder in (tmp_path, odd)}
    assert len(names) == 1
    assert found["ram_bytes"] > 2**28
    required = {"torch", "jupyter_client", "ipython", "pytest", "transformers"}
    assert all(found["packages"][name] == metadata.version(name) for name in required)


def test_tables_and_values_are_computed_once_and_failures_leave_nothing_behind(tmp_path):
    record = runs.Record(tmp_path, {})
    with pytest.raises(ZeroDivisionError):
        record.cached_table("t", lambda: 1 / 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "environment.json"]
    table = record.cached_table("t", lambda: pd.DataFrame({"x": [1.5, 0.1 + 0.2]}))
    assert record.cached_table("t", lambda: pytest.fail("computed again")).equals(table)
    assert record.cached_json("v", lambda: {"peak": 1.0}) == {"peak": 1.0}
    assert record.cached_json("v", lambda: pytest.fail("computed again")) == {"peak": 1.0}


@pytest.mark.parametrize(("error", "kept"), [(errno.ENOSPC, 1), (errno.EINVAL, 2)])
def test_failed_write_keeps_the_old_file_and_a_missing_sync_is_no_failure(
    tmp_path, monkeypatch, error, kept
):
    path = tmp_path / "x.json"
    runs.write_json(path, 1)

    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(runs.os, "fsync", refuse)
    with pytest.raises(OSError, match="No space") if kept == 1 else contextlib.nullcontext():
        runs.write_json(path, 2)
    assert runs.read_json(path) == kept and [*tmp_path.iterdir()] == [path]


def test_run_is_what_was_asked_and_finds_its_tokens_after_a_move(tmp_path, smoke_tokens):
    tokens, run = tmp_path / "a" / "tokens", tmp_path / "a" / "run"
    tokens.mkdir(parents=True)
    for name in ("manifest.json", "tokenizer.json"):
        (tokens / name).write_bytes((smoke_tokens / name).read_bytes())
    runs.create_run(run, SMOKE.model, SMOKE.train, tokens, peak_flops_per_s=1e12)
    assert str(tmp_path) not in (run / "config.json").read_text()
    (tmp_path / "a").rename(tmp_path / "b")
    about = runs.read_run(tmp_path / "b" / "run")
    assert (about.model, about.train, about.peak_flops_per_s) == (SMOKE.model, SMOKE.train, 1e12)
    assert about.tokens_dir == tmp_path / "b" / "tokens"
    assert (tmp_path / "b" / "run" / "tokenizer.json").exists()


def test_metrics_are_told_apart_by_kind_and_forgotten_when_a_run_goes_back(tmp_path):
    log = runs.MetricLog(tmp_path)
    for step in range(1, 6):
        log.write("step", step=step, loss=1.0)
    log.write("event", step=5, text="something")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "step", "step": 2})[:17])  # cut short by a crash
    assert len(runs.read_metrics(tmp_path)) == 6
    log.drop_after(3)
    assert runs.read_metrics(tmp_path, "step").step.tolist() == [1, 2, 3]
    assert runs.read_metrics(tmp_path, "event").text.tolist() == ["something"]
    assert runs.read_metrics(tmp_path, "step", last=True).step.iloc[-1] == 3
    assert runs.read_metrics(tmp_path / "nothing").empty


def test_tensorboard_gets_a_copy_in_which_a_run_that_went_back_has_every_step_once(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = runs.MetricLog(tmp_path, "tensorboard")
    for step in range(1, 7):
        log.write("step", step=step, loss=9.0, mfu=None)
    log.drop_after(3)
    for step in range(4, 9):
        log.write("step", step=step, loss=1.0, mfu=None)
    reader = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(point.step, point.value) for point in reader.Scalars("step/loss")]
    assert found == [(n, 9.0) for n in (1, 2, 3)] + [(n, 1.0) for n in range(4, 9)]


OWNER = """
import sys, time
from pathlib import Path
from llmlib import runs
with runs.lock(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(600)
"""


def assert_locked(folder, words):
    with pytest.raises(runs.Locked, match=words), runs.lock(folder):
        pass


def test_lock_names_its_owner_and_dies_with_it(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"mine\n"
    assert_locked(tmp_path, f"in use by process {owner.pid} on {socket.gethostname()}")
    owner.kill()
    owner.wait()
    with runs.lock(tmp_path):
        pass


class NoLocks(filelock.FileLock):
    """A lock on a file system that has none: its file is made, and stays empty."""

    def _acquire(self):
        open(self.lock_file, "a").close()
        raise OSError(37, "No locks available")


def test_without_locks_a_file_with_host_and_process_takes_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.filelock, "FileLock", NoLocks)
    with runs.lock(tmp_path):
        name = f"process {os.getpid()} on {socket.gethostname()}"
        assert_locked(tmp_path, rf"{name}; .* rm {tmp_path / 'lock.soft'}")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "lock.soft").write_text(f"{dead.pid}\n{socket.gethostname()}\n")
    with runs.lock(tmp_path):
        pass
