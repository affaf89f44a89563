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
import shutil
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from llmlib import runs
from llmlib.config import DataConfig, to_json
from llmlib.corpus import (
    Corpus,
    Row,
    Shard,
    count_documents,
    decode,
    fetch,
    open_corpus,
    read_documents,
    read_rows,
)
from llmlib.tokenizer import (
    DocumentEncoder,
    load_tiktoken,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    train_bpe,
)

BPE_TRAINING_BYTES = 40_000_000  # text that a trained tokenizer sees
JOB_BYTES = 500_000  # text per job: enough to hide what Python adds, little enough to share out


def prepare(config: DataConfig, folder: Path, *, n_workers: int | None = None) -> dict[str, Any]:
    """Tokenise a corpus into ``folder`` and return its manifest; what is finished is kept."""
    if (folder / "manifest.json").exists():
        manifest = runs.read_json(folder / "manifest.json")
        _refuse_other_source(folder, manifest["source"]["config"], to_json(config))
        return manifest
    with _explaining_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with runs.lock(folder):
            return _prepare(config, folder, n_workers)


def _prepare(config: DataConfig, folder: Path, n_workers: int | None) -> dict[str, Any]:
    source, corpus = _claim(config, folder)
    heldout = heldout_documents(source["n_documents"], config.test_size, config.split_seed)
    heldout_set = set(heldout.tolist())
    encoding = _tokenizer(config, corpus, heldout_set, folder)
    with Encoder(encoding, folder, config.n_tokens, source["n_documents"], n_workers) as encoder:
        shards, n_seen = [], 0
        for shard in corpus.train:
            shards.append(encoder.encode(shard, n_seen, heldout_set))
            n_seen += shards[-1]["n_rows"]
            if config.n_tokens is not None and encoder.n_tokens >= config.n_tokens:
                break
        n_tokens = encoder.n_tokens
        official = {
            split: encoder.encode_official(shards) for split, shards in corpus.official.items()
        }
    if len(shards) == len(corpus.train) and n_seen != source["n_documents"]:
        raise ValueError(
            f"corpus={config.corpus!r} declares {source['n_documents']} documents but holds {n_seen}; "
            "its split cannot be trusted. Fetch it again, or give the files as a local folder."
        )
    val = _write_val(folder, encoder.documents.dtype, shards, heldout)
    if n_tokens == 0 or val["n_tokens"] == 0:
        raise ValueError(
            f"corpus={config.corpus!r} holds no text for {'training' if val['n_tokens'] else 'validation'}"
            f" ({n_seen} documents, test_size={config.test_size}); bring more text or raise test_size."
        )
    manifest = {
        "source": source,
        "tokenizer": {
            "name": encoding.name,
            "vocab_size": encoding.n_vocab,
            "end_of_text": encoder.documents.end_of_text,
            "sha256": tokenizer_hash(encoding),
        },
        "dtype": encoder.documents.dtype.str,
        "n_tokens": n_tokens,
        "n_heldout_documents": len(heldout),
        "is_whole_corpus": len(shards) == len(corpus.train),
        "is_short_of_n_tokens": config.n_tokens is not None and n_tokens < config.n_tokens,
        "splits": {"train": shards, "val": [val], **official},
    }
    runs.write_json(folder / "manifest.json", manifest)
    return manifest


def _claim(config: DataConfig, folder: Path) -> tuple[dict[str, Any], Corpus]:
    """Pin what the corpus is on the first visit, so that a resumed one reads the same revision."""
    path = folder / "source.json"
    if path.exists():
        source = runs.read_json(path)
        _refuse_other_source(folder, source["config"], to_json(config))
        return source, open_corpus(replace(config, revision=source["revision"]))
    corpus = open_corpus(config)
    source = {
        "config": to_json(config),
        "revision": corpus.revision,
        "n_documents": count_documents(corpus),
    }
    runs.write_json(path, source)
    return source, corpus


def _refuse_other_source(folder: Path, there: dict, here: dict) -> None:
    if there != here:
        name = next(k for k in here if there.get(k) != here[k])
        raise ValueError(
            f"the tokens in {folder.parent.name}/{folder.name} were made with {name}={there.get(name)!r}, "
            f"not {here[name]!r}; choose another run_name or runs_dir, or delete that folder."
        )


def heldout_documents(n_documents: int, test_size: float, seed: int) -> np.ndarray:
    """Index the held-out documents, in order, as ``datasets``' shuffled ``train_test_split`` does."""
    if n_documents < 2:
        raise ValueError(
            f"the corpus has {n_documents} document(s); training and validation need one each."
        )
    n_test = math.ceil(test_size * n_documents)
    return np.random.default_rng(seed).permutation(n_documents)[:n_test]


def _tokenizer(
    config: DataConfig, corpus: Corpus, heldout: set[int], folder: Path
) -> tiktoken.Encoding:
    path = folder / "tokenizer.json"
    if path.exists():
        return load_tokenizer(path)
    if config.tokenizer == "bpe":
        encoding = train_bpe(
            _training_texts(corpus, heldout, config.n_tokens), config.bpe_vocab_size
        )
    else:
        encoding = load_tiktoken(config.tokenizer)
    runs.write_atomic(path, save_tokenizer(encoding))
    return encoding


