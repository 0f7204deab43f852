"""Learning rate over the steps of a run."""

from __future__ import annotations

import math

from raybd.study import Schedule

_COOLDOWN = 0.2  # share of all steps


def learning_rate(kind: Schedule, step: int, *, base_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up to `base_lr`, then what the schedule says.

    `cosine` is half a cosine that ends at 0. `par` falls in a line to a tenth of `base_lr` at half of the steps
    after the warm-up, and from there in half a cosine to 0. `constant_cooldown` stays at `base_lr` and falls over the
    last fifth of all steps, by 1 - sqrt of the way, to 0: runs of other lengths have the same prefix, so that epochs
    of one that was stopped can be compared with those of one that was planned for fewer.

    Args:
        step: from 0, counted over the whole run. The first step has base_lr / warmup_steps, never 0.

    A run shorter than its warm-up spends itself warming up.

    Source: for `constant_cooldown`, Hägele et al. 2024, arXiv 2405.18392; for `par`, arXiv 2412.00727 and
    nmndeep/PerturbAndRecover@a720440, which has no warm-up: set it to 0.
    """
    if step < warmup_steps:
        return base_lr * ((step + 1) / warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if kind is Schedule.COSINE:
        return base_lr * _half_cosine(progress)
    if kind is Schedule.CONSTANT_COOLDOWN:
        cooldown = max(1.0, _COOLDOWN * total_steps)
        gone = max(0.0, (step - (total_steps - cooldown)) / cooldown)
        return base_lr * (1.0 - math.sqrt(min(1.0, gone)))
    if progress < 0.5:
        return base_lr * (1.0 - 1.8 * progress)
    return base_lr * 0.1 * _half_cosine(2.0 * progress - 1.0)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))
