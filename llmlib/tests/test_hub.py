"""The hub path end to end, against a server on localhost that speaks the hub's protocol."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmlib import corpus, prepare, runs
from llmlib.config import DataConfig
from llmlib.tests import hub_server

SETTINGS = {"corpus": "me/pajama", "tokenizer": "bpe", "bpe_vocab_size": 300, "test_size": 0.02}
BPE_TRAINING_CHARACTERS = 10_000  # of the first shard


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    monkeypatch.setattr(prepare, "BPE_TRAINING_CHARACTERS", BPE_TRAINING_CHARACTERS)
    with hub_server.Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _prepare(hub: hub_server.Hub, tmp_path: Path, **settings: object) -> tuple[dict, str]:
    """Prepare a hub data set in a process of its own; return the manifest's source and the error."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", hub_server.PREPARE, json.dumps(SETTINGS | settings)]
    command += [str(tmp_path / "tokens"), str(BPE_TRAINING_CHARACTERS)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == ("ValueError: " in done.stderr), done.stderr
    manifest, message = tmp_path / "tokens" / "manifest.json", done.stderr.split("ValueError: ")[-1]
    return runs.read_json(manifest)["source"] if manifest.exists() else {}, message


def _assert_same_as_local(tmp_path: Path, files: dict[str, bytes], **settings: object) -> None:
    """Prepare the same files from a folder and compare all tokens byte for byte."""
    local = {"corpus": str(hub_server.write(tmp_path / "local", files))}
    prepare.prepare(DataConfig(**SETTINGS | settings | local), tmp_path / "expected")
    for path in (tmp_path / "expected").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "tokens" / path.name).read_bytes()


def test_damaged_shard_is_named_and_a_mended_server_completes_the_same_revision(hub, tmp_path):
    files = hub_server.layout(n_shards=5, n_documents=300)
    first, second, *others = [path for path in files if "train" in path]
    newest = hub.commit(files)
    hub.cut_to[second] = 3000
    _, message = _prepare(hub, tmp_path, n_tokens=30_000)
    shard = f"shard train-00001 (hf://datasets/me/pajama@{newest}/{second})"
    assert message.startswith(f"{shard} could not be read")
    was_written = (tmp_path / "tokens" / "train-00000.bin").stat().st_mtime_ns

    hub.commit(hub_server.layout(n_shards=1, n_documents=10))  # must not matter
    hub.cut_to.clear()
    hub.log.clear()
    source, _ = _prepare(hub, tmp_path, n_tokens=30_000)
    assert source["revision"] == newest
    assert (tmp_path / "tokens" / "train-00000.bin").stat().st_mtime_ns == was_written
    assert not {first, *others} & {*hub.downloads()}  # the first is at hand, others not needed
    _assert_same_as_local(tmp_path, files, n_tokens=30_000)


def test_subsets_are_listed_and_one_of_a_pinned_revision_is_read_alone(hub, tmp_path):
    sample, others, configs = {}, {}, []
    for files, name in ((others, "full"), (sample, "sample-10BT")):
        for i in range(2):
            rows = hub_server.texts(200, seed=i)
            files[f"data/{name}/{i:03d}_00000.parquet"] = hub_server.parquet(rows)
        data_files = [{"split": "train", "path": f"data/{name}/*"}]
        configs.append({"config_name": name, "data_files": data_files})
    readme = f"---\n{json.dumps({'configs': configs})}\n---\n".encode()
    pinned = hub.commit(sample | others | {"README.md": readme})
    hub.commit(hub_server.layout(n_shards=1, n_documents=10))
    _, message = _prepare(hub, tmp_path / "no subset", revision=pinned)
    assert "['full', 'sample-10BT']" in message and "-p subset" in message
    source, _ = _prepare(hub, tmp_path, subset="sample-10BT", revision=pinned)
    assert (source["revision"], source["n_documents"]) == (pinned, None)
    assert not any("data/full" in path for path in hub.downloads())
    _assert_same_as_local(tmp_path, sample | {"README.md": b"---\nlicense: mit\n---\n"})


@pytest.mark.parametrize(
    ("refusal", "parts"),
    [
        ("RepoNotFound", ("'me/pajama' could not be opened", corpus.NEAREST, "do not compare")),
        ("GatedRepo", ("is a gated dataset", "hf auth login")),
    ],
)
def test_data_set_that_has_gone_or_is_gated_is_told_with_the_remedy(hub, tmp_path, refusal, parts):
    hub.refusal = refusal
    _, message = _prepare(hub, tmp_path)
    assert all(part in message for part in parts)


def test_data_set_with_a_script_is_read_from_its_parquet_branch(hub, tmp_path):
    files = {f"train/{i}.parquet": hub_server.parquet(hub_server.texts(100, i)) for i in (0, 1)}
    hub.branches["refs/convert/parquet"] = hub.commit(files)
    hub.commit({"pajama.py": b"import datasets", "README.md": b"A script."})
    _, message = _prepare(hub, tmp_path)
    assert "-p revision refs/convert/parquet" in message
    source, _ = _prepare(hub, tmp_path / "again", revision="refs/convert/parquet")
    assert source["revision"] == hub.branches["refs/convert/parquet"]


def test_of_many_shards_only_those_that_are_used_are_read(hub, tmp_path):
    files = hub_server.layout(n_shards=120, n_documents=60)
    files["README.md"] = b"---\nlicense: mit\n---\n"  # declares no number of documents
    hub.commit(files)
    source, progress = _prepare(hub, tmp_path, n_tokens=1)
    assert source["n_documents"] is None and source["heldout"].startswith("the first, and")
    unused = {path for path in files if "train" in path and "train-00000" not in path}
    assert {*hub.downloads()} == {*files} - unused - {"README.md"}
    assert "1/120 [" in progress
    _assert_same_as_local(tmp_path, files, n_tokens=1)
