"""Do two pretrain objectives differ? Differences of what their fronts are worth, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raybd import fronts, pareto
from raybd.fronts import Row

RESAMPLES, LEVEL, SEED = 1000, 0.95, 0
CEILING, POINTS_LOST = 0.05, 0.01
# Resamples are handled in blocks of about so many numbers.
_BLOCK = 2_000_000

Floats = NDArray[np.float64]


class Measure(StrEnum):
    """What is compared; the order is that of the columns of `Pool.values`."""

    HYPERVOLUME_SHARE = "hypervolume_share"
    BEST_TOP1 = "best_top1_at_asr_0.05"
    BEST_ASR = "best_asr_within_1"


@dataclass(frozen=True)
class Pool:
    """The points of one group in one run that can be on a front of some of its trials.

    Attributes:
        trial_P: index of each point's trial, -1 for the poisoned model, which always competes; shape [P].
        top1_P, asr_P: on the half that points are chosen on, by falling accuracy, then rising ASR, shape [P].
        quoted_top1_P, quoted_asr_P: the same points on the half that they are quoted on.
        num_trials: T, the number of trials.
        before, quoted_before: accuracy of the poisoned model on each half.
    """

    trial_P: NDArray[np.int64]
    top1_P: Floats
    asr_P: Floats
    quoted_top1_P: Floats
    quoted_asr_P: Floats
    num_trials: int
    before: float
    quoted_before: float

    def values(self, included_RT: NDArray[np.bool_]) -> Floats:
        """Return the measures, shape [R, 3], for R selections of trials; NaN where no point qualifies.

        Chosen on one half and quoted on the other, as `fronts.compute` and `fronts.summarise` do.
        """
        size = max(1, _BLOCK // max(1, len(self.trial_P)))
        blocks = [self._values(included_RT[i : i + size]) for i in range(0, len(included_RT), size)]
        return np.concatenate(blocks) if blocks else np.empty((0, len(Measure)))

    def _values(self, included_RT: NDArray[np.bool_]) -> Floats:
        always = np.ones((len(included_RT), 1), dtype=bool)
        competes_RP = np.concatenate([included_RT, always], axis=1)[:, self.trial_P]
        asr_RP = np.where(competes_RP, self.asr_P, np.inf)
        # Points come by falling accuracy: one is on the front if its ASR is below all before it.
        lowest_RP = np.minimum.accumulate(asr_RP, axis=1)
        member_RP = np.concatenate([competes_RP[:, :1], asr_RP[:, 1:] < lowest_RP[:, :-1]], axis=1)
        share_R = self._quoted_hypervolume(member_RP) / self.quoted_before
        under_RP = member_RP & (self.asr_P <= CEILING)
        within_RP = member_RP & (self.top1_P >= self.before - POINTS_LOST - fronts.SLACK)
        # Along the front accuracy and ASR fall: the first under the ceiling is the most accurate, the last one
        # that keeps the accuracy has the lowest ASR.
        top1_R = np.where(under_RP.any(axis=1), self.quoted_top1_P[under_RP.argmax(axis=1)], np.nan)
        last_R = within_RP.shape[1] - 1 - within_RP[:, ::-1].argmax(axis=1)
        asr_R = np.where(within_RP.any(axis=1), self.quoted_asr_P[last_R], np.nan)
        return np.stack([share_R, top1_R, asr_R], axis=1)

    def _quoted_hypervolume(self, member_RP: NDArray[np.bool_]) -> Floats:
        order = np.argsort(-self.quoted_top1_P, kind="stable")
        widths_P = -np.diff(np.append(self.quoted_top1_P[order], 0.0))
        lowest_RP = np.minimum.accumulate(np.where(member_RP[:, order], self.quoted_asr_P[order], 1.0), axis=1)
        return np.sum(widths_P * (1.0 - lowest_RP), axis=1)


def pool(rows: Sequence[Row], trials: Iterable[Row], *, model: Sequence[Row] | None = None) -> Pool | None:
    """Gather the points of one group; None without a trial, or without the poisoned model's accuracy.

    Args:
        rows: rows of the `epochs` table, of one (objective, pretrain_id, method).
        trials: rows of the `trials` table, for the order in which equal points are preferred.
        model: rows of all methods on the same poisoned model, which is compared with; default: `rows`.
    """
    splits = fronts.halves(rows)
    before, quoted_before = (fronts.baseline(model or rows, split)[0] for split in (splits[0], splits[-1]))
    order = fronts.trial_order(trials)
    by_trial: dict[str, list[Row]] = {}
    start: Row | None = None
    for row in fronts.candidates(rows, "any_epoch", order):
        if row["epoch"] > 0:
            by_trial.setdefault(row["trial_id"], []).append(row)
        elif start is None:
            start = row
    if not by_trial or start is None or not (before > 0 and quoted_before > 0):
        return None
    points = [(-1, start)]
    for number, course in enumerate(by_trial.values()):
        # What a trial's own front leaves out is on no front that the trial is part of.
        kept = pareto.front([r["zeroshot_top1"] for r in course], [r["asr_top1"] for r in course])
        points += [(number, course[i]) for i in sorted(kept)]
    quoted = {(r["trial_id"], r["epoch"]): r for r in rows if r["split"] == splits[-1]}
    points.sort(key=lambda point: (-point[1]["zeroshot_top1"], point[1]["asr_top1"]))
    chosen = [row for _, row in points]
    elsewhere = [quoted[row["trial_id"], row["epoch"]] for row in chosen]
    return Pool(
        trial_P=np.array([number for number, _ in points]),
        top1_P=np.array([row["zeroshot_top1"] for row in chosen]),
        asr_P=np.array([row["asr_top1"] for row in chosen]),
        quoted_top1_P=np.array([row["zeroshot_top1"] for row in elsewhere]),
        quoted_asr_P=np.array([row["asr_top1"] for row in elsewhere]),
        num_trials=len(by_trial),
        before=before,
        quoted_before=quoted_before,
    )


def _draw(pool: Pool, count: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Return which trials are in each of `count` draws with replacement, shape [count, T]."""
    drawn_RT = generator.integers(0, pool.num_trials, size=(count, pool.num_trials))
    included_RT = np.zeros(drawn_RT.shape, dtype=bool)
    np.put_along_axis(included_RT, drawn_RT, values=True, axis=1)
    return included_RT


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
            values_RKM[here_RK] = pool.values(_draw(pool, int(here_RK.sum()), generator))
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


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _interval(values_R: Floats, level: float) -> dict[str, Any]:
    finite = values_R[np.isfinite(values_R)]
    if not len(finite):
        return {"low": None, "high": None, "resamples": 0}
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return {"low": float(low), "high": float(high), "resamples": len(finite)}
