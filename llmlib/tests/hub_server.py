"""Small corpora in SlimPajama's layout, and a server on localhost that speaks the hub's protocol.

The server logs what it is asked for and can be told to misbehave.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

API = re.compile(r"/api/datasets/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/datasets/([^/]+/[^/]+?)/resolve/([^/]+)/(.+)")


class Hub:
    """Datasets by commit, the log of requests, and the faults still to happen."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository, commit, path
        self.log: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.drop_after: dict[str, int] = {}  # path: bytes after which the connection drops, once
        self.cut_to: dict[str, int] = {}  # path: bytes served as if they were the whole file
        self.url = ""

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Add a commit, which becomes the newest, and return its hash."""
        content = repr([(path, hashlib.sha1(data).hexdigest()) for path, data in files.items()])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits.setdefault(repo, {})[sha] = files
        return sha

    def downloads(self) -> list[str]:
        """List the data files that were asked for, without what only reads a part."""
        paths = [path for method, path, _ in self.log if method == "GET" and "/resolve/" in path]
        return [p.split("/resolve/")[1].split("/", 1)[1] for p in paths if "/data/" in p]

    def find(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits.get(repo, {})
        sha = [*commits, None][-2] if commits and revision in (None, "main") else revision
        return (sha, commits[sha]) if sha in commits else None


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub on a free port of localhost."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        is_json = "json" in self.headers.get("Content-Type", "")
        self.do_GET((json.loads(body) if is_json else parse_qs(body)).get("paths", []))

    def do_GET(self, asked: list[str] | None = None) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        if match := RESOLVE.fullmatch(path):
            return self._file(*match.groups())
        match = API.fullmatch(path)
        if not (found := match and self.hub.find(match[1], match[3])):
            return self._answer(
                404, {"X-Error-Code": "RevisionNotFound" if match else "RepoNotFound"}
            )
        (sha, files), kind, folder = found, match[2], f"{match[4]}/" if match[4] else ""
        if kind == "paths-info":
            return self._json([_entry(p, files[p]) for p in asked or [] if p in files])
        if kind == "tree":
            return self._tree(folder, {p: d for p, d in files.items() if p.startswith(folder)})
        siblings = [{"rfilename": p} for p in files]
        self._json({"id": match[1], "sha": sha, "siblings": siblings, "tags": []})

    def _tree(self, folder: str, files: dict[str, bytes]) -> None:
        """List what lies in a folder: files, and folders one level down."""
        if not files:
            return self._answer(404, {"X-Error-Code": "EntryNotFound"})
        below = {p[len(folder) :].split("/")[0] for p in files if "/" in p[len(folder) :]}
        folders = [{"type": "directory", "path": folder + name, "oid": "0"} for name in below]
        is_deep = "recursive=true" in self.path.lower()
        listed = [p for p in files if is_deep or "/" not in p[len(folder) :]]
        self._json(folders + [_entry(p, files[p]) for p in listed])

    def _json(self, value: object) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def _file(self, repo: str, revision: str, path: str) -> None:
        found = self.hub.find(repo, revision)
        if not found or path not in found[1]:
            code = "EntryNotFound" if found else "RevisionNotFound"
            return self._answer(404, {"X-Error-Code": code})
        sha, whole = found[0], found[1][path]
        data = whole if self.command == "HEAD" else whole[: self.hub.cut_to.get(path, len(whole))]
        headers = {"X-Repo-Commit": sha, "X-Linked-Size": str(len(whole)), "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha256(whole).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data = data[start:stop]
        headers["Content-Length"] = str(len(data))
        is_dropped = self.command == "GET" and path in self.hub.drop_after
        sent = data[: self.hub.drop_after.pop(path)] if is_dropped else data
        self._answer(206 if wanted else 200, headers, sent)
        if is_dropped:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()


def _entry(path: str, data: bytes) -> dict:
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}


def parquet(
    texts: list, *, domain: str = "RedPajamaC4", row_group_size: int | None = None
) -> bytes:
    """Make a parquet file in SlimPajama's layout; bytes among the texts need not be UTF-8."""
    raw = [t.encode() if isinstance(t, str) else t for t in texts]
    columns = {
        "text": pa.array(raw, pa.binary()).view(pa.string()),
        "meta": [{"redpajama_set_name": domain}] * len(texts),
        "__index_level_0__": range(len(texts)),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=row_group_size)
    return buffer.getvalue()


def texts(n: int, seed: int) -> list[str]:
    """Make n different documents of English-like words, code-like indents and other scripts."""
    random = Random(seed)
    words = ["the", "model", "learns", "from", "text"]
    words += ["\n\n", "\n    return", "naïve", "漢字", "42"]
    return [
        f"{seed}-{i} " + " ".join(random.choices(words, k=random.randint(5, 80))) for i in range(n)
    ]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files by path below a folder, and return it."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def write_corpus(folder: Path, n_shards: int, n_documents: int) -> Path:
    """Write a folder in the hub's layout with official splits, and return it."""
    return write(folder, layout(n_shards, n_documents))


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
    meta = {"name": "meta", "struct": [{"name": "redpajama_set_name", "dtype": "string"}]}
    columns = [{"name": "text", "dtype": "string"}, meta]
    columns += [{"name": "__index_level_0__", "dtype": "int64"}]
    info = {"features": columns, "splits": splits, "download_size": 1, "dataset_size": 1}
    files["README.md"] = f"---\n{json.dumps({'dataset_info': info})}\n---\n".encode()
    return files
