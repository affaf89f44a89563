"""Learning-rate schedules: pure functions from progress in [0, 1] to a share of the peak rate.

Progress is the share of the budget that is done, whatever the budget counts (seconds, tokens or
steps); ``train`` owns the clock. The first step has progress 0, the last one exactly 1.
"""

from __future__ import annotations

import math


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def one_cycle(progress: float, warmup: float, final_lr: float) -> float:
    """Rise on a cosine from 1/100 to 1, then fall on a cosine to ``final_lr``.

    The recipe's schedule (``torch.optim.lr_scheduler.OneCycleLR``, Smith and Topin 2018), on progress.
    """
    if progress < warmup:
        return _cosine(0.01, 1.0, progress / warmup)
    return _cosine(1.0, final_lr, (progress - warmup) / (1 - warmup))


def linear(progress: float, warmup: float, final_lr: float) -> float:
    """Rise linearly to 1, then fall linearly to ``final_lr`` (arXiv:2502.15938 falls to 0)."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return 1.0 + (final_lr - 1.0) * (progress - warmup) / (1 - warmup)


SCHEDULES = {"one_cycle": one_cycle, "linear": linear}


def lr_multiplier(schedule: str, progress: float, warmup: float, final_lr: float) -> float:
    """Evaluate a schedule by name; progress beyond [0, 1] counts as its nearer end."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}.")
    return SCHEDULES[schedule](min(max(progress, 0.0), 1.0), warmup, final_lr)
