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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from llmlib import runs, tokenizer
from llmlib.config import DataConfig, to_json
from llmlib.corpus import (
    Corpus,
    Document,
    Shard,
    count_documents,
    fetch,
    open_corpus,
    read_documents,
)

BPE_TRAINING_BYTES = 40_000_000  # text that a trained tokenizer sees
JOB_BYTES = 500_000  # text per job: enough to hide what Python adds, little enough to share out

Marker = dict[str, Any]  # what is written about a finished token file
Entry = list  # a document: [index, domain, bytes, tokens]


def prepare(config: DataConfig, folder: Path, *, n_workers: int | None = None) -> dict[str, Any]:
    """Tokenise a corpus into ``folder`` and return its manifest; what is finished is kept."""
    if (folder / "manifest.json").exists():
        manifest = runs.read_json(folder / "manifest.json")
        _refuse_other_config(folder, manifest["source"]["config"], to_json(config))
        return manifest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with runs.lock(folder):
            return _prepare(config, folder, n_workers or n_cores())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"the disk is full while writing tokens to {folder}; free some space (2 bytes per token, "
            "4 for a large vocabulary) and run again: finished shards are kept."
        ) from error


def _prepare(config: DataConfig, folder: Path, n_workers: int) -> dict[str, Any]:
    source, corpus = _claim(config, folder)
    heldout = heldout_documents(source["n_documents"], config.test_size, config.split_seed)
    encoding = _tokenizer(config, corpus, set(heldout), folder)
    encoder = tokenizer.DocumentEncoder(encoding)
    bar, unit = _progress(source["n_documents"], config.n_tokens)
    with ThreadPoolExecutor(n_workers) as pool, bar:
        writer = Writer(encoder, folder, pool, n_workers, bar, unit)
        train = writer.write_split(corpus.train, set(heldout), config.n_tokens)
        official = {name: writer.write_split(shards) for name, shards in corpus.official.items()}
    n_tokens = _total(train, "n_tokens")
    manifest = {
        "source": source,
        "tokenizer": {
            "name": encoding.name,
            "vocab_size": encoding.n_vocab,
            "end_of_text": encoder.end_of_text,
            "sha256": tokenizer.tokenizer_hash(encoding),
        },
        "dtype": encoder.dtype.str,
        "n_tokens": n_tokens,
        "is_whole_corpus": len(train) == len(corpus.train),
        "is_short_of_n_tokens": config.n_tokens is not None and n_tokens < config.n_tokens,
        "splits": {
            "train": train,
            "val": [_write_val(folder, encoder.dtype, train, heldout)],
            **official,
        },
    }
    _check(manifest)
    runs.write_json(folder / "manifest.json", manifest)
    return manifest


def _total(markers: list[Marker], key: str) -> int:
    return sum(marker[key] for marker in markers)


def _check(manifest: dict[str, Any]) -> None:
    """Refuse a corpus of another size than it declares, and one without text for both splits."""
    corpus, n_declared = manifest["source"]["config"]["corpus"], manifest["source"]["n_documents"]
    n_rows = _total(manifest["splits"]["train"], "n_rows")
    if manifest["is_whole_corpus"] and n_rows != n_declared:
        raise ValueError(
            f"corpus={corpus!r} declares {n_declared} documents but holds {n_rows}; its split cannot "
            "be trusted. Fetch it again, or give the files as a local folder."
        )
    for split in ("train", "val"):
        if _total(manifest["splits"][split], "n_tokens") == 0:
            raise ValueError(
                f"corpus={corpus!r} holds no text for {split} ({n_rows} documents); bring more text "
                "or raise test_size."
            )


def _claim(config: DataConfig, folder: Path) -> tuple[dict[str, Any], Corpus]:
    """Pin what the corpus is on the first visit, so that a resumed one reads the same revision."""
    path = folder / "source.json"
    if path.exists():
        source = runs.read_json(path)
        _refuse_other_config(folder, source["config"], to_json(config))
        return source, open_corpus(replace(config, revision=source["revision"]))
    corpus = open_corpus(config)
    source = {
        "config": to_json(config),
        "revision": corpus.revision,
        "n_documents": count_documents(corpus),
    }
    runs.write_json(path, source)
    return source, corpus


def _refuse_other_config(folder: Path, there: dict, here: dict) -> None:
    for name in there | here:
        if there.get(name) != here.get(name):
            raise ValueError(
                f"the tokens in {folder.parent.name}/{folder.name} were made with "
                f"{name}={there.get(name)!r}, not {here.get(name)!r}; choose another run_name or "
                "runs_dir, or delete that folder."
            )


