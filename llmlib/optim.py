"""Optimizers: how parameters are grouped, AdamW, Muon and Sophia.

Each group has a peak rate of its own, and every step sets its share of it; nothing here knows about
time. A step works on lists of tensors, so that a GPU is not kept waiting by launches, and never
reads a number back from the device.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmlib.config import TrainConfig

EPS = 1e-8  # AdamW's


def param_groups(model: nn.Module, config: TrainConfig, weight_decay: float) -> list[dict]:
    """Split parameters into hidden matrices, embeddings and vectors, each with its peak rate.

    Matrices decay, vectors (norm gains) do not. Every trainable parameter is in exactly one group.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    in_blocks = {id(p) for p in model.layers.parameters()}
    hidden = [p for p in params if p.dim() >= 2 and id(p) in in_blocks]
    embeddings = [p for p in params if p.dim() >= 2 and id(p) not in in_blocks]
    vectors = [p for p in params if p.dim() < 2]
    embed_lr, vector_lr = config.embed_lr or config.lr, config.vector_lr or config.lr
    groups = [
        {"params": hidden, "peak_lr": config.lr, "weight_decay": weight_decay},
        {"params": embeddings, "peak_lr": embed_lr, "weight_decay": weight_decay},
        {"params": vectors, "peak_lr": vector_lr, "weight_decay": 0.0},
    ]
    grouped = Counter(id(p) for group in groups for p in group["params"])
    assert grouped == Counter(id(p) for p in params)
    return groups


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
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=EPS, fused=True)
    if config.optimizer == "muon":
        return Muon(groups, config.lr, config.betas, dtype)
    if config.optimizer == "sophia":
        return Sophia(groups, config.lr, betas=(0.965, 0.99), rho=0.05)
    tokens_per_step = config.n_sequences * model.config.seq_len
    return Sophia(groups, config.lr, config.betas, rho=0.05 * 5120 / tokens_per_step)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to a share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


class _Counting(torch.optim.Optimizer):
    """An optimizer that counts its steps where reading them costs nothing, and saves the count."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas})

    @property
    def n_steps(self) -> int:
        return int(self._shared_state.get("step", 0))

    def count_step(self) -> None:
        self._shared_state["step"] = self.n_steps + 1

    @property
    def _shared_state(self) -> dict:
        return self.state[self.param_groups[0]["params"][0]]

    def lists(self, group: dict, *names: str) -> tuple[list[Tensor], ...]:
        """List a group's parameters, their gradients, and each state of that name (zero at first)."""
        params = group["params"]
        for p in params:
            for name in names:
                if name not in self.state[p]:
                    self.state[p][name] = torch.zeros_like(p)
        states = ([self.state[p][name] for p in params] for name in names)
        return params, [p.grad for p in params], *states


class Muon(_Counting):
    """Muon for the first group, the hidden matrices, AdamW for the others (K. Jordan 2024).

    Its step sizes match AdamW's in root mean square (arXiv:2502.16982).
    """

    MOMENTUM = 0.95

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], dtype: torch.dtype
    ):
        super().__init__(groups, lr, betas)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        self.count_step()
        hidden, *others = self.param_groups
        params, grads, momenta = self.lists(hidden, "momentum")
        torch._foreach_lerp_(momenta, grads, 1 - self.MOMENTUM)
        updates = torch._foreach_lerp(grads, momenta, self.MOMENTUM)  # Nesterov's
        torch._foreach_mul_(params, 1 - hidden["lr"] * hidden["weight_decay"])
        for shape in dict.fromkeys(p.shape for p in params):
            alike = [i for i, p in enumerate(params) if p.shape == shape]
            update = orthogonalize(torch.stack([updates[i] for i in alike]), self.dtype)
            lr = 0.2 * max(shape) ** 0.5 * hidden["lr"]
            torch._foreach_add_([params[i] for i in alike], update.unbind(), alpha=-lr)
        for group in others:
            self._step_adamw(group)

    def _step_adamw(self, group: dict) -> None:
        params, *lists = self.lists(group, "exp_avg", "exp_avg_sq")
        step = torch.full((), self.n_steps, dtype=torch.float32, device=params[0].device)
        settings = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": EPS}
        settings |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        settings |= {"amsgrad": False, "maximize": False}
        torch._fused_adamw_(params, *lists, [], [step] * len(params), **settings)


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


