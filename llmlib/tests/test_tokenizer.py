"""Tokenizers against the libraries they stand in for."""

import random
import socket
from string import ascii_letters

import numpy as np
import pytest
import tiktoken

from llmlib import tokenizer
from llmlib.tests.hub_server import texts
from llmlib.tokenizer import END_OF_TEXT, MARK, DocumentEncoder

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
    return tokenizer.train_bpe(texts(300, seed=1) + strange_texts(300), 400)


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
def test_saved_tokenizer_encodes_alike_when_loaded_without_a_network(
    name, tmp_path, request, monkeypatch
):
    encoding = request.getfixturevalue(name)
    (tmp_path / "tokenizer.json").write_text(tokenizer.save_tokenizer(encoding))
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    loaded = tokenizer.load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.describe(loaded) == tokenizer.describe(encoding)
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
        tokenizer.load_tiktoken("gpt3")

    def refuse(*_: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"tokenizer='gpt2' could not .*set TIKTOKEN_CACHE_DIR"):
        tokenizer.load_tiktoken("gpt2")
