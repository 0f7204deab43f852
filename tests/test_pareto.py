"""Fronts and hypervolumes: their defining properties, and an independent implementation."""

from __future__ import annotations

from itertools import pairwise

import moocore
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raybd import pareto

# Shares with few distinct values, so that ties abound, and with many.
_coarse = st.integers(0, 6).map(lambda k: k / 6)
_fine = st.integers(0, 50_000).map(lambda k: k / 50_000)
_points = st.one_of(
    st.lists(st.tuples(_coarse, _coarse), max_size=30),
    st.lists(st.tuples(_fine, _fine), max_size=60),
)
_some_points = _points.filter(bool)
unhurried = settings(deadline=None)  # a busy machine is no failure


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [accuracy for accuracy, _ in points], [asr for _, asr in points]


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] >= b[0] and a[1] <= b[1] and a != b


@unhurried
@given(_points)
def test_front_holds_exactly_the_points_that_nothing_beats(points: list[tuple[float, float]]) -> None:
    kept = pareto.front(*_columns(points)).tolist()
    assert len(set(kept)) == len(kept)
    assert not any(_beats(points[i], points[j]) for i in kept for j in kept)
    for i, point in enumerate(points):
        if i not in kept:
            beaten = any(_beats(points[j], point) for j in kept)
            double = any(points[j] == point and j < i for j in kept)
            assert beaten or double


@unhurried
@given(_points)
def test_front_is_in_rising_order_of_both(points: list[tuple[float, float]]) -> None:
    members = [points[i] for i in pareto.front(*_columns(points))]
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(members))


@unhurried
@given(_some_points)
def test_front_agrees_with_moocore(points: list[tuple[float, float]]) -> None:
    kept = np.zeros(len(points), dtype=bool)
    kept[pareto.front(*_columns(points))] = True
    costs = np.array([(1 - accuracy, asr) for accuracy, asr in points])
    assert kept.tolist() == moocore.is_nondominated(costs).tolist()


@unhurried
@given(_some_points)
def test_hypervolume_agrees_with_moocore(points: list[tuple[float, float]]) -> None:
    costs = np.array([(1 - accuracy, asr) for accuracy, asr in points])
    assert pareto.hypervolume(*_columns(points)) == pytest.approx(moocore.hypervolume(costs, ref=(1, 1)), abs=1e-12)


@unhurried
@given(_points, st.tuples(_coarse, _fine))
def test_hypervolume_never_falls_when_a_point_is_added(
    points: list[tuple[float, float]], more: tuple[float, float]
) -> None:
    before = pareto.hypervolume(*_columns(points))
    after = pareto.hypervolume(*_columns([*points, more]))
    assert after >= before - 1e-12
    if not any(_beats(point, more) or point == more for point in points) and more[0] > 0 and more[1] < 1:
        assert after > before


@unhurried
@given(_some_points)
# The second point is beaten, yet it dominates part of what the first does: the first does not own that part.
@example([(0.5, 0.2), (0.49, 0.21)])
def test_contribution_is_what_the_hypervolume_loses_without_the_point(points: list[tuple[float, float]]) -> None:
    area = pareto.hypervolume(*_columns(points))
    for i, part in enumerate(pareto.contributions(*_columns(points))):
        rest = pareto.hypervolume(*_columns(points[:i] + points[i + 1 :]))
        assert part == pytest.approx(area - rest, abs=1e-12)
        assert part >= 0


def test_known_fronts_and_areas() -> None:
    top1, asr = [0.2, 0.5, 0.4, 0.5, 0.5], [0.1, 0.5, 0.6, 0.5, 0.9]
    assert pareto.front(top1, asr).tolist() == [0, 1]
    assert pareto.hypervolume(top1, asr) == pytest.approx(0.2 * 0.9 + 0.3 * 0.5)
    # 1 and 3 are doubles: neither owns anything alone.
    assert pareto.contributions(top1, asr) == pytest.approx([0.2 * 0.4, 0, 0, 0, 0])
    assert pareto.front([], []).tolist() == []
    assert pareto.hypervolume([], []) == 0.0


@pytest.mark.parametrize(
    ("top1", "asr", "message"),
    [([0.1], [0.1, 0.2], "one length"), ([[0.1]], [[0.2]], "one length"), ([float("nan")], [0.1], "finite")],
)
def test_wrong_input_is_refused(top1: list[float], asr: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pareto.front(top1, asr)


@unhurried
@given(_some_points, _fine)
def test_chosen_points_lie_on_the_front_and_keep_the_limit(points: list[tuple[float, float]], limit: float) -> None:
    top1, asr = _columns(points)
    members = {points[i] for i in pareto.front(top1, asr)}
    low = pareto.lowest_asr(top1, asr, floor=limit)
    assert (low is None) == all(accuracy < limit for accuracy in top1)
    if low is not None:
        assert points[low] in members
        assert top1[low] >= limit
        assert asr[low] == min(s for a, s in points if a >= limit)
    high = pareto.highest_top1(top1, asr, ceiling=limit)
    assert (high is None) == all(share > limit for share in asr)
    if high is not None:
        assert points[high] in members
        assert asr[high] <= limit
        assert top1[high] == max(a for a, s in points if s <= limit)


@unhurried
@given(_some_points)
def test_best_epoch_alone_dominates_most(points: list[tuple[float, float]]) -> None:
    best = pareto.largest_area(*_columns(points))
    areas = [pareto.hypervolume([accuracy], [asr]) for accuracy, asr in points]
    assert areas[best] == pytest.approx(max(areas), abs=1e-12)


def test_share_of_the_rectangle() -> None:
    # The poisoned model alone, at ASR 0.9, has a tenth; one that gains accuracy and loses the backdoor has more than 1.
    assert pareto.hypervolume_share(pareto.hypervolume([0.5], [0.9]), 0.5) == pytest.approx(0.1)
    assert pareto.hypervolume_share(pareto.hypervolume([0.5, 0.6], [0.9, 0.0]), 0.5) == pytest.approx(1.2)
    assert pareto.hypervolume_share(0.3, 0.0) is None
    assert pareto.hypervolume_share(0.3, float("nan")) is None


@unhurried
@given(st.lists(st.tuples(_coarse, _coarse), max_size=30), st.integers(1, 4))
def test_where_points_reach_that_many_of_them_beat_what_is_there(points: list[tuple[float, float]], depth: int) -> None:
    corners = [*zip(*pareto.reach(*map(np.array, _columns(points)), depth=depth), strict=True)]
    assert corners == sorted(corners)
    for top1, asr in ((i / 6, j / 6) for i in range(7) for j in range(7)):
        beaten_by = sum(a > top1 and s <= asr for a, s in points)
        assert any(a > top1 and s <= asr for a, s in corners) == (beaten_by >= depth)
