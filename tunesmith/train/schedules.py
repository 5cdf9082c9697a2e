"""Learning rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from tunesmith.recipe.schema import TrainSection

MODULE_LEARNING_RATE = 1e-3


def warmup_steps(settings: TrainSection, total_steps: int) -> int:
    """Steps of the warm-up: its share of all steps, rounded up, and never all of them."""
    return min(math.ceil(settings.warmup_ratio * total_steps), total_steps - 1)


def learning_rate(settings: TrainSection, step: int, total_steps: int) -> float:
    """The learning rate of update number `step`, counted from 0.

    Warm-up rises linearly and reaches the peak at its last step: peak * (step + 1) / warmup.
    After it, with p = (step - warmup) / (total - warmup), the share of the peak falls from 1 towards
    m = min_learning_rate_ratio: m + (1 - m) * (1 + cos(pi p)) / 2, or 1 - (1 - m) p, or stays 1.
    """
    warmup = warmup_steps(settings, total_steps)
    if step < warmup:
        return peak_learning_rate(settings) * (step + 1) / warmup
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return peak_learning_rate(settings) * _decay(settings, progress)


def peak_learning_rate(settings: TrainSection) -> float:
    """The peak, once it is resolved; AdamW's own default of 1e-3 for a module that nobody gave one."""
    return MODULE_LEARNING_RATE if settings.learning_rate is None else settings.learning_rate


def _decay(settings: TrainSection, progress: float) -> float:
    if settings.schedule == "constant":
        return 1.0
    floor = settings.min_learning_rate_ratio
    left = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return floor + (1 - floor) * left
