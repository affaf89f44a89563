"""How fast text becomes tokens here: ``prepare`` beside the usual route and one bare core.

Every route runs in a process of its own, in turns, and writes or counts the same tokens. Run it as
``python -m llmlib.bench_data``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from llmlib import prepare, runs
from llmlib.config import DataConfig, to_json
from llmlib.corpus import open_corpus, read_documents
from llmlib.tokenizer import END_OF_TEXT, load_tiktoken, save_tokenizer, train_bpe

MINIPAJAMA = runs.ROOT.parent / "shared" / "minipajama"  # a stand-in, where a checkout has it
SLIMPAJAMA_BYTES = 24e9  # text of DKYoon/SlimPajama-6B
N_BATCHES = 1024  # slices that nanoGPT's prepare.py writes its memmap in
ROUTES = {
    "one core, encode_ordinary": "plain",
    "datasets.map and memmap": "usual",
    "llmlib.prepare, one core": "prepare_one",
    "llmlib.prepare": "prepare_all",
}

Measured = tuple[np.ndarray, int, int]  # seconds (wall, cores), tokens, bytes


def measure(corpus: str = "", tokenizer: str = "gpt2", n_repeats: int = 3) -> pd.DataFrame:
    """Time all routes on the train split of a corpus in turns and return the medians.

    Reading the files counts for ``prepare`` only: the usual route gets its Arrow table, and the
    bare core its strings, before the clock starts. Memory is that of the whole process tree.
    """
    corpus = corpus or (str(MINIPAJAMA) if MINIPAJAMA.exists() else "stdlib")
    config = DataConfig(corpus=corpus, tokenizer=tokenizer, test_size=1e-9)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = (d.text for s in open_corpus(config).train for d in read_documents(s) if d.text)
        encoding = train_bpe(texts, 4096) if tokenizer == "bpe" else load_tiktoken(tokenizer)
        (folder / "tokenizer.json").write_text(save_tokenizer(encoding))
        (folder / "config.json").write_text(json.dumps(to_json(config)))
        rows = [
            {"route": route, "repeat": i, **_run(name, folder)}
            for i in range(n_repeats)
            for route, name in ROUTES.items()
        ]
    return _table(pd.DataFrame(rows))


def _table(runs_: pd.DataFrame) -> pd.DataFrame:
    if runs_.n_tokens.nunique() != 1:
        raise RuntimeError(f"the routes disagree on the tokens: {sorted(set(runs_.n_tokens))}.")
    table = runs_.groupby("route", sort=False).median(numeric_only=True).drop(columns="repeat")
    plain, usual = table.mb_per_s.iloc[:2]
    table["n_cores"] = [1, prepare.n_cores(), 1, prepare.n_cores()]
    table["times_usual_route"] = table.mb_per_s / usual
    table["share_of_bare_cores"] = table.mb_per_s / (table.n_cores * plain)
    table["slimpajama_minutes"] = SLIMPAJAMA_BYTES / 1e6 / table.mb_per_s / 60  # extrapolated
    return table.reset_index()


def _run(name: str, folder: Path) -> dict[str, float]:
    """Run one route in a process of its own, watching the memory of its process tree."""
    command = [sys.executable, "-m", "llmlib.bench_data", name, str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=runs.ROOT, text=True
    ) as child:
        peak = 0
        while child.poll() is None:
            peak = max(peak, _tree_bytes(child.pid))
            time.sleep(0.1)
        output = child.stdout.read()
    if child.returncode:
        raise RuntimeError(f"route {name} failed with exit code {child.returncode}.")
    return json.loads(output.splitlines()[-1]) | {"peak_memory_gib": peak / 2**30}


def _tree_bytes(pid: int) -> int:
    """Sum the memory of a process and its children; what they share counts once."""
    total = 0
    try:
        for process in (tree := psutil.Process(pid), *tree.children(recursive=True)):
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.uss)
    except psutil.Error:  # one of them has just ended
        pass
    return total


def _route(name: str, folder: Path) -> dict[str, Any]:
    """Measure one route, in this process."""
    config = DataConfig(**runs.read_json(folder / "config.json"))
    encoding = prepare.load_tokenizer(folder / "tokenizer.json")
    if name.startswith("prepare"):
        clocks, n_tokens, n_bytes = _prepare(config, folder, 1 if name.endswith("one") else None)
    else:
        documents = (d for shard in open_corpus(config).train for d in read_documents(shard))
        texts = (document.text for document in documents if document.text)
        route = _plain if name == "plain" else _usual
        clocks, n_tokens, n_bytes = route(encoding, texts)
    seconds, core_seconds = clocks
    mb = n_bytes / 1e6
    return {
        "seconds": seconds,
        "mb_per_s": mb / seconds,
        "mb_per_core_s": mb / core_seconds,
        "n_tokens": n_tokens,
    }


def _clocks() -> np.ndarray:
    """Seconds on the wall and on the cores, those of ended children included."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)])


def _prepare(config: DataConfig, folder: Path, n_workers: int | None) -> Measured:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        target = Path(scratch)
        (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        import datasets  # noqa: F401 - importing it is not part of the work

        start = _clocks()
        splits = prepare.prepare(config, target, n_workers=n_workers)["splits"]
        clocks = _clocks() - start
    shards = splits["train"] + splits["val"]
    n_bytes = sum(d["bytes"] for shard in shards for d in shard["domains"].values())
    return clocks, sum(shard["n_tokens"] for shard in shards), n_bytes


def _plain(encoding, texts) -> Measured:
    texts = list(texts)
    start = _clocks()
    n_tokens = sum(len(encoding.encode_ordinary(text)) + 1 for text in texts)
    return _clocks() - start, n_tokens, sum(len(text.encode()) for text in texts)


def _usual(encoding, texts) -> Measured:
    """Do as nanoGPT's data/openwebtext/prepare.py does."""
    import datasets

    end = encoding.encode_single_token(END_OF_TEXT)

    def process(example: dict) -> dict:
        ids = [*encoding.encode_ordinary(example["text"]), end]
        return {"ids": ids, "len": len(ids)}

    with tempfile.TemporaryDirectory() as scratch:
        table = datasets.Dataset.from_generator(
            lambda: ({"text": text} for text in texts), cache_dir=scratch, fingerprint="bench"
        )
        n_bytes = sum(len(text.encode()) for text in table["text"])
        start = _clocks()
        tokenized = table.map(process, remove_columns=["text"], num_proc=prepare.n_cores())
        n_tokens = int(np.sum(tokenized["len"], dtype=np.uint64))
        tokens = np.memmap(Path(scratch) / "train.bin", np.uint16, "w+", shape=(n_tokens,))
        position, n_batches = 0, min(N_BATCHES, len(tokenized))
        for index in range(n_batches):
            batch = tokenized.shard(num_shards=n_batches, index=index, contiguous=True)
            ids = np.concatenate(batch.with_format("numpy")["ids"])
            tokens[position : position + len(ids)] = ids
            position += len(ids)
        tokens.flush()
        return _clocks() - start, n_tokens, n_bytes


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(_route(sys.argv[1], Path(sys.argv[2]))))
    else:
        print(measure(*sys.argv[1:2]).to_string(float_format="{:.2f}".format))
