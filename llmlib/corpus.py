"""Where text comes from: a corpus is a list of shards per split, a shard yields documents.

Hub datasets, folders in the hub's layout, JSONL and parquet files go through ``datasets``, which
resolves names, revisions and patterns; shards are then fetched one at a time, so a run that needs
one shard downloads one. Parquet, text files and the running Python's own standard library are read
here, a few documents at a time, whatever the size of a file.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from llmlib.config import DataConfig

PIECE_BYTES = 10_000  # a lone .txt file is cut into documents of about this size, at blank lines
FILES_PER_SHARD = 256  # text files that make one shard
ROWS_PER_READ = 64  # so that even rows of a megabyte need little memory
FOOTERS_AT_ONCE = 16  # parquet footers read in parallel, for a data set of many remote files
DOMAIN = "redpajama_set_name"  # the field of ``meta`` that names it
NOT_SOURCES = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
GENERATED = {"encodings"}  # code pages of the standard library


@dataclass(frozen=True)
class Document:
    raw: bytes | None  # as it is stored; None: null
    domain: str

    @cached_property
    def text(self) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return (self.raw or b"").decode(errors="replace")

    @property
    def is_utf8(self) -> bool:
        return "\ufffd" not in self.text or self.text.encode() == self.raw


@dataclass(frozen=True)
class Shard:
    """One unit of work: a data file, or a list of text files."""

    name: str
    url: str = ""  # local path or hf:// address
    format: str = "text"  # the builder of ``datasets`` that reads it
    files: tuple[tuple[str, str], ...] = ()  # (path, domain) of text files
    is_cut: bool = False  # one long text, cut into documents


@dataclass(frozen=True)
class Corpus:
    name: str
    revision: str | None
    train: list[Shard]
    official: dict[str, list[Shard]] = field(default_factory=dict)  # the dataset's other splits
    n_documents: int | None = None  # in train, where the source declares it


def open_corpus(config: DataConfig) -> Corpus:
    """Resolve ``config.corpus`` to shards without reading their text."""
    if config.corpus == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _text_corpus("stdlib", root, list(_stdlib_files(root)))
    path = Path(config.corpus).expanduser()
    if path.is_file() and _is_text(path):
        shard = Shard("train-00000", files=((str(path), path.stem),), is_cut=True)
        return Corpus(config.corpus, None, [shard])
    if path.is_dir() and all(map(_is_text, files := _visible_files(path))):
        return _text_corpus(config.corpus, path, files)
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", config.corpus):
        raise ValueError(
            f"corpus={config.corpus!r} does not exist; give a file, a folder, a hub id such as "
            "'DKYoon/SlimPajama-6B', or 'stdlib'."
        )
    return _datasets_corpus(config, path)


def _text_corpus(name: str, root: Path, paths: list[Path]) -> Corpus:
    """Group text files into shards; a file is a document and its top folder is its domain."""
    if not paths:
        raise ValueError(
            f"corpus={name!r} holds no text; give a folder with .txt, .jsonl or .parquet files."
        )
    named = [path.relative_to(root) for path in paths]
    # In hash order, so that every shard holds some of everything, the same on every machine.
    named.sort(key=lambda p: hashlib.sha256(p.as_posix().encode()).digest())
    files = [(str(root / p), p.parts[0] if len(p.parts) > 1 else "top level") for p in named]
    groups = [files[i : i + FILES_PER_SHARD] for i in range(0, len(files), FILES_PER_SHARD)]
    shards = [Shard(f"train-{i:05d}", files=tuple(group)) for i, group in enumerate(groups)]
    return Corpus(name, None, shards, n_documents=len(files))


def _stdlib_files(root: Path) -> Iterator[Path]:
    """List the standard library's sources; tests and generated files are left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - NOT_SOURCES - GENERATED
        if not Path(folder).name.startswith("config-"):
            yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _visible_files(root: Path) -> list[Path]:
    paths = ((p, p.relative_to(root).parts) for p in root.rglob("*") if p.is_file())
    return [path for path, parts in paths if not any(part[0] == "." for part in parts)]


def _is_text(path: Path) -> bool:
    return not {".parquet", ".json", ".jsonl"} & {suffix.lower() for suffix in path.suffixes}


def _datasets_corpus(config: DataConfig, path: Path) -> Corpus:
    builder = _builder(config, path)
    splits = {
        str(split): [
            Shard(f"{split}-{i:05d}", url=str(url), format=builder.name)
            for i, url in enumerate(urls)
        ]
        for split, urls in (builder.config.data_files or {}).items()
    }
    if not splits.get("train"):
        raise ValueError(
            f"corpus={config.corpus!r} has no train split; its splits: {', '.join(splits)}."
        )
    train = splits.pop("train")
    commit = re.match(r"hf://datasets/[^@]+@([^/]+)/", train[0].url)
    revision = unquote(commit[1]) if commit else config.revision
    declared = (builder.info.splits or {}).get("train")
    return Corpus(config.corpus, revision, train, splits, declared and declared.num_examples)