def heldout_documents(n_documents: int, test_size: float, seed: int) -> list[int]:
    """Index the held-out documents, in order, as ``datasets``' shuffled ``train_test_split`` does."""
    if n_documents < 2:
        raise ValueError(
            f"the corpus has {n_documents} document(s); training and validation need one each."
        )
    n_test = math.ceil(test_size * n_documents)
    return np.random.default_rng(seed).permutation(n_documents)[:n_test].tolist()


def _tokenizer(
    config: DataConfig, corpus: Corpus, heldout: set[int], folder: Path
) -> tiktoken.Encoding:
    path = folder / "tokenizer.json"
    if path.exists():
        return tokenizer.load_tokenizer(path)
    if config.tokenizer == "bpe":
        texts = _training_texts(corpus, heldout, config.n_tokens)
        encoding = tokenizer.train_bpe(texts, config.bpe_vocab_size)
    else:
        encoding = tokenizer.load_tiktoken(config.tokenizer)
    runs.write_atomic(path, tokenizer.save_tokenizer(encoding))
    return encoding


def _training_texts(corpus: Corpus, heldout: set[int], n_tokens: int | None) -> Iterator[str]:
    """Yield training documents up to BPE_TRAINING_BYTES, from shards that ``n_tokens`` surely needs."""
    n_bytes = index = 0
    for shard in corpus.train:
        for document in read_documents(fetch(shard)):
            if index not in heldout and document.raw:
                yield document.text
            n_bytes += len(document.raw or b"")
            index += 1
            if n_bytes >= BPE_TRAINING_BYTES:
                return
        # A document has at most one token per byte, and one at its end.
        if n_tokens is not None and n_bytes + index >= n_tokens:
            return


class Job(NamedTuple):
    """Documents turned to tokens: those of the main file and those of the held-out one."""

    counts: Counter  # of rows, of bytes and tokens, and of rows that are not as they should be
    main: tuple[np.ndarray, list[Entry]]
    heldout: tuple[np.ndarray, list[Entry]]


def _progress(n_documents: int, n_tokens: int | None) -> tuple[tqdm, str]:
    """Open a bar over the tokens wanted, or over all documents; return what of a job it counts."""
    if n_tokens is None:
        return tqdm(total=n_documents, desc="tokenising", unit=" documents"), "n_rows"
    return tqdm(total=n_tokens, desc="tokenising", unit=" tokens"), "n_tokens"


