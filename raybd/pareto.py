"""Fronts and hypervolumes for two search objectives, accuracy up and attack success rate down: pure functions."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_FEW = 1000  # points are sorted as they are
_CORNERS = 8


def _points(top1: ArrayLike, asr: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    accuracy_N, asr_N = np.asarray(top1, dtype=np.float64), np.asarray(asr, dtype=np.float64)
    if accuracy_N.shape != asr_N.shape or accuracy_N.ndim != 1:
        raise ValueError(f"two vectors of one length expected, got shapes {accuracy_N.shape} and {asr_N.shape}")
    if not (np.isfinite(accuracy_N).all() and np.isfinite(asr_N).all()):
        raise ValueError("points must be finite")
    return accuracy_N, asr_N


def front(top1: ArrayLike, asr: ArrayLike) -> NDArray[np.int64]:
    """Return the indices of the points that no other point beats, by rising accuracy.

    A point is beaten by one that is at least as good in both and better in one. Of equal points the first stays.

    Args:
        top1, asr: fractions, shape [N].

    Errors: ValueError on shapes that differ or values that are not finite.
    """
    accuracy_N, asr_N = _points(top1, asr)
    # By falling accuracy, then rising ASR, then position: a point stays if its ASR is below all before it.
    some = contenders(accuracy_N, asr_N)
    order = some[np.lexsort((asr_N[some], -accuracy_N[some]))]
    return order[records(asr_N[order])][::-1]


def records(asr: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the places of the values that are below all before them: of points by falling accuracy, the front."""
    before = np.concatenate(([np.inf], np.minimum.accumulate(asr)[:-1]))
    return np.flatnonzero(asr < before)


def contenders(top1: NDArray[np.float64], asr: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices, rising, of points among which are all that no other beats, and all that equal those.

    Of many points most are beaten by one of a few: the rest need not be sorted.
    """
    if len(top1) <= _FEW:
        return np.arange(len(top1))
    sample = slice(None, None, -(-len(top1) // _FEW))
    few = front(top1[sample], asr[sample])
    few_top1, few_asr = top1[sample][few], asr[sample][few]
    # A few corners tell most of what is beaten, at a fraction of the cost of a search for each point.
    some_N = np.ones(len(top1), dtype=bool)
    for corner in range(0, len(few), -(-len(few) // _CORNERS)):
        some_N &= (top1 >= few_top1[corner]) | (asr < few_asr[corner])
    some = np.flatnonzero(some_N)
    top1, asr = top1[some], asr[some]
    # Along a front ASR rises with accuracy: of members at least as accurate the first has the lowest ASR.
    place_N = np.searchsorted(few_top1, top1)
    best_N = np.append(few_asr, np.inf)[place_N]
    equal_N = (asr == best_N) & (top1 == np.append(few_top1, np.inf)[place_N])
    return some[(asr < best_N) | equal_N]


def reach(
    top1: NDArray[np.float64], asr: NDArray[np.float64], *, depth: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the corners, by rising accuracy, of where at least `depth` of these points beat whatever is there.

    That is what is less accurate than some corner and has no lower ASR. Along the corners ASR rises with accuracy.
    """
    order = np.lexsort((asr, -top1))
    lowest: list[float] = []
    found: list[tuple[float, float]] = []
    for accuracy, rate in zip(top1[order].tolist(), asr[order].tolist(), strict=True):
        insort(lowest, rate)
        del lowest[depth:]
        if len(lowest) == depth and (not found or lowest[-1] < found[-1][1]):
            found.append((accuracy, lowest[-1]))
    corners_C2 = np.array(found[::-1], dtype=np.float64).reshape(-1, 2)
    return corners_C2[:, 0].copy(), corners_C2[:, 1].copy()


def hypervolume(top1: ArrayLike, asr: ArrayLike) -> float:
    """Return the area that the points dominate, against accuracy 0 and ASR 1: in [0, 1] for fractions.

    Args:
        top1, asr: fractions, shape [N]; they need not form a front.
    """
    accuracy_N, asr_N = _points(top1, asr)
    kept = front(accuracy_N, asr_N)
    widths = np.diff(np.concatenate(([0.0], accuracy_N[kept])))
    return float(np.sum(widths * (1.0 - asr_N[kept])))


def hypervolume_share(area: float, baseline_top1: float) -> float | None:
    """Return a hypervolume as a share of the poisoned model's rectangle: hypervolume / (baseline accuracy x 1).

    The rectangle reaches from accuracy 0 to that of the poisoned model and over all ASR: a front that removes the
    backdoor and loses no accuracy has 1, one that gains accuracy may have more, the poisoned model alone has 1 - ASR.

    Args:
        area: what `hypervolume` gives.
        baseline_top1: accuracy of the poisoned model before cleaning, on the same images.

    Returns: None if the baseline is 0 or not known.
    """
    return area / baseline_top1 if baseline_top1 > 0 else None


def contributions(top1: ArrayLike, asr: ArrayLike) -> NDArray[np.float64]:
    """Return for each point the area that only it dominates, shape [N]; 0 for points off the front and for doubles.

    It is what the hypervolume of all points loses without that point: a beaten point can take part of it over.
    """
    accuracy_N, asr_N = _points(top1, asr)
    area = hypervolume(accuracy_N, asr_N)
    found = np.zeros(len(accuracy_N))
    for i in front(accuracy_N, asr_N):
        found[i] = max(0.0, area - hypervolume(np.delete(accuracy_N, i), np.delete(asr_N, i)))
    return found


def lowest_asr(top1: ArrayLike, asr: ArrayLike, *, floor: float) -> int | None:
    """Return the index of the point with the lowest ASR among those of accuracy >= floor; None if there is none.

    Of equal ASR the higher accuracy wins, then the first.
    """
    accuracy_N, asr_N = _points(top1, asr)
    allowed = np.flatnonzero(accuracy_N >= floor)
    if not len(allowed):
        return None
    order = np.lexsort((allowed, -accuracy_N[allowed], asr_N[allowed]))
    return int(allowed[order[0]])


def highest_top1(top1: ArrayLike, asr: ArrayLike, *, ceiling: float) -> int | None:
    """Return the index of the most accurate point among those of ASR <= ceiling; None if there is none."""
    accuracy_N, asr_N = _points(top1, asr)
    allowed = np.flatnonzero(asr_N <= ceiling)
    if not len(allowed):
        return None
    order = np.lexsort((allowed, asr_N[allowed], -accuracy_N[allowed]))
    return int(allowed[order[0]])


def largest_area(top1: Sequence[float], asr: Sequence[float]) -> int:
    """Return the index of the point that alone dominates most, accuracy x (1 - ASR): a trial's best epoch."""
    accuracy_N, asr_N = _points(top1, asr)
    return int(np.argmax(accuracy_N * (1.0 - asr_N)))
