"""Tokenizers: GPT-2's byte-level BPE from ``tiktoken``, or one trained on the corpus itself.

Both are a ``tiktoken.Encoding`` with one special token, ``<|endoftext|>``, after each document.
A trained one is stored beside the tokens, so a run can always turn its tokens back into text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import tiktoken

END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def load_tiktoken(name: str) -> tiktoken.Encoding:
    """Load a published encoding by name; its vocabulary is downloaded once or read from a cache."""
    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError as error:
        raise ValueError(
            f"tokenizer={name!r} is unknown; choose 'bpe' (train one on the corpus) or one of "
            f"{', '.join(tiktoken.list_encoding_names())}."
        ) from error
    except Exception as error:  # requests raises many kinds; all mean: no network
        raise ValueError(
            f"tokenizer={name!r} needs its vocabulary, which could not be downloaded "
            f"({type(error).__name__}). Copy a tiktoken cache folder here and set "
            "TIKTOKEN_CACHE_DIR to it (for gpt2: the files 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
            " and 6d1cbeee0f20b3d9449abfede4726ed8212e3aee), or use tokenizer='bpe' to train one."
        ) from error
    if END_OF_TEXT not in encoding.special_tokens_set:
        raise ValueError(f"tokenizer={name!r} has no {END_OF_TEXT} token; use 'gpt2' or 'bpe'.")
    return encoding


def train_bpe(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Train a byte-level BPE of ``vocab_size`` tokens with GPT-2's splitting pattern."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    merges = json.loads(model.to_str())["model"]["merges"]
    to_byte = _byte_of_character()
    words = [bytes([i]) for i in range(256)]
    words += [bytes(to_byte[c] for c in left + right) for left, right in merges]
    return _encoding("bpe", {word: rank for rank, word in enumerate(words)})


def _encoding(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        name,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, inverted: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def tokenizer_hash(encoding: tiktoken.Encoding) -> str:
    """Hash what decides the tokens: the pattern, the ranks and the special tokens."""
    digest = hashlib.sha256(encoding._pat_str.encode())
    for word, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(word + rank.to_bytes(4, "little"))
    digest.update(json.dumps(encoding._special_tokens, sort_keys=True).encode())
    return digest.hexdigest()


def save_tokenizer(encoding: tiktoken.Encoding) -> str:
    """Write an encoding as JSON text: a name for a published one, all ranks for a trained one."""
    record: dict = {"name": encoding.name, "sha256": tokenizer_hash(encoding)}
    if encoding.name == "bpe":
        ranks = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
        record["words"] = [base64.b64encode(word).decode() for word in ranks]
    return json.dumps(record)


def load_tokenizer(path: Path) -> tiktoken.Encoding:
    """Read what ``save_tokenizer`` wrote."""
    record = json.loads(path.read_text())
    if record["name"] != "bpe":
        return load_tiktoken(record["name"])
    words = [base64.b64decode(word) for word in record["words"]]
    return _encoding("bpe", {word: rank for rank, word in enumerate(words)})
