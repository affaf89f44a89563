"""Every kind of file that people bring: what is read, mended, left out and counted."""

import bz2
import gzip
import json
import lzma
import os
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmlib import readers
from llmlib.config import DataConfig
from llmlib.corpus import open_corpus, read_documents
from llmlib.tests.hub_server import parquet, peak_kib, texts, write


def _read(path: Path, **settings: object) -> tuple[list[str | None], dict]:
    """Return the texts of a corpus (None: none) and what was met, by kind."""
    tally: readers.Tally = {}
    shards = open_corpus(DataConfig(corpus=str(path), **settings)).train
    documents = [d for shard in shards for d in read_documents(shard, tally)]
    return [d.text for d in documents], {k: n for k, (n, _) in tally.items()}


def _rows(*values: object) -> bytes:
    return "".join(json.dumps({"text": value}) + "\n" for value in values).encode()


STRAY = {"index.json": b'{"made": "2024-05-01"}', "cat.png": b"\x89PNG\r\n\x1a\n\0\0"}
STRAY |= {"page.html": b"", "page": b"<!DOCTYPE html><p>", "a.pdf": b"%PDF-1.7"}
STRAY |= {"a.arrow": b"ARROW1\0\0", "a.tar.gz": gzip.compress(b"a.txt" + bytes(600))}
REMEDIES = {"index.json": "text_column", "a.arrow": "to_parquet", "a.tar.gz": "unpack it"}


@pytest.mark.parametrize("stray", STRAY)
def test_stray_file_changes_no_document_and_is_named(tmp_path, stray):
    stories = {f"story{i}.txt": b"A fox came home wet.\n\nThe end.\n" for i in range(3)}
    found, met = _read(write(tmp_path, stories | {stray: STRAY[stray]}))
    assert found == ["A fox came home wet.\n\nThe end.\n"] * 3
    [reason] = [what for kind, what in met if kind != ".txt"]
    assert reason.startswith("files left out: ")
    with pytest.raises(ValueError, match=REMEDIES.get(stray, "could not be read")):
        _read(tmp_path / stray)


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACKERS[".zst"] = partial(pa.compress, codec="zstd", asbytes=True)


