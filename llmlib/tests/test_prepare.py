"""Tokens on disk: the right ones, whatever happens on the way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from itertools import chain, count
from pathlib import Path

import pandas as pd
import pytest

from llmlib import analysis, corpus, data, prepare, runs
from llmlib.config import DataConfig, to_json
from llmlib.corpus import Corpus
from llmlib.data import load_tokenizer
from llmlib.tests.hub_server import PREPARE, layout, peak_kib, texts, write


def _config(folder: Path, **settings: object) -> DataConfig:
    base = {"tokenizer": "bpe", "bpe_vocab_size": 300, "test_size": 0.05}
    return DataConfig(corpus=str(folder), **(base | settings))


def _files(folder: Path) -> dict[str, bytes]:
    """Every file of prepared tokens but the lock and what tells of the machine."""
    files = [p for p in folder.iterdir() if "lock" not in p.name and "environment" not in p.name]
    return {path.name: path.read_bytes() for path in files}


def _texts(folder: Path, split: str) -> list[str]:
    """Turn a split back into its documents."""
    encoding = load_tokenizer(folder / "tokenizer.json")
    return [encoding.decode(tokens[:-1].tolist()) for tokens in data.documents(folder, split)]


@pytest.fixture(scope="module")
def pajama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pajama"), layout(4, 120))


@pytest.fixture(scope="module")
def prepared(pajama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "tokens"
    prepare.prepare(_config(pajama), folder)
    return folder


@pytest.mark.parametrize("n_documents", [2, 1999, 2001, 50_000])
def test_heldout_documents_are_those_of_datasets_in_its_order(n_documents):
    import datasets

    table = datasets.Dataset.from_dict({"index": range(n_documents)})
    expected = table.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"]["index"]
    texts = Corpus([], source={"n_documents": n_documents})
    place = prepare.split_documents(DataConfig(), texts)
    heldout = [i for i in range(n_documents) if place(i) is not None]
    assert sorted(heldout, key=place) == list(expected)


def test_where_documents_are_not_counted_the_first_and_a_share_are_held_out():
    place = prepare.split_documents(DataConfig(test_size=0.01), Corpus([]))
    heldout = [i for i in range(10_000) if place(i) is not None]
    assert heldout[0] == 0 and 80 < len(heldout) < 120 and sorted(heldout, key=place) == heldout


def test_prepared_splits_are_those_of_datasets_document_for_document(pajama, prepared, tmp_path):
    import datasets

    hub = datasets.load_dataset(str(pajama), cache_dir=str(tmp_path))
    split = hub["train"].train_test_split(test_size=0.05, seed=2357, shuffle=True)
    assert _texts(prepared, "val") == list(split["test"]["text"])
    [val] = data.load_manifest(prepared)["splits"]["val"]
    assert val["documents"] == [meta["redpajama_set_name"] for meta in split["test"]["meta"]]
    heldout = set(split["test"]["text"])
    assert _texts(prepared, "train") == [t for t in hub["train"]["text"] if t not in heldout]
    assert _texts(prepared, "validation") == list(hub["validation"]["text"])
    assert _texts(prepared, "test") == list(hub["test"]["text"])


def test_manifest_counts_documents_bytes_and_tokens_per_domain(pajama, prepared):
    splits = data.load_manifest(prepared)["splits"]
    for shard in splits["train"] + splits["val"]:
        assert shard["n_tokens"] == sum(d["tokens"] for d in shard["domains"].values())
    found = analysis.domain_table(splits["train"] + splits["val"]).set_index("domain")
    shards = corpus.open_corpus(_config(pajama)).train
    read = pd.DataFrame(chain.from_iterable(map(corpus.read_documents, shards)))
    n_bytes = read.text.map(str.encode).map(len).groupby(read.domain)
    assert found.documents.to_dict() == n_bytes.size().to_dict()
    assert found.bytes.to_dict() == n_bytes.sum().to_dict()
    assert [shard["n_rows"] for shard in splits["train"]] == [120] * 4


def test_workers_and_job_size_do_not_change_a_byte(pajama, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHARACTERS_PER_JOB", 1000)
    monkeypatch.setattr(runs, "n_cores", lambda: 5)
    prepare.prepare(_config(pajama), tmp_path)
    assert _files(tmp_path) == _files(prepared)


KILLED = """
import os, signal, sys
from llmlib import corpus
read = corpus.read_documents
def read_and_die(shard, tally=None):
    for i, document in enumerate(read(shard, tally)):
        if tally is not None and (shard.name, i) == (sys.argv[4], 60):
            os.kill(os.getpid(), signal.SIGKILL)
        yield document
