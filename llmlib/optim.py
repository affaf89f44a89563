"""Optimizers: how parameters are grouped, and a dict of builders.

``train`` sets the learning rate on every step through the groups; nothing here knows about time.
A step works on lists of tensors, so that a GPU is not kept waiting by launches, and never reads a
number back from the device.
"""

from __future__ import annotations

import math
import os
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmlib.config import TrainConfig

EPS = 1e-8  # AdamW's


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split parameters into decayed matrices and undecayed vectors (norm gains)."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


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
        return (
            params,
            [p.grad for p in params],
            *([self.state[p][n] for p in params] for n in names),
        )


class AdEMAMix(_Counting):
    """AdamW plus a slow average of gradients (Pagliardini et al., arXiv:2409.03137).

    beta3 and alpha as in the same laboratory's benchmark of short runs (arXiv:2509.01440). They warm
    up as published, but over the slow average's own memory of 1 / (1 - beta3) steps, since a run on
    a clock can't know how many steps it will take; the paper takes all of them.
    """

    BETA3, ALPHA = 0.999, 8.0

    @torch.no_grad()
    def step(self) -> None:
        self.count_step()
        for group in self.param_groups:
            params, grads, fast, slow, squares = self.lists(
                group, "exp_avg", "exp_avg_slow", "exp_avg_sq"
            )
            lr, (beta1, beta2) = group["lr"], group["betas"]
            warm = min(self.n_steps * (1 - self.BETA3), 1.0)
            torch._foreach_lerp_(fast, grads, 1 - beta1)
            torch._foreach_lerp_(slow, grads, 1 - mix_half_lives(beta1, self.BETA3, warm))
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            updates = torch._foreach_mul(slow, warm * self.ALPHA)
            torch._foreach_add_(updates, fast, alpha=1 / (1 - beta1**self.n_steps))
            scales = torch._foreach_sqrt(squares)
            torch._foreach_mul_(scales, (1 - beta2**self.n_steps) ** -0.5)
            torch._foreach_add_(scales, EPS)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_addcdiv_(params, updates, scales, -lr)


def mix_half_lives(start: float, end: float, share: float) -> float:
    """Return the beta whose half-life is a share of the way between those of two betas."""
    return start ** (1 / (1 - share + share * math.log(start) / math.log(end)))


