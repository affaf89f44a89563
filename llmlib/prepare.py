"""Text to token files with a manifest: resumable, hashed, on all cores.

One file of little-endian tokens per shard (the flat layout that nanoGPT and llm-baselines read) is
renamed into place when whole; its marker, which holds the shard's held-out documents, follows, and
the manifest is written last. ``data`` reads what this module writes.
"""

import hashlib
import math
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tqdm import tqdm

from llmlib import corpus, data, runs
from llmlib.config import DataConfig, to_json
from llmlib.corpus import Corpus, Shard
from llmlib.readers import NOT_UTF8, Document

BPE_TRAINING_CHARACTERS = 16_000_000  # that a trained tokenizer sees
MOST_INVALID = 0.05  # share of a shard's documents that may hold bytes that are not UTF-8
CHARACTERS_PER_JOB = 500_000  # enough to hide what Python adds, few enough for memory

Marker = dict[str, Any]  # what is written about a finished token file
Place = Callable[[int], int | None]  # in val, of a document of train by its index; None: none


def prepare(config: DataConfig, tokens_dir: Path) -> Marker:
    """Tokenise a corpus into a folder and return its manifest; what is finished is kept."""
    record = runs.Record(tokens_dir, to_json(config))
    if not (tokens_dir / "manifest.json").exists():
        with runs.lock(tokens_dir):
            runs.write_json(tokens_dir / "manifest.json", _write_tokens(config, record))
    return data.load_manifest(tokens_dir)


def _write_tokens(config: DataConfig, record: runs.Record) -> Marker:
    # The first visit pins what the corpus is, so that a resumed one reads the same.
    begun = record.path / "source.json"
    pinned = runs.read_json(begun).get("revision") if begun.exists() else None
    texts = corpus.open_corpus(replace(config, revision=pinned or config.revision))
    source = record.cached_json("source", lambda: texts.source)
    if texts.source != source:
        raise ValueError(
            f"the corpus {config.corpus!r} has changed since {record.path} was begun ({source} then, "
            f"{texts.source} now); delete that folder to begin anew."
        )
    place = split_documents(config, texts)
    if not (path := record.path / "tokenizer.json").exists():
        if config.tokenizer == "bpe":
            encoding = data.train_bpe(_sample(texts, place), config.bpe_vocab_size)
        else:
            encoding = data.load_tiktoken(config.tokenizer)
        runs.write_atomic(path, data.save_tokenizer(encoding))
    encoding = data.load_tokenizer(path)
    writer = Writer(data.DocumentEncoder(encoding), record)
    train = writer.write_split(texts.train, place, config.n_tokens or math.inf)
    official = {name: writer.write_split(shards) for name, shards in texts.official.items()}
    texts_of_val = chain(*(marker.pop("heldout") for marker in train))
    ordered = sorted(texts_of_val, key=lambda text: place(text[0]))
    documents = [Document(*text) for _, *text in ordered]
    val = writer.write_file("val.bin", documents) | {"documents": [d.domain for d in documents]}
    n_documents = source.get("n_documents")
    n_rows, n_tokens = _total(train, "n_rows"), _total(train, "n_tokens")
    if len(train) == len(texts.train) and n_documents not in (None, n_rows):
        raise ValueError(
            f"the corpus declares {n_documents} documents but holds {n_rows}; its split cannot be "
            "trusted. Fetch it again, or give the files as a local folder without a card."
        )
    if not n_tokens or not val["n_tokens"]:
        raise ValueError(
            f"the corpus holds no text for train or val in {n_rows} documents; bring more text or "
            f"raise test_size. Found: {list(chain(*(m['files'] for m in train)))[:20] or 'nothing'}."
        )
    heldout = "by datasets' train_test_split" if n_documents else "the first, and others by draws"
    return {
        "source": source | {"config": to_json(config), "heldout": heldout},
        "tokenizer": {
            "name": encoding.name,
            "vocab_size": encoding.n_vocab,
            "end_of_text": encoding.eot_token,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        },
        "dtype": writer.encoder.dtype.str,
        "n_tokens": n_tokens,
        "splits": {"train": train, "val": [val], **official},
    }


def _total(markers: list[Marker], key: str) -> int:
    return sum(marker[key] for marker in markers)


