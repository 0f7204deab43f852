"""What can be on the fronts of some of a group's trials, and what those fronts are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raybd import fronts, pareto
from raybd.fronts import Standing
from raybd.points import Floats, Points, Row

CEILING, POINTS_LOST = 0.05, 0.01
# That none of so many trials is drawn happens once in 160,000 draws.
_LAYERS = 12
_MOST_DRAWS = 10_000_000
# Of more points those are left out at first that about so many trials beat, as a sample tells: layers end before them.
_MANY_POINTS, _SAMPLE, _DEPTH = 20_000, 4000, 60


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
class Measured:
    """What `Pool` measures of R selections of trials.

    Attributes:
        values_RM: the measures, shape [R, 3]; NaN where no point qualifies.
        covered_R: whether the points looked at beat all others.
    """

    values_RM: Floats
    covered_R: NDArray[np.bool_]


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
        found = self._measured(included_RT, *self._checks(np.ones(len(self.trial_P), dtype=bool)))
        if self.beyond is not None and not found.covered_R.all():
            return self.beyond.whole().values(included_RT)
        return found.values_RM

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
        strong = np.flatnonzero(np.bincount(self.trial_P[kept_P & (self.trial_P >= 0)]))
        if count * self.num_trials <= _MOST_DRAWS:
            included_RT = np.zeros((count, self.num_trials), dtype=bool)
            for included_T in included_RT:
                included_T[generator.integers(0, self.num_trials, size=self.num_trials)] = True
            included_RS = included_RT[:, strong]
        else:
            hits_R = generator.binomial(self.num_trials, len(strong) / self.num_trials, size=count)
            included_RS = np.zeros((count, len(strong)), dtype=bool)
            for included_S, hits in zip(included_RS, hits_R.tolist(), strict=True):
                included_S[generator.integers(0, len(strong), size=hits)] = True
        found = self._of(kept_P, strong)._measured(included_RS, *self._checks(kept_P))
        for row in np.flatnonzero(~found.covered_R):
            if count * self.num_trials <= _MOST_DRAWS:
                included_T = included_RT[row]
            else:
                others = np.setdiff1d(np.arange(self.num_trials), strong)
                included_T = np.zeros(self.num_trials, dtype=bool)
                included_T[others[generator.integers(0, len(others), size=self.num_trials - hits_R[row])]] = True
                included_T[strong] = included_RS[row]
            found.values_RM[row] = self.values(included_T[None])[0]
        return found.values_RM

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

    def _checks(self, kept_P: NDArray[np.bool_]) -> tuple[NDArray[np.int64], Floats]:
        """Return what tells whether the points kept beat all others, those beyond too, in a selection of trials.

        Returns: numbers of points kept, rising, and ASR that the lowest of so many of them in the selection must not
            exceed, shape [C].
        """
        rest = np.flatnonzero(~kept_P)
        # What beats the front of the others beats all of them.
        rest = rest[pareto.records(self.asr_P[rest])]
        before_C, asr_C = np.cumsum(kept_P, dtype=np.int64)[rest], self.asr_P[rest]
        if self.beyond is not None:
            beyond = np.searchsorted(-self.top1_P[kept_P], -self.beyond.top1_C, side="right")
            before_C, asr_C = np.concatenate([before_C, beyond]), np.concatenate([asr_C, self.beyond.asr_C])
        order = np.argsort(before_C, kind="stable")
        return before_C[order], asr_C[order]

    def _measured(self, included_RT: NDArray[np.bool_], before_C: NDArray[np.int64], asr_C: Floats) -> Measured:
        """Return the measures of R selections of trials, and what the checks of `_checks` say of each.

        Points come by falling accuracy: one is on the front of a selection if its ASR is below all before it. Most
        are below that of no selection, and are passed over.
        """
        lowest_R = np.full(len(included_RT), np.inf)
        covered_R = np.ones(len(included_RT), dtype=bool)
        top1_R, asr_R = np.full((2, len(included_RT)), np.nan)
        members: list[tuple[int, NDArray[np.bool_]]] = []
        checks = zip([*before_C.tolist(), len(self.trial_P)], [*asr_C.tolist(), np.inf], strict=True)
        check = next(checks)
        highest = np.inf
        for point, (trial, asr) in enumerate(zip(self.trial_P.tolist(), self.asr_P.tolist(), strict=True)):
            while check[0] <= point:
                covered_R &= lowest_R <= check[1]
                check = next(checks)
            if asr >= highest:
                continue
            on_front_R = lowest_R > asr if trial < 0 else (lowest_R > asr) & included_RT[:, trial]
            if not on_front_R.any():
                continue
            lowest_R[on_front_R] = asr
            highest = lowest_R.max()
            members.append((point, on_front_R))
            # Along the front accuracy and ASR fall: the first under the ceiling is the most accurate, the last one
            # that keeps the accuracy has the lowest ASR.
            if asr <= CEILING:
                top1_R[on_front_R & np.isnan(top1_R)] = self.quoted_top1_P[point]
            if self.top1_P[point] >= self.before - POINTS_LOST - fronts.SLACK:
                asr_R[on_front_R] = self.quoted_asr_P[point]
        for _, least in (check, *checks):
            covered_R &= lowest_R <= least
        share_R = self._quoted_hypervolume(members, len(included_RT)) / self.quoted_before
        return Measured(np.stack([share_R, top1_R, asr_R], axis=1), covered_R)

    def _quoted_hypervolume(self, members: Iterable[tuple[int, NDArray[np.bool_]]], count: int) -> Floats:
        """Return the hypervolumes of so many fronts on the half that is quoted, given a mask of them for each point."""
        order = np.argsort(-self.quoted_top1_P, kind="stable")
        widths_P = -np.diff(np.append(self.quoted_top1_P[order], 0.0))
        place_P = np.empty(len(order), dtype=np.int64)
        place_P[order] = np.arange(len(order))
        by_place = {int(place_P[point]): (self.quoted_asr_P[point], mask_R) for point, mask_R in members}
        if count == 1:
            lowest_P = np.ones(len(order))
            for place, (asr, _) in by_place.items():
                lowest_P[place] = asr
            return np.sum(widths_P * (1.0 - np.minimum.accumulate(lowest_P)), keepdims=True)
        beaten_R, area_R, part_R = np.zeros((3, count))
        for place, width in enumerate(widths_P.tolist()):
            if place in by_place:
                asr, mask_R = by_place[place]
                np.maximum(beaten_R, 1.0 - asr, out=beaten_R, where=mask_R)
            if width:
                np.multiply(beaten_R, width, out=part_R)
                area_R += part_R
        return area_R


def gather(rows: Iterable[Row], trials: Iterable[Row] | Standing, *, model: Iterable[Row] | None = None) -> Pool | None:
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