def _training_texts(corpus: Corpus, heldout: set[int], n_tokens: int | None) -> Iterator[str]:
    """Yield training documents up to BPE_TRAINING_BYTES, from shards that ``n_tokens`` surely needs."""
    n_bytes = index = 0
    for shard in corpus.train:
        for document in read_documents(fetch(shard)):
            if index not in heldout and document.text:
                yield document.text
            n_bytes += document.n_bytes
            index += 1
            if n_bytes >= BPE_TRAINING_BYTES:
                return
        # A document has at most one token per byte, and one at its end.
        if n_tokens is not None and n_bytes + index >= n_tokens:
            return


class Job(NamedTuple):
    """Rows turned to tokens: those of the main file and those of the held-out one."""

    n_rows: int
    n_bytes: int
    skipped: Counter
    main: tuple[np.ndarray, list]  # tokens, [index, domain, bytes, tokens] of each document
    heldout: tuple[np.ndarray, list]


class Encoder:
    """Turn shards into token files, in order, on all cores, behind one progress bar.

    Threads are enough: tiktoken works outside the interpreter's lock and returns a buffer.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        folder: Path,
        n_tokens_wanted: int | None,
        n_documents: int,
        n_workers: int | None = None,
    ):
        self.documents = DocumentEncoder(encoding)
        self.folder = folder
        self.n_workers = n_workers or n_cores()
        self.pool = ThreadPoolExecutor(self.n_workers)
        self.n_tokens = 0  # in the training files so far
        self.progress = Progress(n_documents, n_tokens_wanted)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.progress.close()

    def encode(self, shard: Shard, offset: int, heldout: set[int] | None) -> dict[str, Any]:
        """Write one shard's tokens and return its marker; a shard that has its marker is done.

        ``offset`` is the number of rows in the shards before it. Held-out documents go to a file
        of their own; ``heldout=None`` means an official split, whose documents are all listed.
        """
        marker_path = self.folder / f"{shard.name}.json"
        if marker_path.exists():
            marker = runs.read_json(marker_path)
            self.progress.skip(marker["n_rows"])
        else:
            marker = self._write(fetch(shard), offset, heldout)
            runs.write_json(marker_path, marker)
        self.n_tokens += marker["n_tokens"] if heldout is not None else 0
        return marker

    def encode_official(self, shards: list[Shard]) -> list[dict[str, Any]]:
        """Write one of the dataset's own held-out splits."""
        markers, n_seen = [], 0
        for shard in shards:
            markers.append(self.encode(shard, n_seen, heldout=None))
            n_seen += markers[-1]["n_rows"]
        return markers

    def _write(self, shard: Shard, offset: int, heldout: set[int] | None) -> dict[str, Any]:
        main_path, val_path = (self.folder / f"{shard.name}{kind}.bin" for kind in ("", ".val"))
        n_rows, skipped = 0, Counter(null=0, empty=0, invalid_utf8=0)
        with TokenFile(main_path, heldout is None) as main, TokenFile(val_path, True) as val:
            for job in self._jobs(shard, offset, heldout or set()):
                n_rows += job.n_rows
                skipped.update(job.skipped)
                main.append(*job.main)
                val.append(*job.heldout)
                self.progress.update(job)
            marker = {"n_rows": n_rows, "skipped": dict(skipped)} | main.finish()
            return marker | ({"val": val.finish()} if heldout is not None else {})

    def _jobs(self, shard: Shard, offset: int, heldout: set[int]) -> Iterator[Job]:
        """Encode rows in order; only a few jobs are in flight, so memory stays flat."""
        pending: deque = deque()
        for rows in _groups(read_rows(shard)):
            pending.append(self.pool.submit(self._encode_job, rows, offset, heldout))
            offset += len(rows)
            if len(pending) > 4 * self.n_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _encode_job(self, rows: list[Row], offset: int, heldout: set[int]) -> Job:
        documents = [decode(*row) for row in rows]
        texts = [document.text for document in documents if document.text]
        tokens, counts = self.documents.encode(texts)
        is_heldout = np.array([offset + i in heldout for i, d in enumerate(documents) if d.text])
        of_heldout = np.repeat(is_heldout.astype(bool), counts)
        counts, skipped = iter(counts.tolist()), Counter()
        main, val = [], []
        for index, document in enumerate(documents, start=offset):
            skipped["invalid_utf8"] += not document.is_valid
            if document.text:
                entry = [index, document.domain, document.n_bytes, next(counts)]
                (val if index in heldout else main).append(entry)
            else:
                skipped["null" if document.text is None else "empty"] += 1
        n_bytes = sum(document.n_bytes for document in documents)
        return Job(
            len(rows), n_bytes, skipped, (tokens[~of_heldout], main), (tokens[of_heldout], val)
        )


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Gather rows until they hold JOB_BYTES of text."""
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += len(row[0] or b"") + 1
        if size >= JOB_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def n_cores() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _explaining_full_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free = shutil.disk_usage(folder.parent).free / 1e9
        raise ValueError(
            f"the disk is full ({free:.2f} GB left) while writing tokens to {folder.name}; free some "
            "space (2 bytes per token, 4 for a large vocabulary) and run again: finished shards are "
            "kept."
        ) from error


class Progress:
    """One bar over documents with MB/s, tokens/s and time left."""

    def __init__(self, n_documents: int, n_tokens_wanted: int | None):
        self.n_tokens_wanted = n_tokens_wanted
        self.n_bytes = self.n_tokens = self.n_rows = 0
        self.bar = tqdm(total=n_documents, desc="tokenising", unit=" documents", mininterval=1)

    def skip(self, n_documents: int) -> None:
        self.bar.initial += n_documents
        self.bar.n += n_documents

    def update(self, job: Job) -> None:
        self.n_bytes += job.n_bytes
        self.n_tokens += len(job.main[0]) + len(job.heldout[0])
        self.n_rows += job.n_rows
        if self.n_tokens_wanted is not None and self.n_tokens:
            expected = self.bar.initial + self.n_tokens_wanted * self.n_rows // self.n_tokens
            self.bar.total = min(self.bar.total, expected)
        self.bar.total = max(self.bar.total, self.bar.n + job.n_rows)
        seconds = max(self.bar.format_dict["elapsed"], 1e-9)
        self.bar.set_postfix_str(
            f"{self.n_bytes / seconds / 1e6:.1f} MB/s, {self.n_tokens / seconds:,.0f} tokens/s",
            refresh=False,
        )
        self.bar.update(job.n_rows)

    def close(self) -> None:
        self.bar.close()


class TokenFile:
    """A token file being written: counted and hashed on the way, renamed when whole."""

    def __init__(self, path: Path, lists_documents: bool):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")
        self.file = open(self.temporary, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self.sha256 = hashlib.sha256()
        self.domains: dict[str, dict[str, int]] = {}
        self.n_tokens = 0
        self.documents: list | None = [] if lists_documents else None

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def append(self, tokens: np.ndarray, documents: list) -> None:
        """Add tokens and the [index, domain, bytes, tokens] of the documents they make up."""
        raw = memoryview(tokens).cast("B")
        while written := self.file.write(raw):
            raw = raw[written:]
        self.sha256.update(memoryview(tokens).cast("B"))
        self.n_tokens += len(tokens)
        for _, domain, n_bytes, n_tokens in documents:
            counts = self.domains.setdefault(domain, {"documents": 0, "bytes": 0, "tokens": 0})
            counts["documents"] += 1
            counts["bytes"] += n_bytes
            counts["tokens"] += n_tokens
        if self.documents is not None:
            self.documents += documents

    def finish(self) -> dict[str, Any]:
        os.fsync(self.file.fileno())
        os.replace(self.temporary, self.path)
        marker = {
            "file": self.path.name,
            "n_tokens": self.n_tokens,
            "sha256": self.sha256.hexdigest(),
            "domains": dict(sorted(self.domains.items())),
        }
        return marker if self.documents is None else marker | {"documents": self.documents}


def _write_val(
    folder: Path, dtype: np.dtype, shards: list[dict], heldout: np.ndarray
) -> dict[str, Any]:
    """Gather the held-out documents of all shards into one file, in the split's own order."""
    found = {}
    for shard in (marker["val"] for marker in shards):
        tokens = np.fromfile(folder / shard["file"], dtype=dtype)
        stops = np.cumsum([document[3] for document in shard["documents"]])
        for document, stop in zip(shard["documents"], stops, strict=True):
            found[document[0]] = (document, tokens[stop - document[3] : stop])
    with TokenFile(folder / "val.bin", lists_documents=True) as file:
        for index in heldout.tolist():
            if index in found:
                document, tokens = found[index]
                file.append(tokens, [document])
        return file.finish()


def verify(folder: Path) -> list[str]:
    """Compare every token file with its hash and return the names of those that differ.

    Whatever belongs to a bad file is forgotten, so that the next ``prepare`` rebuilds it alone.
    """
    manifest_path = folder / "manifest.json"
    splits = runs.read_json(manifest_path)["splits"] if manifest_path.exists() else {}
    others = ("manifest.json", "source.json", "tokenizer.json")
    on_disk = [runs.read_json(p) for p in folder.glob("*.json") if p.name not in others]
    markers = {m["file"]: m for m in [*on_disk, *chain.from_iterable(splits.values())]}
    bad, forget = [], []
    for name, marker in sorted(markers.items()):
        files = [marker, marker["val"]] if "val" in marker else [marker]
        if names := [m["file"] for m in files if _sha256(folder / m["file"]) != m["sha256"]]:
            bad += names
            forget.append((folder / name).with_suffix(".json"))
    # The manifest goes first: a verification that is killed here must not leave it behind alone.
    for path in [manifest_path, *forget] if bad else []:
        path.unlink(missing_ok=True)
    return bad


def _sha256(path: Path) -> str | None:
    if not path.exists():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
