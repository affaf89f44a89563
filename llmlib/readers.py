"""One file to documents: text, JSON lines, tables; plain or compressed, by content and extension.

A reader holds a few documents at a time, takes the columns that are used and no others, and notes in
a tally what it read, mended and left out. Where files come from is ``corpus``'s business.
"""

import bz2
import csv
import gzip
import json
import lzma
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader, StringIO, TextIOWrapper
from itertools import chain, islice
from pathlib import PurePath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

PIECE = (10_000, 100_000)  # of a lone text: cut at a blank line, at most [characters]
WHOLE = 1_000_000  # a text file of a folder up to this size is one document [characters]
ROWS_PER_READ = 64  # so that even rows of a megabyte need little memory
DOMAIN = "redpajama_set_name"  # the field of ``meta`` that names it
END = "<|endoftext|>"
NOT_UTF8 = "not UTF-8, mended"
SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair, or a byte that is not UTF-8
LEFT_OUT = {  # by extension
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xml", ".svg", ".ipynb"), "markup"),
    **dict.fromkeys((".arrow", ".feather"), "Arrow; write it as parquet with datasets' to_parquet"),
    **dict.fromkeys((".tar", ".tgz", ".zip"), "an archive; unpack it"),
}
MARKUP_START = re.compile(rb"(?i)\s*(?:<!doctype html|<html)")
TEXT_TYPE = re.compile(r"^(dictionary<values=)?(large_)?(string|binary).*")  # arrow's names
BINARY = re.compile(rb"\0|\A%PDF")
WIDE = re.compile(rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff")  # byte order marks of UTF-16 and UTF-32
UNPACK = {  # by a file's first bytes
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(file, "zstd"),
}
SUFFIX = re.compile(r"(?<=.)(\.[^.]+)(?:\.(?:gz|bz2|xz|zst))?$")  # of the content, then of packing

Tally = dict[tuple[str, str], list]  # (kind of file, what was met) -> [how often, the first file]


class LeftOut(ValueError):
    """Why a file holds no text that can be read."""


class Document(NamedTuple):
    text: str | None  # None: the row holds no text
    domain: str


@dataclass
class File:
    """A file to read: where it lies, how it is called, and what is known of it."""

    path: str  # or an hf:// address
    name: str  # below the corpus's folder; its suffixes tell the kind, its top folder the domain
    column: str | None = None  # that holds the texts; None: "text", or the only one of strings
    lone: bool = False  # the whole of a corpus, or of a shard: must be readable
    tally: Tally = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What is shown and stored is Unicode, whatever bytes the file system allows.
        self.name = self.name.encode(errors="replace").decode()
        *folders, name = PurePath(self.name).parts
        self.domain = "all" if self.lone else [*folders, "top level"][0]
        match = SUFFIX.search(name.lower())
        self.kind, self.suffix = match.group(0, 1) if match else ("no extension", "")

    def note(self, what: str, n: int = 1) -> None:
        """Count something that was met; the first file of its kind is the example."""
        self.tally.setdefault((self.kind, what), [0, self.name])[0] += n


def read_file(file: File) -> Iterator[Document]:
    """Yield the documents of a file; one without text is noted, or an error where it is alone."""
    try:
        for value, domain in _values(file):
            yield Document(_text(file, value), domain)
        file.note("files read")
    except LeftOut as reason:
        if file.lone:
            raise
        file.note(f"files left out: {str(reason).split(' (')[0]}")


def _text(file: File, value: Any) -> str | None:
    """Turn what stands in a text's place into a text, and note what it took."""
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    if not isinstance(value, str) or not value:
        file.note(f"documents left out: {type(value).__name__ if value else 'no text'}")
        return None
    file.note("documents read")
    try:
        value.encode()
    except UnicodeEncodeError:
        value, n = SURROGATE.subn("\ufffd", value)
        file.note(NOT_UTF8)
        file.note("characters replaced", n)
    if END in value:
        file.note(f"{END} as text", value.count(END))
    return value


def _values(file: File) -> Iterator[tuple[Any, str]]:
    """Choose the reader by content, then by extension; yield texts, or others, with domains."""
    if PurePath(file.name).name.startswith("."):
        raise LeftOut("hidden")
    if not os.path.isfile(file.path):
        raise LeftOut("a link to a folder, or not a file")
    with open(file.path, "rb") as packed:
        unpack = next((u for magic, u in UNPACK.items() if packed.peek().startswith(magic)), None)
        stream = BufferedReader(unpack(packed)) if unpack else packed
        head = stream.peek()
        if head.startswith(b"version https://git-lfs"):
            raise ValueError(f"{file.name} is a git-lfs pointer, not the text; run git lfs pull")
        if file.suffix in LEFT_OUT or MARKUP_START.match(head):
            raise LeftOut(LEFT_OUT.get(file.suffix, "markup"))
        if head.startswith(b"PAR1") or file.suffix == ".parquet":
            yield from _rows(file, _parquet(file, stream))
            return
        how = ("utf-8-sig", "surrogateescape")
        if WIDE.match(head):
            how = ("utf-32" if b"\0\0" in head[:4] else "utf-16", "replace")
        elif BINARY.search(head):
            raise LeftOut("binary")
        text = TextIOWrapper(stream, *how, newline="")
        if file.suffix in ROWS:
            yield from _rows(file, ROWS[file.suffix](text))
        else:
            yield from ((piece, file.domain) for piece in _pieces(file, text))


def _pieces(file: File, text: TextIOWrapper) -> Iterator[str]:
    """Cut at lines that hold <|endoftext|>; elsewhere only a lone or a long text is cut."""
    head = text.read(WHOLE) + text.readline(PIECE[1])
    is_marked = END in map(str.strip, head.splitlines())
    least, most = PIECE if file.lone and not is_marked else (WHOLE, WHOLE)
    piece, is_blank = "", False
    parts = (StringIO(head, newline=""), text)
    for line in chain.from_iterable(iter(partial(part.readline, PIECE[1]), "") for part in parts):
        words = line.strip()
        is_full = len(piece) + len(line) > most or (is_blank and len(piece) >= least)
        if piece and (is_full or words == END):
            yield piece
            piece = ""
        if words != END:
            piece += line
        is_blank = not words
    if piece or not head:
        yield piece


def _rows(file: File, rows: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """Take the column of the texts, and the domain, from rows: objects or plain strings."""
    rows = iter(rows)
    head = list(islice(rows, ROWS_PER_READ))
    cells = [cell for row in head if isinstance(row, dict) for cell in row.items()]
    cells.sort(key=lambda cell: cell[1] is not None)  # a null tells no type where others do
    types = {str(name): type(value).__name__ for name, value in cells}
    column = _column(file, types) if types else ""
    for row in chain(head, rows):
        meta = row.get("meta") if isinstance(row, dict) else None
        meta = _parsed(meta) if isinstance(meta, str | bytes) else meta
        domain = meta.get(DOMAIN) if isinstance(meta, dict) else None
        yield _field(row, column), domain if domain and isinstance(domain, str) else file.domain


def _column(file: File, types: dict[str, str]) -> str:
    """Choose the column of the texts: the one asked for, "text", or the only one of strings.

    Not the latter in a .json, which may be anything.
    """
    wanted = file.column or "text"
    if types.keys() & {wanted, wanted.split(".")[0]}:
        return wanted
    strings = [name for name, kind in types.items() if kind == "str" and name != "meta"]
    if file.column or len(strings) != 1 or file.suffix == ".json":
        has = ", ".join(f"{name}: {kind}" for name, kind in types.items())
        raise LeftOut(f"no {wanted!r} column (it has {has}); name one with text_column")
    file.note(f"files whose texts are column {strings[0]!r}")
    return strings[0]


def _field(row: Any, column: str) -> Any:
    """Find a column of a row, or a field of one ("document.text"); a plain string is itself."""
    if not isinstance(row, dict) or column in row:
        return row[column] if isinstance(row, dict) else row
    first, _, rest = column.partition(".")
    return _field(row.get(first), rest) if rest else None


def _parsed(text: str | bytes) -> Any:
    """Parse JSON; what is none becomes the error, which is no text either."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error


def _json_lines(lines: Iterable[str]) -> Iterator[Any]:
    return map(_parsed, filter(str.strip, lines))


def _json(text: TextIOWrapper) -> Iterable[Any]:
    """Read a .json: rows by line, a list of rows, or one."""
    first = text.readline()
    if isinstance(_parsed(first), dict):
        return _json_lines(chain([first], text))
    whole = _parsed(first + text.read())
    return whole if isinstance(whole, list) else [whole]


def _csv(text: TextIOWrapper) -> Iterable[dict[str, Any]]:
    csv.field_size_limit(1 << 27)  # its own is 128 kB
    header = text.readline()
    return csv.DictReader(chain([header], text), delimiter=max(",;\t|", key=header.count))


ROWS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv}


def _parquet(file: File, stream: BufferedReader) -> Iterator[dict[str, Any]]:
    # Buffered and without read-ahead: one huge row group takes no more memory than many.
    table = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    types = {f.name: TEXT_TYPE.sub("str", str(f.type)) for f in table.schema_arrow}
    file.column = _column(file, types)
    for batch in table.iter_batches(ROWS_PER_READ, columns=[file.column, "meta"]):
        # As bytes: a string that is not UTF-8 costs itself.
        named = zip(batch.schema.names, batch.columns, strict=True)
        arrays = [a.cast(pa.large_binary()) if types[n] == "str" else a for n, a in named]
        yield from pa.RecordBatch.from_arrays(arrays, batch.schema.names).to_pylist()