class Muon(_Counting):
    """Muon for the groups of hidden matrices, AdamW for the others (K. Jordan 2024).

    Its step sizes match AdamW's in root mean square, so that one rate serves both (arXiv:2502.16982).
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self) -> None:
        self.count_step()
        for group in self.param_groups:
            (self._step_muon if group["is_hidden"] else self._step_adamw)(group)

    def _step_muon(self, group: dict) -> None:
        params, grads, momenta = self.lists(group, "momentum")
        torch._foreach_lerp_(momenta, grads, 1 - self.MOMENTUM)
        updates = torch._foreach_lerp(grads, momenta, self.MOMENTUM)  # Nesterov's
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for shape in dict.fromkeys(p.shape for p in params):
            alike = [i for i, p in enumerate(params) if p.shape == shape]
            update = orthogonalize(torch.stack([updates[i] for i in alike]))
            lr = 0.2 * max(shape) ** 0.5 * group["lr"]
            torch._foreach_add_([params[i] for i in alike], update.unbind(), alpha=-lr)

    def _step_adamw(self, group: dict) -> None:
        params, *lists = self.lists(group, "exp_avg", "exp_avg_sq")
        beta1, beta2 = group["betas"]
        step = torch.full((), self.n_steps, dtype=torch.float32, device=params[0].device)
        torch._fused_adamw_(
            params,
            *lists,
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move the singular values of matrices (n, rows, columns) near 1: five Newton-Schulz steps.

    The polynomial and its coefficients are K. Jordan's (2024). In bf16 where the hardware multiplies
    in it, as the model does; elsewhere that costs 60 times fp32's time.
    """
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.to(compute_dtype(matrices.device))
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
    return (x.mT if is_tall else x).to(matrices.dtype)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Choose bf16 where the hardware multiplies in it, else fp32; weights are fp32 either way.

    The environment's LLMLIB_DTYPE ("float32" or "bfloat16") goes first: numbers of two machines
    compare only in one type.
    """
    if name := os.environ.get("LLMLIB_DTYPE"):
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        pays = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        pays = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if pays else torch.float32


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
        self.rho = rho
        self.has_new_hessian = False
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
        for group in self.param_groups:
            _, grads, hessians = self.lists(group, "hessian")
            for grad in grads:
                grad.nan_to_num_(0.0, 0.0, 0.0)  # would never leave the average again
            n, (_, beta2) = inputs.numel() * size, group["betas"]
            torch._foreach_mul_(hessians, beta2)
            torch._foreach_addcmul_(hessians, grads, grads, (1 - beta2) * n)
        self.zero_grad()
        self.has_new_hessian = True

    @torch.no_grad()
    def step(self) -> None:
        assert not self.hessian_is_due, "estimate_hessian was not called"
        self.count_step()
        counts, n_params = [], 0
        for group in self.param_groups:
            params, grads, momenta, hessians = self.lists(group, "exp_avg", "hessian")
            lr, (beta1, _) = group["lr"], group["betas"]
            torch._foreach_lerp_(momenta, grads, 1 - beta1)
            scales = torch._foreach_mul(hessians, self.rho)
            torch._foreach_add_(scales, 1e-15)
            updates = torch._foreach_div(momenta, scales)
            if self.has_new_hessian:
                counts += [(u.abs() < 1).sum() for u in updates]
                n_params += sum(u.numel() for u in updates)
            torch._foreach_clamp_max_(updates, 1.0)
            torch._foreach_clamp_min_(updates, -1.0)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-lr)
        if self.has_new_hessian:
            self.unclipped_share = torch.stack(counts).sum() / n_params
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


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build fused AdamW as the recipe sets it (Loshchilov and Hutter, arXiv:1711.05101)."""
    groups = param_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=EPS, fused=True)


def ademamix(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build AdEMAMix; what it shares with AdamW is set as for AdamW."""
    return AdEMAMix(param_groups(model, config.weight_decay), config.lr, config.betas)


def muon(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build Muon for the matrices in the blocks, at ``matrix_lr``, and AdamW for the rest."""
    matrices, vectors = param_groups(model, config.weight_decay)
    in_blocks = {id(p) for p in model.layers.parameters()}
    hidden = [p for p in matrices["params"] if id(p) in in_blocks]
    others = [p for p in matrices["params"] if id(p) not in in_blocks]
    groups = [
        matrices | {"params": hidden, "is_hidden": True},
        matrices | {"params": others, "is_hidden": False},
        vectors | {"is_hidden": False},
    ]
    groups[0]["lr_scale"] = (config.matrix_lr or config.lr) / config.lr
    return Muon(groups, config.lr, config.betas)


def sophia(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build Sophia-G with the published constants; only ``lr`` is the config's."""
    return Sophia(param_groups(model, 0.2), config.lr, betas=(0.965, 0.99), rho=0.05)


def sophia_writeup(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build Sophia-G as the write-up ran it: AdamW's settings, and ``bs`` at 5120 as in the code."""
    tokens_per_step = config.micro_batch * config.grad_accum * model.config.seq_len
    groups = param_groups(model, config.weight_decay)
    return Sophia(groups, config.lr, config.betas, rho=0.05 * 5120 / tokens_per_step)


OPTIMIZERS = {f.__name__: f for f in (adamw, ademamix, muon, sophia, sophia_writeup)}


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build an optimizer by name; every trainable parameter is in exactly one of its groups."""
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer={config.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}."
        )
    optimizer = OPTIMIZERS[config.optimizer](model, config)
    set_lr(optimizer, config.lr)
    grouped = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    assert grouped == Counter(id(p) for p in model.parameters() if p.requires_grad)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times the group's ``lr_scale`` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
