"""Tokens on disk: the right ones, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmlib import corpus, data, prepare, runs
from llmlib.config import DataConfig
from llmlib.runs import ROOT
from llmlib.tests.hub_server import parquet, texts, write_corpus
from llmlib.tokenizer import load_tokenizer, save_tokenizer, train_bpe

SHARED = ROOT.parent / "shared"


def _config(folder: Path, **settings: object) -> DataConfig:
    base = {"tokenizer": "bpe", "bpe_vocab_size": 300, "test_size": 0.05}
    return DataConfig(corpus=str(folder), **(base | settings))


def _files(folder: Path) -> dict[str, bytes]:
    """Every file of prepared tokens; the lock is left out."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}


def _texts(folder: Path, split: str) -> list[str]:
    """Turn a split back into its documents."""
    encoding = load_tokenizer(folder / "tokenizer.json")
    stream = np.concatenate([*data.open_split(folder, split).streams()])
    ends = np.flatnonzero(stream == encoding.n_vocab - 1)
    return [
        encoding.decode(part.tolist()[i > 0 :]) for i, part in enumerate(np.split(stream, ends))
    ][:-1]


@pytest.fixture(scope="module")
def pajama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("pajama"), n_shards=4, n_documents=120)


@pytest.fixture(scope="module")
def prepared(pajama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "tokens"
    prepare.prepare(_config(pajama), folder)
    return folder


@pytest.fixture
def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "JOB_BYTES", 1000)


# ---------------------------------------------------------------------- the split


@pytest.mark.parametrize("n_documents", [2, 1999, 2001, 50_000])
def test_heldout_documents_are_those_of_datasets_in_its_order(n_documents: int) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"index": range(n_documents)})
    expected = table.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"]["index"]
    assert prepare.heldout_documents(n_documents, 0.0005, 2357) == list(expected)


def test_prepared_splits_are_those_of_datasets_document_for_document(
    pajama: Path, prepared: Path, tmp_path: Path
) -> None:
    import datasets

    hub = datasets.load_dataset(str(pajama), cache_dir=str(tmp_path))
    split = hub["train"].train_test_split(test_size=0.05, seed=2357, shuffle=True)
    assert _texts(prepared, "val") == list(split["test"]["text"])
    heldout = set(split["test"]["text"])
    assert _texts(prepared, "train") == [t for t in hub["train"]["text"] if t not in heldout]
    assert _texts(prepared, "validation") == list(hub["validation"]["text"])
    assert _texts(prepared, "test") == list(hub["test"]["text"])


def test_tokens_are_a_plain_pass_of_encode_ordinary(pajama: Path, prepared: Path) -> None:
    encoding = load_tokenizer(prepared / "tokenizer.json")
    heldout = set(prepare.heldout_documents(480, 0.05, 2357))
    opened, index = corpus.open_corpus(_config(pajama)), 0
    for shard in opened.train:
        expected: list[int] = []
        for document in corpus.read_documents(shard):
            if index not in heldout:
                expected += [*encoding.encode_ordinary(document.text), encoding.n_vocab - 1]
            index += 1
        assert np.fromfile(prepared / f"{shard.name}.bin", "<u2").tolist() == expected


def test_manifest_counts_documents_bytes_and_tokens_per_domain(
    pajama: Path, prepared: Path
) -> None:
    manifest = data.load_manifest(prepared)
    for shard, opened in zip(
        manifest["splits"]["train"], corpus.open_corpus(_config(pajama)).train, strict=True
    ):
        documents = list(corpus.read_documents(opened))
        [(domain, counts)] = shard["domains"].items()
        [(_, val_counts)] = shard["val"]["domains"].items()
        assert {domain} == {document.domain for document in documents}
        assert counts["documents"] + val_counts["documents"] == shard["n_rows"] == 120
        assert counts["bytes"] + val_counts["bytes"] == sum(len(d.raw) for d in documents)
        assert counts["tokens"] == shard["n_tokens"]
    assert manifest["n_tokens"] == sum(s["n_tokens"] for s in manifest["splits"]["train"])
    assert manifest["is_whole_corpus"] and not manifest["is_short_of_n_tokens"]


