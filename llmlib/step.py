"""One training step and one validation: what the full run does, and what the benchmark measures.

Device, precision and processes are chosen here. Weights, gradients and optimizer state are fp32;
matrix products run in bf16 where the hardware has it. A step is shared by the processes of a job.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmlib.model import LanguageModel
from llmlib.optim import set_lr

EVAL_BATCH = 16  # windows
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h

# ------------------------------------------------------------------------- device and precision


def pick_device(local_rank: int = 0) -> torch.device:
    """Use CUDA where there is one, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """Choose bf16 where the hardware multiplies in it, else fp32; weights are fp32 either way."""
    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Compute matrix products in ``dtype``."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> None:
    """Let this process reuse the memory of large tensors instead of faulting it in again.

    A step was 1.11 to 1.17 times as fast with it on a CPU; does nothing where the C library is not
    glibc.
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


@contextlib.contextmanager
def out_of_memory_is_no_error() -> Iterator[None]:
    """Go on behind the block when memory ends, also where a library says so in its own words."""
    try:
        yield
    except RuntimeError as error:
        is_known = isinstance(error, torch.OutOfMemoryError)
        if not (is_known or "out of memory" in str(error) or "ALLOC_FAILED" in str(error)):
            raise


# ------------------------------------------------------------------------- processes


def join_processes() -> int:
    """Join the job that torchrun started, if it did; return the rank on this machine."""
    if not dist.is_torchelastic_launched():
        return 0
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # It outlives a restart and remembers where the dead could be reached (pytorch #135712).
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return local_rank


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Say whether this process decides, validates, saves and writes the record."""
    return rank() == 0


def broadcast(*values: float) -> list[float]:
    """Give every process the main one's values, as soon as that one is here."""
    shared = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.broadcast(shared, src=0)
    return shared.tolist()


def average_gradients(model: nn.Module) -> nn.Module:
    """Let the processes average the gradients of their copies of a model."""
    return DistributedDataParallel(model) if world_size() > 1 else model


# ------------------------------------------------------------------------- the step


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    micro_batch: int,
    lr_factor: float,
    grad_clip: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Take one optimizer step on inputs and targets (n_sequences, T); never wait for the device.

    Returns the mean loss before the step [nats/token] and the gradient norm before clipping, as a
    tensor (2,) on the device. If either is not finite, the step is taken with a gradient of zero.
    """
    set_lr(optimizer, lr_factor)
    if getattr(optimizer, "hessian_is_due", False):
        optimizer.estimate_hessian(model, inputs[:micro_batch], dtype)
    optimizer.zero_grad(set_to_none=True)
    micro_batches = list(zip(inputs.split(micro_batch), targets.split(micro_batch), strict=True))
    total = torch.zeros((), device=inputs.device)
    for i, (x, y) in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        waits = isinstance(model, DistributedDataParallel) and not is_last
        averaging = model.no_sync() if waits else contextlib.nullcontext()
        with averaging, autocast(inputs.device, dtype):
            loss = model(x, y) * (len(x) / len(inputs))
            loss.backward()
        total += loss.detach()
    if world_size() > 1:
        dist.all_reduce(total)
        total /= world_size()
    grads = {name: p.grad for name, p in model.named_parameters()}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient reached {missing}"
    norm = clip_gradients(list(grads.values()), total, grad_clip)
    optimizer.step()
    return torch.stack([total, norm])


def clip_gradients(grads: list[Tensor], loss: Tensor, largest: float | None) -> Tensor:
    """Shrink gradients to a norm of at most ``largest``; zero them if they or the loss aren't finite.

    Returns the norm before. On a CPU, where reading a number is free, needless passes are saved.
    """
    norm = nn.utils.get_total_norm(grads)
    is_bad = ~torch.isfinite(norm + loss)
    scale = torch.ones_like(norm) if largest is None else (largest / (norm + 1e-6)).clamp(max=1.0)
    is_free = reading_is_free(norm.device)
    if not (is_free and scale == 1):
        torch._foreach_mul_(grads, scale)
    if not (is_free and not is_bad):
        for grad in grads:
            grad.masked_fill_(is_bad, 0.0)
    return norm


def reading_is_free(device: torch.device) -> bool:
    """Say whether reading a number waits for nothing: a CPU has computed it already."""
    return device.type == "cpu"


@torch.no_grad()
def evaluate(
    model: LanguageModel, windows: np.ndarray, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Score non-overlapping windows (n, T + 1): token-weighted loss, perplexity and accuracy.

    A few windows at a time, and their logits in chunks, so that it needs less memory than a step.
    """
    loss, n_correct = 0.0, 0
    for batch in np.array_split(windows, -(-len(windows) // EVAL_BATCH)):
        tokens = torch.from_numpy(batch).to(device)
        with autocast(device, dtype):
            batch_loss, batch_correct = model.score(tokens[:, :-1], tokens[:, 1:])
        loss += batch_loss.item()
        n_correct += batch_correct.item()
    n_tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = loss / n_tokens
    return {
        "loss": mean,
        "perplexity": float(np.exp(mean)),
        "accuracy": n_correct / n_tokens,
        "n_tokens": n_tokens,
    }
