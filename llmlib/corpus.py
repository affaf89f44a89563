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
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from llmlib.config import DataConfig

PIECE_BYTES = 10_000  # a lone .txt file is cut into documents of about this size, at blank lines
FILES_PER_SHARD = 256  # text files that make one shard
ROWS_PER_READ = 64  # so that even rows of a megabyte need little memory
FOOTERS_AT_ONCE = 16  # parquet footers read in parallel, for a data set of many remote files
DOMAIN = "redpajama_set_name"  # the field of ``meta`` that names it
HUB_ADDRESS = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)")


Row = tuple[bytes | None, str]  # the text of a document as it is stored (None: null), its domain


class Document(NamedTuple):
    text: str | None  # None: null in the source
    domain: str
    n_bytes: int = 0
    is_valid: bool = True  # False: bytes that were not UTF-8 were replaced


@dataclass(frozen=True)
class Shard:
    """One unit of work: a data file that ``datasets`` reads, or a list of text files."""

    name: str
    url: str = ""  # local path or hf:// address
    format: str = "text"  # "parquet", "json" or "text"
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
        return _text_corpus("stdlib", root, _stdlib_files(root))
    path = Path(config.corpus).expanduser()
    if path.is_file() and _format(path.name) == "text":
        shard = Shard("train-00000", files=((str(path), path.stem),), is_cut=True)
        return Corpus(config.corpus, None, [shard])
    if path.is_dir() and not any(_format(p.name) in ("parquet", "json") for p in path.rglob("*.*")):
        hidden = (p for p in path.rglob("*") if not _is_hidden(p.relative_to(path)))
        return _text_corpus(config.corpus, path, [p for p in hidden if p.is_file()])
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", config.corpus):
        raise ValueError(
            f"corpus={config.corpus!r} does not exist; give a file, a folder, a hub id such as "
            "'DKYoon/SlimPajama-6B', or 'stdlib'."
        )
    return _datasets_corpus(config, path if path.exists() else None)


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


def _stdlib_files(root: Path) -> list[Path]:
    """List the standard library's sources; tests and generated code pages are left out."""
    skip = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - skip - {"encodings"}
        if not Path(folder).relative_to(root).as_posix().startswith("config-"):
            found += [Path(folder, name) for name in names if name.endswith(".py")]
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _format(name: str) -> str:
    suffixes = [s.lower() for s in Path(name).suffixes]
    if ".parquet" in suffixes:
        return "parquet"
    return "json" if {".json", ".jsonl"} & set(suffixes) else "text"


def _datasets_corpus(config: DataConfig, path: Path | None) -> Corpus:
    import datasets

    try:
        if path is not None and path.is_file():
            builder = datasets.load_dataset_builder(
                _format(path.name), data_files={"train": [str(path)]}
            )
        else:
            builder = datasets.load_dataset_builder(
                str(path or config.corpus), config.subset, revision=config.revision
            )
    except Exception as error:  # the library raises many kinds; all mean the same to a reader
        raise ValueError(
            f"corpus={config.corpus!r} (subset {config.subset!r}, revision {config.revision!r}) "
            f"could not be opened: {_first_line(error)} Check the name and the network, or give a "
            "local folder that holds the same files."
        ) from error
    splits = {
        str(split): [
            Shard(f"{split}-{i:05d}", url=str(url), format=_format(str(url)))
            for i, url in enumerate(urls)
        ]
        for split, urls in (builder.config.data_files or {}).items()
    }
    if not splits.get("train"):
        raise ValueError(
            f"corpus={config.corpus!r} has no train split; its splits: {', '.join(splits)}."
        )
    declared = (builder.info.splits or {}).get("train")
    return Corpus(
        name=config.corpus,
        revision=_revision(splits["train"][0].url, config.revision),
        train=splits.pop("train"),
        official=splits,
        n_documents=declared.num_examples if declared else None,
    )


def _revision(url: str, asked: str | None) -> str | None:
    """The commit that hub addresses carry (hf://datasets/owner/name@commit/path)."""
    found = HUB_ADDRESS.match(url)
    return unquote(found.group(2)) if found else asked


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."


