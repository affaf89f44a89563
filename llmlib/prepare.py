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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tqdm import tqdm

from llmlib import corpus, data, locks, runs, tokenizer
from llmlib.config import DataConfig, to_json
from llmlib.corpus import Corpus, Document, Shard, fetch, read_documents

BPE_TRAINING_BYTES = 40_000_000  # text that a trained tokenizer sees
JOB_BYTES = 500_000  # text per job: enough to hide what Python adds, little enough to share out
SKIPPED = ("null", "empty", "invalid_utf8")

Marker = dict[str, Any]  # what is written about a finished token file
Encoded = tuple[np.ndarray, list[list]]  # tokens, and [index, domain, bytes, tokens] per document


def prepare(
    config: DataConfig, tokens_dir: Path, *, n_workers: int | None = None
) -> dict[str, Any]:
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


def _prepare(config: DataConfig, record: runs.Record, n_workers: int) -> dict[str, Any]:
    # The first visit pins what the corpus is, so that a resumed one reads the same revision.
    def describe() -> dict[str, Any]:
        texts = corpus.open_corpus(config)
        return {"revision": texts.revision, "n_documents": corpus.count_documents(texts)}

    source = record.cached_json("source", describe)
    texts = corpus.open_corpus(replace(config, revision=source["revision"]))
    heldout = heldout_documents(source["n_documents"], config.test_size, config.split_seed)
    encoding = _tokenizer(config, texts, set(heldout), record.path)
    total, unit = source["n_documents"], "documents"
    if config.n_tokens:
        total, unit = config.n_tokens, "tokens"
    with tqdm(total=total, desc="tokenising", unit=f" {unit}") as bar:
        writer = Writer(tokenizer.DocumentEncoder(encoding), record.path, n_workers, bar)
        train = writer.write_split(texts.train, set(heldout), config.n_tokens)
        official = {name: writer.write_split(shards) for name, shards in texts.official.items()}
    about = {"name": encoding.name, "vocab_size": encoding.n_vocab}
    about |= {"end_of_text": encoding.eot_token, "sha256": tokenizer.tokenizer_hash(encoding)}
    manifest = {
        "source": source | {"config": to_json(config)},
        "tokenizer": about,
        "dtype": writer.encoder.dtype.str,
        "n_tokens": _total(train, "n_tokens"),
        "is_whole_corpus": len(train) == len(texts.train),
        "splits": {"train": train, "val": [writer.gather(train, heldout)], **official},
    }
    _check(manifest)
    runs.write_json(record.path / "manifest.json", manifest)
    return manifest


def _total(markers: list[Marker], key: str) -> int:
    return sum(marker[key] for marker in markers)


def _check(manifest: dict[str, Any]) -> None:
    """Refuse a corpus of another size than it declares, and one without text for both splits."""
    splits, n_declared = manifest["splits"], manifest["source"]["n_documents"]
    n_rows = _total(splits["train"], "n_rows")
    if manifest["is_whole_corpus"] and n_rows != n_declared:
        raise ValueError(
            f"the corpus declares {n_declared} documents but holds {n_rows}; its split cannot be "
            "trusted. Fetch it again, or give the files as a local folder."
        )
    if empty := [name for name in ("train", "val") if not _total(splits[name], "n_tokens")]:
        raise ValueError(
            f"the corpus holds no text for {' and '.join(empty)} in {n_rows} documents; bring more "
            "text or raise test_size."
        )


def heldout_documents(n_documents: int, test_size: float, seed: int) -> list[int]:
    """Index the held-out documents, in order, as ``datasets``' shuffled ``train_test_split`` does."""
    if n_documents < 2:
        raise ValueError(
            f"the corpus has {n_documents} document(s); training and validation need one each."
        )
    n_test = math.ceil(test_size * n_documents)
    return np.random.default_rng(seed).permutation(n_documents)[:n_test].tolist()


# ------------------------------------------------------------------------- the tokenizer


def _tokenizer(
    config: DataConfig, texts: Corpus, heldout: set[int], folder: Path
) -> tiktoken.Encoding:
    path = folder / "tokenizer.json"
    if path.exists():
        return tokenizer.load_tokenizer(path)
    if config.tokenizer == "bpe":
        training = _training_texts(texts, heldout, config.n_tokens)
        encoding = tokenizer.train_bpe(training, config.bpe_vocab_size)
    else:
        encoding = tokenizer.load_tiktoken(config.tokenizer)
    runs.write_atomic(path, tokenizer.save_tokenizer(encoding))
    return encoding


def _training_texts(texts: Corpus, heldout: set[int], n_tokens: int | None) -> Iterator[str]:
    """Yield training documents up to BPE_TRAINING_BYTES, from shards that ``n_tokens`` surely needs."""
    n_bytes = index = 0
    for shard in texts.train:
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


# ------------------------------------------------------------------------- token files


