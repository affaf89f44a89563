"""One file to documents: text, JSON lines, tables; plain or compressed, by content and extension.

A reader holds a few documents at a time, reads the columns that are used and no others, and notes in
a tally what it read, mended and left out. Where files come from is ``corpus``'s business.
"""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader, TextIOWrapper
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

PIECE_BYTES = (10_000, 100_000)  # of a lone or long text: cut at a blank line, at the latest there
WHOLE_BYTES = 1_000_000  # a text file of a folder up to this size is one document
ROWS_PER_READ = 64  # so that even rows of a megabyte need little memory
DOMAIN = "redpajama_set_name"  # the field of ``meta`` that names it
END = b"<|endoftext|>"
END_LINE = re.compile(rb"<\|endoftext\|>(?<![^\n]<\|endoftext\|>)[ \t]*\r?\n")  # nothing else in it
BLANK_LINE = re.compile(rb"\n\r?\n")
HALF_PAIR = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # of a surrogate pair; the others are bytes
BINARY = re.compile(rb"\0|\A%PDF")
MARKUP_START = re.compile(rb"(?i)\s*(?:<!doctype html|<html)")
MARKUP = {".html", ".htm", ".xhtml", ".xml", ".svg", ".ipynb"}
UNPACK: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: BufferedReader(pa.CompressedInputStream(file, "zstd")),
}
PACKED = {".gz", ".bz2", ".xz", ".zst"}
UTF16_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Tally = dict[tuple[str, str], list]  # (kind of file, what was met) -> [how often, an example]


class LeftOut(ValueError):
    """Why a file holds no text that can be read."""


class Document(NamedTuple):
    raw: bytes | None  # UTF-8, as it is stored; None: no text
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


class File(NamedTuple):
    """A file to read: where it lies, how it is called, and what is known of it."""

    path: Path
    name: PurePath  # below the corpus's folder; its suffixes tell the kind
    domain: str
    tally: Tally
    column: str | None = None  # that holds the texts; None: "text", or the only one that could
    lone: bool = False  # the whole of a corpus, or of a shard: must be readable

    @property
    def suffix(self) -> str:
        """The last suffix below that of compression, in lower case."""
        suffixes = [s.lower() for s in self.name.suffixes if s.lower() not in PACKED]
        return suffixes[-1] if suffixes else ""

    def note(self, what: str, n: int = 1, example: str | None = None) -> None:
        """Count something that was met."""
        packed = self.name.suffix.lower() if self.name.suffix.lower() in PACKED else ""
        kind = self.suffix + packed or "no extension"
        example = str(self.name) if example is None else example
        self.tally.setdefault((kind, what), [0, example])[0] += n


def read_file(file: File) -> Iterator[Document]:
    """Yield the documents of a file; one without text is noted, or an error where it is alone."""
    try:
        for document in _documents(file):
            if document.fault == "invalid_utf8":
                file.note("documents mended: not UTF-8")
                file.note("bytes replaced", document.text.count("\ufffd"))
            if document.raw and (n := document.raw.count(END)):
                file.note(f"{END.decode()} as text", n)
            yield document
        file.note("files read", example="")
    except LeftOut as reason:
        if file.lone:
            raise
        file.note(f"files left out: {str(reason).split(' (')[0]}")


def _documents(file: File) -> Iterator[Document]:
    """Choose the reader by content, then by extension."""
    if file.name.name.startswith("."):
        raise LeftOut("hidden")
    if not file.path.is_file():
        raise LeftOut("a link to a folder, or not a file")
    with open(file.path, "rb") as packed:
        unpack = next((u for magic, u in UNPACK.items() if packed.peek().startswith(magic)), None)
        stream = BufferedReader(unpack(packed)) if unpack else packed
        head = stream.peek()
        if file.suffix in MARKUP or MARKUP_START.match(head):
            raise LeftOut("markup")
        if head.startswith(b"version https://git-lfs"):
            raise ValueError(f"{file.name} is a git-lfs pointer, not the text; run git lfs pull")
        if head.startswith(b"PAR1") or file.suffix == ".parquet":
            yield from _parquet(file, stream)
        elif BINARY.search(head) and not head.startswith(UTF16_32):
            raise LeftOut("binary")
        elif file.suffix in ROWS:
            yield from _rows(file, ROWS[file.suffix](file, _decoded(file, stream)))
        else:
            yield from _texts(file, _decoded(file, stream))


