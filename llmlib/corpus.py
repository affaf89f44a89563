"""Where text comes from: a corpus is a list of shards per split, a shard yields documents.

Hub data sets and folders in the hub's layout are resolved by ``datasets`` (names, revisions,
patterns) and fetched shard by shard, so a run that needs one shard downloads one. Parquet, text
files and the running Python's standard library are read here, other formats by ``datasets``.
"""

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from llmlib.config import DataConfig

PIECE = re.compile(rb".{10000,}?\n\r?\n|.+", re.DOTALL)  # of a lone text file: cut at blank lines
FILES_PER_SHARD = 256  # text files that make one shard
ROWS_PER_READ = 64  # so that even rows of a megabyte need little memory
NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
NEAREST = "-p corpus HuggingFaceFW/fineweb -p subset sample-10BT"  # to SlimPajama, on the hub
DOMAIN = "redpajama_set_name"  # the field of ``meta`` that names it


class Document(NamedTuple):
    raw: bytes | None  # as it is stored; None: null
    domain: str

    @property
    def text(self) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return self.raw.decode(errors="replace")

    @property
    def fault(self) -> str | None:
        """What is wrong with it: "null" or "empty" (no text), "invalid_utf8" (mended), or None."""
        if not self.raw:
            return "null" if self.raw is None else "empty"
        return None if self.text.encode() == self.raw else "invalid_utf8"


class Shard(NamedTuple):
    """One unit of work: a data file, or text files of a folder."""

    name: str
    url: str  # local path or hf:// address
    format: str  # "files", "text", "parquet", or another builder of ``datasets``
    files: tuple[Path, ...] = ()  # below the folder


@dataclass(frozen=True)
class Corpus:
    train: list[Shard]
    revision: str | None = None
    official: dict[str, list[Shard]] = field(default_factory=dict)  # the data set's other splits
    n_documents: int | None = None  # in train, where the source declares it


def open_corpus(config: DataConfig) -> Corpus:
    """Resolve ``config.corpus`` to shards without reading their text."""
    path = Path(config.corpus).expanduser()
    if config.corpus == "stdlib":
        path = Path(sysconfig.get_paths()["stdlib"])
        return _text_corpus(path, [p for p in _names(path, NOT_SOURCES) if p.suffix == ".py"])
    if path.is_file():
        return Corpus([Shard("train-00000", str(path), _format(path))])
    if (names := _names(path)) and all(_format(name) == "text" for name in names):
        return _text_corpus(path, names)
    return _datasets_corpus(config, path)


def _names(root: Path, left_out: Set[str] = frozenset()) -> list[Path]:
    """List the files below a folder, without some folders and what is hidden."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name[0] != "." and name not in left_out]
        names += [Path(folder, name).relative_to(root) for name in files if name[0] != "."]
    return names


def _format(path: Path) -> str:
    suffixes = {suffix.lower() for suffix in path.suffixes}  # several, as in .jsonl.gz
    if ".parquet" in suffixes:
        return "parquet"
    return "json" if suffixes & {".json", ".jsonl"} else "text"


def _text_corpus(folder: Path, names: list[Path]) -> Corpus:
    """Group text files into shards; a file is a document and its top folder is its domain."""
    # In hash order, so that every shard holds some of everything, the same on every machine.
    names = sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    groups = [names[i : i + FILES_PER_SHARD] for i in range(0, len(names), FILES_PER_SHARD)]
    shards = [Shard(f"train-{i:05d}", str(folder), "files", (*g,)) for i, g in enumerate(groups)]
    return Corpus(shards, n_documents=len(names))


def _datasets_corpus(config: DataConfig, path: Path) -> Corpus:
    """Let ``datasets`` find the files of a hub data set, or of a folder in its layout."""
    from datasets import load_dataset_builder

    with _explained(f"corpus={config.corpus!r} could not be opened"):
        builder = load_dataset_builder(str(path), config.subset, revision=config.revision)
        splits = {
            str(name): [Shard(f"{name}-{i:05d}", str(u), builder.name) for i, u in enumerate(urls)]
            for name, urls in (builder.config.data_files or {}).items()
        }
        if "train" not in splits:
            raise ValueError(f"no train split; its splits: {', '.join(splits)}")
    train = splits.pop("train")
    commit = re.match(r"hf://datasets/[^@]+@([0-9a-f]+)/", train[0].url)
    declared = (builder.info.splits or {}).get("train")
    revision = commit[1] if commit else config.revision
    return Corpus(train, revision, splits, declared and declared.num_examples)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn an error into one that a reader can act on; libraries raise many kinds."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        text = (
            f"{what}: {reason}. Check name, files and network, then run again: a corpus is a file, a "
            "folder, a hub id or 'stdlib', and finished shards are kept."
        )
        if type(error).__name__ == "DatasetNotFoundError":
            text += f" If it has gone from the hub, {NEAREST} is near it; losses do not compare."
        raise ValueError(text) from error


def count_documents(corpus: Corpus) -> int:
    """Count the rows of train: as declared, else from parquet footers, else by reading."""
    with ThreadPoolExecutor(16) as pool:  # a data set may have many remote files
        return corpus.n_documents or sum(pool.map(_count, corpus.train))


def _count(shard: Shard) -> int:
    if shard.format != "parquet":
        return sum(1 for _ in read_documents(shard))
    what = f"shard {shard.name} ({shard.url}) could not be read"
    with _explained(what), fsspec.open(shard.url, "rb") as file:  # reads no more than the footer
        return pq.ParquetFile(file).metadata.num_rows


def read_documents(shard: Shard) -> Iterator[Document]:
    """Yield the documents of a shard in order, holding a few at a time."""
    with _explained(f"shard {shard.name} ({shard.url}) could not be read"):
        shard = fetch(shard)
        path = Path(shard.url)
        if shard.format == "files":
            for name in shard.files:
                domain = name.parts[0] if len(name.parts) > 1 else "top level"
                yield Document((path / name).read_bytes(), domain)
        elif shard.format == "text":
            for piece in PIECE.finditer(path.read_bytes()):
                yield Document(piece[0], path.stem)
        else:
            yield from _rows(shard)


def fetch(shard: Shard) -> Shard:
    """Download a hub shard into the Hugging Face cache, resuming where a connection dropped."""
    if not shard.url.startswith("hf://"):
        return shard
    from datasets import DownloadManager

    path = DownloadManager(record_checksums=False).download(shard.url)
    return shard._replace(url=str(path))


def _rows(shard: Shard) -> Iterator[Document]:
    """Read a data file a few rows at a time."""
    if shard.format == "parquet":
        # Buffered and without read-ahead: one huge row group takes no more memory than many.
        file = pq.ParquetFile(shard.url, buffer_size=1 << 20, pre_buffer=False)
        names = [name for name in file.schema_arrow.names if name in ("text", "meta")]
        tables = file.iter_batches(ROWS_PER_READ, columns=names if "text" in names else None)
    else:
        from datasets import load_dataset

        rows = load_dataset(shard.format, data_files=[shard.url], split="train", streaming=True)
        tables = rows.with_format("arrow").iter(batch_size=ROWS_PER_READ)
    for table in tables:
        if "text" not in (names := table.schema.names):
            raise ValueError(f"it has no 'text' column (it has {', '.join(names)}); rename one")
        texts = table.column("text").cast(pa.binary()).to_pylist()
        metas = table.column("meta").to_pylist() if "meta" in names else [None] * len(texts)
        for raw, meta in zip(texts, metas, strict=True):
            yield Document(raw, (isinstance(meta, dict) and meta.get(DOMAIN)) or "all")