def split_documents(config: DataConfig, texts: Corpus) -> Place:
    """Say which documents of train are held out, and in which order.

    Where their number is known, those of ``datasets``' shuffled ``train_test_split``. Elsewhere the
    first, and each other by a draw of its own: nothing is counted before it is used.
    """
    seed, share, n_documents = config.split_seed, config.test_size, texts.source.get("n_documents")
    if not n_documents:
        return lambda i: i if i == 0 or Random(f"{seed} {i}").random() < share else None
    candidates = texts.candidates or range(n_documents)
    drawn = np.random.default_rng(seed).permutation(len(candidates))
    order = [candidates[i] for i in drawn[: math.ceil(share * len(candidates))].tolist()]
    return {index: place for place, index in enumerate(order)}.get


def _sample(texts: Corpus, place: Place) -> Iterator[str]:
    n_characters, documents = 0, chain.from_iterable(map(corpus.read_documents, texts.train))
    for index, document in enumerate(documents):
        if document.text and place(index) is None:
            yield document.text
            n_characters += len(document.text)
        if n_characters >= BPE_TRAINING_CHARACTERS:
            return


@dataclass
class Writer:
    """Turn shards into token files, in order, on all cores."""

    encoder: data.DocumentEncoder
    record: runs.Record

    def write_split(
        self, shards: list[Shard], place: Place = lambda _: None, enough: float = math.inf
    ) -> list[Marker]:
        """Write the shards of a split, up to the one that makes ``enough`` tokens; marked ones are done."""
        markers: list[Marker] = []
        for shard in tqdm(shards, "tokenising", unit=" shards"):
            if _total(markers, "n_tokens") >= enough:
                break
            write = partial(self._write_shard, shard, _total(markers, "n_rows"), place)
            markers.append(self.record.cached_json(shard.name, write))
        return markers

    def _write_shard(self, shard: Shard, first: int, place: Place) -> Marker:
        tally, heldout = {}, []

        def kept() -> Iterator[Document]:
            for index, document in enumerate(corpus.read_documents(shard, tally), first):
                if document.text and place(index) is not None:
                    heldout.append([index, *document])
                elif document.text:
                    yield document

        marker = self.write_file(f"{shard.name}.bin", kept())
        files = [[*key, *counted] for key, counted in sorted(tally.items())]
        n_rows = sum(n for _, what, n, _ in files if what.startswith("documents"))
        bad = {example: n for _, what, n, example in files if what == NOT_UTF8}
        if (n_bad := sum(bad.values())) > MOST_INVALID * n_rows:
            raise ValueError(
                f"{n_bad} of the {n_rows} documents of {shard.name} are not UTF-8, {', '.join(bad)} among "
                "them; turn them into UTF-8 (iconv -f latin1 -t utf-8) or leave them out."
            )
        return marker | {"n_rows": n_rows, "heldout": heldout, "files": files}

    def write_file(self, name: str, documents: Iterable[Document]) -> Marker:
        """Write a token file, counted and hashed on the way, renamed when whole."""
        sha256, domains = hashlib.sha256(), defaultdict(Counter)
        temporary = self.record.path / f".{name}.tmp"
        with open(temporary, "wb") as file:
            for (text, domain), tokens in self._encoded(documents):
                file.write(tokens)
                sha256.update(tokens)
                n_bytes = len(text.encode())
                domains[domain].update(documents=1, bytes=n_bytes, tokens=len(tokens))
            runs.sync(file)
        os.replace(temporary, self.record.path / name)
        n_tokens = sum(counts["tokens"] for counts in domains.values())
        marker = {"file": name, "n_tokens": n_tokens, "sha256": sha256.hexdigest()}
        return marker | {"domains": dict(sorted(domains.items()))}

    def _encoded(self, documents: Iterable[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        """Encode documents on all cores, in order; few at a time, for memory.

        Threads are enough: tiktoken works outside the interpreter's lock and returns a buffer.
        """
        n_characters, jobs = 0, deque()

        def job_number(document: Document) -> int:
            nonlocal n_characters
            n_characters += len(document.text)
            return n_characters // CHARACTERS_PER_JOB

        def encode(job: list[Document]) -> Iterable[tuple[Document, np.ndarray]]:
            return zip(job, self.encoder.encode([text for text, _ in job]), strict=True)

        with ThreadPoolExecutor(runs.n_cores()) as pool:
            for _, job in groupby(documents, job_number):
                jobs.append(pool.submit(encode, [*job]))
                if len(jobs) > 4 * runs.n_cores():
                    yield from jobs.popleft().result()
            for job in jobs:
                yield from job.result()
