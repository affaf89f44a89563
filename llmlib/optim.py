"""Optimizers: how parameters are grouped, the schedule of their rates, AdamW, Muon and Sophia.

Each group has a peak rate of its own, and every step sets its share of it, a pure function of
progress: the share of the budget that is done, whatever that counts (seconds, tokens or steps);
``budget`` owns the clock. A step works on lists of tensors, so that a GPU is not kept waiting by
launches, and never reads a number back from the device.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmlib.config import TrainConfig

FIRST = 0.01  # share of the peak on the first step of a warm-up
SHARE_THAT_FITTED = 8_780 / 10_000  # of the steps the winner planned, when his time was up


def param_groups(model: nn.Module, config: TrainConfig, weight_decay: float) -> list[dict]:
    """Split parameters into hidden matrices, embeddings and vectors, each with its peak rate.

    Matrices decay, vectors (norm gains) do not. Every parameter is in exactly one group.
    """
    hidden, embeddings, vectors = [], [], []
    for name, param in model.named_parameters():
        kind = vectors if param.dim() < 2 else hidden if "layers." in name else embeddings
        kind.append(param)
    embed_lr, vector_lr = config.embed_lr or config.lr, config.vector_lr or config.lr
    embed_decay = weight_decay if config.embed_decay is None else config.embed_decay
    return [
        {"params": hidden, "peak_lr": config.lr, "weight_decay": weight_decay},
        {"params": embeddings, "peak_lr": embed_lr, "weight_decay": embed_decay},
        {"params": vectors, "peak_lr": vector_lr, "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, config: TrainConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """Build the config's optimizer; ``dtype`` is what Muon multiplies matrices in.

    "sophia" has the published constants and only the rates of the config; "sophia_writeup" is
    Sophia as the write-up ran it: AdamW's settings, and ``bs`` at 5120 as in the published code.
    """
    decay = 0.2 if config.optimizer == "sophia" else config.weight_decay
    groups = param_groups(model, config, decay)
    if config.optimizer == "adamw":  # Loshchilov and Hutter, arXiv:1711.05101
        return torch.optim.AdamW(groups, config.lr, config.betas, fused=True)
    if config.optimizer == "muon":
        return Muon(groups, config.lr, config.betas, dtype)
    if config.optimizer == "sophia":
        return Sophia(groups, config.lr, (0.965, 0.99), config.rho)
    tokens_per_step = config.n_sequences * model.config.seq_len
    return Sophia(groups, config.lr, config.betas, config.rho * 5120 / tokens_per_step)


def lr_factor(config: TrainConfig, progress: float) -> float:
    """Evaluate the config's schedule; the first step has progress 0, the last one exactly 1.

    one_cycle: up on a cosine from 1/100, down on one to ``final_lr`` (torch's OneCycleLR, Smith and
    Topin 2018), the recipe's. one_cycle_unfinished breaks off where the winner's run did, which was
    planned on steps and stopped by the clock. The others rise linearly. cosine falls on a cosine
    (arXiv:1608.03983), linear linearly (arXiv:2502.15938), wsd stays at the peak until the last
    ``cooldown`` (arXiv:2405.18392).
    """
    start = config.warmup
    if config.schedule == "one_cycle_unfinished":
        progress *= SHARE_THAT_FITTED
    if progress < start:
        is_cosine = config.schedule.startswith("one_cycle")
        return _cosine(FIRST, 1.0, progress / start) if is_cosine else max(progress / start, FIRST)
    if config.schedule == "wsd":
        start = max(start, 1 - config.cooldown)
    fallen = (progress - start) / (1 - start) if progress > start else 0.0
    if config.schedule in ("linear", "wsd"):
        return 1.0 + (config.final_lr - 1.0) * fallen
    return _cosine(1.0, config.final_lr, fallen)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


class Muon(torch.optim.AdamW):
    """Muon for the first group, the hidden matrices, AdamW for the others (K. Jordan 2024).

    Its step sizes match AdamW's in root mean square (arXiv:2502.16982).
    """

    MOMENTUM = 0.95

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], dtype: torch.dtype
    ):
        super().__init__(groups, lr, betas, fused=True)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Take one step; the hidden matrices have no gradients afterwards."""
        hidden = self.param_groups[0]
        for shape in dict.fromkeys(p.shape for p in hidden["params"]):
            params = [p for p in hidden["params"] if p.shape == shape]
            grads = [p.grad for p in params]
            momenta = zero_state(self, params, "momentum")
            torch._foreach_lerp_(momenta, grads, 1 - self.MOMENTUM)
            updates = torch._foreach_lerp(grads, momenta, self.MOMENTUM)  # Nesterov's
            update = orthogonalize(torch.stack(updates), self.dtype)
            torch._foreach_mul_(params, 1 - hidden["lr"] * hidden["weight_decay"])
            lr = 0.2 * max(shape) ** 0.5 * hidden["lr"]
            torch._foreach_add_(params, update.unbind(), alpha=-lr)
        for param in hidden["params"]:
            param.grad = None  # AdamW passes over it now,
            self.state[param].setdefault("step", torch.zeros(()))  # but looks for this in loading
        super().step()


