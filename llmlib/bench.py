"""How fast the training step is here, how fast it could be, and what each of its levers gives.

Contestants live in processes of their own and take turns, so that a drifting machine is unfair to
none and a crash costs one row. What is timed is ``step.train_step``, the step of the full run;
``bench_model`` builds it, with levers or without. ``python -m llmlib.bench`` sets it beside others.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from llmlib import bench_model, runs
from llmlib.bench_model import Job
from llmlib.config import PRESETS, ModelConfig, TrainConfig, cut, llama_config, resize, to_json
from llmlib.model import build_model
from llmlib.optim import compute_dtype
from llmlib.sizing import count_params, flops_per_token
from llmlib.step import pick_device

PROCESSES = get_context("forkserver")  # each begins with the imports done
PROCESSES.set_forkserver_preload(["llmlib.bench_model", "torch._dynamo"])
AT_ONCE = 4  # rivals that share the machine's memory, beside the one they are held against
SHAPES = {  # (n_layer, d_model), several at about the same number of parameters
    "smoke": [(2, 64), (2, 32), (1, 96)],
    "laptop": [(2, 64), (2, 128), (1, 160), (2, 256), (4, 192)],
    "a100": [
        *[(6, 384), (10, 320), (6, 768), (16, 512), (12, 768)],
        *[(10, 1024), (20, 768), (6, 1280), (10, 1536), (24, 1024)],
    ],
}
SQUARES = {"smoke": (256,), "laptop": (1024, 2048), "a100": (4096, 8192)}
TARGETS = {  # how much faster than each rival; a CPU's are meant for one with bf16 matrix units
    ("cpu", "transformers, compiled"): 1.6,
    ("cpu", "fp32, eager"): 4.5,
    ("cuda", "transformers, compiled"): 1.15,
}
TURNS = {  # timed steps per turn, and turns
    "smoke": {"n_rounds": 2, "n_steps": 1},
    "laptop": {"n_rounds": 5, "n_steps": 2},
    "a100": {"n_rounds": 5, "n_steps": 2},
}


# -- What the machine could do --------------------------------------------------------------------


def products(model: ModelConfig, train: TrainConfig) -> pd.DataFrame:
    """List the matrix products (m x k times k x n) of one step, forward and backward, with counts."""
    with torch.device("meta"):
        linears = [
            (n, m) for n, m in build_model(model).named_modules() if isinstance(m, nn.Linear)
        ]
    shapes: dict[tuple[int, int], Counter] = {}
    for name, linear in linears:
        shape = (linear.in_features, linear.out_features)
        shapes.setdefault(shape, Counter())[name.split(".")[-1].removesuffix("_proj")] += 1
    shapes.setdefault((model.d_model, model.vocab_size), Counter())["head"] += 1
    rows, n_tokens = [], train.micro_batch * model.seq_len
    for (n_in, n_out), names in shapes.items():
        row = {"product": "/".join(names), "count": names.total() * train.grad_accum}
        rows += [
            row | {"pass": "forward", "m": n_tokens, "k": n_in, "n": n_out},
            row | {"pass": "to the input", "m": n_tokens, "k": n_out, "n": n_in},
            row | {"pass": "to the weight", "m": n_out, "k": n_tokens, "n": n_in},
        ]
    table = pd.DataFrame(rows)
    table["flops"] = 2.0 * table.m * table.k * table.n
    return table


def measure_products(
    model: ModelConfig, train: TrainConfig, squares: tuple[int, ...]
) -> pd.DataFrame:
    """Measure each product of a step, attention and square products in the compute dtype.

    ``flops_per_s`` is the fastest of a few, ``step_s`` what a step needs at that rate.
    """
    device = pick_device()
    dtype = compute_dtype(device)
    square = [
        {
            "product": f"square {n}",
            "pass": "",
            "count": 0,
            "m": n,
            "k": n,
            "n": n,
            "flops": 2.0 * n**3,
        }
        for n in squares
    ]
    table = pd.concat([products(model, train), pd.DataFrame(square)], ignore_index=True)
    table["seconds"] = [
        _time_product(*row, device, dtype)
        for row in table[["m", "k", "n", "pass"]].itertuples(index=False)
    ]
    shape = (3, train.micro_batch, model.n_head, model.seq_len, model.d_head)
    q, k, v = torch.randn(shape, device=device).to(dtype).unbind()
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    attention = {
        "product": "attention", "pass": "forward and backward", "count": model.n_layer * train.grad_accum,
        "flops": 12.0 * train.micro_batch * model.seq_len**2 * model.d_model,
        "seconds": _fastest(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward(), device),
    }  # fmt: skip
    table = pd.concat([table, pd.DataFrame([attention])], ignore_index=True)
    table["flops_per_s"] = table.flops / table.seconds
    table["step_s"] = table["count"] * table.seconds
    table["dtype"] = str(dtype).removeprefix("torch.")
    torch.cuda.empty_cache()
    return table


def _time_product(m, k, n, direction: str, device: torch.device, dtype: torch.dtype) -> float:
    """Time a product with its operands laid out as a linear layer has them."""
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    if direction == "forward":
        b = b.t().contiguous().t()
    if direction == "to the weight":
        a = a.t().contiguous().t()
    out = torch.empty(m, n, device=device, dtype=dtype)
    return _fastest(lambda: torch.mm(a, b, out=out), device)


def _fastest(work, device: torch.device) -> float:
    """Time work up to six times, or for about a second; the first time only warms up."""
    times = []
    while len(times) < 2 or (len(times) < 6 and sum(times) < 1):
        started = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - started)
    return min(times[1:])


def measure_bandwidth(n_bytes: int = 2**28) -> float:
    """Measure memory bandwidth with a copy larger than the caches, read and written [bytes/s]."""
    device = pick_device()
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / _fastest(lambda: target.copy_(source), device)


def floor_seconds(table: pd.DataFrame, bandwidth: float, n_params: int) -> dict[str, float]:
    """Bound a step from below: its products at their measured rates, and AdamW's traffic.

    AdamW reads weight, gradient and two moments and writes all but the gradient, 28 bytes each.
    """
    return {"products": float(table.step_s.sum()), "optimizer": 28 * n_params / bandwidth}


# -- Taking turns ---------------------------------------------------------------------------------


class Contestant:
    """A job in a process of its own, kept alive between its turns; after a failure it rests."""

    def __init__(self, job: Job):
        self.job, self.note, self.seconds = job, job.skip, []
        self.memory_gib = float("nan")
        self.process = ProcessPoolExecutor(1, mp_context=PROCESSES)
        self.started = None if self.note else self.process.submit(bench_model.start, job)

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.shutdown()

    def wait(self) -> None:
        """Wait until it has compiled; if memory was short because others did too, try again alone."""
        try:
            fits = (
                not self.started or self.started.result() or self.ask(bench_model.start, self.job)
            )
            if not fits and not self.note:
                raise torch.OutOfMemoryError("the step needs more memory than there is")
        except Exception as error:
            self._fail(error)

    def ask(self, function, *arguments: Any) -> Any:
        """Have the process call a function, unless it has failed: then, and if it fails, None."""
        if not self.note:
            try:
                return self.process.submit(function, *arguments).result()
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        first_line = str(error).strip().partition("\n")[0]
        self.note = f"failed: {type(error).__name__}: {first_line[:120]}"
        self.process.shutdown()  # so that it holds no memory that others need

    def take_turn(self, n_steps: int) -> None:
        self.seconds.append(self.ask(bench_model.turn, n_steps) or float("nan"))

    def row(self, reference: list[float]) -> dict[str, Any]:
        """Summarise its rounds; ``speed_up`` is how much faster the reference was, round by round."""
        job, model = self.job, self.job.model
        speeds = _spread("tokens_per_s", job.tokens_per_step / np.array(self.seconds))
        gains = _spread("speed_up", np.array(self.seconds) / reference)
        return {
            "name": job.name,
            "claim": job.claim,
            **{k: getattr(model, k) for k in ("n_layer", "d_model", "seq_len")},
            **{k: getattr(job.train, k) for k in ("micro_batch", "grad_accum")},
            "n_params": count_params(model),
            **speeds,
            "flops_per_s": speeds["tokens_per_s"] * flops_per_token(model),
            **gains,
            "memory_gib": self.memory_gib,
            "note": self.note,
        }


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Median, lowest and highest: of five rounds, they enclose the true median 15 times in 16."""
    return {name: np.median(values), f"{name}_low": values.min(), f"{name}_high": values.max()}


