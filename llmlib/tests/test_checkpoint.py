"""Checkpoints: whole or not there, and the newest whole one is used."""

import pytest
import torch

from llmlib import checkpoint
from llmlib.checkpoint import Saver, newest_valid, restore


def train_a_little(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(32, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(32)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder, *steps, saver=None, **state):
    """Save a trained model at some steps; return what failed at last."""
    saver = saver or Saver(folder)
    for step in steps:
        saver.save(*train_a_little(), {"step": step} | state)
    return saver.wait()


def steps(folder):
    """Everything in a folder: steps, and whatever else is left there."""
    return sorted(p.stem.lstrip("0") for p in folder.iterdir())


def test_restoring_brings_back_weights_optimizer_and_state(tmp_path):
    model, optimizer = train_a_little()
    saver = Saver(tmp_path)
    saver.save(model, optimizer, {"step": 3, "seconds": {"training": 0.1 + 0.2}})
    for p in model.parameters():
        p.data.zero_()  # training goes on while it is written
    assert saver.wait() is None
    other = train_a_little(seed=9)
    state = restore(*other, newest_valid(tmp_path))
    assert state == {"step": 3, "seconds": {"training": 0.1 + 0.2}}
    for ours, theirs in zip(other, train_a_little(), strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-7], lambda raw: raw[:99] + b"." + raw[100:]])
def test_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, damage):
    assert newest_valid(tmp_path) is None
    save(tmp_path, 1, 2)
    newest = newest_valid(tmp_path)
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match="checkpoint 00000002 is skipped"):
        assert newest_valid(tmp_path).stem == "00000001"


def test_the_newest_two_are_kept_and_a_step_saved_again_replaces_the_first(tmp_path):
    save(tmp_path, 98, 99, 100)
    save(tmp_path, 100, n_skipped=1)
    assert steps(tmp_path) == ["100", "99"]
    assert restore(*train_a_little(), newest_valid(tmp_path))["n_skipped"] == 1


@pytest.mark.parametrize("call", ["runs.os.fsync", "runs.os.replace", "checkpoint.hashlib.sha256"])
def test_write_that_dies_leaves_the_old_checkpoint_in_use(tmp_path, monkeypatch, call):
    """Wherever a write ends, what was there before is found again."""
    save(tmp_path, 1)
    (tmp_path / ".00000002.tmp").touch()  # by a signal that let it tidy up nothing
    packed = checkpoint.pack(*train_a_little(), {"step": 2})
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(f"llmlib.{call}", lambda *_: (_ for _ in ()).throw(SystemExit))
        checkpoint.write(tmp_path, 2, packed)
    assert newest_valid(tmp_path).stem == "00000001"
    save(tmp_path, 2)
    assert newest_valid(tmp_path).stem == "00000002"
    assert steps(tmp_path) == ["1", "2"]  # nothing half-written is left


def test_failed_write_is_reported_once_and_the_next_one_works(tmp_path, limit_files):
    saver = Saver(tmp_path)
    save(tmp_path, 1, saver=saver)
    limit_files(4000)
    failure = save(tmp_path, 2, saver=saver)
    limit_files()
    assert "File too large" in str(failure) and saver.wait() is None
    assert steps(tmp_path) == ["1"]
    assert save(tmp_path, 3, saver=saver) is None and newest_valid(tmp_path).stem == "00000003"
