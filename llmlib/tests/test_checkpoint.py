"""Checkpoints: whole or not there, and the newest whole one is used."""

import errno
import os
import resource
import stat

import pytest
import torch

from llmlib import checkpoint, runs
from llmlib.checkpoint import Saver, newest_valid, restore
from llmlib.config import ModelConfig, TrainConfig
from llmlib.model import build_model
from llmlib.optim import build_optimizer

CONFIG = ModelConfig(vocab_size=64, seq_len=8, n_layer=1, n_head=1, d_model=16, d_ff=32)


def train_a_little(seed=0):
    model = build_model(CONFIG, seed=seed)
    optimizer = build_optimizer(model, TrainConfig())
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(seed))
    for _ in range(2):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder, *steps, saver=None, **state):
    """Save a trained model at some steps; return it, its optimizer and what failed at last."""
    model, optimizer = train_a_little()
    saver = saver or Saver(folder)
    for step in steps:
        saver.save(model, optimizer, {"step": step} | state)
    saver.wait()
    return model, optimizer, saver.take_failure()


def names(folder):
    """Everything in a folder: steps, and whatever else is left there."""
    return sorted(p.name.lstrip("0") for p in folder.iterdir())


def test_restoring_brings_back_weights_optimizer_and_state(tmp_path):
    model, optimizer, _ = save(tmp_path, 3, seconds={"training": 0.1 + 0.2})
    other = build_model(CONFIG, seed=9)
    its_optimizer = build_optimizer(other, TrainConfig())
    state = restore(other, its_optimizer, newest_valid(tmp_path))
    assert state == {"step": 3, "seconds": {"training": 0.1 + 0.2}}
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    ours, theirs = optimizer.state_dict()["state"], its_optimizer.state_dict()["state"]
    assert len(theirs) == len(list(model.parameters()))
    for index, values in ours.items():
        assert set(values) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(values[name], theirs[index][name]) for name in values)


def test_training_goes_on_without_changing_what_is_being_saved():
    model, optimizer = train_a_little()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    weights, _ = checkpoint.snapshot(model, optimizer)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def other_step(path):
    path.write_text(path.read_text().replace('"step": 2', '"step": 9'))


DAMAGE = {
    "truncated weights": ("weights.safetensors", truncate),
    "flipped bit in the weights": ("weights.safetensors", flip_a_bit),
    "flipped bit in the optimizer": ("optimizer.safetensors", flip_a_bit),
    "missing optimizer": ("optimizer.safetensors", lambda path: path.unlink()),
    "truncated state": ("state.json", truncate),
    "missing state": ("state.json", lambda path: path.unlink()),
    "changed state": ("state.json", other_step),
    "state of another kind": ("state.json", lambda path: path.write_text("[1]")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, damage):
    assert newest_valid(tmp_path) is None
    save(tmp_path, 1, 2)
    file, harm = DAMAGE[damage]
    harm(tmp_path / "00000002" / file)
    with pytest.warns(UserWarning, match="checkpoint 00000002 is skipped"):
        assert newest_valid(tmp_path).name == "00000001"


def test_the_newest_two_are_kept_and_a_step_saved_again_replaces_the_first(tmp_path):
    save(tmp_path, 98, 99, 100)
    save(tmp_path, 100, n_skipped=1)
    assert names(tmp_path) == ["100", "99"]
    assert runs.read_json(newest_valid(tmp_path) / "state.json")["state"]["n_skipped"] == 1


@pytest.mark.parametrize("call", ["save_file", "sync", "_hashes", "os.replace"])
def test_write_that_dies_leaves_the_old_checkpoint_in_use(tmp_path, monkeypatch, call):
    """Wherever a write ends, what was there before is found again."""
    save(tmp_path, 1)
    (tmp_path / ".killed" / "new").mkdir(parents=True)  # by a signal that let it tidy up nothing
    tensors = checkpoint.snapshot(*train_a_little())
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(f"llmlib.checkpoint.{call}", lambda *_: (_ for _ in ()).throw(SystemExit))
        checkpoint.write(tmp_path, *tensors, {"step": 2})
    assert newest_valid(tmp_path).name == "00000001"
    save(tmp_path, 2)
    assert newest_valid(tmp_path).name == "00000002"
    assert names(tmp_path) == ["1", "2"]  # nothing half-written is left


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    fsync = checkpoint.os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", refuse_folders)
    assert save(tmp_path, 3)[2] is None and newest_valid(tmp_path)


def test_failed_write_is_reported_once_and_the_next_one_works(tmp_path):
    """The operating system refuses to write more, as on a full disk."""
    saver = Saver(tmp_path)
    save(tmp_path, 1, saver=saver)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        *_, failure = save(tmp_path, 2, saver=saver)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in str(failure) and saver.take_failure() is None
    assert names(tmp_path) == ["1"]
    *_, failure = save(tmp_path, 3, saver=saver)
    assert failure is None and newest_valid(tmp_path).name == "00000003"