def _decoded(file: File, stream: BufferedReader) -> TextIOWrapper:
    """Decode UTF-8 so that any byte comes back, UTF-16 and -32 by their byte order mark."""
    if not (head := stream.peek()).startswith(UTF16_32):
        return TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    encoding = "utf-32" if head.startswith(UTF16_32[:2]) else "utf-16"
    file.note(f"files decoded: {encoding}")
    return TextIOWrapper(stream, encoding, "replace", newline="")


def _encoded(text: str) -> bytes:
    return HALF_PAIR.sub("\ufffd", text).encode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------- plain text


def _texts(file: File, text: TextIOWrapper) -> Iterator[Document]:
    """Cut at lines that hold <|endoftext|>; elsewhere only a lone or a long text is cut."""
    blocks = iter(lambda: _encoded(text.read(1 << 20)), b"")
    first = next(blocks, b"")
    whole = END_LINE.search(first) or (len(first) <= WHOLE_BYTES and not file.lone)
    least, most = (WHOLE_BYTES, WHOLE_BYTES) if whole else PIECE_BYTES
    for piece in _pieces(chain([first], blocks), least, most) if first else [b""]:
        yield Document(piece, file.domain)


def _pieces(blocks: Iterable[bytes], least: int, most: int) -> Iterator[bytes]:
    buffer = b""
    for block in chain(blocks, [b""]):  # the last one is empty
        if not block and buffer.rpartition(b"\n")[2].strip() == END:
            block = b"\n"
        buffer, start = buffer + block, 0
        while ends := _next_cut(buffer, start, least, most):
            if start < ends[0]:
                yield buffer[start : ends[0]]
            start = ends[1]
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _next_cut(buffer: bytes, start: int, least: int, most: int) -> tuple[int, int] | None:
    """Find where a document ends and where the next begins; None: not in this buffer."""
    blank = BLANK_LINE.search(buffer, start + least, start + most)
    stop = blank.end() if blank else start + most
    if end := END_LINE.search(buffer, start, stop):
        return end.span()
    if not blank and len(buffer) <= stop:
        return None
    if not blank:
        stop = buffer.rfind(b"\n", start, stop) + 1 or _character_start(buffer, stop)
    return stop, stop


def _character_start(buffer: bytes, place: int) -> int:
    """Go back to the first byte of a character, at most three."""
    return place - next((i for i in range(4) if buffer[place - i] & 0xC0 != 0x80), 0)


# ---------------------------------------------------------------------- rows


def _rows(file: File, rows: Iterable[Any]) -> Iterator[Document]:
    """Take the texts of rows, which are objects or plain strings; an odd one costs itself."""
    rows = iter(rows)
    head = list(islice(rows, ROWS_PER_READ))
    types: dict[str, str] = {}
    for row in head:
        if isinstance(row, dict):
            types |= {str(k): type(v).__name__ for k, v in row.items() if v is not None}
    column = _column(file, types) if types else ""
    for row in chain(head, rows):
        value, meta = row, None
        if isinstance(row, dict):
            value, meta = _field(row, column), row.get("meta")
        if not isinstance(value, str | None):
            file.note(f"rows left out: {type(value).__name__} in place of a text")
        elif value and HALF_PAIR.search(value):
            file.note("documents mended: half a surrogate pair")
        yield Document(_encoded(value) if isinstance(value, str) else None, _domain(file, meta))


