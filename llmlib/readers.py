"""One file to documents: text, JSON lines, tables; plain or compressed, by content and extension.

A reader holds a few documents at a time, takes the columns that are used and no others, and notes in
a tally what it read, mended and left out. Where files come from is ``corpus``'s business.
"""

import bz2
import csv
import gzip
import json
import lzma
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator
from io import BufferedReader, TextIOWrapper
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

PIECE = (10_000, 100_000)  # of a lone or long text: cut at a blank line, at most [characters]
WHOLE = 1_000_000  # a text file of a folder up to this size is one document [characters]
ROWS_PER_READ = 64  # so that even rows of a megabyte need little memory
DOMAIN = "redpajama_set_name"  # the field of ``meta`` that names it
END = "<|endoftext|>"
END_LINE = re.compile(r"<\|endoftext\|>(?<![^\n]<\|endoftext\|>)[ \t]*\r?\n")  # no more in the line
BLANK_LINE = re.compile(r"\n\r?\n")
HALF_PAIR = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # of surrogates; the others are bytes
MARKUP = {".html", ".htm", ".xhtml", ".xml", ".svg", ".ipynb"}
MARKUP_START = re.compile(rb"(?i)\s*(?:<!doctype html|<html)")
BINARY = re.compile(rb"\0|\A%PDF")
UNPACK = {  # by a file's first bytes
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(file, "zstd"),
}
PACKED = {".gz", ".bz2", ".xz", ".zst"}

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
    column: str | None = None  # that holds the texts; None: "text", or the only one of strings
    lone: bool = False  # the whole of a corpus, or of a shard: must be readable

    @property
    def suffix(self) -> str:
        """The last suffix but that of compression, in lower case."""
        return next((s for s in map(str.lower, self.name.suffixes[::-1]) if s not in PACKED), "")

    def note(self, what: str, n: int = 1, example: str | None = None) -> None:
        """Count something that was met; the first file of its kind is the example."""
        packed = {self.name.suffix.lower()} & PACKED
        kind = "".join([self.suffix, *packed]) or "no extension"
        example = str(self.name) if example is None else example
        self.tally.setdefault((kind, what), [0, example])[0] += n


def read_file(file: File) -> Iterator[Document]:
    """Yield the documents of a file; one without text is noted, or an error where it is alone."""
    try:
        for document in _documents(file):
            if document.fault == "invalid_utf8":
                file.note("documents mended: not UTF-8")
                file.note("bytes replaced", document.text.count("\ufffd"))
            if document.raw and (n := document.raw.count(END.encode())):
                file.note(f"{END} as text", n)
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
        if head.startswith(b"version https://git-lfs"):
            raise ValueError(f"{file.name} is a git-lfs pointer, not the text; run git lfs pull")
        if file.suffix in MARKUP or MARKUP_START.match(head):
            raise LeftOut("markup")
        if head.startswith(b"PAR1") or file.suffix == ".parquet":
            yield from _parquet(file, stream)
            return
        is_utf16 = head.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
        if BINARY.search(head) and not is_utf16:
            raise LeftOut("binary")
        # Any byte of what should be UTF-8 comes back as it was.
        how = ("utf-16", "replace") if is_utf16 else ("utf-8-sig", "surrogateescape")
        text = TextIOWrapper(stream, *how, newline="")
        if file.suffix in ROWS:
            yield from _rows(file, ROWS[file.suffix](file, text))
        else:
            yield from _texts(file, text)


def _encoded(text: str) -> bytes:
    return HALF_PAIR.sub("\ufffd", text).encode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------- plain text


def _texts(file: File, text: TextIOWrapper) -> Iterator[Document]:
    """Cut at lines that hold <|endoftext|>; elsewhere only a lone or a long text is cut."""
    blocks = iter(lambda: text.read(WHOLE + 1), "")
    first = next(blocks, "")
    whole = END_LINE.search(first) or (len(first) <= WHOLE and not file.lone)
    least, most = (WHOLE, WHOLE) if whole else PIECE
    for piece in _pieces(chain([first], blocks), least, most) if first else [""]:
        yield Document(_encoded(piece), file.domain)