@pytest.mark.parametrize("packed", ["", *PACKERS, "content only"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
def test_every_format_reads_the_same_plain_or_compressed(tmp_path, suffix, packed):
    content = {
        ".txt": b"one, and\nanother",
        ".json": b'["one, and\\nanother"]',
        ".csv": b'id,text\n1,"one, and\nanother"\n',
        ".tsv": b'text\tid\n"one, and\nanother"\t1\n',
    }.get(suffix, _rows("one, and\nanother"))
    content = PACKERS.get(packed, gzip.compress if packed else bytes)(content)
    name = f"my{suffix}{packed if packed in PACKERS else ''}"
    found, met = _read(write(tmp_path, {name: content}))
    assert found == ["one, and\nanother"]
    kind = suffix + (packed if packed in PACKERS else "")
    assert met == {(kind, "documents read"): 1, (kind, "files read"): 1}


def test_files_of_a_folder_are_read_in_sorted_order_whatever_their_names(tmp_path):
    names = ["train-timetables.jsonl", "dev-blog.jsonl", "posts.jsonl", "[a]*?{b}%20#.jsonl"]
    files = {name: _rows(name) for name in names}
    found, _ = _read(write(tmp_path / "x $y_1$ [z]*::#?", files))
    assert found == sorted(names)
    assert _read(tmp_path / "x $y_1$ [z]*::#?" / names[-1])[0] == [names[-1]]


def test_names_that_all_follow_a_split_pattern_make_splits(tmp_path):
    files = {f"{s}-00000-of-00001.jsonl": _rows(s) for s in ("train", "validation")}
    opened = open_corpus(DataConfig(corpus=str(write(tmp_path / "a[1]*", files))))
    assert [len(opened.train), *opened.official] == [1, "validation"]
    assert _read(tmp_path / "a[1]*")[0] == ["train"]


def test_what_no_reader_should_open_is_named(tmp_path):
    write(tmp_path, {"a.txt": b"a", ".git/a.txt": b"", "._theirs.csv": b"\0", "b/d/c.txt": b"c"})
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to("nowhere")
    write(tmp_path / os.fsdecode(b"caf\xe9"), {os.fsdecode(b"d\xe9.rst"): b"d"})
    [shard], tally = open_corpus(DataConfig(corpus=str(tmp_path))).train, {}
    found = {d.text: d.domain for d in read_documents(shard, tally)}
    assert found == {"a": "top level", "c": "b", "d": "caf?"}
    assert tally[".rst", "files read"] == [1, "caf?/d?.rst"]
    left_out = {key: n for key, (n, _) in tally.items() if "left out" in key[1]}
    hidden, no_file = "files left out: hidden", "files left out: a link to a folder, or not a file"
    expected = {("no extension", hidden): 1, (".csv", hidden): 1}
    assert left_out == expected | {("no extension", no_file): 1, (".txt", no_file): 2}


@pytest.mark.parametrize("name", ["story.txt", "train-00000-of-00001.parquet", "a.jsonl"])
def test_pointer_of_git_lfs_is_recognised(tmp_path, name):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 146946961\n"
    with pytest.raises(ValueError, match=r"git-lfs pointer, .*; run git lfs pull"):
        _read(write(tmp_path, {name: pointer}))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_byte_order_mark_tells_the_encoding_and_is_dropped(tmp_path, suffix, encoding):
    text = {"csv": "text\nnaïve\n", "jsonl": '{"text": "naïve"}\n'}.get(suffix, "naïve")
    found, _ = _read(write(tmp_path, {f"my.{suffix}": text.encode(encoding)}))
    assert found == ["naïve"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_the_end_of_text_marker_separate_documents(tmp_path, end):
    stories = [f"Story {i}, with <|endoftext|> inside.{end}" for i in range(30_000)]
    text = f"<|endoftext|>{end}".join(stories)
    for last in ("", "<|endoftext|>", f"<|endoftext|>{end}"):
        (tmp_path / "stories.txt").write_bytes((text + last).encode())
        for path in (tmp_path, tmp_path / "stories.txt"):
            found, met = _read(path)
            assert found == stories
            assert met[".txt", "<|endoftext|> as text"] == 30_000


@pytest.mark.parametrize("blank", ["\n\n", "\r\n\r\n"])
def test_lone_text_file_is_cut_at_blank_lines_without_loss(tmp_path, blank):
    text = blank.join(texts(300, seed=0)).encode()
    (tmp_path / "book.txt").write_bytes(text)
    pieces = _read(tmp_path / "book.txt")[0]
    assert "".join(pieces).encode() == text
    assert len(pieces) > 3 and all(piece.endswith("\n") for piece in pieces[:-1])
    assert all(10_000 <= len(piece) < 12_000 for piece in pieces[:-1])


def test_text_without_blank_lines_is_cut_at_line_ends_then_anywhere(tmp_path):
    lines, one_line = "a line of text\n" * 300_000, "漢字" * 700_000
    for text in (lines, one_line):
        (tmp_path / "long.txt").write_text(text)
        for path in (tmp_path, tmp_path / "long.txt"):
            found, met = _read(path)
            assert "".join(found) == text and (".txt", "characters replaced") not in met
            most = 1_000_000 if path == tmp_path else 100_000
            assert all(0.9 * most < len(piece) <= most for piece in found[:-1])
            assert text == one_line or all(piece.endswith("\n") for piece in found)


def test_text_of_a_folder_is_whole_up_to_a_size(tmp_path):
    text = ("word " * 2_000 + "\n\n") * 99
    assert _read(write(tmp_path / "a", {"a.txt": text.encode()}))[0] == [text]
    longer, _ = _read(write(tmp_path / "b", {"a.txt": text.encode() * 2}))
    assert len(longer) == 2 and "".join(longer) == text * 2


READ = """
import sys
from llmlib.readers import File, read_file
n_read = sum(len(d.text) for d in read_file(File(sys.argv[1], sys.argv[1], lone=True)))
assert n_read > 0.9e6 * int(sys.argv[2])
"""


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    peaks = []
    for n_mb in (16, 64):
        if name == "a.parquet":  # one huge row group
            text = parquet([os.urandom(5000).hex() for _ in range(n_mb * 100)])
        elif name == "a.jsonl":
            text = _rows("word " * 195) * (n_mb * 1000)
        else:
            text = b"word " * (n_mb * 200_000)
        (tmp_path / name).write_bytes(gzip.compress(text, 1) if "gz" in name else text)
        peaks.append(peak_kib(READ, tmp_path / name, n_mb))
    assert peaks[1] - peaks[0] < 30_000, peaks


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (b'{"text": 12345}', "int"),
        (b'{"text": ["a"]}', "list"),
        (b'{"text": null}', "no text"),
        (b'{"text": ""}', "no text"),
        (b'{"text": ', "JSONDecodeError"),
        (b'{"text": "a\\', "JSONDecodeError"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_one_bad_row_costs_one_row(tmp_path, odd, reason):
    texts = [f'He said "no" on\nday {i}' for i in range(200)]
    rows = _rows(*texts[:150]) + odd + b"\n\n" + _rows(*texts[150:])
    found, met = _read(write(tmp_path, {"my.jsonl": rows}) / "my.jsonl")
    assert found == [*texts[:150], None, *texts[150:]]
    assert met[".jsonl", f"documents left out: {reason}"] == 1


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path):
    rows = b'{"text": "whole \\ud83d\\ude00"}\n{"text": "cut \\ud83d"}\n{"text": "raw \xff"}\n'
    found, met = _read(write(tmp_path, {"my.jsonl": rows}))
    assert found == ["whole \U0001f600", "cut \ufffd", "raw \ufffd"]
    assert met[".jsonl", readers.NOT_UTF8] == met[".jsonl", "characters replaced"] == 2


def test_fields_that_are_not_used_never_matter(tmp_path):
    rows = [{"text": "word " * 200, "note": None if i < 9000 else [{}]} for i in range(10_000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert len(_read(write(tmp_path, {"a.jsonl": lines}))[0]) == 10_000


@pytest.mark.parametrize("value", [["a", "b"], [{"text": "a"}, {"text": "b"}], {"text": "a"}])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_holds_rows_or_is_named_for_what_it_holds(tmp_path, value, indent):
    path = write(tmp_path, {"my.json": json.dumps(value, indent=indent).encode()}) / "my.json"
    assert _read(path)[0] == ["a", "b"][: len(value)]
    path.write_text(json.dumps({"data": value}, indent=indent))
    with pytest.raises(ValueError, match=r"no 'text' column \(it has data: "):
        _read(path)


STRINGS = [pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", STRINGS, ids=str)
def test_strings_of_every_kind_are_read(tmp_path, kind):
    table = pa.table({"text": pa.array(["alpha", None, "alpha"]).cast(kind), "id": [1, 2, 3]})
    pq.write_table(table, tmp_path / "my.parquet")
    assert _read(tmp_path)[0] == ["alpha", None, "alpha"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_column_of_the_texts_is_asked_for_or_the_only_one_of_strings(tmp_path, suffix):
    def read(rows: list[dict], **settings: object) -> tuple:
        path, table = tmp_path / f"my.{suffix}", pd.DataFrame(rows)
        if suffix == "parquet":
            table.to_parquet(path)
        else:
            table.to_json(path, orient="records", lines=True)
        return _read(path, **settings)

    found, met = read([{"content": "a", "stars": 1, "meta": '{"redpajama_set_name": "x"}'}])
    assert found == ["a"] and (f".{suffix}", "files whose texts are column 'content'") in met
    assert read([{"title": "a", "body": "b"}], text_column="body")[0] == ["b"]
    assert read([{"document": {"text": "a"}}], text_column="document.text")[0] == ["a"]
    found, met = read([{"text": ["a", "b"]}, {"text": ["c"]}])
    assert found == [None, None] and met[f".{suffix}", "documents left out: list"] == 2
    with pytest.raises(ValueError, match=r"no 'text' column \(it has title: str, body: str\)"):
        read([{"title": "a", "body": "b"}])
    with pytest.raises(ValueError, match=r"no 'text' column \(it has document: (dict|struct).*\)"):
        read([{"document": {"text": "a"}}])
    with pytest.raises(ValueError, match=r"no 'body' column \(it has title: str\)"):
        read([{"title": "a"}], text_column="body")


def test_string_of_parquet_that_is_not_utf8_costs_itself(tmp_path):
    (tmp_path / "my.parquet").write_bytes(parquet(["a", b"caf\xe9", None, "", "b"]))
    found, met = _read(tmp_path)
    assert found == ["a", "caf\ufffd", None, None, "b"]
    assert met[".parquet", readers.NOT_UTF8] == met[".parquet", "characters replaced"] == 1


@pytest.mark.parametrize("damage", ["cut short", "overwritten"])
def test_corrupt_file_is_named(tmp_path, damage):
    path, data = tmp_path / "bad.parquet", parquet(texts(500, seed=0))
    overwritten = data[:100] + bytes(900) + data[1000:]
    path.write_bytes(overwritten if damage == "overwritten" else data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"shard train-00000 \(.*bad\..*\) could not be read"):
        _read(path)


def test_domain_stands_in_meta_as_object_or_as_json(tmp_path):
    metas = ['{"redpajama_set_name": "a"}', "no json", None, '{"redpajama_set_name": 3}']
    pq.write_table(pa.table({"text": ["x"] * 4, "meta": metas}), tmp_path / "my.parquet")
    [shard] = open_corpus(DataConfig(corpus=str(tmp_path))).train
    assert [d.domain for d in read_documents(shard)] == ["a"] + ["top level"] * 3


def test_table_of_a_spreadsheet_is_read(tmp_path):
    long = "word " * 50_000
    text = f'\ufeffid;text;stars\r\n1;"{long}";5\r\n2;"a ""b""\r\nc"\r\n3\r\n'
    found, _ = _read(write(tmp_path, {"my.csv": text.encode()}))
    assert found == [long, 'a "b"\r\nc', None]
