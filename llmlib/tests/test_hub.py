"""The hub path end to end, against a server on localhost that speaks the hub's protocol."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmlib import corpus, prepare, runs
from llmlib.config import DataConfig
from llmlib.tests import hub_server

SETTINGS = {"corpus": "me/pajama", "tokenizer": "bpe", "bpe_vocab_size": 300, "test_size": 0.02}
PREPARE = """
import json, sys
from pathlib import Path
import huggingface_hub.constants
from llmlib import prepare
from llmlib.config import DataConfig
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000  # so that a part arrives before the drop
prepare.BPE_TRAINING_CHARACTERS = 10_000  # of the first shard
try:
    prepare.prepare(DataConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]))
except ValueError as error:
    sys.exit(f"ValueError: {error}")
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    monkeypatch.setattr(prepare, "BPE_TRAINING_CHARACTERS", 10_000)
    with hub_server.serve() as server:
        yield server


def _prepare(hub: hub_server.Hub, tmp_path: Path, **settings: object) -> tuple[dict, str]:
    """Prepare a hub data set in a process of its own; return the manifest's source and stderr."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", PREPARE, json.dumps(SETTINGS | settings)]
    command += [str(tmp_path / "tokens")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == ("ValueError:" in done.stderr), done.stderr
    manifest = tmp_path / "tokens" / "manifest.json"
    return runs.read_json(manifest)["source"] if manifest.exists() else {}, done.stderr


def _assert_same_as_local(tmp_path: Path, files: dict[str, bytes], **settings: object) -> None:
    """Prepare the same files from a folder and compare all tokens byte for byte."""
    local = {"corpus": str(hub_server.write(tmp_path / "local", files))}
    prepare.prepare(DataConfig(**SETTINGS | settings | local), tmp_path / "expected")
    there, here = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.bin")}
        for folder in ("tokens", "expected")
    )
    assert there == here


def test_damaged_shard_is_named_and_a_mended_server_completes_the_same_revision(hub, tmp_path):
    files = hub_server.layout(n_shards=5, n_documents=300)
    first, second, *others = [path for path in files if "train" in path]
    newest = hub.commit(files)
    hub.cut_to[second] = 3000
    _, message = _prepare(hub, tmp_path, n_tokens=30_000)
    assert f"ValueError: shard train-00001 (hf://datasets/me/pajama@{newest}/{second})" in message
    assert "could not be read" in message
    was_written = (tmp_path / "tokens" / "train-00000.bin").stat().st_mtime_ns

    hub.commit(hub_server.layout(n_shards=1, n_documents=10))  # must not matter
    hub.cut_to.clear()
    hub.log.clear()
    hub.drop_after[second] = 5000
    source, _ = _prepare(hub, tmp_path, n_tokens=30_000)
    assert source["revision"] == newest
    assert (tmp_path / "tokens" / "train-00000.bin").stat().st_mtime_ns == was_written
    assert not {first, *others} & {*hub.downloads()}  # the first is at hand, others not needed
    ranges = [wanted for _, path, wanted in hub.log if path.endswith(second) and wanted]
    assert ranges == ["bytes=5000-"]  # resumed where the connection dropped
    _assert_same_as_local(tmp_path, files, n_tokens=30_000)


def test_subset_of_a_pinned_revision_is_read_alone(hub, tmp_path):
    sample = {
        f"data/sample-10BT/{i:03d}_00000.parquet": hub_server.parquet(hub_server.texts(200, seed=i))
        for i in range(2)
    }
    others = {f"data/full/{i:03d}_00000.parquet": hub_server.parquet(["a"]) for i in range(2)}
    configs = [
        {"config_name": n, "data_files": [{"split": "train", "path": f"data/{n}/*"}]}
        for n in ("full", "sample-10BT")
    ]
    readme = f"---\n{json.dumps({'configs': configs})}\n---\n".encode()
    pinned = hub.commit(sample | others | {"README.md": readme})
    hub.commit(hub_server.layout(n_shards=1, n_documents=10))
    source, _ = _prepare(hub, tmp_path, subset="sample-10BT", revision=pinned)
    assert (source["revision"], source["n_documents"]) == (pinned, None)
    assert not any("data/full" in path for path in hub.downloads())
    _assert_same_as_local(tmp_path, sample | {"README.md": b"---\nlicense: mit\n---\n"})


def test_rows_of_a_csv_data_set_are_documents(hub, tmp_path):
    rows = [f"line {i}, and\nanother" for i in range(100)]
    csv = "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(rows))
    hub.commit({"README.md": b"A table.", "data/train.csv": csv.encode()})
    _prepare(hub, tmp_path)
    _assert_same_as_local(tmp_path, {"train.parquet": hub_server.parquet(rows)})


def test_for_a_data_set_that_has_gone_the_nearest_one_is_named(hub, tmp_path):
    _, message = _prepare(hub, tmp_path)
    for part in ("'me/pajama' could not be opened", corpus.NEAREST, "losses do not compare"):
        assert part in message
