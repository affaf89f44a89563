"""Text to token files with a manifest: resumable, verifiable, on all cores.

One file of little-endian tokens per shard (the flat layout that nanoGPT and llm-baselines read) is
renamed into place when whole; its marker follows, and the manifest is written last. ``data`` reads
what this module writes.
"""

import hashlib
import math
import os
from collections import Counter, defaultdict, deque
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tiktoken import Encoding
from tqdm import tqdm

from llmlib import corpus, data, runs, tokenizer
from llmlib.config import DataConfig, to_json
from llmlib.corpus import Corpus, Shard
from llmlib.readers import Document, Tally

BPE_TRAINING_BYTES = 16_000_000  # text that a trained tokenizer sees
MANY_SHARDS = 100  # more are not counted: held-out documents come from those that are used
MOST_INVALID = 0.05  # share of a shard's documents that may hold bytes that are not UTF-8
DOCUMENTS_PER_JOB = 64  # about 0.5 MB of text: enough to hide what Python adds
BYTES_PER_JOB = 1_000_000  # so that long documents take no more memory

Marker = dict[str, Any]  # what is written about a finished token file
Encoded = tuple[list, np.ndarray]  # a document's [index, domain, bytes, tokens], and its tokens


def prepare(config: DataConfig, tokens_dir: Path) -> Marker:
    """Tokenise a corpus into a folder and return its manifest; what is finished is kept."""
    record = runs.Record(tokens_dir, to_json(config))
    if not (tokens_dir / "manifest.json").exists():
        with runs.lock(tokens_dir):
            runs.write_json(tokens_dir / "manifest.json", _write_tokens(config, record))
    return data.load_manifest(tokens_dir)


def _write_tokens(config: DataConfig, record: runs.Record) -> Marker:
    # The first visit pins what the corpus is, so that a resumed one reads the same revision.
    source = record.cached_json("source", lambda: _describe(corpus.open_corpus(config)))
    texts = corpus.open_corpus(replace(config, revision=source["revision"]))
    if source.get("about", texts.about) != texts.about:
        raise ValueError(
            f"the sources of {config.corpus!r} have changed since {record.path} was begun "
            f"({source['about']} then, {texts.about} now); delete that folder to begin anew."
        )
    n_documents, heldout = source["n_documents"], Drawn(config.test_size, config.split_seed)
    if n_documents is not None:
        candidates = range(n_documents) if texts.candidates is None else texts.candidates
        drawn = heldout_documents(len(candidates), config.test_size, config.split_seed)
        heldout = dict.fromkeys(candidates[i] for i in drawn)  # a set in the split's order
    encoding = _tokenizer(config, texts, heldout, record.path / "tokenizer.json")
    bar = tqdm(total=None if config.n_tokens else n_documents, unit=" documents")
    with ThreadPoolExecutor(runs.n_cores()) as pool, bar:
        writer = Writer(tokenizer.DocumentEncoder(encoding), record.path, pool, bar)
        train = writer.write_split(texts.train, heldout, config.n_tokens)
        val = writer.gather(train, heldout)
        official = {name: writer.write_split(shards) for name, shards in texts.official.items()}
    n_rows, n_tokens = _total(train, "n_rows"), _total(train, "n_tokens")
    if len(train) == len(texts.train) and n_documents not in (None, n_rows):
        raise ValueError(
            f"the corpus declares {n_documents} documents but holds {n_rows}; its split cannot be "
            "trusted. Fetch it again, or give the files as a local folder."
        )
    if not n_tokens or not val["n_tokens"]:
        raise ValueError(
            f"the corpus holds no text for train or val in {n_rows} documents; bring more text or "
            "raise test_size."
        )
    return {
        "source": source | {"config": to_json(config)},
        "tokenizer": tokenizer.describe(encoding),
        "dtype": writer.encoder.dtype.str,
        "n_tokens": n_tokens,
        "splits": {"train": train, "val": [val], **official},
        "files": _merged(m["files"] for markers in (train, *official.values()) for m in markers),
    }


def _describe(texts: Corpus) -> dict[str, Any]:
    about = {"revision": texts.revision, "about": texts.about}
    if len(texts.train) > MANY_SHARDS:
        how = "each by a draw of its own, from the shards that are used"
        return about | {"n_documents": None, "heldout": how}
    n_documents = corpus.count_documents(texts, tally := {})
    if n_documents < 2:
        raise ValueError(
            f"the corpus has {n_documents} document(s); train and val need one each. Found: "
            f"{[f'{kind} {what}: {n}' for (kind, what), (n, _) in tally.items()] or 'nothing'}."
        )
    return about | {"n_documents": n_documents, "heldout": "by datasets' train_test_split"}


