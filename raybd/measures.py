"""What a group of cleaning trials shows beside its front: how steady it is, and what a defender would have taken.

Pure functions of rows of the `epochs`, `trials` and `fronts` tables. A group is an (objective, pretrain_id, method).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raybd import fronts, pareto
from raybd.fronts import Row

# A step counts as unstable only beyond these: smaller ones are noise, and tell no two objectives apart.
TOP1_TOLERANCE, ASR_TOLERANCE = 0.001, 0.01
REFRESH = "batchnorm_refresh"


class Rule(StrEnum):
    """How a defender who does not know the trigger, and so not the ASR, picks a model."""

    LOWEST_LOSS = "lowest_loss"
    HIGHEST_TOP1 = "highest_top1"
    LAST_EPOCH = "last_epoch"


def unstable_steps(
    top1: ArrayLike, asr: ArrayLike, *, top1_tolerance: float = TOP1_TOLERANCE, asr_tolerance: float = ASR_TOLERANCE
) -> int:
    """Return how many steps of a run make it worse in both: accuracy down and ASR up, each by more than a tolerance.

    Args:
        top1, asr: fractions by epoch, shape [E]; there are E - 1 steps.
        top1_tolerance, asr_tolerance: fractions.
    """
    fall_S = -np.diff(np.asarray(top1, dtype=np.float64))
    rise_S = np.diff(np.asarray(asr, dtype=np.float64))
    return int(np.sum((fall_S > top1_tolerance + fronts.SLACK) & (rise_S > asr_tolerance + fronts.SLACK)))


def rebound(asr: Sequence[float]) -> float:
    """Return by how much the ASR of a run has risen again at its end: the last minus the lowest, a fraction."""
    return asr[-1] - min(asr)


def instability(
    rows: Iterable[Row], *, top1_tolerance: float = TOP1_TOLERANCE, asr_tolerance: float = ASR_TOLERANCE
) -> dict[str, Any] | None:
    """Say how steady the trials of a group are; None if none has an epoch after the poisoned model.

    Args:
        rows: rows of the `epochs` table on one half, from epoch 0. Points without training (`alpha`) have no course.
        top1_tolerance, asr_tolerance: see `unstable_steps`.

    Returns:
        trials, steps: counts of what was looked at; the step from the poisoned model to epoch 1 is one.
        unstable_steps, unstable_share: steps down in accuracy and up in ASR beyond the tolerances.
        rebound: last minus lowest ASR of a trial, mean over trials.
        best_at, best_at_median: where in a trial the point with the largest accuracy x (1 - ASR) lies, as a share of
            its epochs (0 the poisoned model, 1 the last epoch): mean and median over trials.
        by_trial: the same of each trial.
    """
    courses: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["epoch"]):
        if row.get("alpha") is None:
            courses[row["trial_id"]].append(row)
    found = []
    for trial_id, course in courses.items():
        if course[-1]["epoch"] == 0:
            continue
        top1, asr = [row["zeroshot_top1"] for row in course], [row["asr_top1"] for row in course]
        best = course[pareto.largest_area(top1, asr)]["epoch"]
        found.append(
            {
                "trial_id": trial_id,
                "steps": len(course) - 1,
                "unstable_steps": unstable_steps(top1, asr, top1_tolerance=top1_tolerance, asr_tolerance=asr_tolerance),
                "rebound": rebound(asr),
                "best_epoch": best,
                "best_at": best / course[-1]["epoch"],
            }
        )
    if not found:
        return None
    steps, unstable = sum(t["steps"] for t in found), sum(t["unstable_steps"] for t in found)
    places = [trial["best_at"] for trial in found]
    return {
        "top1_tolerance": top1_tolerance,
        "asr_tolerance": asr_tolerance,
        "trials": len(found),
        "steps": steps,
        "unstable_steps": unstable,
        # A run that resumed from a lone row has no step.
        "unstable_share": unstable / steps if steps else None,
        "rebound": statistics.fmean(trial["rebound"] for trial in found),
        "best_at": statistics.fmean(places),
        "best_at_median": statistics.median(places),
        "by_trial": found,
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


def _quoted(row: Row, rows: Iterable[Row], members: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Return a point with its scores and its regret on each half."""
    own = {r["split"]: r for r in rows if (r["trial_id"], r["epoch"]) == (row["trial_id"], row["epoch"])}
    return {
        "trial_id": row["trial_id"],
        "epoch": row["epoch"],
        "method": row["method"],
        "scores": {
            split: {
                "zeroshot_top1": r["zeroshot_top1"],
                "asr_top1": r["asr_top1"],
                **regret(r["zeroshot_top1"], r["asr_top1"], members[split]),
            }
            for split, r in own.items()
        },
    }


def defenders_choice(
    rows: Sequence[Row], trials: Sequence[Row], front: Iterable[Row]
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
    order, unfinished = fronts.trial_order(trials), fronts.unfinished_trials(trials)
    members: dict[str, list[Row]] = defaultdict(list)
    for row in front:
        members[row["split"]].append(row)

    def competing(kind: str) -> list[Row]:
        # An alpha of 0 is the poisoned model itself.
        found = fronts.candidates(rows, kind, order, unfinished)
        return [row for row in found if row["epoch"] > 0 and row.get("alpha") != 0]

    def best(found: Sequence[Row], score: Callable[[Row], float]) -> dict[str, Any] | None:
        return _quoted(max(found, key=score), rows, members) if found else None

    every = competing("any_epoch")
    return {
        Rule.LOWEST_LOSS.value: best([r for r in every if _finite(r.get("loss"))], lambda row: -row["loss"]),
        Rule.HIGHEST_TOP1.value: best(every, lambda row: row["zeroshot_top1"]),
        Rule.LAST_EPOCH.value: best(competing("final"), lambda row: row["zeroshot_top1"]),
    }


def _finite(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))


def refresh_baseline(rows: Sequence[Row], front: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the points that only had their BatchNorm statistics refreshed, best first: a baseline of its own.

    Args:
        rows: rows of the `epochs` table of one poisoned model, of every method.
        front: rows of the `fronts` table to compare with: the front of all epochs, on each half.

    Returns: trial, epoch, scores by half with how far the front is ahead (`regret`), by falling accuracy x (1 - ASR)
        on the search half. Empty if no trial has the method.
    """
    members: dict[str, list[Row]] = defaultdict(list)
    for row in front:
        members[row["split"]].append(row)
    refreshed = [row for row in rows if row["method"] == REFRESH and row["epoch"] > 0]
    chosen_on = fronts.halves(rows)[0]
    points = [row for row in refreshed if row["split"] == chosen_on]
    points.sort(key=lambda row: (-row["zeroshot_top1"] * (1 - row["asr_top1"]), row["trial_id"], row["epoch"]))
    return [_quoted(row, refreshed, members) for row in points]