def zero_state(optimizer: torch.optim.Optimizer, params: list[Tensor], name: str) -> list[Tensor]:
    """List the state of that name of each parameter; it begins as zeros."""
    for p in params:
        if name not in optimizer.state[p]:
            optimizer.state[p][name] = torch.zeros_like(p)
    return [optimizer.state[p][name] for p in params]


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Move the singular values of matrices (n, rows, columns) near 1: five Newton-Schulz steps.

    The polynomial and its coefficients are K. Jordan's (2024). In ``dtype``: bf16 where the hardware
    multiplies in it, as the model does; elsewhere that costs 60 times fp32's time.
    """
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if is_tall else matrices
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        both = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, both, x, beta=3.4445)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Sophia(torch.optim.Optimizer):
    """Sophia-G: steps of at most lr, shorter where the loss is curved (Liu et al., arXiv:2305.14342).

    ``hessian`` estimates the diagonal of the mean loss's Gauss-Newton matrix: ``n`` times the squared
    gradient over ``n`` labels drawn from the model, averaged over time. The published code keeps
    the squared gradient over a whole step and multiplies by ``bs``, the tokens of a step, in
    the update; carried into the estimate, ``n`` may be smaller, and one micro-batch is enough.
    """

    HESSIAN_INTERVAL = 10  # steps
    DRAWN_AT_ONCE = 4  # sequences: all logits of a micro-batch would need more memory than a step

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], rho: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "n_steps": 0})  # in checkpoints too
        self.rho = rho
        self.unclipped_share = 0.0  # of all entries, in the last step that had a new Hessian

    @property
    def hessian_is_due(self) -> bool:
        return self.param_groups[0]["n_steps"] % self.HESSIAN_INTERVAL == 0

    def estimate_hessian(self, model: nn.Module, inputs: Tensor) -> None:
        """Take inputs (n_sequences, T) into the estimate: about one and a third passes over them.

        The gradient goes through ``model`` as it is, so a compiled one needs no second compilation
        and processes average theirs and stay equal; labels are drawn by the bare module beneath.
        """
        bare = getattr(model, "module", model)
        bare = getattr(bare, "_orig_mod", bare)
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        seed = self.param_groups[0]["n_steps"] * size + rank
        generator = torch.Generator(inputs.device).manual_seed(seed)
        with torch.no_grad():
            labels = [draw(bare(x), generator) for x in inputs.split(self.DRAWN_AT_ONCE)]
        torch.clear_autocast_cache()  # some versions of torch keep casts made without gradients
        self.zero_grad()
        model(inputs, torch.cat(labels)).backward()
        n = inputs.numel() * size
        for group in self.param_groups:
            params, beta2 = group["params"], group["betas"][1]
            # What is not finite would never leave the average again.
            grads = [p.grad.nan_to_num_(0.0, 0.0, 0.0) for p in params]
            hessians = zero_state(self, params, "hessian")
            torch._foreach_mul_(hessians, beta2)
            torch._foreach_addcmul_(hessians, grads, grads, (1 - beta2) * n)

    @torch.no_grad()
    def step(self) -> None:
        is_new, n_unclipped, n_params = self.hessian_is_due, 0, 0
        for group in self.param_groups:
            params = group["params"]
            momenta = zero_state(self, params, "exp_avg")
            torch._foreach_lerp_(momenta, [p.grad for p in params], 1 - group["betas"][0])
            scales = torch._foreach_mul([self.state[p]["hessian"] for p in params], self.rho)
            torch._foreach_add_(scales, 1e-15)
            updates = torch._foreach_div(momenta, scales)
            if is_new:
                n_unclipped = n_unclipped + sum((u.abs() < 1).sum() for u in updates)
                n_params += sum(u.numel() for u in updates)
            torch._foreach_clamp_max_(updates, 1.0)
            torch._foreach_clamp_min_(updates, -1.0)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            group["n_steps"] += 1
        if is_new:
            self.unclipped_share = n_unclipped / n_params


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a label from each softmax over logits (..., V), where its cumulative sum passes a number.

    Ten times as fast on a CPU as noise on every logit, and nothing is read from the device.
    """
    cumulative = logits.float().softmax(-1).cumsum(-1)
    shape = (*logits.shape[:-1], 1)
    share = torch.rand(shape, generator=generator, device=logits.device)
    labels = torch.searchsorted(cumulative, share * cumulative[..., -1:]).squeeze(-1)
    return labels.clamp_(max=logits.size(-1) - 1)  # logits that are not finite are passed nowhere
