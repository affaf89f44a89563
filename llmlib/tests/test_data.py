"""Batches and windows from token files."""

import os
import random
import socket
import threading
from collections import defaultdict
from itertools import islice
from pathlib import Path
from string import ascii_letters

import numpy as np
import pytest
import tiktoken
import torch

from llmlib import data, prepare, runs
from llmlib.config import DataConfig
from llmlib.data import END_OF_TEXT, MARK, Batches, DocumentEncoder, TokenFiles, load_tokenizer
from llmlib.tests.hub_server import layout, texts, write

END = 9  # the end-of-text token of the streams below


def _prepared(folder: Path, **streams: object) -> Path:
    """Write a folder of tokens with one file per split."""
    for name, stream in streams.items():
        np.asarray(stream).astype("<u2").tofile(folder / f"{name}.bin")
    splits = {n: [{"file": f"{n}.bin", "n_tokens": len(s)}] for n, s in streams.items()}
    manifest = {"splits": splits, "dtype": "<u2", "tokenizer": {"end_of_text": END}}
    runs.write_json(folder / "manifest.json", manifest)
    return folder


@pytest.fixture
def counting(tmp_path: Path) -> TokenFiles:
    """Three files of consecutive numbers, so that a token says where it stands."""
    streams = [np.arange(0, 1000), np.arange(1000, 1037), np.arange(2000, 5000)]
    paths = [tmp_path / f"{i}.bin" for i in range(3)]
    for path, stream in zip(paths, streams, strict=True):
        stream.astype("<u2").tofile(path)
    return TokenFiles(paths, [1000, 37, 3000], "<u2")


@pytest.fixture(scope="module")
def pajama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hub = write(tmp_path_factory.mktemp("pajama"), layout(4, 120))
    config = DataConfig(corpus=str(hub), tokenizer="bpe", bpe_vocab_size=300, test_size=0.1)
    prepare.prepare(config, hub / "tokens")
    return hub / "tokens"


def test_epoch_uses_every_window_once_and_the_next_in_another_order(counting):
    batches = Batches(counting, 32, 1)
    n, (inputs, targets) = batches.n_windows, batches.batch(0)
    assert torch.equal(inputs + 1, targets) and inputs.shape == (1, 32)
    first, second = ([int(batches.batch(e * n + i)[0][0, 0]) for i in range(n)] for e in range(2))
    assert sorted(first) == sorted(second) == [*range(0, 968, 32), 1000, *range(2000, 4976, 32)]
    assert first != second


