"""Learning-rate schedules: pure functions from progress in [0, 1] to a share of the peak rate.

Progress is the share of the budget that is done, whatever the budget counts (seconds, tokens or
steps); ``budget`` owns the clock. The first step has progress 0, the last one exactly 1.
"""

import math

from llmlib.config import TrainConfig

FIRST = 0.01  # share of the peak on the first step of a warm-up
SHARE_THAT_FITTED = 8_780 / 10_000  # of the steps the winner planned, when his time was up


def lr_factor(config: TrainConfig, progress: float) -> float:
    """Evaluate the config's schedule; progress beyond [0, 1] counts as its nearer end.

    one_cycle: up on a cosine from 1/100, down on one to ``final_lr`` (torch's OneCycleLR, Smith and
    Topin 2018), the recipe's. one_cycle_unfinished breaks off where the winner's run did, which was
    planned on steps and stopped by the clock. The others rise linearly. cosine falls on a cosine
    (arXiv:1608.03983), linear linearly (arXiv:2502.15938), wsd stays at the peak until the last
    ``cooldown`` (arXiv:2405.18392).
    """
    progress, start = min(max(progress, 0.0), 1.0), config.warmup
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
