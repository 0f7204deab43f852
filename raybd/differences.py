"""How two fronts differ, and what one is worth, with bootstrap intervals: of pretrain objectives, or of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import combinations
from typing import Any

import numpy as np

from raybd.points import Floats
from raybd.pools import Pool

RESAMPLES, LEVEL, SEED = 1000, 0.95, 0


class Measure(StrEnum):
    """What is compared; the order is that of the columns of `Pool.values`."""

    HYPERVOLUME_SHARE = "hypervolume_share"
    BEST_TOP1 = "best_top1_at_asr_0.05"
    BEST_ASR = "best_asr_within_1"


def compare(
    pools: Mapping[str, Sequence[Pool]],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = SEED,
) -> list[dict[str, Any]]:
    """Return the difference of each two pretrain objectives in each measure, with percentile bootstrap intervals.

    A resample draws runs with replacement (with one run, that run), the same for every objective, and within each
    drawn run as many trials as it has, with replacement. What is given for several runs is their mean.

    A resample can lose a run's best trials and never find better ones, so each objective's own values in resamples
    lie on one side of the value of all trials; in a difference this cancels only where both lose alike. The interval
    says how far the difference hangs on single trials and seeds. It is no test of a hypothesis.

    Args:
        pools: for each pretrain objective its pool in each run; the runs are the same and in the same order.
        resamples, level, seed: of the bootstrap; the same seed gives the same interval.

    Returns: for each pair and measure both values, `difference` (first minus second), `low` and `high`, and
        `resamples`, those in which both had a point that qualifies. None where there is none.
    """
    names = list(pools)
    if len(names) < 2:
        return []
    runs = len(pools[names[0]])
    generator = np.random.default_rng(seed)
    runs_RK = generator.integers(0, runs, size=(resamples, runs))
    whole, resampled = {}, {}
    for name in names:
        found = [pool.values(np.ones((1, pool.num_trials), dtype=bool))[0] for pool in pools[name]]
        whole[name] = np.mean(found, axis=0)
        values_RKM = np.empty((resamples, runs, len(Measure)))
        for k, pool in enumerate(pools[name]):
            here_RK = runs_RK == k
            values_RKM[here_RK] = pool.resampled(int(here_RK.sum()), generator)
        resampled[name] = values_RKM.mean(axis=1)
    return [
        {
            "first": first,
            "second": second,
            "measure": measure.value,
            "first_value": _number(whole[first][m]),
            "second_value": _number(whole[second][m]),
            "difference": _number(whole[first][m] - whole[second][m]),
            **_interval(resampled[first][:, m] - resampled[second][:, m], level),
            "level": level,
            "runs": runs,
            "trials": [sum(pool.num_trials for pool in pools[name]) for name in (first, second)],
        }
        for first, second in combinations(names, 2)
        for m, measure in enumerate(Measure)
    ]


def worth(pool: Pool, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = SEED) -> list[dict[str, Any]]:
    """Return what one group's front is worth in each measure, with a percentile bootstrap interval over its trials.

    A resample can lose the best trials and never find better ones: an interval lies to the worse side of the value,
    and says how far the value hangs on single trials.

    Args:
        resamples, level, seed: of the bootstrap; the same seed gives the same interval.

    Returns: for each measure `value`, `low` and `high`, and `resamples`, those with a point that qualifies. None where
        there is none.
    """
    (whole,) = pool.values(np.ones((1, pool.num_trials), dtype=bool))
    values_RM = pool.resampled(resamples, np.random.default_rng(seed))
    return [
        {
            "measure": measure.value,
            "value": _number(whole[m]),
            **_interval(values_RM[:, m], level),
            "level": level,
            "trials": pool.num_trials,
        }
        for m, measure in enumerate(Measure)
    ]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _interval(values_R: Floats, level: float) -> dict[str, Any]:
    finite = np.sort(values_R[np.isfinite(values_R)])
    if not len(finite):
        return {"low": None, "high": None, "resamples": 0}
    low, high = (_quantile(finite, share) for share in ((1 - level) / 2, (1 + level) / 2))
    return {"low": low, "high": high, "resamples": len(finite)}


def _quantile(ordered: Floats, share: float) -> float:
    """Return what `np.quantile` does of numbers in order: that one loads what numpy has for masked arrays."""
    place = share * (len(ordered) - 1)
    below = int(place)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    rest = place - below
    return low + (high - low) * rest if rest < 0.5 else high - (high - low) * (1 - rest)