def take_turns(jobs: list[Job], *, n_rounds: int, n_steps: int) -> pd.DataFrame:
    """Time jobs in interleaved rounds of a few steps each; the first is what others are held against."""
    rows = []
    with Contestant(jobs[0]) as ours:
        for i in range(1, max(2, len(jobs)), AT_ONCE):
            with ExitStack() as stack:
                rivals = [stack.enter_context(Contestant(job)) for job in jobs[i : i + AT_ONCE]]
                n_before, everyone = len(ours.seconds), [ours, *rivals]
                wait([contestant.started for contestant in everyone if contestant.started])
                for contestant in everyone:
                    contestant.wait()
                if ours.note:
                    raise ValueError(f"{ours.note}; try a smaller micro_batch or seq_len.")
                for turn in range(n_rounds):
                    for contestant in everyone if turn % 2 == 0 else everyone[::-1]:
                        contestant.take_turn(n_steps)
                for contestant in everyone:
                    memory = contestant.ask(bench_model.peak_memory_gib)
                    contestant.memory_gib = memory or float("nan")
                rows += [rival.row(ours.seconds[n_before:]) for rival in rivals]
        return pd.DataFrame([ours.row(ours.seconds), *rows])


# -- What to measure ------------------------------------------------------------------------------


def ablations(model: ModelConfig, train: TrainConfig) -> list[Job]:
    """Our step, and our step without each lever in turn; with the write-up's claims."""
    half = _halve(train)
    fp32_only = compute_dtype(pick_device()) == torch.float32
    skip = "skipped: this processor has no bf16 units, all is fp32 here" if fp32_only else ""
    gpt2 = resize(model, arch="gpt2", n_layer=model.n_layer, d_model=model.d_model)
    raw = replace(model, vocab_size=model.vocab_size - 47)  # 50 304 to GPT-2's 50 257
    fp32 = {"dtype": "float32", "skip": skip}
    return [
        Job("ours", model, train),
        Job("not compiled", model, train, ("compile",), claim="1.15x"),
        Job("complex RoPE", model, train, ("real RoPE",)),
        Job("LayerNorm", model, train, ("RMSNorm",), claim="above 1x"),
        Job("unfused AdamW", model, train, ("fused AdamW",)),
        Job("half the micro-batch", model, half, claim="1.10x"),
        Job("unpadded vocabulary", raw, train),
        Job("all logits at once", model, train, ("chunked loss",)),
        Job("freed memory given back", model, train, ("kept memory",)),
        Job("GPT-2", gpt2, train),
        Job("RMSNorm in bf16", model, train, ("fp32 statistics",), skip=skip),
        Job("tf32 for bf16", model, train, **fp32),
        Job("fp32 for bf16", model, train, ("tf32",), **fp32),
    ]


