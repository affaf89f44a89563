"""The training step under measurement: against variants of itself, by shape, by micro-batch.

What is timed is ``step.train_step``, the step of the full run. A variant alters our model or its
settings; it is never a second copy of the step. A variant and ours live in one process, apart from
the notebook's, and take turns, so that a machine that drifts is unfair to neither.
"""

import gc
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import benchmark

from llmlib import corpus, data, devices, prepare, runs, step
from llmlib.config import DataConfig, ModelConfig, TrainConfig, resize, with_micro_batch
from llmlib.inference import hf_model
from llmlib.model import build_model
from llmlib.optim import build_optimizer
from llmlib.sizing import count_params, flops_per_token, step_memory
from llmlib.tokenizer import load_tokenizer

SHAPES = {  # (n_layer, d_model): about as many parameters as the model but deeper, then others
    "smoke": [(2, 32)],
    "laptop": [(4, 96), (2, 64)],
    "a100": [(20, 768), (6, 1280), (6, 768), (10, 1536)],
}
TURNS = {  # turns of each variant, and timed steps in each
    "smoke": {"n_rounds": 2, "n_steps": 1},
    "laptop": {"n_rounds": 5, "n_steps": 2},
    "a100": {"n_rounds": 5, "n_steps": 2},
}
SQUARES = {"smoke": 256, "laptop": 2048, "a100": 8192}  # rows of the products that give the peak
KINDS = {  # of work, by what the names of operators and kernels contain; the first match holds
    "matrix products": ("::mm", "::addmm", "::bmm", "gemm", "mkl", "cutlass", "nvjet", "xmma"),
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "optimizer and clipping": ("adam", "optimizer", "foreach", "multi_tensor", "vector_norm"),
    "elementwise, norms, loss": ("fused", "triton", "compiled", "aten::", "elementwise", "reduce"),
}


@dataclass(frozen=True)
class Variant:
    """A step to time: shape, settings, and what is changed about our model."""

    name: str
    model: ModelConfig
    train: TrainConfig
    change: str = ""  # "LayerNorm" or "transformers"
    kind: str = "ablation"  # or "micro-batch" or "shape"
    claim: float | None = None  # how much faster ours should be, by the write-up


class TransformersLlama(nn.Module):
    """The same Llama from transformers, with its own attention, loss and head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.model = config, hf_model(config)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model(tokens, labels=targets, shift_labels=targets, use_cache=False).loss


def build_variant(variant: Variant) -> nn.Module:
    """Build a variant's model on the CPU, altered as it says."""
    if variant.change == "transformers":
        return TransformersLlama(variant.model)
    model = build_model(variant.model)
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if variant.change == "LayerNorm" and isinstance(norm, nn.RMSNorm):
                setattr(parent, name, nn.LayerNorm(len(norm.weight), norm.eps, bias=False))
    return model


class TimedStep:
    """A variant's model, optimizer and batch on the device, compiled and ready to step."""

    def __init__(self, variant: Variant):
        device, train = devices.pick_device(), variant.train
        self.variant, self.dtype = variant, devices.compute_dtype(device, train.dtype)
        model = build_variant(variant).to(device)
        self.optimizer = build_optimizer(model, train, self.dtype)
        self.model = devices.compile_model(model, device) if train.compile else model
        shape = (train.n_sequences, variant.model.seq_len + 1)
        tokens = torch.randint(variant.model.vocab_size, shape, device=device)
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        torch.set_float32_matmul_precision("high")
        devices.keep_freed_memory()
        self.note = ""
        try:
            self.take(2)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.note, self.model = devices.why_uncompiled(error), model
            self.take(2)

    def take(self, n_steps: int) -> float:
        """Take steps and return the mean time of one [s]."""
        train, started = self.variant.train, time.perf_counter()
        how = {"micro_batch": train.micro_batch, "grad_clip": train.grad_clip, "lr_factor": 1.0}
        for _ in range(n_steps):
            numbers = step.train_step(
                self.model, self.optimizer, *self.batch, dtype=self.dtype, **how
            )
        numbers.tolist()  # waits for the device
        return (time.perf_counter() - started) / n_steps


def measure(variants: list[Variant], *, n_rounds: int, n_steps: int) -> pd.DataFrame:
    """Time each variant in turns with the first, a few steps each, in a process of their own.

    The lowest and highest of five turns enclose the true median 15 times in 16. A variant that does
    not run, or whose memory ends, is a row with a note. The first begins alone, and one other at a
    time is beside it; if the device has no memory for two, by estimate, the other is timed in a
    process without the first, against the first's median alone, and a note says so.
    """
    turns, room = (n_rounds, n_steps), 0.9 * (runs.environment()["memory_bytes"] or np.inf)
    ours, *others = variants
    beside = [v for v in others if _memory(ours) + _memory(v) <= room]
    rows = in_process(_take_turns, [ours, *beside], *turns)
    reference = ours.train.n_sequences * ours.model.seq_len / rows[0]["tokens_per_s"]
    rows += [in_process(_time, v, reference, *turns) for v in others if v not in beside]
    return pd.DataFrame(rows).set_index("name").loc[[v.name for v in variants]].reset_index()


