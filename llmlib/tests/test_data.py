"""Batches and windows from token files."""

from __future__ import annotations

import os
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from llmlib import data, prepare, runs
from llmlib.config import DataConfig
from llmlib.data import Batches, TokenFiles
from llmlib.tests.hub_server import write_corpus
from llmlib.tokenizer import load_tokenizer

END = 9  # the end-of-text token of the streams below


def _tokens(folder: Path, *streams: np.ndarray) -> TokenFiles:
    """Write streams as token files."""
    for i, stream in enumerate(streams):
        stream.astype("<u2").tofile(folder / f"{i}.bin")
    names = tuple(f"{i}.bin" for i in range(len(streams)))
    return TokenFiles(folder, names, tuple(map(len, streams)), "<u2")


@pytest.fixture
def counting(tmp_path: Path) -> TokenFiles:
    """Three files of consecutive numbers, so that a token says where it stands."""
    return _tokens(tmp_path, np.arange(0, 1000), np.arange(1000, 1037), np.arange(2000, 5000))


@pytest.fixture(scope="module")
def pajama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hub = write_corpus(tmp_path_factory.mktemp("pajama"), n_shards=4, n_documents=120)
    config = DataConfig(corpus=str(hub), tokenizer="bpe", bpe_vocab_size=300, test_size=0.1)
    prepare.prepare(config, hub / "tokens")
    return hub / "tokens"


# ---------------------------------------------------------------------- batches


def test_targets_are_inputs_one_to_the_right(counting: TokenFiles) -> None:
    inputs, targets = Batches(counting, 32, 4).batch(0)
    assert inputs.shape == targets.shape == (4, 32) and inputs.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)


def test_epoch_uses_every_window_once_and_the_next_in_another_order(counting: TokenFiles) -> None:
    batches = Batches(counting, 32, 1)
    n = batches.n_windows
    assert n == (1000 - 1) // 32 + (37 - 1) // 32 + (3000 - 1) // 32
    first, second = ([int(batches.batch(e * n + i)[0][0, 0]) for i in range(n)] for e in range(2))
    expected = [*range(0, 968, 32), 1000, *range(2000, 4976, 32)]
    assert sorted(first) == sorted(second) == expected
    assert first != second


def test_batch_depends_on_seed_and_step_alone(counting: TokenFiles) -> None:
    one, other = Batches(counting, 32, 5, seed=3), Batches(counting, 32, 5, seed=3)
    shuffled = [other.batch(step)[0] for step in (40, 7, 0, 100)]  # across epochs, out of order
    assert all(
        torch.equal(one.batch(step)[0], inputs)
        for step, inputs in zip((40, 7, 0, 100), shuffled, strict=True)
    )
    assert not torch.equal(one.batch(0)[0], Batches(counting, 32, 5, seed=4).batch(0)[0])


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_a_step_without_overlap(counting: TokenFiles, world_size: int) -> None:
    batches = Batches(counting, 32, 6)
    parts = [batches.batch(11, rank=r, world_size=world_size)[0] for r in range(world_size)]
    assert torch.equal(torch.cat(parts), batches.batch(11)[0])


def test_too_few_tokens_for_a_window_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="32 tokens are too few for one window of 33"):
        Batches(_tokens(tmp_path, np.arange(32)), 32, 1)


def _resident_kib() -> int:
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x]
    return int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_resident_memory_stays_flat_while_a_large_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "0.bin").touch()
    os.truncate(tmp_path / "0.bin", 200_000_000)
    batches = Batches(TokenFiles(tmp_path, ("0.bin",), (100_000_000,), "<u2"), 1023, 256)
    batches.batch(0)
    before = _resident_kib()
    for step in range(1, batches.n_windows // 256):
        batches.batch(step)
    assert _resident_kib() - before < 30_000


def test_prefetched_batches_are_those_read_directly(counting: TokenFiles) -> None:
    batches = Batches(counting, 32, 6)
    ahead = data.prefetch(batches, 5, torch.device("cpu"), rank=1, world_size=2)
    for step, (inputs, targets) in enumerate(islice(ahead, 30), start=5):
        expected = batches.batch(step, rank=1, world_size=2)
        assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])
    n_threads = threading.active_count()
    ahead.close()
    assert threading.active_count() == n_threads - 1


