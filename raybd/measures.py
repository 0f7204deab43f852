"""What a group of cleaning trials shows beside its front: how steady it is, and what a defender would have taken.

Pure functions of rows of the `epochs`, `trials` and `fronts` tables. A group is an (objective, pretrain_id, method).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raybd import fronts
from raybd.columns import combined, ordered
from raybd.fronts import Standing
from raybd.points import Floats, Points, Row

# A step counts as unstable only beyond these: smaller ones are noise, and tell no two objectives apart.
TOP1_TOLERANCE, ASR_TOLERANCE = 0.001, 0.01
REFRESH = "batchnorm_refresh"


class Rule(StrEnum):
    """How a defender who does not know the trigger, and so not the ASR, picks a model."""

    LOWEST_LOSS = "lowest_loss"
    HIGHEST_TOP1 = "highest_top1"
    LAST_EPOCH = "last_epoch"


def unstable(top1: ArrayLike, asr: ArrayLike, *, top1_tolerance: float, asr_tolerance: float) -> NDArray[np.bool_]:
    """Say which steps make a run worse in both: accuracy down and ASR up, each by more than a tolerance.

    Args:
        top1, asr: fractions by epoch, shape [E].
        top1_tolerance, asr_tolerance: fractions.

    Returns: shape [E - 1].
    """
    fall_S = -np.diff(np.asarray(top1, dtype=np.float64))
    rise_S = np.diff(np.asarray(asr, dtype=np.float64))
    return np.asarray((fall_S > top1_tolerance + fronts.SLACK) & (rise_S > asr_tolerance + fronts.SLACK))


def instability(
    rows: Iterable[Row],
    *,
    top1_tolerance: float = TOP1_TOLERANCE,
    asr_tolerance: float = ASR_TOLERANCE,
    by_trial: bool = True,
) -> dict[str, Any] | None:
    """Say how steady the trials of a group are; None if none has an epoch after the poisoned model.

    Args:
        rows: rows of the `epochs` table on one half, from epoch 0. Points without training (`alpha`) have no course.
        top1_tolerance, asr_tolerance: see `unstable`.
        by_trial: say it of each trial too.

    Returns:
        trials, steps: counts of what was looked at; the step from the poisoned model to epoch 1 is one.
        unstable_steps, unstable_share: steps down in accuracy and up in ASR beyond the tolerances.
        rebound: last minus lowest ASR of a trial, mean over trials.
        best_at, best_at_median: where in a trial the point with the largest accuracy x (1 - ASR) lies, as a share of
            its epochs (0 the poisoned model, 1 the last epoch): mean and median over trials.
        by_trial: the same of each trial.
    """
    points = Points.of(rows)
    points = points.take(~points.column("mixed"))
    found = _courses(points, top1_tolerance, asr_tolerance)
    if not found["trial_id"]:
        return None
    steps, unstable = sum(found["steps"]), sum(found["unstable_steps"])
    whole = {
        "top1_tolerance": top1_tolerance,
        "asr_tolerance": asr_tolerance,
        "trials": len(found["trial_id"]),
        "steps": steps,
        "unstable_steps": unstable,
        # A run that resumed from a lone row has no step.
        "unstable_share": unstable / steps if steps else None,
        "rebound": statistics.fmean(found["rebound"]),
        "best_at": statistics.fmean(found["best_at"]),
        "best_at_median": statistics.median(found["best_at"]),
    }
    if by_trial:
        whole["by_trial"] = [dict(zip(found, trial, strict=True)) for trial in zip(*found.values(), strict=True)]
    return whole


def _courses(points: Points, top1_tolerance: float, asr_tolerance: float) -> dict[str, list[Any]]:
    """Return what `instability` says of each trial, column by column, in the order of their first epochs."""
    trial_N, epoch_N = points.column("trial_id"), points.column("epoch")
    if not len(points):
        return {"trial_id": []}
    # By the first epoch of a trial, then by the first row that has it, then by epoch.
    first_T = np.full(len(points.texts["trial_id"]), np.iinfo(np.int64).max)
    np.minimum.at(first_T, trial_N, epoch_N)
    firsts = np.flatnonzero(epoch_N == first_T[trial_N])
    row_T = np.zeros(len(first_T), dtype=np.int64)
    row_T[trial_N[firsts][::-1]] = firsts[::-1]
    trials = np.flatnonzero(np.bincount(trial_N))
    trials = trials[np.lexsort((row_T[trials], first_T[trials]))]
    place_T = np.zeros(len(first_T), dtype=np.int64)
    place_T[trials] = np.arange(len(trials))
    key_N, _ = combined([(place_T[trial_N], len(trials)), (epoch_N, int(epoch_N.max()) + 1)])
    order = ordered(key_N)
    courses = points if order is None else points.take(order)
    epoch_N, top1_N, asr_N = (courses.column(name) for name in ("epoch", "zeroshot_top1", "asr_top1"))
    length_T = np.bincount(place_T[trial_N], minlength=len(trials))
    end_T = np.cumsum(length_T)
    start_T = end_T - length_T
    worse_N = np.zeros(len(courses), dtype=bool)
    worse_N[1:] = unstable(top1_N, asr_N, top1_tolerance=top1_tolerance, asr_tolerance=asr_tolerance)
    worse_N[start_T] = False  # from one trial to the next is no step
    area_N = top1_N * (1.0 - asr_N)
    largest_N = np.flatnonzero(area_N == np.maximum.reduceat(area_N, start_T).repeat(length_T))
    best_T = epoch_N[largest_N[np.searchsorted(largest_N, start_T)]]  # of equals the first
    last_T = epoch_N[end_T - 1]
    trained_T = last_T > 0
    texts = courses.texts["trial_id"]
    return {
        "trial_id": [texts[code] for code in courses.column("trial_id")[start_T[trained_T]].tolist()],
        "steps": (length_T - 1)[trained_T].tolist(),
        "unstable_steps": np.add.reduceat(worse_N, start_T, dtype=np.int64)[trained_T].tolist(),
        "rebound": (asr_N[end_T - 1] - np.minimum.reduceat(asr_N, start_T))[trained_T].tolist(),
        "best_epoch": best_T[trained_T].tolist(),
        "best_at": (best_T[trained_T] / last_T[trained_T]).tolist(),
    }


def regret(top1: float, asr: float, front: Iterable[Row]) -> dict[str, float]:
    """Return what a point gives away against a front: in ASR at its accuracy, and in accuracy at its ASR.

    `regret_asr` is its ASR minus the lowest on the front among points at least as accurate; `regret_top1` the highest
    accuracy on the front among points of no higher ASR minus its own. `regret_asr_within_1` allows the front a point
    of accuracy less: the most accurate of all points has no `regret_asr`, yet may keep a backdoor that a point of
    accuracy would have removed. The point counts as a member: on images on which the front was not chosen it may beat
    all members, and then gives nothing away.

    Args:
        top1, asr: the point, fractions.
        front: rows with `zeroshot_top1` and `asr_top1`, on the same images.
    """
    points = [(top1, asr), *((row["zeroshot_top1"], row["asr_top1"]) for row in front)]
    return {
        "regret_asr": asr - min(s for a, s in points if a >= top1),
        "regret_asr_within_1": asr - min(s for a, s in points if a >= top1 - 0.01 - fronts.SLACK),
        "regret_top1": max(a for a, s in points if s <= asr) - top1,
    }


def _quoted(points: Points, chosen: NDArray[np.int64], members: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Return points, given by their rows, each with its scores and its regret on each half."""
    own: dict[tuple[str, int], dict[str, Row]] = defaultdict(dict)
    for row in points.same_points(chosen):
        own[row["trial_id"], row["epoch"]][row["split"]] = row
    return [
        {
            "trial_id": row["trial_id"],
            "epoch": row["epoch"],
            "method": row["method"],
            "scores": {
                split: {
                    "zeroshot_top1": r["zeroshot_top1"],
                    "asr_top1": r["asr_top1"],
                    **regret(r["zeroshot_top1"], r["asr_top1"], members.get(split, ())),
                }
                for split, r in own[row["trial_id"], row["epoch"]].items()
            },
        }
        for row in points.take(chosen)
    ]


