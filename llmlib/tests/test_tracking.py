"""Trackers, read back with TensorBoard's own reader."""

import subprocess
import sys

import pytest

from llmlib.tracking import open_tracker


def step(number, loss):
    place = {"kind": "step", "step": number, "tokens": 64 * number, "seconds": 0.5 * number}
    return place | {"loss": loss, "lr": 1e-3, "mfu": None}


def event(number, text):
    return {"kind": "event", "step": number, "tokens": 64 * number, "seconds": 1.0, "text": text}


def read(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(run / "tensorboard"))
    return reader.Reload()


def losses(run):
    return [(point.step, point.value) for point in read(run).Scalars("step/loss")]


def test_numbers_become_curves_and_events_text(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = open_tracker("tensorboard", tmp_path)
    tracker.log(event(0, "a beginning"))
    for number in (1, 2, 3):
        tracker.log(step(number, 4.0 / number))
    tracker.log({"kind": "eval", "step": 3, "tokens": 192, "val_loss": 2.5, "val_sha256": "0a"})
    tracker.close()
    assert losses(tmp_path) == [(n, pytest.approx(4.0 / n)) for n in (1, 2, 3)]
    reader = read(tmp_path)
    tags = {"step/tokens", "step/seconds", "step/loss", "step/lr", "eval/tokens", "eval/val_loss"}
    assert set(reader.Tags()["scalars"]) == tags
    [text] = reader.Tensors("event/text_summary")
    assert text.tensor_proto.string_val == [b"a beginning"]


@pytest.mark.parametrize("reopened", [True, False], ids=["another-process", "the-same-process"])
def test_a_run_that_went_back_has_every_step_once(tmp_path, reopened):
    pytest.importorskip("tensorboard")
    tracker = open_tracker("tensorboard", tmp_path)
    for number in range(1, 7):
        tracker.log(step(number, 9.0))
    if reopened:
        tracker.close()
        tracker = open_tracker("tensorboard", tmp_path)
    tracker.log(event(3, "went back to step 3"))
    for number in range(4, 9):
        tracker.log(step(number, 1.0))
    tracker.close()
    assert losses(tmp_path) == [(n, 9.0) for n in (1, 2, 3)] + [(n, 1.0) for n in range(4, 9)]


def test_a_process_that_ends_with_an_error_has_written_its_last_rows(tmp_path):
    pytest.importorskip("tensorboard")
    script = f"""
from pathlib import Path
from llmlib.tracking import open_tracker
open_tracker("tensorboard", Path({str(tmp_path)!r})).log({step(1, 2.0)!r})
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 3
    assert losses(tmp_path) == [(1, 2.0)]


def test_no_tracker_leaves_nothing(tmp_path):
    tracker = open_tracker(None, tmp_path)
    tracker.log(step(1, 2.0))
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused_with_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"'wandb' is unknown.*tensorboard"):
        open_tracker("wandb", tmp_path)


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[tensorboard\]"'):
        open_tracker("tensorboard", tmp_path)
