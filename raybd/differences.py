"""What a front is worth, and how two of them differ, with bootstrap intervals: of pretrain objectives, or of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raybd import fronts, pareto
from raybd.fronts import Standing
from raybd.points import Floats, Points, Row

RESAMPLES, LEVEL, SEED = 1000, 0.95, 0
CEILING, POINTS_LOST = 0.05, 0.01
# Resamples are handled in blocks of about so many numbers.
_BLOCK = 100_000
# That none of so many trials is drawn happens once in 160,000 draws.
_LAYERS = 12
_MOST_DRAWS = 10_000_000
# Of more points those are left out at first that about so many trials beat, as a sample tells: layers end before them.
_MANY_POINTS, _SAMPLE, _DEPTH = 20_000, 4000, 60


class Measure(StrEnum):
    """What is compared; the order is that of the columns of `Pool.values`."""

    HYPERVOLUME_SHARE = "hypervolume_share"
    BEST_TOP1 = "best_top1_at_asr_0.05"
    BEST_ASR = "best_asr_within_1"


@dataclass(frozen=True)
class Beyond:
    """Points that a pool leaves out, for many trials beat each of them.

    Attributes:
        top1_C, asr_C: `pareto.reach`: each of the points is less accurate than a corner, and has no lower ASR.
        whole: returns the pool with them.
    """

    top1_C: Floats
    asr_C: Floats
    whole: Callable[[], Pool]


@dataclass(frozen=True)
class Pool:
    """The points of one group in one run that can be on a front of some of its trials.

    Attributes:
        trial_P: index of each point's trial, -1 for the poisoned model, which always competes; shape [P].
        top1_P, asr_P: on the half that points are chosen on, by falling accuracy, then rising ASR, shape [P].
        quoted_top1_P, quoted_asr_P: the same points on the half that they are quoted on.
        num_trials: T, the number of trials.
        before, quoted_before: accuracy of the poisoned model on each half.
        beyond: points that are left out until a selection of trials needs them; None if all are here.
    """

    trial_P: NDArray[np.int64]
    top1_P: Floats
    asr_P: Floats
    quoted_top1_P: Floats
    quoted_asr_P: Floats
    num_trials: int
    before: float
    quoted_before: float
    beyond: Beyond | None = None

    def values(self, included_RT: NDArray[np.bool_]) -> Floats:
        """Return the measures, shape [R, 3], for R selections of trials; NaN where no point qualifies.

        Chosen on one half and quoted on the other, as `fronts.compute` and `fronts.summarise` do.
        """
        size = max(1, _BLOCK // max(1, len(self.trial_P)))
        every_P = np.ones(len(self.trial_P), dtype=bool)
        blocks = []
        for i in range(0, len(included_RT), size):
            asr_RP = self.competing_asr(included_RT[i : i + size])
            if self.beyond is not None and not self._covered(every_P, asr_RP).all():
                return self.beyond.whole().values(included_RT)
            blocks.append(self._values(asr_RP))
        return np.concatenate(blocks) if blocks else np.empty((0, len(Measure)))

    def resampled(self, count: int, generator: np.random.Generator) -> Floats:
        """Return the measures, shape [count, 3], of as many draws of trials with replacement.

        Of many points only those are looked at that few trials beat; a draw that has so few of those trials that
        another point may be on its front is looked at as a whole. Where all draws together are more than ten
        million, only how many fall on such a trial is drawn, and then on which: the distribution is the same.
        """
        layers = self._layers()
        if self.beyond is not None and not self._covers(self.beyond, layers[-1]):
            return self.beyond.whole().resampled(count, generator)
        kept_P = self._contenders(layers)
        strong = np.unique(self.trial_P[kept_P & (self.trial_P >= 0)])
        if count * self.num_trials <= _MOST_DRAWS:
            included_RT = np.zeros((count, self.num_trials), dtype=bool)
            drawn_RT = generator.integers(0, self.num_trials, size=included_RT.shape)
            np.put_along_axis(included_RT, drawn_RT, values=True, axis=1)
            included_RS = included_RT[:, strong]
        else:
            hits_R = generator.binomial(self.num_trials, len(strong) / self.num_trials, size=count)
            included_RS = np.zeros((count, len(strong)), dtype=bool)
            included_RS[np.arange(count).repeat(hits_R), generator.integers(0, len(strong), size=hits_R.sum())] = True
        few = self._of(kept_P, strong)
        values_RM = few.values(included_RS)
        size = max(1, _BLOCK // max(1, len(few.trial_P)))
        covered = [self._covered(kept_P, few.competing_asr(included_RS[i : i + size])) for i in range(0, count, size)]
        for row in np.flatnonzero(~np.concatenate(covered)) if covered else ():
            if count * self.num_trials <= _MOST_DRAWS:
                included_T = included_RT[row]
            else:
                others = np.setdiff1d(np.arange(self.num_trials), strong)
                included_T = np.zeros(self.num_trials, dtype=bool)
                included_T[others[generator.integers(0, len(others), size=self.num_trials - hits_R[row])]] = True
                included_T[strong] = included_RS[row]
            values_RM[row] = self.values(included_T[None])[0]
        return values_RM

    def _layers(self) -> list[NDArray[np.int64]]:
        """Return `_LAYERS` times the points of a front: that of the trials that are in none before."""
        left = np.flatnonzero(self.trial_P >= 0)
        strong_T, layers = np.zeros(self.num_trials, dtype=bool), []
        for _ in range(_LAYERS):
            layers.append(left[pareto.records(self.asr_P[left])])
            strong_T[self.trial_P[layers[-1]]] = True
            left = left[~strong_T[self.trial_P[left]]]
        return layers

    def _covers(self, beyond: Beyond, layer: NDArray[np.int64]) -> bool:
        """Say whether a layer beats all points that are left out: then so do those before it, and none is in them."""
        asr_L = np.append(np.inf, self.asr_P[layer])
        place_C = np.searchsorted(-self.top1_P[layer], -beyond.top1_C, side="right")
        return bool((asr_L[place_C] <= beyond.asr_C).all())

    def _contenders(self, layers: Iterable[NDArray[np.int64]]) -> NDArray[np.bool_]:
        """Say which points fewer than `_LAYERS` other trials are known to beat, the poisoned model among them; [P].

        The points of one trial do not beat each other, so each layer that beats a point has another trial that does.
        """
        strong_T = np.zeros(self.num_trials, dtype=bool)
        for layer in layers:
            strong_T[self.trial_P[layer]] = True
        kept = np.flatnonzero(np.append(strong_T, True)[self.trial_P])
        beaten = np.zeros(len(kept), dtype=np.int64)
        for layer in filter(len, layers):
            # Along a layer ASR falls: of its points before another the last has the lowest.
            place = np.searchsorted(layer, kept) - 1
            beaten += (place >= 0) & (self.asr_P[layer[place]] <= self.asr_P[kept])
        kept_P = np.zeros(len(self.trial_P), dtype=bool)
        kept_P[kept[(beaten < _LAYERS) | (self.trial_P[kept] < 0)]] = True
        return kept_P

    def _of(self, kept_P: NDArray[np.bool_], trials: NDArray[np.int64]) -> Pool:
        """Return the pool of these points, which are of these trials, rising, and of the poisoned model."""
        points = {name: getattr(self, name)[kept_P] for name in ("top1_P", "asr_P", "quoted_top1_P", "quoted_asr_P")}
        number_P = np.searchsorted(trials, self.trial_P[kept_P])
        number_P[self.trial_P[kept_P] < 0] = -1
        return replace(self, trial_P=number_P, num_trials=len(trials), beyond=None, **points)

    def _covered(self, kept_P: NDArray[np.bool_], asr_RK: Floats) -> NDArray[np.bool_]:
        """Say of each selection of trials whether the points kept beat all others, those beyond too; shape [R].

        Args:
            asr_RK: `competing_asr` of the points that are kept.
        """
        rest = np.flatnonzero(~kept_P)
        # What beats the front of the others beats all of them.
        rest = rest[pareto.records(self.asr_P[rest])]
        before, asr = np.cumsum(kept_P)[rest], self.asr_P[rest]  # how many that are kept come before each
        if self.beyond is not None:
            beyond = np.searchsorted(-self.top1_P[kept_P], -self.beyond.top1_C, side="right")
            before, asr = np.append(before, beyond), np.append(asr, self.beyond.asr_C)
        if not len(asr):
            return np.ones(len(asr_RK), dtype=bool)
        lowest_RK = np.minimum.accumulate(asr_RK, axis=1)
        lowest_RK = np.concatenate([np.full((len(asr_RK), 1), np.inf), lowest_RK], axis=1)
        return np.asarray((lowest_RK[:, before] <= asr).all(axis=1))

    def competing_asr(self, included_RT: NDArray[np.bool_]) -> Floats:
        """Return the ASR of points in R selections of trials, shape [R, P]; infinite for those left out."""
        always = np.ones((len(included_RT), 1), dtype=bool)
        competes_RP = np.concatenate([included_RT, always], axis=1)[:, self.trial_P]
        return np.where(competes_RP, self.asr_P, np.inf)

    def _values(self, asr_RP: Floats) -> Floats:
        # Points come by falling accuracy: one is on the front if its ASR is below all before it.
        lowest_RP = np.minimum.accumulate(asr_RP, axis=1)
        member_RP = np.concatenate([np.isfinite(asr_RP[:, :1]), asr_RP[:, 1:] < lowest_RP[:, :-1]], axis=1)
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


def pool(rows: Iterable[Row], trials: Iterable[Row] | Standing, *, model: Iterable[Row] | None = None) -> Pool | None:
    """Gather the points of one group; None without a trial, or without the poisoned model's accuracy.

    Args:
        rows: rows of the `epochs` table, of one (objective, pretrain_id, method).
        trials: rows of the `trials` table, for the order in which equal points are preferred.
        model: rows of all methods on the same poisoned model, which is compared with; default: `rows`.
    """
    points = Points.of(rows)
    standing, splits = Standing.of(points, trials), fronts.halves(points)
    everyone = points if model is None else Points.of(model)
    before, quoted_before = (fronts.baseline(everyone, split)[0] for split in (splits[0], splits[-1]))
    competes_N = fronts.candidates(points, "any_epoch", standing)
    cleaned_N = points.column("epoch") > 0
    starts, cleaned = np.flatnonzero(competes_N & ~cleaned_N), np.flatnonzero(competes_N & cleaned_N)
    if not len(starts) or not len(cleaned) or not (before > 0 and quoted_before > 0):
        return None
    trial_N = points.column("trial_id")
    start = starts[standing.rank_T[trial_N[starts]] == standing.rank_T[trial_N[starts]].min()]
    start = standing.order(points, start)[:1]
    taking_part_T = np.zeros(len(standing.rank_T), dtype=bool)
    taking_part_T[standing.rank_T[trial_N[cleaned]]] = True
    number_T = (np.cumsum(taking_part_T) - 1)[standing.rank_T]
    top1_N, asr_N = points.column("zeroshot_top1"), points.column("asr_top1")
    # What the poisoned model beats is on no front.
    cleaned = cleaned[(top1_N[cleaned] > top1_N[start]) | (asr_N[cleaned] < asr_N[start])]

    def gathered(cleaned: NDArray[np.int64], beyond: Beyond | None = None) -> Pool:
        cleaned = standing.order(points, cleaned)
        chosen = np.concatenate([start, cleaned])
        number_P = np.concatenate([[-1], number_T[trial_N[cleaned]]])
        order = np.lexsort((asr_N[chosen], -top1_N[chosen]))
        chosen, number_P = chosen[order], number_P[order]
        kept = _own_fronts(number_P, asr_N[chosen])
        chosen, number_P = chosen[kept], number_P[kept]
        quoted = _elsewhere(points, chosen, splits[-1])
        return Pool(
            trial_P=number_P,
            top1_P=top1_N[chosen],
            asr_P=asr_N[chosen],
            quoted_top1_P=top1_N[quoted],
            quoted_asr_P=asr_N[quoted],
            num_trials=int(taking_part_T.sum()),
            before=before,
            quoted_before=quoted_before,
            beyond=beyond,
        )

    if len(cleaned) <= _MANY_POINTS:
        return gathered(cleaned)
    some = cleaned[:: -(-len(cleaned) // _SAMPLE)]
    some = some[np.unique(trial_N[some], return_index=True)[1]]  # of each trial one point
    depth = 1 + _DEPTH * len(some) // int(taking_part_T.sum())
    top1_C, asr_C = pareto.reach(top1_N[some], asr_N[some], depth=depth)
    place_N = np.searchsorted(top1_C, top1_N[cleaned], side="right")
    near = cleaned[asr_N[cleaned] < np.append(asr_C, np.inf)[place_N]]
    return gathered(near, Beyond(top1_C, asr_C, lambda: gathered(cleaned)))


def _own_fronts(trial_P: NDArray[np.int64], asr_P: Floats) -> NDArray[np.int64]:
    """Return the points that no other of the same trial beats, of points by falling accuracy, then rising ASR.

    What a trial's own front leaves out is on no front that the trial is part of.
    """
    order = np.argsort(trial_P, kind="stable")
    trial_P, asr_P = trial_P[order], asr_P[order]
    # The lowest ASR so far within each trial: what comes of a later trial is below all of those before.
    place_P = np.cumsum(np.diff(trial_P, prepend=trial_P[:1]) != 0)
    rank_P = np.unique(asr_P, return_inverse=True)[1]
    key_P = rank_P - place_P * (int(rank_P.max(initial=0)) + 1)
    lowest_P = np.minimum.accumulate(key_P)
    kept_P = np.concatenate(([True], key_P[1:] < lowest_P[:-1]))
    return np.sort(order[kept_P])


def _elsewhere(points: Points, chosen: NDArray[np.int64], split: str) -> NDArray[np.int64]:
    """Return the rows of the same trials and epochs on another half; the last, should there be several."""
    key_N, _ = points.key("trial_id", "epoch")
    trials = np.zeros(len(points.texts["trial_id"]), dtype=bool)
    trials[points.column("trial_id")[chosen]] = True
    there = np.flatnonzero(points.having("split", split) & trials[points.column("trial_id")])[::-1]
    order = np.argsort(key_N[there], kind="stable")
    there = there[order]
    place = np.searchsorted(key_N[there], key_N[chosen])
    found = there[np.minimum(place, len(there) - 1)]
    if not (key_N[found] == key_N[chosen]).all():
        raise KeyError(f"points that are not on the {split} half")
    return found


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
    finite = values_R[np.isfinite(values_R)]
    if not len(finite):
        return {"low": None, "high": None, "resamples": 0}
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return {"low": float(low), "high": float(high), "resamples": len(finite)}
