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
        commits = self.commits.get(repo)
        if not commits:
            return None
        sha = list(commits)[-1] if revision in (None, "main") else revision
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


def _entry(path: str, data: bytes) -> dict:
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}


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
        asked = json.loads(body) if is_json else parse_qs(body)
        self._answer(asked.get("paths", []))

    def do_GET(self) -> None:
        self._answer([])

    def _answer(self, asked_paths: list[str]) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        if match := RESOLVE.fullmatch(path):
            return self._file(*match.groups())
        match = API.fullmatch(path)
        found = match and self.hub.find(match[1], match[3])
        if not found:
            return self._missing("RepoNotFound" if not match else "RevisionNotFound")
        (sha, files), kind = found, match[2]
        if kind == "paths-info":
            return self._json([_entry(p, files[p]) for p in asked_paths if p in files])
        if kind == "tree":
            folder = f"{match[4]}/" if match[4] else ""
            inside = {p: d for p, d in files.items() if p.startswith(folder)}
            if not inside:
                return self._missing("EntryNotFound")
            names = [p[len(folder) :].split("/")[0] for p in inside if "/" in p[len(folder) :]]
            folders = [
                {"type": "directory", "path": folder + name, "oid": "0" * 40, "size": 0}
                for name in sorted(set(names))
            ]
            is_recursive = "recursive=true" in self.path.lower()
            listed = [p for p in inside if is_recursive or "/" not in p[len(folder) :]]
            return self._json(folders + [_entry(p, inside[p]) for p in sorted(listed)])
        siblings = [{"rfilename": p} for p in files]
        return self._json({"id": match[1], "sha": sha, "siblings": siblings, "tags": []})

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"{code}: {self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, repo: str, revision: str, path: str) -> None:
        found = self.hub.find(repo, revision)
        if not found or path not in found[1]:
            return self._missing("EntryNotFound" if found else "RevisionNotFound")
        sha, data = found[0], found[1][path]
        size = len(data)
        is_head = self.command == "HEAD"
        data = data if is_head else data[: self.hub.cut_to.get(path, size)]
        start, stop = 0, len(data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(wanted[1]), min(int(wanted[2] or stop) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{hashlib.sha256(found[1][path]).hexdigest()}"')
        self.send_header("X-Linked-Size", str(size))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if is_head:
            return
        if (limit := self.hub.drop_after.pop(path, None)) is not None:
            self.wfile.write(data[start : start + limit])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(data[start:stop])


def parquet(
    texts: list, *, domain: str = "RedPajamaC4", row_group_size: int | None = None
) -> bytes:
    """Make a parquet file in SlimPajama's layout; bytes among the texts need not be UTF-8."""
    raw = [t.encode() if isinstance(t, str) else t for t in texts]
    table = pa.table(
        {
            "text": pa.array(raw, pa.binary()).view(pa.string()),
            "meta": [{"redpajama_set_name": domain}] * len(texts),
            "__index_level_0__": range(len(texts)),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=row_group_size)
    return buffer.getvalue()


def texts(n: int, seed: int) -> list[str]:
    """Make n different documents of English-like words, code-like indents and other scripts."""
    random = Random(seed)
    words = ["the", "model", "learns", "from", "text"]
    words += ["\n\n", "\n    return", "naïve", "漢字", "42"]
    return [
        f"{seed}-{i} " + " ".join(random.choices(words, k=random.randint(5, 80))) for i in range(n)
    ]


def write_corpus(folder: Path, n_shards: int, n_documents: int) -> Path:
    """Write a folder in the hub's layout with official splits, and return it."""
    for path, data in layout(n_shards, n_documents).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


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
    lines = [f"  - name: {s}\n    num_bytes: 1\n    num_examples: {n}" for s, n in counts.items()]
    features = "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: meta\n"
    features += "    struct:\n    - name: redpajama_set_name\n      dtype: string\n"
    features += "  - name: __index_level_0__\n    dtype: int64\n  splits:\n"
    sizes = "\n  download_size: 1\n  dataset_size: 1\n"
    files["README.md"] = ("---\n" + features + "\n".join(lines) + sizes + "---\n").encode()
    return files