def _builder(config: DataConfig, path: Path) -> Any:
    """Let ``datasets`` find the files of a hub data set, of a folder, or of one file."""
    import datasets

    what = f"corpus={config.corpus!r} (subset {config.subset!r}, revision {config.revision!r})"
    remedy = "Check the name and the network, or give a local folder that holds the same files."
    with _explaining(f"{what} could not be opened", remedy):
        if path.is_file():
            name = "parquet" if ".parquet" in path.name.lower() else "json"
            return datasets.load_dataset_builder(name, data_files={"train": [str(path)]})
        return datasets.load_dataset_builder(str(path), config.subset, revision=config.revision)


@contextmanager
def _explaining(what: str, remedy: str) -> Iterator[None]:
    """Turn an error into one that a reader can act on; libraries raise many kinds."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"{what}: {reason}. {remedy}") from error


def _reading(shard: Shard) -> AbstractContextManager:
    what = f"shard {shard.name} ({shard.url or 'text files'}) could not be read"
    return _explaining(what, "Mend or replace the file and run again: finished shards are kept.")


def fetch(shard: Shard) -> Shard:
    """Download a hub shard into the Hugging Face cache, resuming where a connection dropped."""
    if not shard.url.startswith("hf://"):
        return shard
    import datasets

    what = f"shard {shard.name} ({shard.url}) could not be downloaded"
    with _explaining(what, "Run again: finished shards are kept."):
        local = datasets.DownloadManager(record_checksums=False).download(shard.url)
    return replace(shard, url=str(local))


def count_documents(corpus: Corpus) -> int:
    """Count the rows of train: as declared, else from parquet footers, else by reading."""
    if corpus.n_documents is not None:
        return corpus.n_documents
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        return sum(pool.map(_count, corpus.train))


def _count(shard: Shard) -> int:
    if shard.format != "parquet":
        return sum(1 for _ in read_documents(fetch(shard)))
    import fsspec
    import pyarrow.parquet as pq

    with _reading(shard), fsspec.open(shard.url, "rb") as file:  # reads no more than the footer
        return pq.ParquetFile(file).metadata.num_rows


def read_documents(shard: Shard) -> Iterator[Document]:
    """Yield the documents of a local shard in order, holding a few at a time."""
    with _reading(shard):
        if shard.is_cut:
            [(path, domain)] = shard.files
            yield from (Document(piece, domain) for piece in _pieces(Path(path)))
        elif shard.files:
            yield from (Document(Path(path).read_bytes(), domain) for path, domain in shard.files)
        else:
            for table in _tables(shard):
                yield from map(Document, *_columns(table))


def _tables(shard: Shard) -> Iterator:
    if shard.format == "parquet":
        import pyarrow.parquet as pq

        # Buffered and without read-ahead: one huge row group takes no more memory than many.
        with pq.ParquetFile(shard.url, buffer_size=1 << 20, pre_buffer=False) as file:
            columns = file.schema_arrow.names  # all, for the error message, if there is no text
            if "text" in columns:
                columns = [name for name in columns if name in ("text", "meta")]
            yield from file.iter_batches(ROWS_PER_READ, columns=columns)
    else:
        import datasets

        rows = datasets.load_dataset(
            shard.format, data_files=[shard.url], split="train", streaming=True
        )
        yield from rows.with_format("arrow").iter(batch_size=ROWS_PER_READ)


def _columns(table) -> tuple[list[bytes | None], list[str]]:
    """Take texts and domains out of an Arrow table."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if "text" not in table.schema.names:
        raise ValueError(
            f"it has no 'text' column (it has {', '.join(table.schema.names)}); rename the one that "
            "holds the documents"
        )
    texts = table.column("text").cast(pa.binary()).to_pylist()
    domains: list = [None] * len(texts)
    if "meta" in table.schema.names:
        meta = table.column("meta")
        if pa.types.is_struct(meta.type) and meta.type.get_field_index(DOMAIN) >= 0:
            domains = pc.struct_field(meta, DOMAIN).to_pylist()
    return texts, [domain or "all" for domain in domains]


def _pieces(path: Path) -> Iterator[bytes]:
    """Cut one long text at blank lines into pieces of PIECE_BYTES or a little more."""
    piece: list[bytes] = []
    size = 0
    with open(path, "rb") as file:
        for line in file:
            piece.append(line)
            size += len(line)
            if size >= PIECE_BYTES and not line.strip():
                yield b"".join(piece)
                piece, size = [], 0
    if piece:
        yield b"".join(piece)
