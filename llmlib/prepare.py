"""Text to token files with a manifest: resumable, verifiable, on all cores.

One file of little-endian tokens per shard (the flat layout that nanoGPT and llm-baselines read) is
renamed into place when whole; its marker follows, and the manifest is written last. ``data`` reads
what this module writes.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tiktoken import Encoding
from tqdm import tqdm

from llmlib import corpus, data, locks, runs, tokenizer
from llmlib.config import DataConfig, to_json
from llmlib.corpus import Corpus, Document, Shard

BPE_TRAINING_BYTES = 40_000_000  # text that a trained tokenizer sees
DOCUMENTS_PER_JOB = 64  # about 0.5 MB of text: enough to hide what Python adds

Marker = dict[str, Any]  # what is written about a finished token file
Encoded = tuple[np.ndarray, list[list]]  # tokens, and [index, domain, bytes, tokens] per document


def prepare(config: DataConfig, tokens_dir: Path, *, n_workers: int | None = None) -> Marker:
    """Tokenise a corpus into a folder and return its manifest; what is finished is kept."""
    try:
        record = runs.Record(tokens_dir, to_json(config))
        if (tokens_dir / "manifest.json").exists():
            return data.load_manifest(tokens_dir)
        with locks.lock(tokens_dir):
            return _prepare(config, record, n_workers or runs.n_cores())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"the disk is full while writing tokens to {tokens_dir}; free some space (2 bytes per "
            "token, 4 for a large vocabulary) and run again: finished shards are kept."
        ) from error


def _prepare(config: DataConfig, record: runs.Record, n_workers: int) -> Marker:
    # The first visit pins what the corpus is, so that a resumed one reads the same revision.
    source = record.cached_json("source", lambda: _describe(corpus.open_corpus(config)))
    texts = corpus.open_corpus(replace(config, revision=source["revision"]))
    n_documents = source["n_documents"]
    heldout = heldout_documents(n_documents, config.test_size, config.split_seed)
    encoding = _tokenizer(config, texts, {*heldout}, record.path / "tokenizer.json")
    unit, total = (" tokens", config.n_tokens) if config.n_tokens else (" rows", n_documents)
    bar = tqdm(total=total, desc="tokenising", unit=unit)
    with ThreadPoolExecutor(n_workers) as pool, bar:
        writer = Writer(tokenizer.DocumentEncoder(encoding), record.path, pool, 4 * n_workers, bar)
        train = writer.write_split(texts.train, {*heldout}, config.n_tokens)
        val = [writer.gather(train, heldout)]
        official = {name: writer.write_split(shards) for name, shards in texts.official.items()}
    is_whole = len(train) == len(texts.train)
    _check(n_documents if is_whole else None, train, val)
    manifest = {
        "source": source | {"config": to_json(config)},
        "tokenizer": tokenizer.describe(encoding),
        "dtype": writer.encoder.dtype.str,
        "n_tokens": _total(train, "n_tokens"),
        "splits": {"train": train, "val": val, **official},
    }
    runs.write_json(record.path / "manifest.json", manifest)
    return manifest


def _describe(texts: Corpus) -> dict[str, Any]:
    return {"revision": texts.revision, "n_documents": corpus.count_documents(texts)}


def _total(markers: list[Marker], key: str) -> int:
    return sum(marker[key] for marker in markers)


def _check(n_declared: int | None, train: list[Marker], val: list[Marker]) -> None:
    """Refuse a whole corpus of another size than it declares, and a split without text."""
    n_rows = _total(train, "n_rows")
    if n_declared not in (None, n_rows):
        raise ValueError(
            f"the corpus declares {n_declared} documents but holds {n_rows}; its split cannot be "
            "trusted. Fetch it again, or give the files as a local folder."
        )
    if not _total(train, "n_tokens") or not _total(val, "n_tokens"):
        raise ValueError(
            f"the corpus holds no text for train or val in {n_rows} documents; bring more text or "
            "raise test_size."
        )


def heldout_documents(n_documents: int, test_size: float, seed: int) -> list[int]:
    """Index the held-out documents, in order, as ``datasets``' shuffled ``train_test_split`` does."""
    if n_documents < 2:
        raise ValueError(f"the corpus has {n_documents} document(s); train and val need one each.")
    n_test = math.ceil(test_size * n_documents)
    return np.random.default_rng(seed).permutation(n_documents)[:n_test].tolist()


def _tokenizer(config: DataConfig, texts: Corpus, heldout: set[int], path: Path) -> Encoding:
    if not path.exists():
        if config.tokenizer == "bpe":
            training = _training_texts(texts, heldout, config.n_tokens or math.inf)
            encoding = tokenizer.train_bpe(training, config.bpe_vocab_size)
        else:
            encoding = tokenizer.load_tiktoken(config.tokenizer)
        runs.write_atomic(path, tokenizer.save_tokenizer(encoding))
    return tokenizer.load_tokenizer(path)


def _training_texts(texts: Corpus, heldout: set[int], n_tokens: float) -> Iterator[str]:
    """Yield training documents up to BPE_TRAINING_BYTES, from shards that ``n_tokens`` surely needs."""
    n_bytes = index = 0
    for shard in texts.train:
        # A document has at most one token per byte, and one at its end.
        if n_bytes + index >= n_tokens:
            return
        for document in corpus.read_documents(corpus.fetch(shard)):
            if index not in heldout and document.raw:
                yield document.text
            n_bytes, index = n_bytes + len(document.raw or b""), index + 1
            if n_bytes >= BPE_TRAINING_BYTES:
                return


