"""Rates from counts, and how sure one may be of them. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

SPLITS = ("search", "report")
Z_95 = 1.959963984540054


def wilson(successes: int, n: int, *, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a share, as fractions; (0, 1) if nothing was counted.

    Args:
        successes, n: counts, 0 <= successes <= n.
        z: quantile of the normal distribution; the default gives 95 %.

    Errors: ValueError on counts that cannot be.
    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n}: counts with 0 <= successes <= n expected")
    if n == 0:
        return 0.0, 1.0
    share, z2_n = successes / n, z * z / n
    centre = (share + z2_n / 2) / (1 + z2_n)
    half = z * math.sqrt(share * (1 - share) / n + z2_n / (4 * n)) / (1 + z2_n)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


# Poisoned models whose backdoors are less alike, or weaker, than this are poor ground for comparing cleanings.
ALIKE, STRONG = 0.05, 0.95


@dataclass(frozen=True)
class Counts:
    """What was counted on one half of the evaluation set.

    Attributes:
        correct_clean: of `n_clean` clean images, those classified right.
        hit_target: of `n_triggered` triggered images, those classified as the target.
        correct_triggered: triggered images that are still classified right; None where nobody counted them.
    """

    n_clean: int = 0
    correct_clean: int = 0
    n_triggered: int = 0
    hit_target: int = 0
    correct_triggered: int | None = 0

    def __add__(self, other: Counts) -> Counts:
        both = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        sums: dict[str, Any] = {name: None if None in pair else sum(pair) for name, pair in both.items()}
        return Counts(**sums)

    def attack_columns(self) -> dict[str, float | int | None]:
        """Return ASR and robust accuracy as fractions, with their counts."""
        return {
            "asr_top1": self.hit_target / self.n_triggered,
            "robust_top1": None if self.correct_triggered is None else self.correct_triggered / self.n_triggered,
            "n_triggered": self.n_triggered,
            "hit_target": self.hit_target,
            "correct_triggered": self.correct_triggered,
        }

    def columns(self) -> dict[str, float | int | None]:
        """Return accuracy, ASR and robust accuracy as fractions, with the counts: columns of the tables."""
        clean = {"n_clean": self.n_clean, "correct_clean": self.correct_clean}
        return {"zeroshot_top1": self.correct_clean / self.n_clean, **clean, **self.attack_columns()}
