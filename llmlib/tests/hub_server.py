"""Small corpora in SlimPajama's layout, and a server on localhost that speaks the hub's protocol.

The server knows what ``datasets`` asks of a hub: a commit, what a folder holds, and files or parts of
them. It logs what it is asked for and can be told to misbehave.
"""

import hashlib
import io
import json
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

PREPARE = """
import json, sys
from pathlib import Path
from llmlib import prepare
from llmlib.config import DataConfig
prepare.BPE_TRAINING_CHARACTERS = int(sys.argv[3])
prepare.prepare(DataConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]))
"""
PATH = re.compile(r"(?:/api)?/datasets/me/pajama/(resolve|revision|tree)/([^/]+)/?(.*)")


class Hub(ThreadingHTTPServer):
    """The commits of me/pajama, the log of requests, and the faults still to happen."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, dict[str, bytes]] = {}  # files by path, by the commit's hash
        self.branches: dict[str, str] = {}  # commits by name; the newest is main
        self.refusal = "RepoNotFound"  # why there is nothing, where there is no commit
        self.log: list[str] = []  # the paths of the files that were asked for
        self.cut_to: dict[str, int] = {}  # path: bytes served as if they were the whole file

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit, which becomes the newest, and return its hash."""
        sha = _hash(repr([(path, _hash(data)) for path, data in files.items()]).encode())
        self.commits[sha] = files
        return sha

    def downloads(self) -> list[str]:
        """List the data files that were asked for."""
        return [path[path.index("data/") :] for path in self.log if "/data/" in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if not self.server.commits:
            return self._answer(401, **{"X-Error-Code": self.server.refusal})
        path = urlsplit(self.path).path
        if self.command == "GET" and "/resolve/" in path:
            self.server.log.append(unquote(path))
        match = PATH.fullmatch(path)
        kind, revision, name = map(unquote, match.groups()) if match else [""] * 3
        newest = {"main": [*self.server.commits][-1]}
        sha = (newest | self.server.branches).get(revision, revision)
        files = self.server.commits.get(sha, {})
        if kind == "revision":
            self._answer(200, json.dumps({"id": "me/pajama", "sha": sha, "tags": []}).encode())
        elif kind == "tree":
            self._answer(200, json.dumps(_listing(files, f"{name}/" if name else "")).encode())
        elif kind == "resolve" and name in files:
            most = self.server.cut_to.get(name) if self.command == "GET" else None
            headers = {"X-Repo-Commit": sha, "ETag": _hash(files[name])}
            self._answer(200, files[name][:most], **headers)
        else:
            self._answer(404, **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data if self.command == "GET" else b"")


def _listing(files: dict[str, bytes], folder: str) -> list[dict]:
    """List what lies in a folder: files, and folders one level down."""
    below = [path.removeprefix(folder) for path in files if path.startswith(folder)]
    entries = {}
    for path in below:
        name = folder + path.split("/")[0]
        kind, size = "file" if name in files else "directory", len(files.get(name, ""))
        entries[name] = {"type": kind, "size": size, "path": name, "oid": _hash(name.encode())}
    return [*entries.values()]


def _hash(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def parquet(texts: list, *, domain: str = "RedPajamaC4") -> bytes:
    """Make a parquet file in SlimPajama's layout; bytes among the texts need not be UTF-8."""
    raw = [t.encode() if isinstance(t, str) else t for t in texts]
    columns = {
        "text": pa.array(raw, pa.binary()).view(pa.string()),
        "meta": [{"redpajama_set_name": domain}] * len(texts),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def texts(n: int, seed: int) -> list[str]:
    """Make n different documents of English-like words, code-like indents and other scripts."""
    random = Random(seed)
    words = ["the", "model", "learns", "text", "\n\n", "\n    return", "naïve", "漢字", "42"]
    drawn = [random.choices(words, k=random.randint(5, 80)) for _ in range(n)]
    return [f"{seed}-{i} {' '.join(found)}" for i, found in enumerate(drawn)]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files by path below a folder, and return it."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def peak_kib(code: str, *arguments: object) -> int:
    """Run code in a process of its own and return the most memory it held."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc")
    code += "\nfrom pathlib import Path\nprint(Path('/proc/self/status').read_text())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(out.split("VmHWM:")[1].split()[0])


def layout(n_shards: int, n_documents: int) -> dict[str, bytes]:
    """Make the files of a small data set in SlimPajama-6B's layout, by path."""
    files = {
        f"data/train-{i:05d}-of-{n_shards:05d}-0123456789abcdef.parquet": parquet(
            texts(n_documents, i), domain=f"RedPajama{'Book' if i % 2 else 'C4'}"
        )
        for i in range(n_shards)
    }
    for seed, split in ((100, "validation"), (200, "test")):
        files[f"data/{split}-00000-of-00001-0123456789abcdef.parquet"] = parquet(texts(20, seed))
    counts = {"train": n_shards * n_documents, "validation": 20, "test": 20}
    splits = [{"name": s, "num_bytes": 1, "num_examples": n} for s, n in counts.items()]
    files["README.md"] = f"---\n{json.dumps({'dataset_info': {'splits': splits}})}\n---\n".encode()
    return files
