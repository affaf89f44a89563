"""Tokenizers against the libraries they stand in for."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from llmlib import prepare
from llmlib.config import DataConfig
from llmlib.tests.hub_server import texts, write_corpus
from llmlib.tokenizer import (
    END_OF_TEXT,
    MARK,
    DocumentEncoder,
    load_tiktoken,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    train_bpe,
)

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
    return train_bpe(texts(300, seed=1) + strange_texts(300), 400)


def test_trained_bpe_encodes_as_the_tokenizers_library_does(bpe: tiktoken.Encoding) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=399, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(texts(300, seed=1) + strange_texts(300), trainer)
    byte_of = {c: bytes([i]) for i, c in enumerate(_byte_characters())}
    for text in texts(50, seed=2) + strange_texts(50):
        theirs = [b"".join(byte_of[c] for c in word) for word in reference.encode(text).tokens]
        assert bpe.decode_tokens_bytes(bpe.encode_ordinary(text)) == theirs


def _byte_characters() -> list[str]:
    """The characters of GPT-2's byte alphabet, as transformers builds it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[i] for i in range(256)]


def test_trained_bpe_has_the_asked_size_and_one_special_token(bpe: tiktoken.Encoding) -> None:
    assert bpe.n_vocab == 400
    assert bpe.special_tokens_set == {END_OF_TEXT}
    assert bpe.encode_single_token(END_OF_TEXT) == 399


def test_decoding_gives_the_text_back(bpe: tiktoken.Encoding) -> None:
    for text in texts(50, seed=3) + strange_texts(50):
        assert bpe.decode(bpe.encode_ordinary(text)) == text


def test_saved_bpe_encodes_alike_when_loaded(bpe: tiktoken.Encoding, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(save_tokenizer(bpe))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer_hash(loaded) == tokenizer_hash(bpe)
    assert [loaded.encode_ordinary(t) for t in strange_texts(50)] == [
        bpe.encode_ordinary(t) for t in strange_texts(50)
    ]


def test_altered_tokenizer_is_refused(bpe: tiktoken.Encoding, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    record = json.loads(save_tokenizer(bpe))
    record["words"][300:302] = record["words"][301:299:-1]  # two merges in each other's place
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"tokenizer\.json .* does not hold the tokenizer"):
        load_tokenizer(path)


def _assert_equals_encode_ordinary(encoding: tiktoken.Encoding, documents: list[str]) -> None:
    end = encoding.encode_single_token(END_OF_TEXT)
    expected = [[*encoding.encode_ordinary(text), end] for text in documents]
    tokens, counts = DocumentEncoder(encoding).encode(documents)
    assert counts == [len(e) for e in expected]
    assert tokens.tolist() == [token for e in expected for token in e]


def test_documents_encode_as_encode_ordinary_does(bpe: tiktoken.Encoding) -> None:
    _assert_equals_encode_ordinary(bpe, strange_texts(20_000))
    _assert_equals_encode_ordinary(bpe, [f"a {MARK} b", "two  words", ""])


def test_every_character_encodes_as_encode_ordinary_does(gpt2: tiktoken.Encoding) -> None:
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and chr(c) != MARK]
    lines = ["".join(f" {c}  {c}a" for c in characters[i : i + 64]) for i in range(0, 70_000, 64)]
    _assert_equals_encode_ordinary(gpt2, lines + strange_texts(20_000))


def test_large_vocabulary_takes_four_bytes() -> None:
    ranks = {bytes([i]): i for i in range(256)}
    large = tiktoken.Encoding(
        "large", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 70_000}
    )
    tokens, counts = DocumentEncoder(large).encode(["ab", "c"])
    assert tokens.dtype == np.dtype("<u4")
    assert tokens.tolist() == [97, 98, 70_000, 99, 70_000] and counts == [3, 2]


def test_unknown_tokenizer_is_named_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"tokenizer='gpt3' is unknown; choose 'bpe'.*gpt2"):
        load_tiktoken("gpt3")


def test_missing_vocabulary_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    names = "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6.*6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    with pytest.raises(ValueError, match=f"TIKTOKEN_CACHE_DIR.*{names}.*tokenizer='bpe'"):
        load_tiktoken("gpt2")
    corpus = write_corpus(tmp_path / "corpus", n_shards=1, n_documents=10)
    config = DataConfig(corpus=str(corpus), tokenizer="gpt2", test_size=0.1)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR"):
        prepare.prepare(config, tmp_path / "tokens")


def test_vocabulary_of_the_cache_is_gpt2s(gpt2: tiktoken.Encoding) -> None:
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]
    assert gpt2.encode_single_token(END_OF_TEXT) == 50256