def fetch(shard: Shard) -> Shard:
    """Download a hub shard into the Hugging Face cache, resuming where a connection dropped."""
    address = HUB_ADDRESS.match(shard.url)
    if not address:
        return shard
    from huggingface_hub import hf_hub_download

    name, revision, file = address.groups()
    try:
        local = hf_hub_download(name, file, repo_type="dataset", revision=unquote(revision))
    except Exception as error:
        raise ValueError(
            f"shard {shard.name} ({file}) could not be downloaded: {_first_line(error)} "
            "Run again: finished shards are kept."
        ) from error
    return replace(shard, url=local)


def count_documents(corpus: Corpus) -> int:
    """Count the rows of train: as declared, else from parquet footers, else by reading."""
    if corpus.n_documents is not None:
        return corpus.n_documents
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        return sum(pool.map(_count, corpus.train))


def _count(shard: Shard) -> int:
    if shard.format != "parquet":
        return sum(1 for _ in read_rows(fetch(shard)))
    import fsspec
    import pyarrow.parquet as pq

    with _naming(shard), fsspec.open(shard.url, "rb") as file:  # reads no more than the footer
        return pq.ParquetFile(file).metadata.num_rows


@contextmanager
def _naming(shard: Shard) -> Iterator[None]:
    """Say which shard could not be read; readers raise many kinds of errors."""
    try:
        yield
    except (ColumnError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"shard {shard.name} ({shard.url or 'text files'}) could not be read: "
            f"{_first_line(error)} Delete the file and fetch it again; finished shards are kept."
        ) from error


class ColumnError(ValueError):
    """The corpus has no column of documents."""


def read_documents(shard: Shard) -> Iterator[Document]:
    """Yield the documents of a local shard in order."""
    return (decode(*row) for row in read_rows(shard))


def read_rows(shard: Shard) -> Iterator[Row]:
    """Yield the rows of a local shard in order, holding a few at a time."""
    with _naming(shard):
        if shard.is_cut:
            [(path, domain)] = shard.files
            yield from ((piece, domain) for piece in _pieces(Path(path)))
        elif shard.files:
            yield from ((Path(path).read_bytes(), domain) for path, domain in shard.files)
        else:
            for table in _tables(shard):
                yield from _rows(table)


def _tables(shard: Shard) -> Iterator:
    if shard.format == "parquet":
        import pyarrow.parquet as pq

        # Buffered and without read-ahead: one huge row group takes no more memory than many.
        with pq.ParquetFile(shard.url, buffer_size=1 << 20, pre_buffer=False) as file:
            columns = [c for c in ("text", "meta") if c in file.schema_arrow.names]
            _require_text(file.schema_arrow.names)
            yield from file.iter_batches(ROWS_PER_READ, columns=columns)
    else:
        import datasets

        rows = datasets.load_dataset(
            shard.format, data_files=[shard.url], split="train", streaming=True
        )
        yield from rows.with_format("arrow").iter(batch_size=ROWS_PER_READ)


def _require_text(columns: list[str]) -> None:
    if "text" not in columns:
        raise ColumnError(
            f"the corpus has no 'text' column (it has {', '.join(columns)}); rename the column that "
            "holds the documents."
        )


def _rows(table) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.compute as pc

    _require_text(table.schema.names)
    texts = table.column("text").cast(pa.binary()).to_pylist()
    domains: list = [None] * len(texts)
    if "meta" in table.schema.names:
        meta = table.column("meta")
        if pa.types.is_struct(meta.type) and meta.type.get_field_index(DOMAIN) >= 0:
            domains = pc.struct_field(meta, DOMAIN).to_pylist()
    yield from ((text, domain or "all") for text, domain in zip(texts, domains, strict=True))


def decode(raw: bytes | None, domain: str) -> Document:
    """Turn a row into a document; bytes that are not UTF-8 become U+FFFD."""
    if raw is None:
        return Document(None, domain)
    try:
        return Document(raw.decode(), domain, len(raw))
    except UnicodeDecodeError:
        return Document(raw.decode(errors="replace"), domain, len(raw), is_valid=False)


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