def _pieces(blocks: Iterable[str], least: int, most: int) -> Iterator[str]:
    buffer = ""
    for block in chain(blocks, [""]):  # the last one is empty
        if not block and buffer.rpartition("\n")[2].strip() == END:
            block = "\n"
        buffer, start = buffer + block, 0
        while cut := _next_cut(buffer, start, least, most):
            if start < cut[0]:
                yield buffer[start : cut[0]]
            start = cut[1]
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _next_cut(buffer: str, start: int, least: int, most: int) -> tuple[int, int] | None:
    """Find where a document ends and where the next begins; None: not in this buffer."""
    blank = BLANK_LINE.search(buffer, start + least, start + most)
    stop = blank.end() if blank else start + most
    if end := END_LINE.search(buffer, start, stop):
        return end.span()
    if not blank and len(buffer) <= stop:
        return None
    if not blank:
        stop = buffer.rfind("\n", start, stop) + 1 or stop
    return stop, stop


# ---------------------------------------------------------------------- rows


def _rows(file: File, rows: Iterable[Any], column: str | None = None) -> Iterator[Document]:
    """Take the texts of rows, which are objects or plain strings; an odd one costs itself."""
    rows = iter(rows)
    head = list(islice(rows, ROWS_PER_READ))
    cells = [cell for row in head if isinstance(row, dict) for cell in row.items()]
    types = {str(name): type(value).__name__ for name, value in cells if value is not None}
    column = column or (_column(file, types) if types else "")
    for row in chain(head, rows):
        value = _field(row, column)
        if isinstance(value, str):
            if HALF_PAIR.search(value):
                file.note("documents mended: half a surrogate pair")
            value = _encoded(value)
        elif not isinstance(value, bytes | None):
            file.note(f"rows left out: {type(value).__name__} in place of a text")
            value = None
        meta = row.get("meta") if isinstance(row, dict) else None
        meta = _parsed(meta) if isinstance(meta, str | bytes) else meta
        domain = meta.get(DOMAIN) if isinstance(meta, dict) else None
        yield Document(value, domain if domain and isinstance(domain, str) else file.domain)


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


def _field(row: Any, column: str) -> Any:
    """Find a column of a row, or a field of one ("document.text"); a plain string is itself."""
    if not isinstance(row, dict) or column in row:
        return row[column] if isinstance(row, dict) else row
    first, _, rest = column.partition(".")
    return _field(row.get(first), rest) if rest else None


def _parsed(text: str | bytes) -> Any:
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
    """Read a .json: lines, a list of rows, one row, or rows below a key of an object."""
    wanted, first, second = file.column or "text", text.readline(), text.readline()
    if second.strip() and isinstance(_parsed(first), dict):
        return _json_lines(file, chain([first, second], text))
    whole = _parsed(first + second + text.read())
    if isinstance(whole, dict) and _field(whole, wanted):
        return [whole]
    for key, rows in whole.items() if isinstance(whole, dict) else ():
        if (
            isinstance(rows, list)
            and rows
            and isinstance(rows[0], dict)
            and _field(rows[0], wanted)
        ):
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


ROWS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv}


def _parquet(file: File, stream: BufferedReader) -> Iterator[Document]:
    # Buffered and without read-ahead: one huge row group takes no more memory than many.
    table = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    types = {f.name: "str" if _is_text(f.type) else str(f.type) for f in table.schema_arrow}
    column = _column(file, types)
    if types.get(column, "str") != "str":
        raise LeftOut(f"column {column!r} holds {types[column]}, not text")
    meta = "meta" if types.get("meta") == "str" else f"meta.{DOMAIN}"

    def rows() -> Iterator[dict[str, Any]]:
        for batch in table.iter_batches(ROWS_PER_READ, columns=[column, meta]):
            # As bytes: a string that is not UTF-8 costs itself.
            arrays = [a.cast(pa.large_binary()) if _is_text(a.type) else a for a in batch.columns]
            yield from pa.RecordBatch.from_arrays(arrays, batch.schema.names).to_pylist()

    yield from _rows(file, rows(), column)


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings or bytes, in any of arrow's ways."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(re.fullmatch(r"(large_)?(string|binary)(_view)?", str(kind)))