def _memory(variant: Variant) -> int:
    """Estimate the memory of a step [bytes]; transformers' loss forms all logits at once."""
    model, train = variant.model, variant.train
    all_logits = train.micro_batch * model.seq_len * model.vocab_size
    return step_memory(model, train) + 16 * all_logits * (variant.change == "transformers")


def in_process(function: Callable, *arguments: Any) -> Any:
    """Call a function in a process of its own, which takes its memory and settings with it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["llmlib.bench", "torch._dynamo"])  # imported once for all
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *arguments).result()


def _take_turns(variants: list[Variant], n_rounds: int, n_steps: int) -> list[dict[str, Any]]:
    ours = TimedStep(variants[0])
    alone = [ours.take(n_steps) for _ in range(n_rounds)]
    others = [_time(variant, ours, n_rounds, n_steps) for variant in variants[1:]]
    return [_row(variants[0], alone, alone) | {"note": ours.note}, *others]


def _time(variant: Variant, ours: TimedStep | float, n_rounds: int, n_steps: int) -> dict:
    """Time a variant in turns with ours, or alone against the time of ours [s]; return its row."""
    is_alone = isinstance(ours, float)
    torch._dynamo.config.recompile_limit = 64  # variants are many graphs of the same code
    try:
        other = TimedStep(variant)
        turns = [
            (other.take(n_steps), ours if is_alone else ours.take(n_steps)) for _ in range(n_rounds)
        ]
        note = "timed alone: no memory for two" if is_alone else other.note
        return _row(variant, *zip(*turns, strict=True)) | {"note": note}
    except (RuntimeError, ValueError) as error:
        note = f"failed: {str(error).strip().splitlines()[0]:.120}"
        return _row(variant, [np.nan], [np.nan]) | {"note": note}
    finally:
        other = None
        gc.collect()
        devices.empty_cache()


def _row(variant: Variant, seconds: list[float], reference: list[float]) -> dict[str, Any]:
    """Summarise turns; ``speed_up`` is how much faster the reference was, turn by turn."""
    model, train, seconds = variant.model, variant.train, np.array(seconds)
    row = {key: getattr(variant, key) for key in ("name", "kind", "claim")}
    row["n_params"] = count_params(model)
    row |= {key: getattr(model, key) for key in ("n_layer", "d_model")}
    row |= {key: getattr(train, key) for key in ("micro_batch", "grad_accum")}
    speed, speed_up = train.n_sequences * model.seq_len / seconds, seconds / reference
    for name, values in (("tokens_per_s", speed), ("speed_up", speed_up)):
        row |= {name: np.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}
    return row | {"flops_per_s": row["tokens_per_s"] * flops_per_token(model), "note": ""}


def matmul_peak(size: int) -> float:
    """Measure the fastest square product in the compute dtype [FLOP/s]."""
    device = devices.pick_device()
    a, b = torch.randn(2, size, size, device=device).to(devices.compute_dtype(device))
    timer = benchmark.Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=1).times)


def profile_step(variant: Variant, n_steps: int) -> pd.DataFrame:
    """Say what kinds of work a steady step spends its time on, by PyTorch's profiler [s]."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # no notes on starting and stopping
    timed, spent = TimedStep(variant), dict.fromkeys(KINDS, 0.0)
    with torch.profiler.profile() as profile:
        wall = timed.take(n_steps)
    on_device = devices.accelerator() is not None
    for event in profile.key_averages():
        is_kernel = event.device_type != torch.autograd.DeviceType.CPU
        parts = (k for k, words in KINDS.items() if any(w in event.key.lower() for w in words))
        if is_kernel == on_device and (kind := next(parts, None)):
            own = event.self_device_time_total if on_device else event.self_cpu_time_total
            spent[kind] += own / 1e6 / n_steps
    spent["idle and other"] = max(0.0, wall - sum(spent.values()))
    table = pd.DataFrame({"kind": spent.keys(), "seconds": spent.values()})
    return table.assign(share=table.seconds / table.seconds.sum())