def _column(file: File, types: dict[str, str]) -> str:
    """Choose the column of the texts: the one asked for, "text", or the only one of strings."""
    wanted = file.column or "text"
    if wanted in types or wanted.split(".")[0] in types:
        return wanted
    strings = [name for name, kind in types.items() if kind == "str" and name != "meta"]
    if file.column or len(strings) != 1:
        has = ", ".join(f"{name}: {kind}" for name, kind in types.items())
        raise LeftOut(f"no {wanted!r} column (it has {has}); name one with text_column")
    file.note(f"files whose texts are column {strings[0]!r}")
    return strings[0]


def _field(row: dict[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    for part in column.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _domain(file: File, meta: Any) -> str:
    """Read a row's domain from its ``meta``: an object, or one written as JSON."""
    if isinstance(meta, str):
        meta = _parsed(meta)
    domain = meta.get(DOMAIN) if isinstance(meta, dict) else None
    return domain if isinstance(domain, str) and domain else file.domain


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_lines(file: File, lines: Iterable[str]) -> Iterator[Any]:
    """Parse lines; one that is no JSON becomes a row of None."""
    for line in filter(str.strip, lines):
        if (row := _parsed(line)) is None and line.strip() != "null":
            file.note("rows left out: not JSON")
        yield row


def _json(file: File, text: TextIOWrapper) -> Iterable[Any]:
    """Read a .json: lines, a list of rows, or one below a key of an object."""
    first, second = text.readline(), text.readline()
    if second.strip() and isinstance(_parsed(first), dict):
        return _json_lines(file, chain([first, second], text))
    whole = _parsed(first + second + text.read())
    if isinstance(whole, dict):
        if isinstance(_field(whole, file.column or "text"), str):
            return [whole]
        lists = {key: rows for key, rows in whole.items() if isinstance(rows, list) and rows}
        for key, rows in lists.items():
            if all(isinstance(r, dict) and _field(r, file.column or "text") for r in rows[:1]):
                file.note(f"files whose rows are below {key!r}")
                return rows
    if not isinstance(whole, list):
        raise LeftOut("JSON without rows of text")
    return whole


def _csv(file: File, text: TextIOWrapper) -> Iterable[dict[str, Any]]:
    csv.field_size_limit(1 << 27)  # its own is 128 kB
    header = text.readline()
    delimiter = max(",;\t|", key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    return csv.DictReader(text, names, delimiter=delimiter)


ROWS: dict[str, Callable[[File, TextIOWrapper], Iterable[Any]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
}


def _parquet(file: File, stream: BufferedReader) -> Iterator[Document]:
    # Buffered and without read-ahead: one huge row group takes no more memory than many.
    table = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    schema = table.schema_arrow
    types = {f.name: "str" if _is_text(f.type) else str(f.type) for f in schema}
    column = _column(file, types)
    meta = {"str": "meta", None: None}.get(types.get("meta"), f"meta.{DOMAIN}")
    wanted = [name for name in (column, meta) if name]
    for batch in table.iter_batches(ROWS_PER_READ, columns=wanted):
        texts = _array(batch, column)
        if not _is_text(texts.type):
            raise LeftOut(f"column {column!r} holds {texts.type}, not text")
        if pa.types.is_dictionary(texts.type):
            texts = texts.dictionary_decode()
        metas = batch["meta"].to_pylist() if "meta" in batch.schema.names else [None] * len(batch)
        for raw, about in zip(texts.cast(pa.large_binary()).to_pylist(), metas, strict=True):
            yield Document(raw, _domain(file, about))


def _array(batch: pa.RecordBatch, column: str) -> pa.Array:
    """Find a column, or a field of one: "document.text"."""
    if column in batch.schema.names:
        return batch[column]
    first, *fields = column.split(".")
    return pc.struct_field(batch[first], fields)


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings, in any of arrow's ways, or bytes."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(re.fullmatch(r"(large_)?(string|binary)(_view)?", str(kind)))