def _merged(tables: Iterable[list[list]]) -> list[list]:
    """Add up what shards tell of their files: rows of kind, what was met, how often, an example."""
    total: dict[tuple[str, str], list] = {}
    for kind, what, n, example in sorted(row for table in tables for row in table):
        total.setdefault((kind, what), [0, example])[0] += n
    return [[*key, *counted] for key, counted in total.items()]


def _total(markers: list[Marker], key: str) -> int:
    return sum(marker[key] for marker in markers)


def heldout_documents(n_documents: int, test_size: float, seed: int) -> list[int]:
    """Index the held-out documents, in order, as ``datasets``' shuffled ``train_test_split`` does."""
    n_test = math.ceil(test_size * n_documents)
    return np.random.default_rng(seed).permutation(n_documents)[:n_test].tolist()


class Drawn:
    """Held-out documents of a corpus too large to be counted: each by a draw of its own."""

    def __init__(self, test_size: float, seed: int):
        self.below, self.seed = int(test_size * 2**64), seed

    def __contains__(self, index: int) -> bool:
        draw = hashlib.blake2b(f"{self.seed} {index}".encode(), digest_size=8).digest()
        return int.from_bytes(draw, "big") < self.below


def _tokenizer(config: DataConfig, texts: Corpus, heldout: Container[int], path: Path) -> Encoding:
    if not path.exists():
        if config.tokenizer == "bpe":
            training = _training_texts(texts, heldout, config.n_tokens or math.inf)
            encoding = tokenizer.train_bpe(training, config.bpe_vocab_size)
        else:
            encoding = tokenizer.load_tiktoken(config.tokenizer)
        runs.write_atomic(path, tokenizer.save_tokenizer(encoding))
    return tokenizer.load_tokenizer(path)


def _training_texts(texts: Corpus, heldout: Container[int], n_tokens: float) -> Iterator[str]:
    """Yield training documents up to BPE_TRAINING_BYTES, from shards that ``n_tokens`` surely needs."""
    n_most = index = 0  # a document has at most one token per byte, and one at its end
    for shard in texts.train:
        if n_most >= n_tokens:
            return
        for document in corpus.read_documents(shard):
            if index not in heldout and document.raw:
                yield document.text
            index += 1
            n_most += len(document.raw or b"") + 1
            if n_most >= BPE_TRAINING_BYTES:
                return