def variants(model: ModelConfig, train: TrainConfig, scale: str) -> list[Variant]:
    """Our step; with one thing changed; cut into other micro-batches; at other shapes."""
    gpt2 = resize(model, arch="gpt2", n_layer=model.n_layer, d_model=model.d_model)
    found = [
        Variant("ours", model, train),
        Variant("not compiled", model, replace(train, compile=False), claim=1.15),
        Variant("LayerNorm", model, train, "LayerNorm", claim=1.0),
        Variant("GPT-2", gpt2, train),
    ]
    if find_spec("transformers"):
        found.append(Variant("transformers' Llama", model, train, "transformers"))
    for factor, claim in ((0.5, 1.10), (2, None), (4, None)):
        size = int(train.micro_batch * factor)
        if size and train.n_sequences % size == 0:
            cut = with_micro_batch(train, size)
            found.append(Variant(f"micro-batch {size}", model, cut, "", "micro-batch", claim))
    for n_layer, d_model in SHAPES[scale]:
        shape = resize(model, arch=model.arch, n_layer=n_layer, d_model=d_model)
        found.append(Variant(f"{n_layer} x {d_model}", shape, train, kind="shape"))
    return found


def choose_micro_batch(table: pd.DataFrame) -> dict[str, int]:
    """Grow the micro-batch until memory ends or speed (by turns) stops rising by more than 2 %.

    ``table`` holds our step and its other micro-batches, as ``measure`` returns them.
    """
    best, *rest = table.sort_values("micro_batch").itertuples()
    for row in rest:
        if not 1.02 * row.speed_up < best.speed_up:
            break
        best = row
    return {"micro_batch": int(best.micro_batch), "grad_accum": int(best.grad_accum)}


def tokenising_routes(config: DataConfig, n_repeats: int) -> pd.DataFrame:
    """Time ``prepare`` beside ``datasets.map`` and a flat file (nanoGPT's prepare.py, written faster).

    Each in a process of its own, in turns, with the same tokenizer, to as many tokens; medians.
    Reading the corpus's files counts for ``prepare`` only.
    """
    routes = {"llmlib.prepare": _prepare, "datasets.map": _datasets_map}
    with TemporaryDirectory() as folder:
        in_process(_quietly, config, Path(folder))
        splits = data.load_manifest(Path(folder))["splits"].values()
        rows = [
            (name, *in_process(route, config, Path(folder)))
            for _ in range(n_repeats)
            for name, route in routes.items()
        ]
    table = pd.DataFrame(rows, columns=["route", "seconds", "n_tokens"])
    assert table.n_tokens.nunique() == 1, f"the routes disagree on the tokens: {rows}"
    domains = [d for shards in splits for shard in shards for d in shard["domains"].values()]
    table = table.groupby("route", sort=False).seconds.median().reset_index()
    table["mb_per_s"] = sum(d["bytes"] for d in domains) / 1e6 / table.seconds
    return table.assign(times_usual_route=table.mb_per_s / table.mb_per_s.iloc[1])


def _quietly(config: DataConfig, folder: Path) -> dict[str, Any]:
    with redirect_stderr(StringIO()):  # no progress bar
        return prepare.prepare(config, folder)


def _prepare(config: DataConfig, done: Path) -> tuple[float, int]:
    """Return the seconds it takes, and the number of tokens."""
    with TemporaryDirectory() as folder:
        shutil.copy(done / "tokenizer.json", folder)
        started = time.perf_counter()
        splits = _quietly(config, Path(folder))["splits"].values()
        seconds = time.perf_counter() - started
    return seconds, sum(shard["n_tokens"] for shards in splits for shard in shards)


def _datasets_map(config: DataConfig, done: Path) -> tuple[float, int]:
    """Do the same with ``datasets``, for the shards that the finished folder holds."""
    import datasets

    datasets.disable_progress_bars()
    encoding, source = load_tokenizer(done / "tokenizer.json"), corpus.open_corpus(config)
    n_shards = len(data.load_manifest(done)["splits"]["train"])
    shards = sum(source.official.values(), source.train[:n_shards])
    documents = (document for shard in shards for document in corpus.read_documents(shard))

    def encode(example: dict) -> dict:
        return {"ids": [*encoding.encode_ordinary(example["text"]), encoding.eot_token]}

    with TemporaryDirectory() as folder:
        table = datasets.Dataset.from_generator(
            lambda: ({"text": d.text} for d in documents if d.text),
            cache_dir=folder,
            fingerprint="texts",
        )
        started, path = time.perf_counter(), Path(folder, "train.bin")
        table = table.map(encode, remove_columns=["text"], num_proc=runs.n_cores())
        with open(path, "wb") as file:
            for rows in table.with_format("numpy").iter(1024):
                np.concatenate(rows["ids"]).astype(np.uint16).tofile(file)
        return time.perf_counter() - started, path.stat().st_size // 2
