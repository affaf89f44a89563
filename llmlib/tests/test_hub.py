"""The hub path end to end, against a server on localhost that speaks the hub's protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmlib import prepare, runs
from llmlib.config import DataConfig, to_json
from llmlib.tests import hub_server

SETTINGS = {"tokenizer": "bpe", "bpe_vocab_size": 300, "test_size": 0.02}
PREPARE = """
import json, sys
from pathlib import Path
import huggingface_hub.constants
from llmlib import prepare
from llmlib.config import DataConfig
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000  # so that a part arrives before the drop
try:
    prepare.prepare(DataConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]))
except ValueError as error:
    sys.exit(f"ValueError: {error}")
"""


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.serve() as server:
        yield server


def _prepare(hub: hub_server.Hub, tmp_path: Path, **settings: object) -> str:
    """Prepare a hub data set in a process of its own and return what it wrote to stderr."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, json.dumps(SETTINGS | settings), str(tmp_path / "tokens")],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == ("ValueError:" in done.stderr), done.stderr
    return done.stderr


def _assert_same_tokens(there: Path, here: Path) -> None:
    """Compare all token files of two folders byte for byte, and what the manifests say of them."""
    names = sorted(path.name for path in here.glob("*.bin"))
    assert names == sorted(path.name for path in there.glob("*.bin"))
    assert all((there / name).read_bytes() == (here / name).read_bytes() for name in names)
    first, second = (runs.read_json(folder / "manifest.json") for folder in (there, here))
    assert first | {"source": None} == second | {"source": None}


def _local(files: dict[str, bytes], tmp_path: Path, **settings: object) -> Path:
    """Prepare the same files from a folder."""
    for path, data in files.items():
        (tmp_path / "local" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / path).write_bytes(data)
    config = DataConfig(corpus=str(tmp_path / "local"), **(SETTINGS | settings))
    prepare.prepare(config, tmp_path / "expected")
    return tmp_path / "expected"


def test_pinned_revision_fetches_only_the_shards_it_needs_and_resumes_a_dropped_connection(
    hub: hub_server.Hub, tmp_path: Path
) -> None:
    files = hub_server.layout(n_shards=5, n_documents=300)
    pinned = hub.commit("me/pajama", files)
    hub.commit("me/pajama", hub_server.layout(n_shards=1, n_documents=10))
    names = [path for path in files if "train" in path]
    hub.drop_after[names[1]] = 5000
    _prepare(hub, tmp_path, corpus="me/pajama", revision=pinned, n_tokens=30_000)

    manifest = runs.read_json(tmp_path / "tokens" / "manifest.json")
    assert manifest["source"]["revision"] == pinned
    assert {p for p in hub.downloads() if "train" in p} == set(names[:2])
    ranges = [wanted for method, path, wanted in hub.log if path.endswith(names[1]) and wanted]
    assert ranges == ["bytes=5000-"]
    expected = _local(files, tmp_path, n_tokens=30_000)
    _assert_same_tokens(tmp_path / "tokens", expected)
    assert manifest["source"]["config"] == to_json(
        DataConfig(corpus="me/pajama", revision=pinned, n_tokens=30_000, **SETTINGS)
    )


def test_shard_of_another_size_is_named_and_a_mended_server_completes(
    hub: hub_server.Hub, tmp_path: Path
) -> None:
    files = hub_server.layout(n_shards=3, n_documents=100)
    newest = hub.commit("me/pajama", files)
    bad = next(path for path in files if "train-00001" in path)
    hub.cut_to[bad] = 3000
    message = _prepare(hub, tmp_path, corpus="me/pajama", n_tokens=15_000)
    assert "ValueError: shard train-00001 (hf://datasets/me/pajama" in message
    assert f"{bad}) could not be downloaded" in message
    assert "finished shards are kept" in message
    kept = tmp_path / "tokens" / "train-00000.bin"
    was_written = kept.stat().st_mtime_ns

    hub.cut_to.clear()
    hub.log.clear()
    hub.commit("me/pajama", hub_server.layout(n_shards=1, n_documents=10))  # must not matter
    _prepare(hub, tmp_path, corpus="me/pajama", n_tokens=15_000)
    assert kept.stat().st_mtime_ns == was_written
    assert not any("train-00000" in path for path in hub.downloads())
    manifest = runs.read_json(tmp_path / "tokens" / "manifest.json")
    assert manifest["source"]["revision"] == newest
    _assert_same_tokens(tmp_path / "tokens", _local(files, tmp_path, n_tokens=15_000))


def test_subset_of_a_data_set_is_counted_from_footers(hub: hub_server.Hub, tmp_path: Path) -> None:
    readme = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: data/{name}/*\n"
        for name in ("full", "sample-10BT")
    )
    files = {
        f"data/{name}/{i:03d}_00000.parquet": hub_server.parquet(hub_server.texts(200, seed=i))
        for name, shards in (("full", range(2)), ("sample-10BT", range(2, 4)))
        for i in shards
    }
    hub.commit("me/fineweb", files | {"README.md": f"{readme}---\n".encode()})
    _prepare(hub, tmp_path, corpus="me/fineweb", subset="sample-10BT")
    manifest = runs.read_json(tmp_path / "tokens" / "manifest.json")
    assert manifest["source"]["n_documents"] == 400
    assert not any("data/full" in path for path in hub.downloads())
    sample = {path.replace("data/sample-10BT", "data"): d for path, d in files.items()}
    sample = {path: d for path, d in sample.items() if "full" not in path}
    _assert_same_tokens(tmp_path / "tokens", _local(sample, tmp_path))


def test_rows_of_a_csv_data_set_are_documents(hub: hub_server.Hub, tmp_path: Path) -> None:
    rows = [f"line {i}, and\nanother" for i in range(100)]
    csv = "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(rows))
    hub.commit("me/csv", {"data/train.csv": csv.encode()})
    _prepare(hub, tmp_path, corpus="me/csv")
    same = {"train.parquet": hub_server.parquet(rows, domain="all")}
    _assert_same_tokens(tmp_path / "tokens", _local(same, tmp_path))


def test_unknown_data_set_is_named(hub: hub_server.Hub, tmp_path: Path) -> None:
    message = _prepare(hub, tmp_path, corpus="me/nothing")
    assert "ValueError: corpus='me/nothing'" in message
    assert "could not be opened" in message
