"""Optimizers: how parameters are grouped, and a dict of builders.

``train`` sets the learning rate on every step through the groups; nothing here knows about time.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from llmlib.config import TrainConfig


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split parameters into decayed matrices and undecayed vectors (norm gains)."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build fused AdamW as the recipe sets it (Loshchilov and Hutter, arXiv:1711.05101)."""
    groups = param_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


OPTIMIZERS = {"adamw": adamw}


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build an optimizer by name; every trainable parameter is in exactly one of its groups."""
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer={config.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}."
        )
    optimizer = OPTIMIZERS[config.optimizer](model, config)
    grouped = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    assert grouped == Counter(id(p) for p in model.parameters() if p.requires_grad)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