@dataclass
class Writer:
    """Turn shards into token files, in order, on all cores, behind one progress bar.

    Threads are enough: tiktoken works outside the interpreter's lock and returns a buffer.
    """

    encoder: tokenizer.DocumentEncoder
    folder: Path
    pool: ThreadPoolExecutor
    n_workers: int
    bar: tqdm
    unit: str  # what the bar counts
    done: Counter = field(default_factory=Counter)

    def write_split(
        self, shards: list[Shard], heldout: set[int] | None = None, n_tokens: int | None = None
    ) -> list[Marker]:
        """Write the shards of a split, up to the one that reaches ``n_tokens``.

        Held-out documents go to files of their own; ``heldout=None`` means an official split,
        whose documents are all listed. A shard that has its marker is done.
        """
        markers: list[Marker] = []
        for shard in shards:
            path = self.folder / f"{shard.name}.json"
            if path.exists():
                marker = runs.read_json(path)
                self.bar.initial += marker[self.unit]
                self.bar.n += marker[self.unit]
            else:
                marker = self._write_shard(fetch(shard), _total(markers, "n_rows"), heldout)
                runs.write_json(path, marker)
            markers.append(marker)
            if n_tokens is not None and _total(markers, "n_tokens") >= n_tokens:
                break
        return markers

    def _write_shard(self, shard: Shard, offset: int, heldout: set[int] | None) -> Marker:
        main_path, val_path = (self.folder / f"{shard.name}{kind}.bin" for kind in ("", ".val"))
        counts: Counter = Counter()
        with TokenFile(main_path, heldout is None) as main, TokenFile(val_path, True) as val:
            for job in self._jobs(shard, offset, heldout or set()):
                counts.update(job.counts)
                main.append(*job.main)
                val.append(*job.heldout)
                self._show(job.counts)
            skipped = {kind: counts[kind] for kind in ("null", "empty", "invalid_utf8")}
            marker = {"n_rows": counts["n_rows"], "skipped": skipped} | main.finish()
            return marker if heldout is None else marker | {"val": val.finish()}

    def _show(self, counts: Counter) -> None:
        self.done.update(counts)
        seconds = max(self.bar.format_dict["elapsed"], 1e-9)
        mb_per_s, tokens_per_s = (self.done[k] / seconds for k in ("n_bytes", "n_tokens"))
        text = f"{mb_per_s / 1e6:.1f} MB/s, {tokens_per_s:,.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(counts[self.unit])

    def _jobs(self, shard: Shard, offset: int, heldout: set[int]) -> Iterator[Job]:
        """Encode documents in order; only a few jobs are in flight, so memory stays flat."""
        pending: deque = deque()
        for documents in _groups(read_documents(shard)):
            pending.append(self.pool.submit(self._encode, documents, offset, heldout))
            offset += len(documents)
            if len(pending) > 4 * self.n_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _encode(self, documents: list[Document], offset: int, heldout: set[int]) -> Job:
        kept = [(i, d) for i, d in enumerate(documents, start=offset) if d.raw]
        main = self._to_tokens([(i, d) for i, d in kept if i not in heldout])
        val = self._to_tokens([(i, d) for i, d in kept if i in heldout])
        counts = Counter(
            n_rows=len(documents),
            n_bytes=sum(len(d.raw) for _, d in kept),
            n_tokens=len(main[0]) + len(val[0]),
            null=sum(d.raw is None for d in documents),
            empty=sum(d.raw == b"" for d in documents),
            invalid_utf8=sum(not d.is_utf8 for d in documents),
        )
        return Job(counts, main, val)

    def _to_tokens(self, documents: list[tuple[int, Document]]) -> tuple[np.ndarray, list[Entry]]:
        tokens, counts = self.encoder.encode([d.text for _, d in documents])
        pairs = zip(documents, counts.tolist(), strict=True)
        return tokens, [[i, d.domain, len(d.raw), n] for (i, d), n in pairs]


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Gather documents until they hold JOB_BYTES of text."""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.raw or b"") + 1
        if size >= JOB_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


class TokenFile:
    """A token file being written: counted and hashed on the way, renamed when whole."""

    def __init__(self, path: Path, lists_documents: bool):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")
        self.file = open(self.temporary, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self.sha256 = hashlib.sha256()
        self.domains: dict[str, Counter] = defaultdict(Counter)
        self.n_tokens = 0
        self.documents: list | None = [] if lists_documents else None

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def append(self, tokens: np.ndarray, documents: list[Entry]) -> None:
        """Add tokens and the documents they make up."""
        raw = memoryview(tokens).cast("B")
        while written := self.file.write(raw):
            raw = raw[written:]
        self.sha256.update(memoryview(tokens).cast("B"))
        self.n_tokens += len(tokens)
        for _, domain, n_bytes, n_tokens in documents:
            self.domains[domain].update(documents=1, bytes=n_bytes, tokens=n_tokens)
        if self.documents is not None:
            self.documents += documents

    def finish(self) -> Marker:
        os.fsync(self.file.fileno())
        os.replace(self.temporary, self.path)
        marker = {
            "file": self.path.name,
            "n_tokens": self.n_tokens,
            "sha256": self.sha256.hexdigest(),
            "domains": dict(sorted(self.domains.items())),
        }
        return marker if self.documents is None else marker | {"documents": self.documents}


def _write_val(folder: Path, dtype: np.dtype, shards: list[Marker], heldout: list[int]) -> Marker:
    """Gather the held-out documents of all shards into one file, in the split's own order."""
    found = {}
    for shard in (marker["val"] for marker in shards):
        tokens = np.fromfile(folder / shard["file"], dtype=dtype)
        stops = np.cumsum([entry[3] for entry in shard["documents"]])
        for entry, part in zip(shard["documents"], np.split(tokens, stops), strict=False):
            found[entry[0]] = part, [entry]
    with TokenFile(folder / "val.bin", lists_documents=True) as file:
        for index in heldout:
            if index in found:
                file.append(*found[index])
        return file.finish()


def verify(folder: Path) -> list[str]:
    """Compare every token file with its hash and return the names of those that differ.

    Whatever belongs to a bad file is forgotten, so that the next ``prepare`` rebuilds it alone.
    """
    manifest = folder / "manifest.json"
    markers = [runs.read_json(path) for path in sorted(folder.glob("*-*.json"))]
    markers += runs.read_json(manifest)["splits"]["val"] if manifest.exists() else []
    bad = []
    for marker in markers:
        files = [marker, marker["val"]] if "val" in marker else [marker]
        if names := [f["file"] for f in files if _sha256(folder / f["file"]) != f["sha256"]]:
            bad += names
            manifest.unlink(missing_ok=True)  # first: it must not be left behind alone
            (folder / marker["file"]).with_suffix(".json").unlink(missing_ok=True)
    return bad


def _sha256(path: Path) -> str | None:
    if not path.exists():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def n_cores() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
