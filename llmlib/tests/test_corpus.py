"""Reading text from wherever it comes, whole or damaged."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from llmlib.config import DataConfig
from llmlib.corpus import Document, count_documents, open_corpus, read_documents
from llmlib.tests.hub_server import parquet, texts, write_corpus


def _read(path: Path | str) -> list[Document]:
    shards = open_corpus(DataConfig(corpus=str(path))).train
    return [document for shard in shards for document in read_documents(shard)]


def test_folder_in_the_hubs_layout_reads_as_datasets_reads_it(tmp_path):
    import datasets

    write_corpus(tmp_path / "hub", n_shards=3, n_documents=150)
    opened = open_corpus(DataConfig(corpus=str(tmp_path / "hub")))
    expected = datasets.load_dataset(str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache"))
    assert opened.n_documents == 450
    for split, shards in {"train": opened.train, **opened.official}.items():
        documents = [document for shard in shards for document in read_documents(shard)]
        assert [d.text for d in documents] == list(expected[split]["text"])
        domains = [meta["redpajama_set_name"] for meta in expected[split]["meta"]]
        assert [d.domain for d in documents] == domains


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "PARQUET"])
def test_single_file_is_a_corpus(tmp_path, suffix):
    path, expected = tmp_path / f"my.{suffix}", texts(100, seed=0)
    if suffix.lower() == "parquet":
        path.write_bytes(parquet(expected))
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in expected))
    assert [document.text for document in _read(path)] == expected
    assert count_documents(open_corpus(DataConfig(corpus=str(path)))) == 100


@pytest.mark.parametrize("blank", ["\n\n", "\r\n\r\n"])
def test_lone_text_file_is_cut_at_blank_lines_without_loss(tmp_path, blank):
    text = blank.join(texts(300, seed=0)).encode()
    (tmp_path / "book.txt").write_bytes(text)
    pieces = [document.raw for document in _read(tmp_path / "book.txt")]
    assert b"".join(pieces) == text
    assert len(pieces) > 3 and all(piece.endswith(b"\n") for piece in pieces[:-1])
    assert all(10_000 <= len(piece) < 12_000 for piece in pieces[:-1])


def test_text_files_of_a_folder_are_documents_with_their_folder_as_domain(tmp_path):
    for name in ("a/1.txt", "a/2.txt", "b/3.txt", "4.txt", ".git/no.txt", ".git/no.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = {document.text: document.domain for document in _read(tmp_path)}
    assert found == {"a/1.txt": "a", "a/2.txt": "a", "b/3.txt": "b", "4.txt": "top level"}


def test_standard_library_is_python_sources_without_tests():
    opened = open_corpus(DataConfig(corpus="stdlib"))
    paths = [Path(name) for shard in opened.train for name, _ in shard.files]
    assert len(paths) == opened.n_documents > 300
    assert all(path.suffix == ".py" and "tests" not in path.parts for path in paths)


def test_corpus_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"corpus='no/such/folder' could not be opened"):
        open_corpus(DataConfig(corpus="no/such/folder"))
    with pytest.raises(ValueError, match="could not be opened"):  # a folder without files
        open_corpus(DataConfig(corpus=str(tmp_path)))
    (tmp_path / "validation-00000-of-00001.parquet").write_bytes(parquet(texts(5, seed=0)))
    with pytest.raises(ValueError, match=r"no train split; its splits: validation\."):
        open_corpus(DataConfig(corpus=str(tmp_path)))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_invalid_utf8_is_replaced_and_marked(tmp_path, suffix):
    path, bad = tmp_path / f"my.{suffix}", b"good \xff\xfe bad"
    path.write_bytes(b'{"text": "' + bad + b'"}\n' if suffix == "jsonl" else bad)
    [document] = _read(path)
    assert document.text == "good \ufffd\ufffd bad" and document.fault == "invalid_utf8"


@pytest.mark.parametrize("damage", ["cut short", "overwritten"])
def test_corrupt_file_is_named(tmp_path, damage):
    path, data = tmp_path / "bad.parquet", parquet(texts(500, seed=0))
    overwritten = data[:100] + bytes(900) + data[1000:]
    path.write_bytes(overwritten if damage == "overwritten" else data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"shard train-00000 \(.*bad\..*\) could not be read"):
        _read(path)


READ_ALL = """
import sys
from pathlib import Path
from llmlib import corpus
read = lambda path: sum(len(d.raw) for d in corpus.read_documents(corpus.Shard("x", path)))
def peak_kib():
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1])
read(sys.argv[1])
before = peak_kib()
print(read(sys.argv[2]), peak_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_one_huge_row_group_takes_no_more_memory_than_small_ones(tmp_path):
    random = Random(0)
    documents = [random.randbytes(2_500).hex() for _ in range(30_000)]
    (tmp_path / "small.parquet").write_bytes(parquet(documents[:1000], row_group_size=100))
    (tmp_path / "huge.parquet").write_bytes(parquet(documents, row_group_size=30_000))
    files = [str(tmp_path / "small.parquet"), str(tmp_path / "huge.parquet")]
    command = [sys.executable, "-c", READ_ALL, *files]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    n_bytes, more_kib = map(int, out.stdout.split())
    assert n_bytes == 150e6
    assert more_kib < 60_000, more_kib