class Sophia(_Counting):
    """Sophia-G: steps of at most lr, shorter where the loss is curved (Liu et al., arXiv:2305.14342).

    ``hessian`` estimates the diagonal of the mean loss's Gauss-Newton matrix: ``n`` times the squared
    gradient over ``n`` labels drawn from the model, averaged over time. The published code keeps
    the squared gradient over a whole step and multiplies by ``bs``, the tokens of a step, in
    the update; carried into the estimate, ``n`` may be smaller, and one micro-batch is enough.
    """

    HESSIAN_INTERVAL = 10  # steps
    DRAWN_AT_ONCE = 4  # sequences: all logits of a micro-batch would need more memory than a step

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], rho: float):
        super().__init__(groups, lr, betas)
        self.rho, self.has_new_hessian = rho, False
        # Of all entries, in the last step that had a new Hessian:
        self.unclipped_share = torch.zeros((), device=groups[0]["params"][0].device)

    @property
    def hessian_is_due(self) -> bool:
        return self.n_steps % self.HESSIAN_INTERVAL == 0 and not self.has_new_hessian

    @property
    def n_hessian_passes(self) -> int:
        return -(-self.n_steps // self.HESSIAN_INTERVAL)

    def estimate_hessian(self, model: nn.Module, inputs: Tensor, dtype: torch.dtype) -> None:
        """Take inputs (n_sequences, T) into the estimate: about one and a third passes over them.

        The gradient goes through ``model`` as it is, so a compiled one needs no second compilation
        and processes average theirs and stay equal; labels are drawn by the bare module beneath.
        """
        bare = getattr(model, "module", model)
        bare = getattr(bare, "_orig_mod", bare)
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        generator = torch.Generator(inputs.device).manual_seed(self.n_steps * size + rank)
        self.zero_grad()
        mixed = torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), mixed:
            labels = [draw(bare(x), generator) for x in inputs.split(self.DRAWN_AT_ONCE)]
        with mixed:  # anew: versions of torch differ in keeping casts made without gradients
            model(inputs, torch.cat(labels)).backward()
        n = inputs.numel() * size
        for group in self.param_groups:
            (_, grads, hessians), beta2 = self.lists(group, "hessian"), group["betas"][1]
            for grad in grads:
                grad.nan_to_num_(0.0, 0.0, 0.0)  # would never leave the average again
            torch._foreach_mul_(hessians, beta2)
            torch._foreach_addcmul_(hessians, grads, grads, (1 - beta2) * n)
        self.zero_grad()
        self.has_new_hessian = True

    @torch.no_grad()
    def step(self) -> None:
        assert not self.hessian_is_due, "estimate_hessian was not called"
        self.count_step()
        n_unclipped = n_params = 0
        for group in self.param_groups:
            params, grads, momenta, hessians = self.lists(group, "exp_avg", "hessian")
            torch._foreach_lerp_(momenta, grads, 1 - group["betas"][0])
            scales = torch._foreach_mul(hessians, self.rho)
            torch._foreach_add_(scales, 1e-15)
            updates = torch._foreach_div(momenta, scales)
            if self.has_new_hessian:
                n_unclipped = n_unclipped + sum((u.abs() < 1).sum() for u in updates)
                n_params += sum(u.numel() for u in updates)
            torch._foreach_clamp_max_(updates, 1.0)
            torch._foreach_clamp_min_(updates, -1.0)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
        if self.has_new_hessian:
            self.unclipped_share = n_unclipped / n_params
        self.has_new_hessian = False


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a label from each softmax over logits (..., V), where its cumulative sum passes a number.

    Ten times as fast on a CPU as noise on every logit, and nothing is read from the device.
    """
    cumulative = logits.float().softmax(-1).cumsum(-1)
    shape = (*logits.shape[:-1], 1)
    share = torch.rand(shape, generator=generator, device=logits.device)
    labels = torch.searchsorted(cumulative, share * cumulative[..., -1:]).squeeze(-1)
    return labels.clamp_(max=logits.size(-1) - 1)  # logits that are not finite are passed nowhere
