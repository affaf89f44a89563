"""The training step under measurement: against variants of itself and by kind of work.

What is timed is ``step.train_step``, the step of the full run. A variant alters our model or its
settings; it is never a second copy of the step. Variants take turns in one process, apart from the
notebook's, so that a machine that drifts is unfair to none.
"""

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import StringIO
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import benchmark

from llmlib import analysis, data, devices, prepare, runs, step
from llmlib.config import DataConfig, ModelConfig, TrainConfig, resize, with_micro_batch
from llmlib.inference import hf_model
from llmlib.model import build_model
from llmlib.optim import build_optimizer
from llmlib.sizing import count_params, step_memory

DEEPER = {"smoke": (7, 32), "laptop": (5, 96), "a100": (20, 768)}  # layers and width: N as ours
# Processes, rounds in each, and timed steps of each variant in a round.
TURNS = {k: {"n_processes": 3, "n_rounds": 5, "n_steps": 2} for k in ("laptop", "a100")}
TURNS |= {"smoke": {"n_processes": 2, "n_rounds": 1, "n_steps": 1}}
SQUARES = {"smoke": 256, "laptop": 2048, "a100": 8192}  # rows of the products that give the peak
KINDS = {  # of work, by what the names of operators and kernels contain; the first match holds
    "matrix products": "::mm|::addmm|::bmm|gemm|mkl|cutlass|nvjet|xmma",
    "attention": "attention|flash|fmha|sdpa",
    "optimizer and clipping": "adam|optimizer|foreach|multi_tensor|vector_norm",
    "elementwise, norms, loss": "fused|triton|compiled|aten::|elementwise|reduce",
}


class TransformersLlama(nn.Module):
    """The same Llama from transformers, with its own attention, loss and head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.model = config, hf_model(config)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model(tokens, labels=targets, shift_labels=targets, use_cache=False).loss


def with_layer_norms(config: ModelConfig) -> nn.Module:
    """Build our model with LayerNorm in place of RMSNorm."""
    model = build_model(config)
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.RMSNorm):
            model.set_submodule(name, nn.LayerNorm(config.d_model, norm.eps, bias=False))
    return model


@dataclass(frozen=True)
class Variant:
    """A step to time: shape, settings, and what builds the model on the CPU."""

    name: str
    model: ModelConfig
    train: TrainConfig
    build: Callable[[ModelConfig], nn.Module] = build_model
    claim: float | None = None  # how many times as fast ours is by the write-up; 1: just faster


def variants(model: ModelConfig, train: TrainConfig, scale: str) -> list[Variant]:
    """Our step; with one thing changed; cut into other micro-batches; deeper at equal size."""
    gpt2 = resize(model, arch="gpt2", n_layer=model.n_layer, d_model=model.d_model)
    n_layer, d_model = DEEPER[scale]
    deeper = resize(model, arch=model.arch, n_layer=n_layer, d_model=d_model)
    found = [
        Variant("ours", model, train),
        Variant("not compiled", model, replace(train, compile=False), claim=1.15),
        Variant("LayerNorm", model, train, with_layer_norms, claim=1.0),
        Variant(f"deeper: {n_layer} x {d_model}", deeper, train, claim=1.0),
        Variant("GPT-2", gpt2, train),
    ]
    if find_spec("transformers"):
        found.append(Variant("transformers' Llama", model, train, TransformersLlama))
    for size, claim in ((train.micro_batch // 2, 1.10), (2 * train.micro_batch, None)):
        if size and train.n_sequences % size == 0:
            cut = with_micro_batch(train, size)
            found.append(Variant(f"micro-batch {size}", model, cut, claim=claim))
    return found


class TimedStep:
    """A variant's model, optimizer and batch on the device, compiled and ready to step."""

    def __init__(self, variant: Variant):
        config, train, device = variant.model, variant.train, devices.pick_device()
        dtype, model = devices.compute_dtype(device, train.dtype), variant.build(config).to(device)
        self.model = devices.compile_model(model, device) if train.compile else model
        self.optimizer = build_optimizer(model, train, dtype)
        shape = (2, train.n_sequences, config.seq_len)
        self.inputs, self.targets = torch.randint(config.vocab_size, shape, device=device)
        self.how = {"micro_batch": train.micro_batch, "grad_clip": train.grad_clip, "dtype": dtype}
        torch.set_float32_matmul_precision("high")
        devices.keep_freed_memory()
        self.note = ""
        try:
            self.take(2)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.note, self.model = devices.why_uncompiled(error), model
            self.take(2)

    def take(self, n_steps: int) -> float:
        """Take steps and return their speed [tokens/s]."""
        started = time.perf_counter()
        batch = self.optimizer, self.inputs, self.targets
        for _ in range(n_steps):
            numbers = step.train_step(self.model, *batch, lr_factor=1.0, **self.how)
        numbers.tolist()  # waits for the device
        return n_steps * self.inputs.numel() / (time.perf_counter() - started)


