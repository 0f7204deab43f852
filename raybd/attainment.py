"""Fronts of several runs as one: which points how many of the runs attain. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raybd import pareto


def levels(runs: int) -> dict[str, int]:
    """Return how many of the runs must attain a point for it to be in the best, the median and the worst surface."""
    return {"best": 1, "median": math.ceil(runs / 2), "worst": runs}


def surface(runs: Sequence[tuple[ArrayLike, ArrayLike]], *, attained_by: int) -> NDArray[np.float64]:
    """Return the corners of the region that at least so many runs attain: a level of the empirical attainment function.

    A run attains a point if one of its own is at least as accurate and has no higher ASR. The corners are a front.

    Args:
        runs: accuracies and ASR of each run's points, fractions, shapes [N]; they need not form a front.
        attained_by: number of runs, 1 for the best surface, all of them for the worst.

    Returns: (accuracy, ASR) by rising accuracy, shape [C, 2]; empty if too few runs have points.
    Errors: ValueError on a number that cannot be.
    Source: V. Grunert da Fonseca, C. M. Fonseca and A. O. Hall, EMO 2001, LNCS 1993, 213-225.
    """
    if not 1 <= attained_by <= len(runs):
        raise ValueError(f"attained by {attained_by} of {len(runs)} runs: 1 to {len(runs)} expected")
    points = [(np.asarray(top1, dtype=np.float64), np.asarray(asr, dtype=np.float64)) for top1, asr in runs]
    edges_A = np.unique(np.concatenate([top1 for top1, _ in points]))
    # For each run and accuracy, the lowest ASR at which the run is at least so accurate; infinite beyond its reach.
    lowest_RA = np.full((len(points), len(edges_A)), np.inf)
    for lowest_A, (top1, asr) in zip(lowest_RA, points, strict=True):
        np.minimum.at(lowest_A, np.searchsorted(edges_A, top1), asr)
        lowest_A[:] = np.minimum.accumulate(lowest_A[::-1])[::-1]
    asr_A = np.sort(lowest_RA, axis=0)[attained_by - 1]
    reached = np.isfinite(asr_A)
    edges, asr = edges_A[reached], asr_A[reached]
    kept = pareto.front(edges, asr)
    return np.stack([edges[kept], asr[kept]], axis=1)


def surfaces(runs: Sequence[tuple[ArrayLike, ArrayLike]]) -> dict[str, dict[str, Any]]:
    """Return the best, the median and the worst attainment surface, with the hypervolume of each.

    Args:
        runs: see `surface`; the fronts of studies that differ by their seed.

    Returns: for each level `attained_by` (runs), `hypervolume` and `points`, (accuracy, ASR) by rising accuracy.
    """
    found = {}
    for name, attained_by in levels(len(runs)).items():
        corners = surface(runs, attained_by=attained_by)
        found[name] = {
            "attained_by": attained_by,
            "hypervolume": pareto.hypervolume(corners[:, 0], corners[:, 1]),
            "points": corners.tolist(),
        }
    return found
