"""Attainment surfaces: hand-made cases, an independent implementation, and their order."""

from __future__ import annotations

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybd import attainment, pareto

_coarse = st.integers(0, 6).map(lambda k: k / 6)
_fine = st.integers(0, 50_000).map(lambda k: k / 50_000)
_share = st.one_of(_coarse, _fine)
_runs = st.lists(st.lists(st.tuples(_share, _share), min_size=1, max_size=12), min_size=1, max_size=5)
unhurried = settings(deadline=None)


def _columns(runs: list[list[tuple[float, float]]]) -> list[tuple[list[float], list[float]]]:
    return [([top1 for top1, _ in run], [asr for _, asr in run]) for run in runs]


@unhurried
@given(_runs)
def test_surfaces_agree_with_moocore(runs: list[list[tuple[float, float]]]) -> None:
    points = np.array([(1 - top1, asr) for run in runs for top1, asr in run])
    sets = np.array([i for i, run in enumerate(runs) for _ in run])
    given_levels = attainment.surfaces(_columns(runs))
    for level in given_levels.values():
        percentile = 100 * level["attained_by"] / len(runs)
        expected = moocore.eaf(points, sets, percentiles=[percentile])[:, :2]
        ours = np.array([(1 - top1, asr) for top1, asr in level["points"]])
        order = np.lexsort(expected.T[::-1])
        assert ours[::-1] == pytest.approx(expected[order], abs=1e-12)


@unhurried
@given(_runs)
def test_more_runs_attain_less_and_one_run_attains_its_front(runs: list[list[tuple[float, float]]]) -> None:
    columns = _columns(runs)
    corners = [attainment.surface(columns, attained_by=k + 1) for k in range(len(runs))]
    areas = [pareto.hypervolume(c[:, 0], c[:, 1]) for c in corners]
    assert areas == sorted(areas, reverse=True)
    union = [point for run in runs for point in run]
    assert areas[0] == pytest.approx(pareto.hypervolume(*zip(*union, strict=True)), abs=1e-12)
    assert areas[-1] <= min(pareto.hypervolume(*column) for column in columns) + 1e-12


def test_surfaces_by_hand() -> None:
    runs = _columns([[(0.5, 0.2), (0.6, 0.6)], [(0.4, 0.1), (0.7, 0.5)], [(0.55, 0.3)]])
    found = attainment.surfaces(runs)
    assert {name: level["attained_by"] for name, level in found.items()} == {"best": 1, "median": 2, "worst": 3}
    assert found["best"]["points"] == [[0.4, 0.1], [0.5, 0.2], [0.55, 0.3], [0.7, 0.5]]
    assert found["median"]["points"] == [[0.4, 0.2], [0.5, 0.3], [0.55, 0.5], [0.6, 0.6]]
    assert found["worst"]["points"] == [[0.4, 0.3], [0.5, 0.5], [0.55, 0.6]]
    assert found["worst"]["hypervolume"] == pytest.approx(0.4 * 0.7 + 0.1 * 0.5 + 0.05 * 0.4)


def test_a_run_without_points_attains_nothing() -> None:
    runs = _columns([[(0.5, 0.2)], []])
    assert attainment.surface(runs, attained_by=1).tolist() == [[0.5, 0.2]]
    assert attainment.surface(runs, attained_by=2).shape == (0, 2)
    assert attainment.surfaces(runs)["worst"]["hypervolume"] == 0.0


@pytest.mark.parametrize("number", [0, 2])
def test_levels_that_cannot_be_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match="1 to 1 expected"):
        attainment.surface([([0.5], [0.5])], attained_by=number)
