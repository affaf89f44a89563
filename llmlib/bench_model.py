"""The training step under measurement, and what it would be without one of its levers.

A ``Job`` names configs and the levers to take away; a ``Stage`` builds it and takes steps with
``step.train_step``, the very step of the full run. No lever is an option of the model: it is taken
away by altering what was built. ``start`` and ``turn`` hold the one stage of a process.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmlib import model as production
from llmlib.config import ModelConfig, TrainConfig
from llmlib.data import Batches, Tokens, prefetch
from llmlib.model import LanguageModel, RMSNorm, build_model
from llmlib.optim import build_optimizer, compute_dtype, param_groups
from llmlib.step import compile_model, keep_freed_memory, pick_device, train_step


@dataclass(frozen=True)
class Job:
    """One contestant: its configs, and the levers taken away from our step."""

    name: str
    model: ModelConfig
    train: TrainConfig
    without: tuple[str, ...] = ()
    dtype: str | None = None  # None: what the hardware multiplies fastest
    claim: str = ""  # how much faster ours should be than this, by the write-up
    skip: str = ""  # why it cannot be measured here

    @property
    def tokens_per_step(self) -> int:
        return self.train.micro_batch * self.train.grad_accum * self.model.seq_len


def rotate_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn feature pairs as complex numbers, as Llama's original code does."""
    a, b = x.float().chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag), dim=-1).type_as(x)


class LowRMSNorm(nn.Module):
    """RMSNorm whose statistics are in the compute dtype, too."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype):
        super().__init__()
        self.weight, self.eps, self.dtype = norm.weight, norm.eps, dtype

    def forward(self, x: Tensor) -> Tensor:
        low = x.to(self.dtype)
        scale = torch.rsqrt(low.square().mean(-1, keepdim=True) + self.eps)
        return (low * scale).type_as(x) * self.weight


class FullLogits(nn.Module):
    """A model whose loss holds the logits of all its tokens at once."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.model.hidden(tokens), self.model.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Transformers(nn.Module):
    """The same Llama from transformers, with its own attention, loss and head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            max_position_embeddings=config.seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
        self.model = LlamaForCausalLM(shape)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model(tokens, labels=targets, shift_labels=targets, use_cache=False).loss


def without_levers(
    model: LanguageModel, without: tuple[str, ...], dtype: torch.dtype
) -> LanguageModel | FullLogits:
    """Alter a built model; complex RoPE replaces ours in the whole process."""
    if "real RoPE" in without:
        production.rotate = rotate_complex
        warnings.filterwarnings("ignore", message="Torchinductor does not support code generation")
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, RMSNorm) and "RMSNorm" in without:
                setattr(parent, name, nn.LayerNorm(len(norm.weight), norm.eps, bias=False))
            elif isinstance(norm, RMSNorm) and "fp32 statistics" in without:
                setattr(parent, name, LowRMSNorm(norm, dtype))
    return FullLogits(model) if "chunked loss" in without else model


class Stage:
    """A job's model and optimizer on the device, ready to take steps."""

    def __init__(self, job: Job):
        self.job, self.device = job, pick_device()
        self.dtype = getattr(torch, job.dtype) if job.dtype else compute_dtype(self.device)
        if not {"kept memory", "llmlib"} & set(job.without):
            keep_freed_memory()
        torch.set_float32_matmul_precision("highest" if "tf32" in job.without else "high")
        if "llmlib" in job.without:
            model = Transformers(job.model)
        else:
            model = without_levers(build_model(job.model), job.without, self.dtype)
        model.to(self.device)
        if "fused AdamW" in job.without:
            groups = param_groups(model, job.train.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, lr=job.train.lr, betas=job.train.betas)
        else:
            self.optimizer = build_optimizer(model, job.train)
        if "llmlib" in job.without:
            self.model = torch.compile(model, dynamic=False)
        elif job.train.compile and "compile" not in job.without:
            self.model = compile_model(model, self.device)
        else:
            self.model = model
        n_sequences = job.train.micro_batch * job.train.grad_accum
        shape = (n_sequences, job.model.seq_len + 1)
        tokens = torch.randint(job.model.vocab_size, shape, device=self.device)
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(self, inputs: Tensor, targets: Tensor, lr: float | None = None) -> Tensor:
        """Take one step; return its loss, which may still be under way."""
        train = self.job.train
        loss, _ = train_step(
            self.model,
            self.optimizer,
            inputs,
            targets,
            micro_batch=train.micro_batch,
            lr=train.lr if lr is None else lr,
            grad_clip=train.grad_clip,
            dtype=self.dtype,
        )
        return loss

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def turn(self, n_steps: int) -> float:
        """Take a step to warm up and n to time; return their mean [s] and make room for others."""
        self.step(*self.batch)
        self.wait()
        started = time.perf_counter()
        for _ in range(n_steps):
            self.step(*self.batch)
        self.wait()
        seconds = (time.perf_counter() - started) / n_steps
        torch.cuda.empty_cache()
        return seconds

    def losses(self, n_steps: int) -> list[float]:
        """Train on the bytes of the standard library's sources, the same for every job."""
        text = b"".join(
            path.read_bytes() for path in sorted(Path(tempfile.__file__).parent.glob("*.py"))
        )
        n_sequences, width = len(self.batch[0]), self.job.model.seq_len + 1
        text = np.frombuffer(text, np.uint8)
        losses = []
        for i in range(n_steps):
            starts = np.random.default_rng(i).integers(len(text) - width, size=n_sequences)
            windows = np.stack([text[start : start + width] for start in starts]).astype(np.int64)
            tokens = torch.from_numpy(windows).to(self.device)
            lr = self.job.train.lr * min(1, (i + 1) / 20)
            inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            losses.append(self.step(inputs, targets, lr))
        return [float(loss) for loss in losses]


