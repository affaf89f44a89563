"""How fast text becomes tokens here: ``prepare`` beside the usual route and one bare core.

Every route runs in a process of its own, in turns, and writes or counts the same tokens. Run it as
``python -m llmlib.bench_data``.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import tiktoken

from llmlib import prepare, runs
from llmlib.config import DataConfig, to_json
from llmlib.corpus import open_corpus, read_documents
from llmlib.tokenizer import END_OF_TEXT, load_tiktoken, load_tokenizer, save_tokenizer, train_bpe

MINIPAJAMA = runs.ROOT.parent / "shared" / "minipajama"  # a stand-in, where a checkout has it
SLIMPAJAMA_MB = 24e3  # text of DKYoon/SlimPajama-6B
N_BATCHES = 1024  # slices that nanoGPT's prepare.py writes its memmap in

Measured = tuple[float, int]  # seconds, tokens


def measure(corpus: str = "", tokenizer: str = "gpt2", n_repeats: int = 3) -> pd.DataFrame:
    """Time all routes on the train split of a corpus in turns and return the medians.

    Reading the files counts for ``prepare`` only: the usual route gets its Arrow table, and the
    bare core its strings, before the clock starts. Memory is that of the whole process tree.
    """
    corpus = corpus or (str(MINIPAJAMA) if MINIPAJAMA.exists() else "stdlib")
    config = DataConfig(corpus=corpus, tokenizer=tokenizer, test_size=1e-9)
    encoding = train_bpe(_texts(config), 4096) if tokenizer == "bpe" else load_tiktoken(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runs.write_atomic(folder / "tokenizer.json", save_tokenizer(encoding))
        runs.write_json(folder / "config.json", to_json(config))
        rows = [_run(route, folder) for _ in range(n_repeats) for route in ROUTES]
    return _table(pd.DataFrame(rows), sum(len(text.encode()) for text in _texts(config)) / 1e6)


def _table(rows: pd.DataFrame, mb: float) -> pd.DataFrame:
    if rows.n_tokens.nunique() != 1:
        raise RuntimeError(f"the routes disagree on the tokens: {sorted(set(rows.n_tokens))}.")
    table = rows.groupby("route", sort=False).median()
    table["mb_per_s"] = mb / table.seconds
    plain, usual = table.mb_per_s.iloc[:2]
    table["n_cores"] = [1, prepare.n_cores(), 1, prepare.n_cores()]
    table["times_usual_route"] = table.mb_per_s / usual
    table["share_of_bare_cores"] = table.mb_per_s / (table.n_cores * plain)
    table["slimpajama_minutes"] = SLIMPAJAMA_MB / table.mb_per_s / 60  # extrapolated
    return table.reset_index()


def _run(route: str, folder: Path) -> dict[str, str | float]:
    """Run one route in a process of its own, watching the memory of its process tree."""
    command = [sys.executable, "-m", "llmlib.bench_data", route, str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=runs.ROOT, text=True
    ) as child:
        peak = 0
        while child.poll() is None:
            peak = max(peak, _tree_bytes(child.pid))
            time.sleep(0.1)
        output = child.stdout.read()
    if child.returncode:
        raise RuntimeError(f"route {route!r} failed with exit code {child.returncode}.")
    seconds, n_tokens = json.loads(output.splitlines()[-1])
    return {
        "route": route,
        "seconds": seconds,
        "n_tokens": n_tokens,
        "peak_memory_gib": peak / 2**30,
    }


def _tree_bytes(pid: int) -> int:
    """Sum the memory of a process and its children; what they share counts once."""
    total = 0
    with contextlib.suppress(psutil.Error):  # one of them has just ended
        for process in (tree := psutil.Process(pid), *tree.children(recursive=True)):
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.uss)
    return total


# ---------------------------------------------------------------------- the routes


def _texts(config: DataConfig) -> Iterator[str]:
    documents = (d for shard in open_corpus(config).train for d in read_documents(shard))
    return (document.text for document in documents if document.text)


def _plain(config: DataConfig, encoding: tiktoken.Encoding, folder: Path) -> Measured:
    texts = list(_texts(config))
    start = time.perf_counter()
    n_tokens = sum(len(encoding.encode_ordinary(text)) + 1 for text in texts)
    return time.perf_counter() - start, n_tokens


def _usual(config: DataConfig, encoding: tiktoken.Encoding, folder: Path) -> Measured:
    """Do as nanoGPT's data/openwebtext/prepare.py does."""
    import datasets

    end = encoding.encode_single_token(END_OF_TEXT)

    def process(example: dict) -> dict:
        ids = [*encoding.encode_ordinary(example["text"]), end]
        return {"ids": ids, "len": len(ids)}

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        table = datasets.Dataset.from_generator(
            lambda: ({"text": text} for text in _texts(config)), cache_dir=scratch, fingerprint="b"
        )
        start = time.perf_counter()
        tokenized = table.map(process, remove_columns=["text"], num_proc=prepare.n_cores())
        n_tokens = int(np.sum(tokenized["len"], dtype=np.uint64))
        tokens = np.memmap(Path(scratch) / "train.bin", np.uint16, "w+", shape=(n_tokens,))
        position, n_batches = 0, min(N_BATCHES, len(tokenized))
        for index in range(n_batches):
            batch = tokenized.shard(num_shards=n_batches, index=index).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            tokens[position : position + len(ids)] = ids
            position += len(ids)
        tokens.flush()
        return time.perf_counter() - start, n_tokens


def _prepare(
    config: DataConfig, encoding: tiktoken.Encoding, folder: Path, n_workers: int | None = None
) -> Measured:
    import datasets  # noqa: F401 - importing it is not part of the work

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        runs.write_atomic(Path(scratch) / "tokenizer.json", save_tokenizer(encoding))
        start = time.perf_counter()
        splits = prepare.prepare(config, Path(scratch), n_workers=n_workers)["splits"]
        seconds = time.perf_counter() - start
    return seconds, sum(shard["n_tokens"] for shard in splits["train"] + splits["val"])


ROUTES = {
    "one core, encode_ordinary": _plain,
    "datasets.map and memmap": _usual,
    "llmlib.prepare, one core": partial(_prepare, n_workers=1),
    "llmlib.prepare": _prepare,
}

if __name__ == "__main__":
    if len(sys.argv) == 3:
        route, folder = ROUTES[sys.argv[1]], Path(sys.argv[2])
        config = DataConfig(**runs.read_json(folder / "config.json"))
        print(json.dumps(route(config, load_tokenizer(folder / "tokenizer.json"), folder)))
    else:
        print(measure(*sys.argv[1:2]).to_string(float_format="{:.2f}".format))
