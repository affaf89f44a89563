"""Throughput, memory and MFU of the training step, against peaks measured on this machine.

Each setting is measured in a process of its own, so its memory is its own and a crash costs one
row. What is timed is ``step.train_step``, the step of the full run.
"""

from __future__ import annotations

import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from llmlib.config import ModelConfig, TrainConfig, llama_config
from llmlib.model import build_model
from llmlib.optim import build_optimizer
from llmlib.sizing import count_params, flops_per_token
from llmlib.step import compile_model, compute_dtype, pick_device, train_step


def measure_peak(sizes: tuple[int, ...] = (1024, 2048, 4096), n_repeats: int = 5) -> dict[str, Any]:
    """Measure the fastest matrix product in the compute dtype [FLOP/s], over square sizes."""
    device = pick_device()
    dtype = compute_dtype(device)
    best = 0.0
    for size in sizes if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(n_repeats + 1):
            seconds = _timed(lambda: a @ b, device)
            best = max(best, 2 * size**3 / seconds)
    return {"flops_per_s": best, "dtype": str(dtype).removeprefix("torch."), "device": device.type}


def _timed(work, device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_step(model_config: ModelConfig, config: TrainConfig, n_measure: int) -> dict[str, Any]:
    """Time training steps on random tokens: median and quartiles of tokens/s, and peak memory."""
    device = pick_device()
    dtype = compute_dtype(device)
    torch.set_float32_matmul_precision("high")
    model = build_model(model_config).to(device)
    optimizer = build_optimizer(model, config)
    fast_model = compile_model(model, device) if config.compile else model
    shape = (config.micro_batch * config.grad_accum, model_config.seq_len + 1)
    tokens = torch.randint(model_config.vocab_size, shape, device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    settings = {"lr": config.lr, "grad_clip": config.grad_clip, "micro_batch": config.micro_batch}

    def step() -> None:
        train_step(fast_model, optimizer, inputs, targets, dtype=dtype, **settings)

    first = _timed(step, device)
    _timed(step, device)
    seconds = np.array([_timed(step, device) for _ in range(n_measure)])
    low, median, high = np.quantile(inputs.numel() / seconds, [0.25, 0.5, 0.75])
    return {
        "n_params": count_params(model_config),
        "tokens_per_s": median,
        "tokens_per_s_low": low,
        "tokens_per_s_high": high,
        "flops_per_s": median * flops_per_token(model_config),
        "memory_gib": _peak_memory_gib(device),
        "first_step_s": first,
    }


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux; there, ru_maxrss would include the parent's memory
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    [peak] = (line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak[1]) / 2**20


def compare_settings(
    model_config: ModelConfig,
    config: TrainConfig,
    settings: dict[str, dict[str, Any]],
    *,
    n_measure: int,
) -> pd.DataFrame:
    """Measure the step under named changes to the model's or the training's config."""
    rows = []
    model_fields = set(ModelConfig.__dataclass_fields__)
    for name, changes in settings.items():
        for_model = {k: v for k, v in changes.items() if k in model_fields}
        for_training = {k: v for k, v in changes.items() if k not in model_fields}
        model, training = replace(model_config, **for_model), replace(config, **for_training)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            measured = process.submit(measure_step, model, training, n_measure).result()
        shape = {"n_layer": model.n_layer, "d_model": model.d_model}
        batch = {"micro_batch": training.micro_batch, "grad_accum": training.grad_accum}
        rows.append({"setting": name} | shape | batch | measured)
    return pd.DataFrame(rows)


def deeper_and_wider(base: ModelConfig) -> dict[str, dict[str, Any]]:
    """Vary depth against width at about the same number of block parameters."""
    shapes = {}
    for name, width in (("deeper", 0.5), ("wider", 2.0)):
        d_model = int(base.d_model * width)
        n_layer = max(1, round(base.n_layer / width**2))
        shape = llama_config(n_layer, d_model, d_head=base.d_head)
        shapes[f"{name}: {n_layer} x {d_model}"] = {
            key: getattr(shape, key) for key in ("n_layer", "d_model", "n_head", "d_ff")
        }
    return shapes
