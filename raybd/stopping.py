"""Which trials of a search go on, and which are stopped before their last epoch: pure functions.

Two rules. *Successive halving*: after each rung, an epoch that the study names, trials wait until all have reached it;
then they are ranked, and a share goes on. *Collapse guard*: a trial whose accuracy falls below a floor is stopped.

Ranked by layers of non-domination and, within a layer, by the hypervolume that each adds to those before it: the idea
of MO-ASHA (Schmucker et al. 2021, arXiv 2106.12639).

Differs: nothing is decided before all trials have reached a rung, so that none is kept for having started early, and
what goes on does not depend on the number of workers; a trial is ranked by all its epochs so far, since each of them is
a candidate for the front.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from raybd import pareto
from raybd.study import Stopping

Point = tuple[float, float]  # accuracy, attack success rate
_NOTHING = 1e-12  # areas are sums of products of counted shares: less than this is none


def next_rung(stopping: Stopping, *, done: int, epochs: int) -> int | None:
    """Return the epoch after which a trial waits next; None if it runs to its end.

    Args:
        done: the rung that it left last, 0 if none.
        epochs: that it is planned for; one that ends at a rung has nothing to wait for.
    """
    return next((rung for rung in stopping.rungs if done < rung < epochs), None)


def places(stopping: Stopping, arrived: int) -> int:
    """Return how many of the trials that have arrived at a rung go on."""
    return max(1, round(stopping.keep * arrived))


def expected_epochs(stopping: Stopping, planned: Sequence[int]) -> list[int]:
    """Return how many epochs trials will do, were the first ones always the best.

    Which ones are best changes the sum only where trials are planned for different numbers of epochs.

    Args:
        planned: epochs of each trial, all of one search.
    """
    done, going = list(planned), list(range(len(planned)))
    for rung in stopping.rungs:
        going = [i for i in going if planned[i] > rung]
        if not going:
            break
        free = places(stopping, len(going))
        for i in going[free:]:
            done[i] = rung
        going = going[:free]
    return done


def expected_of_equals(stopping: Stopping, count: int, planned: int) -> int:
    """Return the sum of `expected_epochs` of many trials that are all planned for the same number of epochs."""
    done, going = 0, count
    for rung in stopping.rungs:
        if not going or planned <= rung:
            break
        free = min(going, places(stopping, going))
        done += (going - free) * rung
        going = free
    return done + going * planned


def ranked(trials: Mapping[str, Sequence[Point]], *, most: int | None = None) -> list[str]:
    """Return trials from the best to the worst, given the points of each so far; of equals the first name first.

    The first is the one that alone dominates most, the next the one that adds most to it, and so on. Where none that
    is left adds any, all of them are dominated by those before: the next layer begins.

    Args:
        most: how many to return at most, which of thousands takes a fraction of the time; all by default.
    """
    wanted = len(trials) if most is None else min(most, len(trials))
    fronts = {name: _front(points) for name, points in trials.items()}
    alone = {name: _area(points) for name, points in fronts.items()}
    left, order = set(trials), list[str]()
    while len(order) < wanted:
        layer: list[Point] = []
        area = 0.0
        # What one adds can only shrink while the layer grows: only those that may still be first are looked at again.
        heap = [(-alone[name], name) for name in left]
        heapq.heapify(heap)
        while heap and len(order) < wanted:
            _, name = heapq.heappop(heap)
            added = _area([*layer, *fronts[name]]) - area if layer else alone[name]
            if layer and added <= _NOTHING:
                continue
            if heap and (-added, name) > heap[0]:
                heapq.heappush(heap, (-added, name))
                continue
            layer = _front([*layer, *fronts[name]])
            area = _area(layer)
            order.append(name)
            left.discard(name)
    return order


@dataclass(frozen=True)
class Decision:
    """What becomes of the trials at a rung.

    Attributes:
        go_on: those that go on, the best first.
        stopped: the others, each with its reason.
    """

    go_on: tuple[str, ...]
    stopped: Mapping[str, str]


def decide(stopping: Stopping, rung: int, trials: Mapping[str, Mapping[int, Point]]) -> Decision:
    """Decide which trials go on beyond a rung. It depends on their points up to there alone.

    Args:
        rung: the epoch.
        trials: by name, the points by epoch of every trial that has arrived at the rung.
    """
    order = ranked({n: [point for e, point in points.items() if e <= rung] for n, points in trials.items()})
    free = places(stopping, len(order))
    reason = f"rung at epoch {rung}: place {{}} of {len(order)}, the first {free} go on"
    return Decision(
        tuple(order[:free]), {name: reason.format(i) for i, name in enumerate(order[free:], start=free + 1)}
    )


def collapse(stopping: Stopping, epoch: int, points: Mapping[int, Point]) -> str | None:
    """Return why a trial is stopped after an epoch because its accuracy collapsed, None if it did not.

    Args:
        points: of the trial by epoch; epoch 0 is the poisoned model.
    """
    if not stopping.collapse_below or epoch < stopping.grace_epochs or 0 not in points:
        return None
    found, floor = points[epoch][0], stopping.collapse_below * points[0][0]
    if found >= floor:
        return None
    return (
        f"accuracy collapsed: {found:.2%} after epoch {epoch}, below {floor:.2%}, "
        f"{stopping.collapse_below:g} of the poisoned model's"
    )


def _front(points: Iterable[Point]) -> list[Point]:
    listed = list(points)
    top1, asr = zip(*listed, strict=True)
    return [listed[i] for i in pareto.front(top1, asr)]


def _area(points: Sequence[Point]) -> float:
    return pareto.hypervolume(*zip(*points, strict=True))