def _halve(train: TrainConfig) -> TrainConfig:
    return replace(
        train, micro_batch=max(1, train.micro_batch // 2), grad_accum=train.grad_accum * 2
    )


def judge(table: pd.DataFrame) -> pd.Series:
    """Hold each claim against the lowest and highest of its rounds."""

    def verdict(row) -> str:
        if isinstance(row.note, str) and row.note:
            return row.note
        if row.speed_up_low <= 1 <= row.speed_up_high:
            return "no difference"
        if row.claim and isinstance(row.claim, str):
            return "confirmed" if row.speed_up_low > 1 else "not confirmed"
        return "ours is faster" if row.speed_up_low > 1 else "ours is slower"

    return pd.Series(["reference", *map(verdict, table.iloc[1:].itertuples())], table.index)


def waterfall(model: ModelConfig, train: TrainConfig) -> list[Job]:
    """Our step first, then the naive step and what it becomes as levers are added one by one."""
    precision = [] if compute_dtype(pick_device()) == torch.float32 else ["tf32", "bf16"]
    levers = [
        *precision,
        "kept memory",
        "whole micro-batch",
        "fused AdamW",
        "chunked loss",
        "real RoPE",
        "compile",
    ]
    jobs = [Job("+ compile", model, train)]
    for i in range(len(levers)):
        missing = tuple(levers[i:])
        training = _halve(train) if "whole micro-batch" in missing else train
        dtype = "float32" if "bf16" in missing else None
        jobs.append(Job(f"+ {levers[i - 1]}" if i else "naive", model, training, missing, dtype))
    return jobs


def shapes(model: ModelConfig, train: TrainConfig, scale: str) -> list[Job]:
    """The model's own shape first, then deeper and wider ones at several sizes."""
    own = (model.n_layer, model.d_model)
    pairs = [own, *(pair for pair in SHAPES[scale] if pair != own)]
    return [
        Job(f"{n} x {d}", resize(model, arch=model.arch, n_layer=n, d_model=d), train)
        for n, d in pairs
    ]


def contexts(model: ModelConfig, train: TrainConfig) -> list[Job]:
    """Half, whole and twice the context, at the same tokens per micro-batch."""
    return [
        Job(
            f"context {int(factor * model.seq_len)}",
            replace(model, seq_len=int(factor * model.seq_len)),
            replace(train, micro_batch=max(1, int(train.micro_batch / factor))),
        )
        for factor in (1, 0.5, 2)
    ]


def micro_batches(model: ModelConfig, train: TrainConfig) -> list[Job]:
    """Ways to cut the same step: from a quarter of the micro-batch to four times it, ours first."""
    n_sequences = train.micro_batch * train.grad_accum
    sizes = [int(train.micro_batch * factor) for factor in (1, 0.25, 0.5, 2, 4)]
    return [
        Job(f"{size}", model, cut(train, size))
        for size in sizes
        if size and n_sequences % size == 0
    ]


def choose_micro_batch(table: pd.DataFrame) -> dict[str, int]:
    """Grow the micro-batch until memory ends or speed stops rising by more than 2 %."""
    table = table.sort_values("micro_batch")
    best = table.iloc[0]
    for _, row in table.iloc[1:].iterrows():
        if not row.tokens_per_s > 1.02 * best.tokens_per_s:
            break
        best = row
    return {k: int(best[k]) for k in ("micro_batch", "grad_accum")}


def autotune_micro_batch(
    model: ModelConfig, train: TrainConfig, **turns: int
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Measure the ways to cut a step and choose one; the tokens per step stay the same."""
    table = take_turns(micro_batches(model, train), **turns)
    return table, choose_micro_batch(table)


def where_time_goes(model: ModelConfig, train: TrainConfig, n_steps: int) -> dict[str, float]:
    """Profile our step in a process of its own: see ``bench_model.breakdown``."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as process:
        return process.submit(bench_model.breakdown, Job("ours", model, train), n_steps).result()


def fit_exponent(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Fit y = a x^b by least squares of logarithms; return b and its standard error."""
    x, y = np.log(x) - np.log(x).mean(), np.log(y) - np.log(y).mean()
    slope = (x * y).sum() / (x**2).sum()
    squares = ((y - slope * x) ** 2).sum()
    return slope, np.sqrt(squares / (len(x) - 2) / (x**2).sum()) if len(x) > 2 else np.nan


def growth(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Fit how speed and memory grow with the quantity that each table varies."""
    rows = []
    for quantity, table in tables.items():
        for measured in ("tokens_per_s", "memory_gib"):
            known = table.dropna(subset=measured)
            exponent, error = fit_exponent(known[quantity], known[measured])
            rows.append((quantity, measured, len(known), exponent, error))
    return pd.DataFrame(rows, columns=["quantity", "measured", "n", "exponent", "standard_error"])


# -- Beside others --------------------------------------------------------------------------------


def side_by_side(model: ModelConfig, train: TrainConfig, dtype: str | None) -> list[Job]:
    """Our step, transformers' Llama in the same step, and ours in fp32 without compiling."""
    return [
        Job("ours", model, train, dtype=dtype),
        Job("transformers, compiled", model, train, ("llmlib",), dtype),
        Job(
            "fp32, eager",
            model,
            train,
            ("compile", "tf32", "chunked loss", "kept memory"),
            "float32",
        ),
    ]


def check_losses(jobs: list[Job], n_steps: int) -> str:
    """Train two jobs on the same data and say how far their losses are apart."""
    losses = []
    for job in jobs:
        with Contestant(job) as contestant:
            losses.append(contestant.ask(bench_model.losses, n_steps))
            if contestant.note:
                return f"{job.name} {contestant.note}"
    ours, reference = np.array(losses)
    apart, noise = np.abs(ours - reference), np.std(np.diff(reference)) / 2**0.5
    return (
        f"{n_steps} steps of {jobs[0].name} and {jobs[1].name} on the same data: losses fell from "
        f"{reference[0]:.3f} to {reference[-1]:.3f} and differ by {apart.max():.1e} at most, "
        f"{apart.mean():.1e} on average (from one batch to the next: {noise:.1e})"
    )


def recorded(folder: Path = runs.ROOT / "runs" / "bench") -> pd.DataFrame:
    """Tabulate the committed records of this command, one row per contestant."""
    tables = []
    for path in sorted(folder.glob("*.json")):
        record = runs.read_json(path)
        tables.append(
            pd.DataFrame(record["rows"]).assign(machine=path.stem, losses=record["losses"])
        )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def against_targets(beside: pd.DataFrame) -> list[str]:
    """Say of each rival whether the target was met, and what the measured peak would allow at most."""
    return [
        f"{row.machine}: {row.speed_up:.2f} times as fast as {row.rival}, target {target}: "
        + ("met" if row.speed_up >= target else f"missed by {1 - row.speed_up / target:.0%}")
        + f"; at the measured peak it would be {1 / row.mfu:.2f}"
        for _, row in beside.rename(columns={"name": "rival"}).iterrows()
        for target in [TARGETS.get((row.machine.split("-")[0], row.rival))]
        if target
    ]


def main() -> None:
    """Time our step beside transformers' Llama and a plain fp32 step: same shape, batch and AdamW."""
    parser = argparse.ArgumentParser(prog="python -m llmlib.bench", description=main.__doc__)
    scale = "laptop" if pick_device().type == "cpu" else "a100"
    numbers = {"n_layer": (6, 10), "d_model": (384, 1024), "vocab_size": (50_304, 50_304)}
    numbers |= {"seq_len": (256, 512), "micro_batch": (16, 32), "grad_accum": (1, 8)}
    for name, choices in (numbers | {"rounds": (5, 5), "steps": (2, 2)}).items():
        default, flag = choices[scale == "a100"], f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"default: {default}")
    dtypes = {"auto": None, "bf16": "bfloat16", "fp32": "float32"}
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="auto: bf16 if it pays")
    help_text = "compare the losses of N steps on the same data with the plain step's"
    parser.add_argument("--check-losses", type=int, default=0, metavar="N", help=help_text)
    parser.add_argument("--output", type=Path, help="JSON file for the table")
    asked = parser.parse_args()
    shape = {"vocab_size": asked.vocab_size, "seq_len": asked.seq_len}
    model = llama_config(asked.n_layer, asked.d_model, **shape)
    batch = {"micro_batch": asked.micro_batch, "grad_accum": asked.grad_accum}
    jobs = side_by_side(model, replace(PRESETS["a100"].train, **batch), dtypes[asked.dtype])
    peak = measure_products(model, jobs[0].train, SQUARES[scale]).flops_per_s.max()
    table = take_turns(jobs, n_rounds=asked.rounds, n_steps=asked.steps)
    table["mfu"] = table.flops_per_s / peak
    print(f"{model}\n{jobs[0].tokens_per_step} tokens per step, peak {peak / 1e12:.3f} TFLOP/s")
    gains = ["speed_up", "speed_up_low", "speed_up_high"]
    shown = ["name", "tokens_per_s", *gains, "mfu", "memory_gib", "note"]
    print(table[shown].to_string(index=False, float_format="{:.4g}".format))
    losses = check_losses([jobs[0], jobs[-1]], asked.check_losses) if asked.check_losses else None
    print(losses or "")
    if asked.output:
        rows = json.loads(table.to_json(orient="records"))
        about = {"environment": runs.environment(), "model": to_json(model), **batch}
        about |= {"dtype": str(compute_dtype(pick_device())), "peak_flops_per_s": peak}
        runs.write_json(asked.output, about | {"rows": rows, "losses": losses})


if __name__ == "__main__":
    main()