def test_batch_depends_on_seed_step_and_rank_alone(counting):
    one, other = Batches(counting, 32, 6, seed=3), Batches(counting, 32, 6, seed=3)
    for step in (40, 7, 0, 100):  # across epochs, out of order
        for world_size in (1, 2, 3, 6):
            ranks = [other.batch(step, rank=r, world_size=world_size) for r in range(world_size)]
            assert torch.equal(torch.cat([inputs for inputs, _ in ranks]), one.batch(step)[0])
    assert not torch.equal(one.batch(0)[0], Batches(counting, 32, 6, seed=4).batch(0)[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_resident_memory_stays_flat_while_a_large_file_is_read(tmp_path):
    (tmp_path / "0.bin").touch()
    os.truncate(tmp_path / "0.bin", 200_000_000)
    batches = Batches(TokenFiles([tmp_path / "0.bin"], [100_000_000], "<u2"), 1023, 256)

    def resident_kib() -> int:
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

    batches.batch(0)
    before = resident_kib()
    for step in range(1, batches.n_windows // 256):
        batches.batch(step)
    assert resident_kib() - before < 30_000


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_prefetched_batches_are_those_read_directly(counting, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    batches = Batches(counting, 32, 6)
    ahead = data.prefetch(batches, 5, torch.device(device), rank=1, world_size=2)
    for step, found in enumerate(islice(ahead, 30), start=5):
        expected = batches.batch(step, rank=1, world_size=2)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    n_threads = threading.active_count()
    ahead.close()
    assert threading.active_count() == n_threads - 1


def test_windows_of_a_split_follow_each_other_or_are_spread_over_it(tmp_path):
    windows = data.eval_windows(_prepared(tmp_path, val=np.arange(1001)), "val", 10)
    assert windows.tolist() == [list(range(s, s + 11)) for s in range(0, 1000, 10)]
    assert data.eval_windows(tmp_path, "val", 10, 5)[:, 0].tolist() == [0, 250, 500, 740, 990]


def test_domain_windows_are_windows_of_the_domains_own_documents(pajama):
    text, parts = load_tokenizer(pajama / "tokenizer.json").decode, defaultdict(list)
    for document in data.documents(pajama, "val"):
        shard = int(text(document.tolist())[0])  # a document begins with its shard's number
        parts[f"RedPajama{'Book' if shard % 2 else 'C4'}"].append(document)
    windows = data.domain_windows(pajama, 16)
    assert [*windows] == sorted(parts)
    for domain, found in windows.items():
        stream = np.concatenate(parts[domain])
        n = (len(stream) - 1) // 16
        assert np.array_equal(found[:, :-1].ravel(), stream[: n * 16])
        assert np.array_equal(found[:, 1:].ravel(), stream[1 : n * 16 + 1])
    assert data.domain_windows(pajama, 10**6) == {}
    n_tokens = sum(map(len, data.documents(pajama, "val")))
    assert [*data.domain_windows(pajama, n_tokens // 8)] == ["others"]  # too few windows each


def test_mistakes_are_named_with_the_remedy(pajama, counting, tmp_path):
    with pytest.raises(ValueError, match=r"split='dev' is not .* train, val, validation, test"):
        data.open_split(pajama, "dev")
    with pytest.raises(ValueError, match="run 01_data_prep first"):
        data.load_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"3000 tokens in a row, too few for .* window of 3001"):
        Batches(counting, 3000, 1)
    with pytest.raises(ValueError, match=r"too few for one window of 1000001; bring more text"):
        data.eval_windows(pajama, "val", 1_000_000)
    os.truncate(_prepared(tmp_path, val=range(9)) / "val.bin", 2)
    with pytest.raises(ValueError, match=r"val\.bin is missing or has another size"):
        data.open_split(tmp_path, "val")


def test_documents_of_val_in_another_split_are_counted(tmp_path):
    val, train = [1, 2, END, 3, END], [3, END, 3, END, 2, END, 1, 2, 3, END]
    _prepared(tmp_path, train=train, val=val, test=[*val, 4, END])
    assert data.shared_with_val(tmp_path) == {"train": 1, "test": 2}


PIECES = [
    *"ab1'.,!? \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u202f\u3000\ufeffé漢😀\x00ſ"
]
PIECES += ["'s", "'ll", "  ", "\n\n", END_OF_TEXT]


def strange_texts(n: int) -> list[str]:
    """Every white space, contractions, other scripts, and the special token's name as text."""
    pick = random.Random(0)
    return ["".join(pick.choices(PIECES, k=pick.randint(0, 40))) for _ in range(n)]


@pytest.fixture(scope="module")
def bpe() -> tiktoken.Encoding:
    return data.train_bpe(texts(300, seed=1) + strange_texts(300), 400)


def test_trained_bpe_encodes_as_the_tokenizers_library_does(bpe):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=399, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(texts(300, seed=1) + strange_texts(300), trainer)
    byte_of = {character: bytes([i]) for i, character in bytes_to_unicode().items()}
    for text in texts(50, seed=2) + strange_texts(50):
        theirs = [b"".join(byte_of[c] for c in word) for word in reference.encode(text).tokens]
        ours = bpe.encode_ordinary(text)
        assert bpe.decode_tokens_bytes(ours) == theirs
        assert bpe.decode(ours) == text
    assert bpe.n_vocab == 400 and bpe.special_tokens_set == {END_OF_TEXT} and bpe.eot_token == 399


@pytest.mark.parametrize("name", ["bpe", "gpt2"])
def test_saved_tokenizer_loads_alike_without_a_network(name, tmp_path, request, monkeypatch):
    encoding = request.getfixturevalue(name)
    (tmp_path / "tokenizer.json").write_text(data.save_tokenizer(encoding))
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    loaded = data.load_tokenizer(tmp_path / "tokenizer.json")
    assert data.save_tokenizer(loaded) == data.save_tokenizer(encoding)
    assert all(loaded.encode_ordinary(t) == encoding.encode_ordinary(t) for t in strange_texts(50))


def _assert_equals_encode_ordinary(encoding: tiktoken.Encoding, documents: list[str]) -> None:
    tokens = DocumentEncoder(encoding).encode(documents)
    for found, text in zip(tokens, documents, strict=True):
        assert found.tolist() == [*encoding.encode_ordinary(text), encoding.eot_token]


def test_documents_encode_as_encode_ordinary_does(bpe):
    _assert_equals_encode_ordinary(bpe, strange_texts(20_000))
    _assert_equals_encode_ordinary(bpe, [f"a {MARK} b", "two  words", ""])
    _assert_equals_encode_ordinary(bpe, ["".join(random.choices(ascii_letters, k=10_000_000))])


def test_every_character_encodes_as_encode_ordinary_does(gpt2):
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and chr(c) != MARK]
    lines = ["".join(f" {c}  {c}a" for c in characters[i : i + 64]) for i in range(0, 70_000, 64)]
    _assert_equals_encode_ordinary(gpt2, lines)


def test_large_vocabulary_takes_four_bytes():
    ranks, special = {bytes([i]): i for i in range(256)}, {END_OF_TEXT: 70_000}
    how = {"pat_str": r"\s+|\S+", "mergeable_ranks": ranks, "special_tokens": special}
    [tokens] = DocumentEncoder(tiktoken.Encoding("large", **how)).encode(["ab"])
    assert tokens.dtype == np.dtype("<u4") and tokens.tolist() == [97, 98, 70_000]


def test_unknown_tokenizer_and_missing_vocabulary_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"tokenizer='gpt3' could not .*choose 'bpe'.*gpt2"):
        data.load_tiktoken("gpt3")

    def refuse(*_: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"tokenizer='gpt2' could not .*set TIKTOKEN_CACHE_DIR"):
        data.load_tiktoken("gpt2")