_stage: Stage | None = None  # the one that this process serves


def start(job: Job) -> bool:
    """Build the process's stage and take first steps, which compile it; say if memory sufficed."""
    global _stage
    try:
        _stage = _stage or Stage(job)
        _stage.turn(1)
        return True
    except torch.OutOfMemoryError:
        pass  # what the failed step held is free only behind this block
    torch.cuda.empty_cache()
    return False


def turn(n_steps: int) -> float:
    return _stage.turn(n_steps)


def losses(n_steps: int) -> list[float]:
    return _stage.losses(n_steps)


def peak_memory_gib() -> float:
    """Measure the most memory that the process held: the device's, or the whole process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux; there, ru_maxrss would include the parent's memory
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    [peak] = (line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak[1]) / 2**20


KINDS = {  # of work, by what the names of operators and kernels contain; the first match holds
    "matmul": ("::mm", "::addmm", "::bmm", "gemm", "mkl", "cutlass", "nvjet", "xmma"),
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "head and loss": ("softmax", "nll_loss", "logsumexp", "gather"),
    "optimizer and clipping": ("adam", "optimizer", "foreach", "multi_tensor", "vector_norm"),
    "data": ("next batch", "memcpy htod"),
    "elementwise and norms": ("fused", "triton", "compiled", "aten::", "elementwise", "reduce"),
}


def kind_of_work(name: str, shapes: Any, vocab_size: int) -> str:
    """Classify an event; a product with the vocabulary among its dimensions is the head's."""
    name = name.lower()
    kind = next((k for k, parts in KINDS.items() if any(part in name for part in parts)), "other")
    is_head = kind == "matmul" and any(vocab_size in shape for shape in shapes if shape)
    return "head and loss" if is_head else kind


def breakdown(job: Job, n_steps: int) -> dict[str, float]:
    """Profile steady steps fed by ``data.prefetch``: seconds per step by kind of work.

    They sum to the wall time of a step under the profiler: "idle and other" is what no operator
    claims. "bare step" is that time without a profiler, "read one batch" what a batch costs alone.
    """
    os.environ["KINETO_LOG_LEVEL"] = "99"  # no notes on starting and stopping
    torch._inductor.config.cpp.enable_kernel_profile = True
    start(job)
    on_device = _stage.device.type == "cuda"
    n_sequences = len(_stage.batch[0])
    with tempfile.TemporaryDirectory() as folder:
        n_tokens = 4 * job.tokens_per_step + 1
        np.random.default_rng(0).integers(job.model.vocab_size, size=n_tokens).astype(
            np.uint16
        ).tofile(Path(folder) / "tokens.bin")
        tokens = Tokens(Path(folder), ("tokens.bin",), (n_tokens,), "uint16")
        batches = Batches(tokens, job.model.seq_len, n_sequences)
        read_s = _seconds_each(lambda i: batches.batch(i), n_steps)
        stream = prefetch(batches, 0, _stage.device)

        def step(_: int) -> None:
            with torch.profiler.record_function("next batch"):
                inputs, targets = next(stream)
            _stage.step(inputs, targets)

        step(0)
        bare_s = _seconds_each(step, n_steps)
        with torch.profiler.profile(record_shapes=True) as profile:
            wall_s = _seconds_each(step, n_steps)
        stream.close()
    spent = Counter(dict.fromkeys(KINDS, 0.0))
    for event in profile.key_averages(group_by_input_shape=True):
        is_kernel = event.device_type != torch.autograd.DeviceType.CPU
        kind = kind_of_work(event.key, event.input_shapes, job.model.vocab_size)
        if is_kernel or not on_device:
            own = event.self_device_time_total if on_device else event.self_cpu_time_total
            spent[kind] += own / 1e6 / n_steps
        elif kind == "head and loss":  # kernels carry no shapes, the operators that start them do
            moved = event.self_device_time_total / 1e6 / n_steps
            spent[kind] += moved
            spent["matmul"] -= moved
    spent.pop("other", None)
    idle = wall_s - sum(spent.values())
    return dict(spent) | {"idle and other": idle, "bare step": bare_s, "read one batch": read_s}


def _seconds_each(work, n: int) -> float:
    _stage.wait()
    started = time.perf_counter()
    for i in range(n):
        work(i)
    _stage.wait()
    return (time.perf_counter() - started) / n
