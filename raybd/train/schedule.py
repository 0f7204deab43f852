"""Learning rate over the steps of a run."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, *, base_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up to `base_lr`, then a cosine that ends at 0.

    Args:
        step: from 0, counted over the whole run. The first step has base_lr / warmup_steps, never 0.

    A run shorter than its warm-up spends itself warming up.
    """
    if step < warmup_steps:
        return base_lr * ((step + 1) / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base_lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