corpus.read_documents = read_and_die
"""


def test_run_that_is_killed_again_and_again_ends_byte_identical(pajama, prepared, tmp_path):
    folder, config = tmp_path / "tokens", json.dumps(to_json(_config(pajama)))
    for n_done in (1, 3):
        arguments = [config, str(folder), "16_000_000", f"train-{n_done:05d}"]
        killed = subprocess.run([sys.executable, "-c", KILLED + PREPARE, *arguments])
        assert killed.returncode == -signal.SIGKILL
        assert len([*folder.glob("train-*.json")]) == n_done
        assert (folder / f".train-{n_done:05d}.bin.tmp").exists()
    prepare.prepare(_config(pajama), folder)
    assert _files(folder) == _files(prepared)


def test_crash_before_or_after_any_rename_is_mended(pajama, prepared, tmp_path, monkeypatch):
    replace, n_renames = os.replace, 4 + (4 + 2) * 2 + 2  # six shards and their markers among them
    monkeypatch.setattr(runs, "environment", lambda _: {})  # which takes longer than all the rest
    for n in range(2 * n_renames + 1):
        moments, folder = count(), tmp_path / str(n)

        def crash(source: Path, target: Path) -> None:
            for rename in (lambda: None, lambda: replace(source, target)):
                rename()
                if next(moments) == n:
                    raise KeyboardInterrupt

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", crash)
            prepare.prepare(_config(pajama), folder)
            assert n == 2 * n_renames
        prepare.prepare(_config(pajama), folder)
        assert _files(folder) == _files(prepared)


@pytest.mark.parametrize("name", ["train-00002", "val", "validation-00000"])
@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_damaged_file_is_named_and_alone_rebuilt(pajama, prepared, tmp_path, name, damage):
    write(tmp_path, _files(prepared))
    path = tmp_path / f"{name}.bin"
    os.truncate(path, path.stat().st_size - 2) if damage == "truncated" else path.unlink()
    written = {p.stem: p.stat().st_mtime_ns for p in tmp_path.glob("*-*.bin")}
    with pytest.raises(ValueError, match=rf"{name}\.bin is .*delete .* and {name}\.json"):
        data.open_split(tmp_path, name.split("-")[0])
    for marker in ("manifest", name):
        (tmp_path / f"{marker}.json").unlink(missing_ok=True)
    prepare.prepare(_config(pajama), tmp_path)
    assert _files(tmp_path) == _files(prepared)
    now = {p.stem: p.stat().st_mtime_ns for p in tmp_path.glob("*-*.bin")}
    assert {n for n in now if now[n] != written.get(n)} == {name} - {"val"}


def test_other_config_and_a_second_process_are_refused(pajama, prepared, tmp_path):
    with pytest.raises(ValueError, match="bpe_vocab_size: 300 there, 301 here"):
        prepare.prepare(_config(pajama, bpe_vocab_size=301), prepared)
    with runs.lock(tmp_path), pytest.raises(runs.Locked):
        prepare.prepare(_config(pajama), tmp_path)


def test_n_tokens_stops_after_the_shard_that_reaches_it(pajama, prepared, tmp_path):
    wanted = data.load_manifest(prepared)["splits"]["train"][0]["n_tokens"] + 1
    manifest = prepare.prepare(_config(pajama, n_tokens=wanted), tmp_path)
    assert len(manifest["splits"]["train"]) == 2 and manifest["n_tokens"] >= wanted
    assert _texts(tmp_path, "val") == [t for t in _texts(prepared, "val") if t[:2] in ("0-", "1-")]


@pytest.mark.parametrize("rows", [[""] * 50, ["one"], [["a list"]] * 2])
def test_corpus_without_text_for_both_splits_is_refused(tmp_path, rows):
    (tmp_path / "my.jsonl").write_text("".join(f"{json.dumps({'text': row})}\n" for row in rows))
    with pytest.raises(ValueError, match=r"holds no text for train or val .*Found: .*\.jsonl.*"):
        prepare.prepare(_config(tmp_path / "my.jsonl"), tmp_path / "tokens")


def test_corpus_whose_declared_size_is_wrong_is_refused(tmp_path):
    hub = write(tmp_path / "hub", layout(2, 50))
    readme = (hub / "README.md").read_text()
    (hub / "README.md").write_text(readme.replace('examples": 100', 'examples": 101'))
    with pytest.raises(ValueError, match="declares 101 documents but holds 100"):
        prepare.prepare(_config(hub), tmp_path / "tokens")


def test_manifest_tells_what_was_read_and_left_out(tmp_path):
    files = {f"{i}.txt": text.encode() for i, text in enumerate(texts(300, seed=0))}
    write(tmp_path / "my", files | {"b.html": b"<p>", "a.html": b"<p>", "c.txt": b"caf\xe9"})
    manifest = prepare.prepare(_config(tmp_path / "my"), tmp_path / "tokens")
    assert analysis.file_table(manifest).to_numpy().tolist() == [
        ["characters replaced", ".txt", 1, "c.txt"],
        ["documents read", ".txt", 301, "0.txt"],
        ["files left out: markup", ".html", 2, "a.html"],
        ["files read", ".txt", 301, "0.txt"],
        ["not UTF-8, mended", ".txt", 1, "c.txt"],
    ]
    with pytest.raises(ValueError, match=r"in 0 documents.*\.html', 'files left out: markup', 1"):
        prepare.prepare(_config(write(tmp_path / "none", {"b.html": b"<p>"})), tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"in 0 documents.*Found: nothing"):
        prepare.prepare(_config(tmp_path / "empty"), tmp_path / "nothing")


def test_memory_of_preparation_does_not_grow_with_a_text_without_line_ends(tmp_path):
    peaks = []
    for n_mb in (16, 64):
        (tmp_path / "one_line.txt").write_bytes(b"word " * (n_mb * 200_000))
        config = json.dumps(to_json(_config(tmp_path / "one_line.txt", test_size=0.01)))
        peaks.append(peak_kib(PREPARE, config, tmp_path / str(n_mb), 1_000_000))
        assert data.load_manifest(tmp_path / str(n_mb))["n_tokens"] > n_mb * 190_000
    assert peaks[1] - peaks[0] < 30_000, peaks


def test_text_of_another_encoding_is_refused_by_name(tmp_path):
    files = {f"{i}.txt": text.encode() for i, text in enumerate(texts(30, seed=0))}
    files |= {f"é{i}.txt": "Café crème".encode("latin-1") for i in range(2)}
    with pytest.raises(ValueError, match=r"2 of the 32 documents .* é0\.txt among them; .*iconv"):
        prepare.prepare(_config(write(tmp_path / "my", files)), tmp_path / "tokens")


def test_own_sources_that_change_on_the_way_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.Writer, "write_split", lambda *_: 1 / 0)
    monkeypatch.setattr(prepare, "BPE_TRAINING_CHARACTERS", 10_000)
    config = DataConfig(corpus="stdlib", tokenizer="bpe", bpe_vocab_size=257)
    with pytest.raises(ZeroDivisionError):
        prepare.prepare(config, tmp_path)
    source = runs.read_json(tmp_path / "source.json")
    runs.write_json(tmp_path / "source.json", source | {"sha256": "another"})
    with pytest.raises(ValueError, match=r"has changed since .* delete that folder"):
        prepare.prepare(config, tmp_path)
    runs.write_json(tmp_path / "manifest.json", {"finished": True})
    assert prepare.prepare(config, tmp_path) == {"finished": True}