def test_workers_and_job_size_do_not_change_a_byte(
    pajama: Path, prepared: Path, tmp_path: Path, small_jobs: None
) -> None:
    prepare.prepare(_config(pajama), tmp_path, n_workers=5)
    assert _files(tmp_path) == _files(prepared)


# ---------------------------------------------------------------------- resuming


SLOWLY = """
import json, sys, time
from pathlib import Path
from llmlib import prepare
from llmlib.config import DataConfig
prepare.JOB_BYTES = 2000
append = prepare.TokenFile.append
def slow(*arguments):
    time.sleep(0.01)
    append(*arguments)
prepare.TokenFile.append = slow
write_json = prepare.runs.write_json
def never_end(path, value):
    if path.name == "manifest.json":
        time.sleep(1e9)
    write_json(path, value)
prepare.runs.write_json = never_end
prepare.prepare(DataConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


def _is_writing(folder: Path, since: int) -> bool:
    try:
        return any(p.stat().st_mtime_ns > since for p in folder.glob(".train-*.tmp"))
    except FileNotFoundError:  # renamed just now
        return True


def test_run_that_is_killed_again_and_again_ends_byte_identical(
    pajama: Path, prepared: Path, tmp_path: Path
) -> None:
    folder, pick = tmp_path / "tokens", random.Random()
    config = json.dumps(runs.read_json(prepared / "source.json")["config"])
    for n_done in range(4):
        markers, started = set(folder.glob("train-*.json")), time.time_ns()
        child = subprocess.Popen(
            [sys.executable, "-c", SLOWLY, config, str(folder)], stderr=subprocess.DEVNULL
        )
        while child.poll() is None and not (
            len(list(folder.glob("train-*.json"))) >= n_done and _is_writing(folder, started)
        ):
            time.sleep(0.001)
        time.sleep(pick.uniform(0, 0.35))  # about as long as a shard takes
        child.kill()
        assert child.wait() == -signal.SIGKILL
        assert markers <= set(folder.glob("train-*.json"))  # finished shards are not lost
    assert not (folder / "manifest.json").exists(), "killed too late to show anything"
    prepare.prepare(DataConfig(**json.loads(config)), folder)
    assert _files(folder) == _files(prepared)


class Crash(BaseException):
    """The power goes."""


def test_crash_before_or_after_any_rename_is_mended_by_the_next_run(
    pajama: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, n_crashes = os.replace, 0
    while True:
        n_left = n_crashes // 2

        def crash(source: Path, target: Path) -> None:
            nonlocal n_left
            n_left -= 1
            if n_left < 0 and n_crashes % 2 == 0:
                raise Crash
            replace(source, target)
            if n_left < 0:
                raise Crash

        folder = tmp_path / str(n_crashes)
        monkeypatch.setattr(os, "replace", crash)
        try:
            prepare.prepare(_config(pajama), folder)
        except Crash:
            n_crashes += 1
        else:
            break
        finally:
            monkeypatch.setattr(os, "replace", replace)
        prepare.prepare(_config(pajama), folder)
        assert _files(folder) == _files(prepared)
    # source, tokenizer, 4 x (main, val, marker), 2 x (main, marker), val, manifest: both sides
    assert n_crashes == 2 * (2 + 4 * 3 + 2 * 2 + 1 + 1)


def _copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for name, content in _files(folder).items():
        (to / name).write_bytes(content)
    return to


@pytest.mark.parametrize(
    "name", ["train-00002.bin", "train-00001.val.bin", "val.bin", "validation-00000.bin"]
)
@pytest.mark.parametrize("damage", ["truncated", "altered", "deleted"])
def test_damaged_file_is_named_and_alone_rebuilt(
    pajama: Path, prepared: Path, tmp_path: Path, name: str, damage: str
) -> None:
    folder = _copy(prepared, tmp_path / "tokens")
    assert prepare.verify(folder) == []
    path, content = folder / name, (folder / name).read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        altered = bytes([content[0] ^ 1]) + content[1:]
        path.write_bytes(content[:-2] if damage == "truncated" else altered)
    written = {p.name: p.stat().st_mtime_ns for p in folder.glob("*-*.bin")}
    assert prepare.verify(folder) == [name]
    prepare.prepare(_config(pajama), folder)
    assert _files(folder) == _files(prepared)
    now = {p.name: p.stat().st_mtime_ns for p in folder.glob("*-*.bin")}
    rebuilt = {n for n in now if now[n] != written.get(n)}
    assert {n.split(".")[0] for n in rebuilt} == {name.split(".")[0]} - {"val"}


def test_truncated_file_is_named_when_it_is_opened(prepared: Path, tmp_path: Path) -> None:
    folder = _copy(prepared, tmp_path / "tokens")
    (folder / "train-00003.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00003\.bin is missing or has another size"):
        data.open_split(folder, "train")


def test_other_config_is_refused_with_what_differs(prepared: Path, pajama: Path) -> None:
    with pytest.raises(ValueError, match="were made with bpe_vocab_size=300, not 301"):
        prepare.prepare(_config(pajama, bpe_vocab_size=301), prepared)


def test_setting_that_only_older_tokens_have_is_named(
    prepared: Path, pajama: Path, tmp_path: Path
) -> None:
    folder = _copy(prepared, tmp_path / "tokens")
    manifest = runs.read_json(folder / "manifest.json")
    manifest["source"]["config"]["lower_case"] = True
    runs.write_json(folder / "manifest.json", manifest)
    with pytest.raises(ValueError, match="were made with lower_case=True, not None"):
        prepare.prepare(_config(pajama), folder)


def test_two_processes_cannot_prepare_the_same_tokens(pajama: Path, tmp_path: Path) -> None:
    with runs.lock(tmp_path), pytest.raises(runs.Locked):
        prepare.prepare(_config(pajama), tmp_path)


# ---------------------------------------------------------------------- how much


def test_n_tokens_stops_after_the_shard_that_reaches_it(
    pajama: Path, prepared: Path, tmp_path: Path
) -> None:
    first, second = data.load_manifest(prepared)["splits"]["train"][:2]
    wanted = first["n_tokens"] + 1
    manifest = prepare.prepare(_config(pajama, n_tokens=wanted), tmp_path)
    assert len(manifest["splits"]["train"]) == 2
    assert manifest["n_tokens"] >= wanted and second["n_tokens"] > 1
    assert not manifest["is_whole_corpus"] and not manifest["is_short_of_n_tokens"]
    everything = _texts(prepared, "val")
    assert _texts(tmp_path, "val") == [t for t in everything if t.split("-")[0] in ("0", "1")]


def test_more_tokens_than_there_are_takes_all_and_says_so(pajama: Path, tmp_path: Path) -> None:
    manifest = prepare.prepare(_config(pajama, n_tokens=10**9), tmp_path)
    assert manifest["is_whole_corpus"] and manifest["is_short_of_n_tokens"]
    assert len(manifest["splits"]["train"]) == 4


# ---------------------------------------------------------------------- bad input


def test_null_empty_and_invalid_documents_are_counted(tmp_path: Path) -> None:
    rows = [*texts(50, seed=0), None, "", "", b"caf\xe9", None, None]
    (tmp_path / "my.parquet").write_bytes(parquet(rows))
    manifest = prepare.prepare(_config(tmp_path / "my.parquet"), tmp_path / "tokens")
    [shard] = manifest["splits"]["train"]
    assert shard["skipped"] == {"null": 3, "empty": 2, "invalid_utf8": 1}
    n_kept = sum(d["documents"] for s in (shard, shard["val"]) for d in s["domains"].values())
    assert (shard["n_rows"], n_kept) == (56, 51)
    kept = _texts(tmp_path / "tokens", "train") + _texts(tmp_path / "tokens", "val")
    assert sorted(kept) == sorted([*texts(50, seed=0), "caf\ufffd"])


def test_corrupt_shard_is_named_and_its_repair_completes(
    pajama: Path, prepared: Path, tmp_path: Path
) -> None:
    hub = write_corpus(tmp_path / "hub", n_shards=4, n_documents=120)
    config = _config(hub)
    bad = next(hub.glob("data/train-00002*"))
    content = bad.read_bytes()
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((prepared / "tokenizer.json").read_bytes())
    bad.write_bytes(content[:100] + bytes(900) + content[1000:])
    with pytest.raises(ValueError, match=r"shard train-00002 \(.*\) could not be read"):
        prepare.prepare(config, folder)
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("train-*.bin")}
    assert sorted(p.name for p in kept if "val" not in p.name) == [
        "train-00000.bin",
        "train-00001.bin",
    ]
    assert not list(folder.glob(".*.tmp"))
    bad.write_bytes(content)
    prepare.prepare(config, folder)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    there, here = _files(folder), _files(prepared)
    assert {n: there[n] for n in there if n.endswith(".bin")} == {
        n: here[n] for n in here if n.endswith(".bin")
    }


def test_document_of_ten_megabytes_without_a_space_is_encoded(tmp_path: Path) -> None:
    long = "".join(random.Random(0).choices(string.ascii_letters, k=10_000_000))
    (tmp_path / "my.parquet").write_bytes(parquet([*texts(20, seed=0), long]))
    folder = tmp_path / "tokens"
    folder.mkdir()
    encoding = train_bpe(texts(20, seed=0), 300)
    (folder / "tokenizer.json").write_text(save_tokenizer(encoding))
    prepare.prepare(_config(tmp_path / "my.parquet"), folder)
    assert long in _texts(folder, "train") + _texts(folder, "val")


@pytest.mark.parametrize("when", [0, 3, 9])
def test_full_disk_is_explained_and_finished_shards_are_kept(
    pajama: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: int,
) -> None:
    fsync, n_synced = os.fsync, 0

    def full(file: int) -> None:
        nonlocal n_synced
        n_synced += 1
        if n_synced > when:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"the disk is full .*run again: finished shards are kept"):
        prepare.prepare(_config(pajama), tmp_path / "tokens")
    monkeypatch.undo()
    prepare.prepare(_config(pajama), tmp_path / "tokens")
    assert _files(tmp_path / "tokens") == _files(prepared)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_operating_systems_own_full_disk_is_explained(pajama: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / ".train-00000.bin.tmp").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="the disk is full"):
        prepare.prepare(_config(pajama), tmp_path / "tokens")
    assert not list((tmp_path / "tokens").glob("*.bin"))


def test_corpus_of_empty_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my.parquet").write_bytes(parquet([""] * 50))
    with pytest.raises(ValueError, match="holds no text for"):
        prepare.prepare(_config(tmp_path / "my.parquet"), tmp_path / "tokens")


def test_corpus_of_one_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my.parquet").write_bytes(parquet(["one"]))
    with pytest.raises(ValueError, match=r"has 1 document\(s\); training and validation need one"):
        prepare.prepare(_config(tmp_path / "my.parquet"), tmp_path / "tokens")


def test_corpus_whose_declared_size_is_wrong_is_refused(tmp_path: Path) -> None:
    hub = write_corpus(tmp_path / "hub", n_shards=2, n_documents=50)
    readme = (hub / "README.md").read_text()
    (hub / "README.md").write_text(readme.replace("num_examples: 100", "num_examples: 101"))
    with pytest.raises(ValueError, match="declares 101 documents but holds 100"):
        prepare.prepare(_config(hub), tmp_path / "tokens")


# ---------------------------------------------------------------------- the real thing


@pytest.mark.skipif(
    not (SHARED / "minipajama").exists() or not (SHARED / "tiktoken-cache").exists(),
    reason="needs the shared miniature of SlimPajama and GPT-2's vocabulary",
)
def test_first_shard_of_minipajama_equals_a_plain_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken-cache"))
    config = DataConfig(corpus=str(SHARED / "minipajama"), n_tokens=1)
    manifest = prepare.prepare(config, tmp_path)
    assert manifest["source"]["n_documents"] == 18_899
    encoding = tiktoken.get_encoding("gpt2")
    heldout = set(np.random.default_rng(2357).permutation(18_899)[:10].tolist())
    table = pq.read_table(next((SHARED / "minipajama" / "data").glob("train-00000-*")))
    expected = []
    for index, text in enumerate(table["text"].to_pylist()):
        if index not in heldout:
            expected.append(np.array([*encoding.encode_ordinary(text), 50_256], np.uint16))
    assert np.array_equal(
        np.fromfile(tmp_path / "train-00000.bin", "<u2"), np.concatenate(expected)
    )
    assert data.shared_documents(tmp_path)["n_shared"].sum() == 0