def test_error_while_prefetching_reaches_the_reader(tmp_path: Path) -> None:
    batches = Batches(_tokens(tmp_path, np.arange(100)), 32, 1)
    ahead = data.prefetch(batches, 0, torch.device("cpu"))
    next(ahead)
    os.unlink(tmp_path / "0.bin")
    with pytest.raises(FileNotFoundError):
        list(ahead)
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetched_batches_arrive_whole_on_the_device(counting: TokenFiles) -> None:
    batches = Batches(counting, 32, 6)
    for step, (inputs, _) in enumerate(islice(data.prefetch(batches, 0, torch.device("cuda")), 50)):
        assert torch.equal(inputs.cpu(), batches.batch(step)[0])


# ---------------------------------------------------------------------- held-out splits


def _prepared(folder: Path, **streams: np.ndarray) -> Path:
    """Write a folder of tokens with one file per split."""
    for name, stream in streams.items():
        np.asarray(stream).astype("<u2").tofile(folder / f"{name}.bin")
    splits = {n: [{"file": f"{n}.bin", "n_tokens": len(s)}] for n, s in streams.items()}
    manifest = {"splits": splits, "dtype": "<u2", "tokenizer": {"end_of_text": END}}
    runs.write_json(folder / "manifest.json", manifest)
    return folder


def test_all_windows_of_a_heldout_split_follow_each_other(tmp_path: Path) -> None:
    windows = data.eval_windows(_prepared(tmp_path, val=np.arange(111)), "val", 10)
    assert windows.tolist() == [list(range(s, s + 11)) for s in range(0, 110, 10)]


def test_fewer_windows_are_spread_over_the_split(tmp_path: Path) -> None:
    windows = data.eval_windows(_prepared(tmp_path, val=np.arange(1001)), "val", 10, 5)
    assert windows[:, 0].tolist() == [0, 250, 500, 740, 990]


def test_heldout_split_without_a_window_is_refused(pajama: Path) -> None:
    with pytest.raises(ValueError, match=r"too few for one window of 1000001; bring more text"):
        data.eval_windows(pajama, "val", 1_000_000)


def test_documents_of_a_heldout_split_add_up_to_it(pajama: Path) -> None:
    [shard] = data.load_manifest(pajama)["splits"]["val"]
    found = list(data.documents(pajama, "val"))
    whole = data.open_split(pajama, "val").read(0)
    assert np.array_equal(np.concatenate([tokens for _, tokens in found]), whole)
    # Documents begin with the number of their shard; odd ones are Book, even ones C4.
    text = load_tokenizer(pajama / "tokenizer.json").decode
    for (domain, n_bytes), tokens in found:
        is_book = int(text(tokens.tolist())[0]) % 2
        assert domain == ("RedPajamaBook" if is_book else "RedPajamaC4")
        assert n_bytes == len(text(tokens[:-1].tolist()).encode())
    with pytest.raises(ValueError, match="split='train' does not list its documents"):
        list(data.documents(pajama, "train"))
    assert sum(d["documents"] for d in shard["domains"].values()) == len(found)


def test_domain_windows_are_windows_of_the_domain_alone(pajama: Path) -> None:
    windows = data.domain_windows(pajama, "val", 16)
    assert set(windows) == {"RedPajamaC4", "RedPajamaBook"}
    for domain, found in windows.items():
        parts = [t for (name, _), t in data.documents(pajama, "val") if name == domain]
        stream = np.concatenate(parts)
        n = (len(stream) - 1) // 16
        assert np.array_equal(found[:, :-1].ravel(), stream[: n * 16])
        assert np.array_equal(found[:, 1:].ravel(), stream[1 : n * 16 + 1])
    assert data.domain_windows(pajama, "val", 10**6) == {}


def test_unknown_split_is_named_with_the_choices(pajama: Path) -> None:
    with pytest.raises(ValueError, match=r"split='dev' is not .* train, val, validation, test"):
        data.open_split(pajama, "dev")


def test_missing_manifest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run 01_data_prep first"):
        data.load_manifest(tmp_path)


def test_documents_in_two_splits_are_counted(pajama: Path, tmp_path: Path) -> None:
    assert data.shared_documents(pajama)["n_shared"].tolist() == [0] * 6
    val, train = [1, 2, END, 3, END], [3, END, 3, END, 2, END, 1, 2, 3, END]
    found = data.shared_documents(_prepared(tmp_path, train=train, val=val, test=[3, END]))
    expected = [("train", "val", 1), ("train", "test", 1), ("val", "test", 1)]
    assert list(found.itertuples(index=False, name=None)) == expected
