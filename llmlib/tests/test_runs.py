import json

import pandas as pd
import pytest

from llmlib import runs


def test_record_claims_its_config_and_refuses_another(tmp_path):
    runs.open_record("a", {"lr": 0.1, "betas": (0.9, 0.95)}, scale="smoke", runs_dir=tmp_path)
    runs.open_record("a", {"lr": 0.1, "betas": (0.9, 0.95)}, scale="smoke", runs_dir=tmp_path)
    before = (tmp_path / "a" / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"lr: 0\.1 there, 0\.2 here.*choose another run_name"):
        runs.open_record("a", {"lr": 0.2, "betas": (0.9, 0.95)}, scale="smoke", runs_dir=tmp_path)
    assert (tmp_path / "a" / "config.json").read_bytes() == before


def test_tables_and_values_are_computed_once(tmp_path):
    record = runs.open_record("a", {}, scale="smoke", runs_dir=tmp_path)
    table = record.table("t", lambda: pd.DataFrame({"x": [1.5, 2.0]}))
    assert record.table("t", lambda: pytest.fail("computed again")).equals(table)
    assert record.value("v", lambda: {"peak": 1.0}) == {"peak": 1.0}
    assert record.value("v", lambda: pytest.fail("computed again")) == {"peak": 1.0}


def test_a_failed_computation_leaves_nothing_behind(tmp_path):
    record = runs.open_record("a", {}, scale="smoke", runs_dir=tmp_path)
    with pytest.raises(RuntimeError):
        record.table("t", lambda: (_ for _ in ()).throw(RuntimeError("no")))
    assert not record.is_done
    assert sorted(p.name for p in record.path.iterdir()) == ["config.json", "environment.json"]


def test_missing_earlier_record_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"run 01_data_prep first: .*--only 01_data_prep"):
        runs.load_summary("01_data_prep", scale="smoke", runs_dir=tmp_path)


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    runs.write_json(path, {"a": 1})

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(runs.os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        runs.write_json(path, {"a": 2})
    assert runs.read_json(path) == {"a": 1}


def test_metrics_survive_a_line_that_a_crash_cut_short(tmp_path):
    good = json.dumps({"kind": "step", "step": 1, "loss": 2.0})
    (tmp_path / "metrics.jsonl").write_text(good + "\n" + good[:17])
    assert runs.read_metrics(tmp_path).to_dict("records") == [
        {"kind": "step", "step": 1, "loss": 2.0}
    ]


def test_environment_names_versions_and_device():
    environment = runs.environment()
    assert {"torch", "python", "device", "commit", "n_cores"} <= environment.keys()
