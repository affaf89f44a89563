"""One training step and one validation: what the full run does, and what the benchmark measures.

A step is shared by the processes of a job; ``devices`` says what computes it, and in which precision.
"""

import contextlib
import os

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmlib import devices
from llmlib.devices import autocast

EVAL_BATCH = 4  # windows; the logits of one at a time are in memory


def join_processes() -> None:
    """Join the job that torchrun started, if it did, with an accelerator for each process."""
    if not dist.is_torchelastic_launched():
        return
    if devices.accelerator():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(dist.rendezvous("env://"))
    # The store may outlive a restart; it knows where the dead could be reached (pytorch #135712).
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(store=store, rank=rank, world_size=size)


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
    for group in optimizer.param_groups:
        group["lr"] = lr_factor * group["peak_lr"]
    if getattr(optimizer, "hessian_is_due", False):
        with autocast(inputs.device, dtype):
            optimizer.estimate_hessian(model, inputs[:micro_batch])
    optimizer.zero_grad()
    micro_batches = list(zip(inputs.split(micro_batch), targets.split(micro_batch), strict=True))
    total = torch.zeros((), device=inputs.device)
    for i, (x, y) in enumerate(micro_batches, 1):
        waits = isinstance(model, DistributedDataParallel) and i < len(micro_batches)
        averaging = model.no_sync() if waits else contextlib.nullcontext()
        with averaging, autocast(inputs.device, dtype):
            loss = model(x, y) * (len(x) / len(inputs))
            loss.backward()
        total += loss.detach()
    if world_size() > 1:
        dist.all_reduce(total)
        total /= world_size()
    params = dict(model.named_parameters())
    missing = [name for name, p in params.items() if p.grad is None]
    assert not missing, f"no gradient reached {missing}"
    norm = nn.utils.clip_grad_norm_(params.values(), grad_clip or torch.inf)
    is_bad = ~torch.isfinite(norm + total)
    for p in params.values():  # no product of lists turns what is not finite into zero
        p.grad.masked_fill_(is_bad, 0.0)
    optimizer.step()
    return torch.stack([total, norm])


def evaluate(
    model: nn.Module, windows: np.ndarray, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Score non-overlapping windows (n, T + 1): token-weighted loss, perplexity and accuracy."""
    loss, accuracy = score_windows(model, windows, device, dtype).mean(0).tolist()
    result = {"loss": loss, "perplexity": float(np.exp(loss)), "accuracy": accuracy}
    return result | {"n_tokens": windows[:, 1:].size}


@torch.no_grad()
def score_windows(
    model: nn.Module, windows: np.ndarray, device: torch.device, dtype: torch.dtype
) -> np.ndarray:
    """Score each of some windows (n, T + 1): mean loss [nats/token] and accuracy, (n, 2).

    Needs less memory than a training step, whatever its micro-batch.
    """
    scores, head = [], model.embed_tokens.weight
    for batch in torch.from_numpy(windows).split(EVAL_BATCH):
        tokens = batch.to(device)
        with autocast(device, dtype):
            for hidden, targets in zip(model.hidden(tokens[:, :-1]), tokens[:, 1:], strict=True):
                logits = F.linear(hidden, head).float()
                n_correct = (logits.argmax(-1) == targets).sum()
                loss = F.cross_entropy(logits, targets, reduction="sum")
                scores.append(torch.stack([loss, n_correct.float()]))
    return np.array(torch.stack(scores).tolist()) / (windows.shape[1] - 1)