def _by_split(front: Iterable[Row]) -> dict[str, list[Row]]:
    members: dict[str, list[Row]] = defaultdict(list)
    for row in front:
        members[row["split"]].append(row)
    return members


def defenders_choice(
    rows: Iterable[Row], trials: Iterable[Row] | Standing, front: Iterable[Row]
) -> dict[str, dict[str, Any] | None]:
    """Return what a defender who does not know the trigger would have taken from a group, and the regret of it.

    Every epoch of every trial after the poisoned model competes; the choice is made on the search half.
    `lowest_loss`: the least training loss on the cleaning set (`loss`). Losses of other weights or methods are sums
    of other terms, so across them this favours the smaller sum; points without a loss do not compete.
    `highest_top1`: the highest accuracy on clean images. `last_epoch`: the last epoch of the trial that is then the
    most accurate, among trials that came to their end. Of equals the trial of lowest number, then the first epoch.

    Args:
        rows: rows of the `epochs` table, of one group.
        trials: rows of the `trials` table.
        front: rows of the `fronts` table: the group's front of all epochs, on each half.

    Returns: for each rule trial, epoch, and by half the scores with what `regret` gives;
        None where no point has what the rule looks at.
    """
    points = Points.of(rows)
    standing = Standing.of(points, trials)
    members = _by_split(front)
    # An alpha of 0 is the poisoned model itself.
    cleaned_N = (points.column("epoch") > 0) & (points.column("alpha") != 0)
    every_N, final_N = (cleaned_N & fronts.candidates(points, kind, standing) for kind in fronts.KINDS)
    top1_N, loss_N = points.column("zeroshot_top1"), points.column("loss")

    def best(competing_N: NDArray[np.bool_], score_N: Floats) -> dict[str, Any] | None:
        found = np.flatnonzero(competing_N)
        if not len(found):
            return None
        found = found[score_N[found] == score_N[found].max()]
        return _quoted(points, standing.order(points, found)[:1], members)[0]

    return {
        Rule.LOWEST_LOSS.value: best(every_N & np.isfinite(loss_N), -loss_N),
        Rule.HIGHEST_TOP1.value: best(every_N, top1_N),
        Rule.LAST_EPOCH.value: best(final_N, top1_N),
    }


def refresh_baseline(rows: Iterable[Row], front: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the points that only had their BatchNorm statistics refreshed, best first: a baseline of its own.

    Args:
        rows: rows of the `epochs` table of one poisoned model, of every method.
        front: rows of the `fronts` table to compare with: the front of all epochs, on each half.

    Returns: trial, epoch, scores by half with how far the front is ahead (`regret`), by falling accuracy x (1 - ASR)
        on the search half. Empty if no trial has the method.
    """
    points = Points.of(rows)
    chosen_on = fronts.halves(points)[0]
    points = points.take(points.having("method", REFRESH) & (points.column("epoch") > 0))
    if not len(points):
        return []
    chosen = [
        (-row["zeroshot_top1"] * (1 - row["asr_top1"]), row["trial_id"], row["epoch"], place)
        for place, row in enumerate(points)
        if row["split"] == chosen_on
    ]
    return _quoted(points, np.array([place for *_, place in sorted(chosen)], dtype=np.int64), _by_split(front))
