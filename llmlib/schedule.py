"""Learning-rate schedules: pure functions from progress in [0, 1] to a share of the peak rate.

Progress is the share of the budget that is done, whatever the budget counts (seconds, tokens or
steps); ``train`` owns the clock. The first step has progress 0, the last one exactly 1.
"""

from __future__ import annotations

import math

FIRST_LR = 0.01  # share of the peak on the first step of a warm-up
SHARE_THAT_FITTED = 8_780 / 10_000  # of the steps the winner planned, when his time was up


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def one_cycle(progress: float, warmup: float, final_lr: float, cooldown: float) -> float:
    """Rise on a cosine from 1/100 to 1, then fall on a cosine to ``final_lr``.

    The recipe's schedule (``torch.optim.lr_scheduler.OneCycleLR``, Smith and Topin 2018), on progress.
    """
    if progress < warmup:
        return _cosine(FIRST_LR, 1.0, progress / warmup)
    return _cosine(1.0, final_lr, (progress - warmup) / (1 - warmup))


def one_cycle_unfinished(progress: float, warmup: float, final_lr: float, cooldown: float) -> float:
    """Break off ``one_cycle`` where the winner's run did: planned on steps, stopped by the clock."""
    return one_cycle(SHARE_THAT_FITTED * progress, warmup, final_lr, cooldown)


def cosine(progress: float, warmup: float, final_lr: float, cooldown: float) -> float:
    """Rise linearly to 1, then fall on a cosine to ``final_lr`` (arXiv:1608.03983, one period)."""
    if progress < warmup:
        return max(progress / warmup, FIRST_LR)
    return _cosine(1.0, final_lr, (progress - warmup) / (1 - warmup))


def wsd(progress: float, warmup: float, final_lr: float, cooldown: float) -> float:
    """Rise linearly to 1, stay, then fall linearly to ``final_lr`` over the last ``cooldown``.

    Warm-up, stable, decay (arXiv:2405.18392); without a cool-down it stays to the end.
    """
    if progress < warmup:
        return max(progress / warmup, FIRST_LR)
    start = max(warmup, 1 - cooldown)
    return 1.0 if progress <= start else 1.0 + (final_lr - 1.0) * (progress - start) / (1 - start)


def linear(progress: float, warmup: float, final_lr: float, cooldown: float) -> float:
    """Rise linearly to 1, then fall linearly to ``final_lr`` (arXiv:2502.15938 falls to 0)."""
    return wsd(progress, warmup, final_lr, cooldown=1.0)


SCHEDULES = {f.__name__: f for f in (one_cycle, one_cycle_unfinished, cosine, linear, wsd)}


def lr_multiplier(
    schedule: str, progress: float, warmup: float, final_lr: float, cooldown: float = 0.5
) -> float:
    """Evaluate a schedule by name; progress beyond [0, 1] counts as its nearer end."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}.")
    return SCHEDULES[schedule](min(max(progress, 0.0), 1.0), warmup, final_lr, cooldown)