def measure(
    variants: list[Variant], *, n_processes: int, n_rounds: int, n_steps: int
) -> pd.DataFrame:
    """Time the variants in turns, in several processes one after another; a row for each.

    A round takes each variant once. A process gives the median of its rounds; a row has the median
    of the processes (of one process, of its rounds), the lowest and the highest: what measuring
    once more would show. ``speed_up`` is how many times as fast the first variant is, round by
    round. One that does not run is a row with a note. One that by estimate has no memory beside the
    others has processes of its own.
    """
    memory, together, apart = runs.environment()["memory_bytes"], variants[:1], []
    for variant in variants[1:]:
        waiting = sum(16 * count_params(v.model) for v in together)  # gradients, AdamW's state too
        needed = waiting + max(step_memory(v.model, v.train) for v in [*together, variant])
        (apart if memory and needed > 0.9 * memory else together).append(variant)
    turns = pd.DataFrame(
        (process, *turn)
        for process in range(n_processes)
        for group in [together, *([variant] for variant in apart)]
        for turn in in_process(_take_turns, group, n_rounds, n_steps)
    ).set_axis(["process", "round", "name", "tokens_per_s", "note"], axis=1)
    speed = turns.pivot(index=["process", "round"], columns="name", values="tokens_per_s")
    abouts = [vars(v.model) | vars(v.train) | vars(v) for v in variants]
    columns = ["name", "claim", "n_params", "n_layer", "d_model", "micro_batch"]
    table = pd.DataFrame(abouts).assign(n_params=[count_params(v.model) for v in variants])
    table = table[columns].set_index("name")
    ratio = 1 / speed.div(speed[variants[0].name], axis=0)
    for name, values in {"tokens_per_s": speed, "speed_up": ratio}.items():
        medians = values.groupby("process" if n_processes > 1 else "round").median()
        table[[name, f"{name}_low", f"{name}_high"]] = medians.agg(["median", "min", "max"]).T
    table["note"] = turns.groupby("name").note.max()
    table.loc[[v.name for v in apart], "note"] += " timed alone: no memory beside the others"
    return table.reset_index()


def _take_turns(variants: list[Variant], n_rounds: int, n_steps: int) -> list[tuple]:
    """Return round, name, speed [tokens/s] and note of every turn."""
    torch._dynamo.config.recompile_limit = 64  # variants are many graphs of the same code
    ready, turns = {}, []
    for variant in variants:
        try:
            ready[variant.name] = TimedStep(variant)
        except (RuntimeError, ValueError) as error:
            note = f"failed: {str(error).strip().splitlines()[0]:.120}"
            turns.append((0, variant.name, np.nan, note))
        gc.collect()  # what one that failed has left
    for i in range(n_rounds):
        turns += [(i, name, timed.take(n_steps), timed.note) for name, timed in ready.items()]
    return turns