@dataclass
class Writer:
    """Turn shards into token files, in order, on all cores, behind one progress bar.

    Threads are enough: tiktoken works outside the interpreter's lock and returns a buffer.
    """

    encoder: tokenizer.DocumentEncoder
    folder: Path
    n_workers: int
    bar: tqdm

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
            if not path.exists():
                marker = self._write_shard(fetch(shard), _total(markers, "n_rows"), heldout)
                runs.write_json(path, marker)
            else:
                marker = runs.read_json(path)
                self._advance(marker)
            markers.append(marker)
            if n_tokens is not None and _total(markers, "n_tokens") >= n_tokens:
                break
        return markers

    def _advance(self, counts: dict[str, Any]) -> None:
        self.bar.update(counts["n_rows" if "documents" in self.bar.unit else "n_tokens"])

    def _write_shard(self, shard: Shard, offset: int, heldout: set[int] | None) -> Marker:
        counts: Counter = Counter()
        main_file = TokenFile(self.folder / f"{shard.name}.bin", heldout is None)
        with main_file as main, TokenFile(self.folder / f"{shard.name}.val.bin", True) as val:
            for job_counts, for_main, for_val in self._jobs(shard, offset, heldout or set()):
                counts.update(job_counts)
                main.append(*for_main)
                val.append(*for_val)
                self._advance(job_counts)
            marker = {"n_rows": counts["n_rows"], "skipped": {k: counts[k] for k in SKIPPED}}
            marker |= main.finish()
            return marker if heldout is None else marker | {"val": val.finish()}

    def _jobs(self, shard: Shard, offset: int, heldout: set[int]) -> Iterator[tuple]:
        """Encode documents in order; only a few jobs are under way, so memory stays flat."""
        pending: deque = deque()
        with ThreadPoolExecutor(self.n_workers) as pool:
            for documents in corpus.groups(read_documents(shard), JOB_BYTES):
                pending.append(pool.submit(self._encode, documents, offset, heldout))
                offset += len(documents)
                if len(pending) > 4 * self.n_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _encode(
        self, documents: list[Document], offset: int, heldout: set[int]
    ) -> tuple[Counter, Encoded, Encoded]:
        kept = [(i, d) for i, d in enumerate(documents, start=offset) if d.raw]
        main = self._to_tokens([(i, d) for i, d in kept if i not in heldout])
        val = self._to_tokens([(i, d) for i, d in kept if i in heldout])
        counts = Counter(
            n_rows=len(documents),
            n_tokens=len(main[0]) + len(val[0]),
            null=sum(d.raw is None for d in documents),
            empty=sum(d.raw == b"" for d in documents),
            invalid_utf8=sum(not d.is_utf8 for d in documents),
        )
        return counts, main, val

    def _to_tokens(self, documents: list[tuple[int, Document]]) -> Encoded:
        tokens, counts = self.encoder.encode([d.text for _, d in documents])
        pairs = zip(documents, counts, strict=True)
        return tokens, [[i, d.domain, len(d.raw), n] for (i, d), n in pairs]

    def gather(self, shards: list[Marker], heldout: list[int]) -> Marker:
        """Gather the held-out documents of all shards into one file, in the split's own order."""
        found = {}
        for shard in (marker["val"] for marker in shards):
            tokens = np.fromfile(self.folder / shard["file"], dtype=self.encoder.dtype)
            stops = np.cumsum([entry[3] for entry in shard["documents"]])
            for entry, part in zip(shard["documents"], np.split(tokens, stops), strict=False):
                found[entry[0]] = part, [entry]
        with TokenFile(self.folder / "val.bin", lists_documents=True) as file:
            for index in heldout:
                if index in found:
                    file.append(*found[index])
            return file.finish()


class TokenFile:
    """A token file being written: counted and hashed on the way, renamed when whole."""

    def __init__(self, path: Path, lists_documents: bool):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")
        self.file = open(self.temporary, "wb")  # noqa: SIM115 - closed by __exit__
        self.sha256 = hashlib.sha256()
        self.domains: dict[str, Counter] = defaultdict(Counter)
        self.n_tokens = 0
        self.documents: list | None = [] if lists_documents else None

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def append(self, tokens: np.ndarray, documents: list[list]) -> None:
        """Add tokens and the documents they make up."""
        self.file.write(tokens.tobytes())
        self.sha256.update(tokens.tobytes())
        self.n_tokens += len(tokens)
        for _, domain, n_bytes, n_tokens in documents:
            self.domains[domain].update(documents=1, bytes=n_bytes, tokens=n_tokens)
        if self.documents is not None:
            self.documents += documents

    def finish(self) -> Marker:
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.temporary, self.path)
        marker = {
            "file": self.path.name,
            "n_tokens": self.n_tokens,
            "sha256": self.sha256.hexdigest(),
            "domains": dict(sorted(self.domains.items())),
        }
        return marker if self.documents is None else marker | {"documents": self.documents}


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
        if names := [f["file"] for f in files if not _agrees(tokens_dir / f["file"], f["sha256"])]:
            bad += names
            manifest.unlink(missing_ok=True)  # first: it must not be left behind alone
            (tokens_dir / marker["file"]).with_suffix(".json").unlink(missing_ok=True)
    return bad


def _agrees(path: Path, sha256: str) -> bool:
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
