"""One training step and one validation: what the full run does, and what the benchmark measures.

A step is shared by the processes of a group. Weights, gradients and optimizer state are fp32; matmuls
run in bf16 where the hardware has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmlib.model import LanguageModel
from llmlib.optim import set_lr

EVAL_BATCH = 16  # sequences
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@dataclass(frozen=True)
class Group:
    """The processes of a run; one process is its own group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def join() -> Group:
        """Join the group that torchrun started, if it did."""
        if not dist.is_torchelastic_launched():
            return Group()
        local_rank = int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # It outlives a restart and remembers where the dead could be reached (pytorch #135712).
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        return Group(rank, size, local_rank)

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Rank 0 decides, validates, saves and writes the record."""
        return self.rank == 0

    def follow_leader(self, *values: float) -> list[float]:
        """Give every process the leader's values, as soon as the leader is here."""
        decision = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.broadcast(decision, src=0)
        return decision.tolist()

    def wait_for_leader(self) -> None:
        self.follow_leader(0.0)

    def share(self, model: nn.Module) -> nn.Module:
        """Let the processes average the gradients of their copies of a model."""
        return DistributedDataParallel(model) if self.size > 1 else model


def pick_device(local_rank: int = 0) -> torch.device:
    """Use CUDA where there is one, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Compute matmuls in ``dtype``."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> None:
    """Let this process reuse the memory of large tensors instead of faulting it in again.

    A step was 1.11 to 1.17 times as fast with it on a CPU (02_throughput's record); does nothing where
    the C library is not glibc.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compile_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Compile without graph breaks, or say in one line why not and what it costs."""
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        print("No Triton here, so the model runs uncompiled (about 1.5 times slower).")
    elif device.type == "cpu" and not any(c and shutil.which(c) for c in compilers):
        print("No C++ compiler here, so the model runs uncompiled; install g++ to gain speed.")
    else:
        return torch.compile(model, fullgraph=True, dynamic=False)
    return model


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    micro_batch: int,
    lr: float,
    grad_clip: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step on inputs and targets (n_sequences, T); never wait for the device.

    Returns the mean loss before the step [nats/token] and the gradient norm before clipping, both on
    the device. If either is not finite, the step is taken with a gradient of zero.
    """
    set_lr(optimizer, lr)
    if getattr(optimizer, "hessian_is_due", False):
        optimizer.estimate_hessian(model, inputs[:micro_batch], dtype)
    optimizer.zero_grad(set_to_none=True)
    micro_inputs, micro_targets = inputs.split(micro_batch), targets.split(micro_batch)
    total = torch.zeros((), device=inputs.device)
    for i, (x, y) in enumerate(zip(micro_inputs, micro_targets, strict=True)):
        is_last = i == len(micro_inputs) - 1
        with sync_gradients(model, is_last), autocast(inputs.device, dtype):
            loss = model(x, y) * (len(x) / len(inputs))
            loss.backward()
        total += loss.detach()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    grads = {name: p.grad for name, p in model.named_parameters()}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient reached {missing}"
    norm = clip_gradients(list(grads.values()), total, grad_clip)
    optimizer.step()
    return total, norm


def clip_gradients(grads: list[Tensor], loss: Tensor, largest: float | None) -> Tensor:
    """Shrink gradients to a norm of at most ``largest``, zero them if they or the loss are not finite.

    Returns the norm before. Where looking costs nothing, needless passes are saved.
    """
    norm = nn.utils.get_total_norm(grads)
    is_bad = ~torch.isfinite(norm + loss)
    scale = torch.ones_like(norm) if largest is None else (largest / (norm + 1e-6)).clamp(max=1.0)
    may_look = looking_is_free(norm.device)
    if not (may_look and scale == 1):
        torch._foreach_mul_(grads, scale)
    if not (may_look and not is_bad):
        for grad in grads:
            grad.masked_fill_(is_bad, 0.0)
    return norm


def looking_is_free(device: torch.device) -> bool:
    """Say whether reading a number waits for nothing: a CPU has computed it already."""
    return device.type == "cpu"


class Reading:
    """Numbers on their way from the device, which may work on meanwhile."""

    def __init__(self, *values: Tensor):
        self.values = torch.stack([v.float() for v in values]).to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if values[0].is_cuda else None
        if self.event:
            self.event.record()

    def get(self) -> list[float]:
        """Wait for what makes these numbers, but not for what was asked of the device later."""
        if self.event:
            self.event.synchronize()
        return self.values.tolist()


def sync_gradients(model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
    """Average gradients across processes on the last micro-batch only."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return contextlib.nullcontext()


@torch.no_grad()
def evaluate(
    model: LanguageModel, windows: np.ndarray, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Score non-overlapping windows (n, T + 1): token-weighted loss, perplexity and accuracy."""
    loss, n_correct = 0.0, 0
    for batch in np.array_split(windows, -(-len(windows) // EVAL_BATCH)):
        tokens = torch.from_numpy(batch).to(device)
        with autocast(device, dtype):
            logits = model(tokens[:, :-1])
        logits, targets = logits.flatten(0, 1).float(), tokens[:, 1:].flatten()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        n_correct += (logits.argmax(-1) == targets).sum().item()
    n_tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = loss / n_tokens
    return {
        "loss": mean,
        "perplexity": float(np.exp(mean)),
        "accuracy": n_correct / n_tokens,
        "n_tokens": n_tokens,
    }
