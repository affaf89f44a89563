"""Tokenizers: GPT-2's byte-level BPE from ``tiktoken``, or one trained on the corpus itself.

Both are a ``tiktoken.Encoding`` with one special token, ``<|endoftext|>``, after each document. It is
stored beside the tokens, so a run can turn its tokens back into text without a network.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tiktoken

END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MARK = "\ufdd0"  # a Unicode noncharacter: reserved for use inside programs
SPACE = r"\t-\r\x{85}\pZ"  # what tiktoken's \s means, for arrow's regular expressions


def load_tiktoken(name: str) -> tiktoken.Encoding:
    """Load a published encoding by name; its vocabulary is downloaded once or read from a cache."""
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # unknown, or no network, which has many names
        raise ValueError(
            f"tokenizer={name!r} could not be loaded ({type(error).__name__}); choose 'bpe' or one of "
            f"{', '.join(tiktoken.list_encoding_names())}. Without a network, set TIKTOKEN_CACHE_DIR "
            "to tiktoken's cache folder of a machine that has one."
        ) from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Train a byte-level BPE of ``vocab_size`` tokens with GPT-2's splitting pattern."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    # Its characters stand for bytes: first those that print, in order, then the others.
    in_order = sorted(range(256), key=lambda b: b == 32 or not chr(b).isprintable())
    byte, rank = dict(zip(alphabet, in_order, strict=True)), model.get_vocab()
    merged = [bytes(byte[c] for c in word) for word in sorted(rank, key=rank.get)[256:]]
    words = [bytes([i]) for i in range(256)] + merged
    return tiktoken.Encoding(
        "bpe",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={word: i for i, word in enumerate(words)},
        special_tokens={END_OF_TEXT: len(words)},
    )


def save_tokenizer(encoding: tiktoken.Encoding) -> str:
    """Write an encoding as JSON text, with its pattern and all its tokens."""
    ranks = {word.decode("latin-1"): rank for word, rank in encoding._mergeable_ranks.items()}
    record = {"name": encoding.name, "pat_str": encoding._pat_str, "mergeable_ranks": ranks}
    return json.dumps(record | {"special_tokens": encoding._special_tokens})


def load_tokenizer(path: Path) -> tiktoken.Encoding:
    """Read what ``save_tokenizer`` wrote."""
    record = json.loads(path.read_text())
    ranks = {word.encode("latin-1"): rank for word, rank in record["mergeable_ranks"].items()}
    return tiktoken.Encoding(**record | {"mergeable_ranks": ranks})


def describe(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """Describe an encoding; the hash covers its name, pattern and all tokens."""
    return {
        "name": encoding.name,
        "vocab_size": encoding.n_vocab,
        "end_of_text": encoding.eot_token,
        "sha256": hashlib.sha256(save_tokenizer(encoding).encode()).hexdigest(),
    }


class DocumentEncoder:
    """Encode documents just as ``encode_ordinary`` does, about 1.6 times as fast.

    GPT-2's pattern looks ahead for one thing: of white space before a word, the last character goes
    with the word. With a mark put before that character, a pattern without look-ahead splits the
    text alike, and a finite automaton can run it.
    """

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding, self.marking = encoding, None
        self.dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
        if encoding.name in ("gpt2", "bpe"):
            self.marking = tiktoken.Encoding(
                "marking",
                pat_str=GPT2_PATTERN.replace(r"|\s+(?!\S)", ""),
                mergeable_ranks=encoding._mergeable_ranks,
                special_tokens={MARK: encoding.n_vocab},  # never leaves this class
            )

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return each text's tokens, <|endoftext|> at the end."""
        encoding, allowed = self.encoding, set()
        if self.marking and not any(MARK in text for text in texts):
            encoding, allowed = self.marking, {MARK}
            texts = pc.replace_substring_regex(
                pa.array(texts, pa.large_string()),
                pattern=f"([{SPACE}])([{SPACE}][^{SPACE}])",
                replacement=rf"\1{MARK}\2",
            ).to_pylist()
        how = {"allowed_special": allowed, "disallowed_special": ()}
        parts = (encoding.encode_to_numpy(text, **how) for text in texts)
        ended = (np.append(part, np.uint32(self.encoding.eot_token)) for part in parts)
        return [part[part != self.encoding.n_vocab].astype(self.dtype) for part in ended]