@dataclass
class Writer:
    """Turn shards into token files, in order, on all cores, behind one progress bar.

    Threads are enough: tiktoken works outside the interpreter's lock and returns a buffer.
    """

    encoder: tokenizer.DocumentEncoder
    folder: Path
    pool: ThreadPoolExecutor
    n_ahead: int  # jobs under way at once; few, so memory stays flat
    bar: tqdm

    def write_split(
        self, shards: list[Shard], heldout: Set[int] = frozenset(), n_tokens: int | None = None
    ) -> list[Marker]:
        """Write the shards of a split, up to the one that reaches ``n_tokens``; marked ones are done."""
        markers: list[Marker] = []
        for shard in shards:
            path = self.folder / f"{shard.name}.json"
            if path.exists():
                marker = runs.read_json(path)
                self._advance(marker)
            else:
                marker = self._write_shard(shard, _total(markers, "n_rows"), heldout)
                runs.write_json(path, marker)
            markers.append(marker)
            if n_tokens and _total(markers, "n_tokens") >= n_tokens:
                break
        return markers

    def _advance(self, counts: Marker) -> None:
        self.bar.update(counts[f"n_{self.bar.unit.strip()}"])

    def _write_shard(self, shard: Shard, first: int, heldout: Set[int]) -> Marker:
        counts, aside = Counter(), []

        def parts() -> Iterator[Encoded]:
            for job_counts, main, val in self._jobs(shard, first, heldout):
                counts.update(job_counts)
                aside.append(val)
                self._advance(job_counts)
                yield main

        marker = self.write_file(f"{shard.name}.bin", parts(), is_listed=False)
        if heldout:
            marker["val"] = self.write_file(f"{shard.name}.val.bin", aside)
        skipped = {kind: counts[kind] for kind in ("null", "empty", "invalid_utf8")}
        return marker | {"n_rows": counts["n_rows"], "skipped": skipped}

    def _jobs(self, shard: Shard, first: int, heldout: Set[int]) -> Iterator[tuple]:
        """Encode the documents of a shard, in order."""
        pending, documents = deque(), corpus.read_documents(corpus.fetch(shard))
        while job := list(islice(documents, DOCUMENTS_PER_JOB)):
            pending.append(self.pool.submit(self._encode, job, first, heldout))
            first += len(job)
            if len(pending) > self.n_ahead:
                yield pending.popleft().result()
        yield from (job.result() for job in pending)

    def _encode(self, documents: list[Document], first: int, heldout: Set[int]) -> tuple:
        """Return counts, and what goes to the shard's main file and to its held-out one."""
        counts = {
            "n_rows": len(documents),
            "null": sum(d.raw is None for d in documents),
            "empty": sum(d.raw == b"" for d in documents),
            "invalid_utf8": sum(not d.is_utf8 for d in documents),
        }
        files = {False: [], True: []}
        for index, document in enumerate(documents, first):
            if document.raw:
                files[index in heldout].append((index, document))
        main, val = map(self._to_tokens, files.values())
        return counts | {"n_tokens": len(main[0]) + len(val[0])}, main, val

    def _to_tokens(self, documents: list[tuple[int, Document]]) -> Encoded:
        tokens, counts = self.encoder.encode([d.text for _, d in documents])
        pairs = zip(documents, counts, strict=True)
        return tokens, [[i, d.domain, len(d.raw), n] for (i, d), n in pairs]

    def write_file(self, name: str, parts: Iterable[Encoded], *, is_listed: bool = True) -> Marker:
        """Write a token file, counted and hashed on the way, renamed when whole."""
        sha256, n_tokens, domains, documents = hashlib.sha256(), 0, defaultdict(Counter), []
        with open(self.folder / f".{name}.tmp", "wb") as file:
            for tokens, entries in parts:
                file.write(tokens)
                sha256.update(tokens)
                n_tokens += len(tokens)
                for _, domain, n_bytes, n in entries:
                    domains[domain].update(documents=1, bytes=n_bytes, tokens=n)
                documents += entries if is_listed else []
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.folder / f".{name}.tmp", self.folder / name)
        marker = {"file": name, "n_tokens": n_tokens, "sha256": sha256.hexdigest()}
        marker["domains"] = dict(sorted(domains.items()))
        return marker | ({"documents": documents} if is_listed else {})

    def gather(self, markers: list[Marker], heldout: list[int]) -> Marker:
        """Gather the held-out documents of all shards into one file, in the split's own order."""
        found = {}
        for val in (marker["val"] for marker in markers):
            tokens, start = np.fromfile(self.folder / val["file"], self.encoder.dtype), 0
            for index, *about, n_tokens in val["documents"]:
                found[index] = tokens[start : start + n_tokens], [[index, *about, n_tokens]]
                start += n_tokens
        return self.write_file("val.bin", (found[i] for i in heldout if i in found))


def verify(tokens_dir: Path) -> list[str]:
    """Compare every token file with its hash and return the names of those that differ.

    Whatever belongs to a bad file is forgotten, so that the next ``prepare`` rebuilds it alone.
    """
    manifest = tokens_dir / "manifest.json"
    markers = [runs.read_json(path) for path in sorted(tokens_dir.glob("*-*.json"))]
    markers += runs.read_json(manifest)["splits"]["val"] if manifest.exists() else []
    bad = []
    for marker in markers:
        files = [marker, marker["val"]] if "val" in marker else [marker]
        if names := [f["file"] for f in files if _sha256(tokens_dir / f["file"]) != f["sha256"]]:
            bad += names
            manifest.unlink(missing_ok=True)  # first: it must not be left behind alone
            (tokens_dir / marker["file"]).with_suffix(".json").unlink(missing_ok=True)
    return bad


def _sha256(path: Path) -> str | None:
    if not path.exists():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