def in_process(function: Callable, *arguments: Any) -> Any:
    """Call a function in a process of its own, which takes its memory and settings with it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["llmlib.bench", "torch._dynamo"])  # imported once for all
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *arguments).result()


def choose_micro_batch(table: pd.DataFrame) -> int:
    """Keep ours, the first row, unless another micro-batch is faster in every process."""
    cuts = table[table.name.str.startswith("micro-batch") & (table.speed_up_high < 1)]
    return int(pd.concat([cuts.sort_values("speed_up"), table]).micro_batch.iloc[0])


def matmul_peak(size: int) -> float:
    """Measure the fastest square product in the compute dtype [FLOP/s]."""
    device = devices.pick_device()
    a, b = torch.randn(2, size, size, device=device).to(devices.compute_dtype(device))
    timer = benchmark.Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=1).times)


def profile_step(variant: Variant, n_steps: int) -> pd.DataFrame:
    """Say what kinds of work a steady step spends its time on, by PyTorch's profiler [s]."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # no notes on starting and stopping
    timed = TimedStep(variant)
    with torch.profiler.profile() as profile:
        wall = timed.inputs.numel() / timed.take(n_steps)
    where = "device" if devices.accelerator() else "cpu"
    events = pd.DataFrame(
        (event.key.lower(), getattr(event, f"self_{where}_time_total") / 1e6 / n_steps)
        for event in profile.key_averages()
        if (event.device_type == torch.autograd.DeviceType.CPU) == (where == "cpu")
    )
    holds = [events[0].str.contains(pattern) for pattern in KINDS.values()]
    by_kind = events[1].groupby(np.select(holds, list(KINDS), ""))
    seconds = by_kind.sum().reindex(KINDS, fill_value=0.0)
    seconds["idle and other"] = max(0.0, wall - seconds.sum())
    table = seconds.rename_axis("kind").reset_index(name="seconds")
    return table.assign(share=table.seconds / table.seconds.sum())


def tokenising_routes(config: DataConfig, n_repeats: int) -> pd.DataFrame:
    """Time ``prepare`` beside ``datasets.map`` and a flat file (nanoGPT's prepare.py, written faster).

    Each in a process of its own, in turns, with the same tokenizer, to as many tokens; medians.
    Reading the corpus's files counts for ``prepare`` only.
    """
    with TemporaryDirectory() as folder:
        done = Path(folder, "done")
        in_process(_time_prepare, config, done)
        n_bytes = analysis.split_table(data.load_manifest(done)).bytes.sum()
        times = pd.DataFrame(
            {
                "llmlib.prepare": in_process(_time_prepare, config, Path(folder, str(i)), done),
                "datasets.map": in_process(_time_datasets_map, done),
            }
            for i in range(n_repeats)
        )
    table = times.median().rename_axis("route").reset_index(name="seconds")
    table["mb_per_s"] = n_bytes / 1e6 / table.seconds
    return table.assign(times_usual_route=table.mb_per_s / table.mb_per_s.iloc[1])


def _time_prepare(config: DataConfig, folder: Path, done: Path | None = None) -> float:
    """Prepare into a new folder, with the tokenizer of a finished one if there is one [s]."""
    if done:
        folder.mkdir()
        shutil.copy(done / "tokenizer.json", folder)
    with redirect_stderr(StringIO()):  # no progress bar
        started = time.perf_counter()
        prepare.prepare(config, folder)
    return time.perf_counter() - started


def _time_datasets_map(done: Path) -> float:
    """Turn the texts of a finished folder into as many tokens in a flat file with ``datasets`` [s]."""
    import datasets

    datasets.disable_progress_bars()
    encoding, manifest = data.load_tokenizer(done / "tokenizer.json"), data.load_manifest(done)

    def texts() -> Iterator[dict]:
        for document in chain(*(data.documents(done, split) for split in manifest["splits"])):
            yield {"text": encoding.decode(document[:-1])}

    def encode(example: dict) -> dict:
        return {"ids": [*encoding.encode_ordinary(example["text"]), encoding.eot_token]}

    path, how = done / "flat.bin", {"num_proc": runs.n_cores(), "load_from_cache_file": False}
    table = datasets.Dataset.from_generator(texts, cache_dir=done / "cache", fingerprint="texts")
    started = time.perf_counter()
    table = table.map(encode, remove_columns=["text"], **how).with_format("numpy")
    np.concatenate(table[:]["ids"]).astype(manifest["dtype"]).tofile(path)
    seconds = time.perf_counter() - started
    n_tokens = analysis.split_table(manifest).tokens.sum()
    assert path.stat().st_size == n_tokens * np.dtype(manifest["dtype"]).itemsize
    return seconds