@dataclass
class Writer:
    """Turn shards into token files, in order, on all cores, behind one progress bar.

    Threads are enough: tiktoken works outside the interpreter's lock and returns a buffer.
    """

    encoder: tokenizer.DocumentEncoder
    folder: Path
    pool: ThreadPoolExecutor
    bar: tqdm

    def write_split(
        self, shards: list[Shard], heldout: Container[int] = (), n_tokens: int | None = None
    ) -> list[Marker]:
        """Write the shards of a split, up to the one that reaches ``n_tokens``; marked ones are done."""
        markers: list[Marker] = []
        for shard in shards:
            path = self.folder / f"{shard.name}.json"
            if path.exists():
                self.bar.update(runs.read_json(path)["n_rows"])
            else:
                runs.write_json(path, self._write_shard(shard, _total(markers, "n_rows"), heldout))
            markers.append(runs.read_json(path))
            if n_tokens and _total(markers, "n_tokens") >= n_tokens:
                break
        return markers

    def _write_shard(self, shard: Shard, first: int, heldout: Container[int]) -> Marker:
        n_of_fault, tally, aside = Counter(), {}, []

        def kept() -> Iterator[Encoded]:
            documents = enumerate(corpus.read_documents(shard, tally), first)
            for entry, tokens in self._encoded(documents, n_of_fault):
                if entry[0] in heldout:
                    aside.append((entry, tokens))
                else:
                    yield entry, tokens
            _require_utf8(shard, tally, n_of_fault)

        marker = self._write_file(f"{shard.name}.bin", kept())
        if heldout:
            marker["val"] = self._write_val(f"{shard.name}.val.bin", aside)
        skipped = {fault: n_of_fault[fault] for fault in ("null", "empty", "invalid_utf8")}
        files = [[*key, *counted] for key, counted in sorted(tally.items())]
        return marker | {"n_rows": n_of_fault.total(), "skipped": skipped, "files": files}

    def _encoded(
        self, documents: Iterator[tuple[int, Document]], n_of_fault: Counter
    ) -> Iterator[Encoded]:
        """Encode documents, in order, and count their faults; few at a time, for memory."""
        jobs = deque()
        for job in _jobs(documents):
            n_of_fault.update(document.fault for _, document in job)
            self.bar.update(len(job))
            jobs.append(self.pool.submit(self._encode, job))
            if len(jobs) > 4 * runs.n_cores():
                yield from jobs.popleft().result()
        for encoded in jobs:
            yield from encoded.result()

    def _encode(self, job: list[tuple[int, Document]]) -> list[Encoded]:
        documents = [(index, document) for index, document in job if document.raw]
        tokens = self.encoder.encode([document.text for _, document in documents])
        pairs = zip(documents, tokens, strict=True)
        return [([i, d.domain, len(d.raw), len(found)], found) for (i, d), found in pairs]

    def _write_file(self, name: str, documents: Iterable[Encoded]) -> Marker:
        """Write a token file, counted and hashed on the way, renamed when whole."""
        sha256, domains = hashlib.sha256(), defaultdict(Counter)
        temporary = self.folder / f".{name}.tmp"
        with open(temporary, "wb") as file:
            for (_, domain, n_bytes, n_tokens), tokens in documents:
                file.write(tokens)
                sha256.update(tokens)
                domains[domain].update(documents=1, bytes=n_bytes, tokens=n_tokens)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)
        n_tokens = sum(counts["tokens"] for counts in domains.values())
        marker = {"file": name, "n_tokens": n_tokens, "sha256": sha256.hexdigest()}
        return marker | {"domains": dict(sorted(domains.items()))}

    def _write_val(self, name: str, documents: list[Encoded]) -> Marker:
        return self._write_file(name, documents) | {"documents": [entry for entry, _ in documents]}

    def gather(self, markers: list[Marker], heldout: dict[int, None] | Drawn) -> Marker:
        """Gather the held-out documents of all shards into one file, in the split's own order."""
        found = {}
        for val in (marker["val"] for marker in markers):
            tokens, start = np.fromfile(self.folder / val["file"], self.encoder.dtype), 0
            for entry in val["documents"]:
                index, *_, n_tokens = entry
                found[index] = entry, tokens[start : start + n_tokens]
                start += n_tokens
        order = sorted(found) if isinstance(heldout, Drawn) else filter(found.get, heldout)
        return self._write_val("val.bin", [found[index] for index in order])


def _jobs(documents: Iterator[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Group documents by number and size."""
    job, n_bytes = [], 0
    for index, document in documents:
        job.append((index, document))
        n_bytes += len(document.raw or b"")
        if len(job) == DOCUMENTS_PER_JOB or n_bytes >= BYTES_PER_JOB:
            yield job
            job, n_bytes = [], 0
    if job:
        yield job


def _require_utf8(shard: Shard, tally: Tally, n_of_fault: Counter) -> None:
    """Refuse a shard of another encoding: replacement characters are no text."""
    n_bad, n_rows = n_of_fault["invalid_utf8"], n_of_fault.total()
    if n_bad > MOST_INVALID * n_rows:
        examples = [counted[1] for (_, what), counted in tally.items() if "not UTF-8" in what]
        raise ValueError(
            f"{n_bad} of the {n_rows} documents of {shard.url} are not UTF-8, {examples[0]} among "
            "them; turn them into UTF-8 (iconv -f latin1 -t utf-8) or leave them out."
        )


def verify(tokens_dir: Path) -> list[str]:
    """Compare every token file with its hash and return the names of those that differ.

    Whatever belongs to a bad file is forgotten, so that the next ``prepare`` rebuilds it alone.
    """
    manifest = tokens_dir / "manifest.json"
    markers = [runs.read_json(path) for path in sorted(tokens_dir.glob("*-*.json"))]
    markers += runs.read_json(manifest)["splits"]["val"] if manifest.exists() else []
    bad = []
    for marker in markers:
        hashes = {part["file"]: part["sha256"] for part in (marker, marker.get("val", marker))}
        differing = [name for name, found in hashes.items() if _sha256(tokens_dir / name) != found]
        if differing:
            bad += differing
            manifest.unlink(missing_ok=True)  # first: it must not be left behind alone
            (tokens_dir / marker["file"]).with_suffix(".json").unlink(missing_ok=True)
    return bad


def _sha256(path: Path) -> str | None:
    if not path.exists():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
