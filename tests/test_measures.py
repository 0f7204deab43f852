"""Stability, blind choices and the BatchNorm baseline, from hand-computed cases and their defining properties."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybd import analysis, fronts, measures

_share = st.integers(0, 20).map(lambda k: k / 20)
_course = st.lists(st.tuples(_share, _share), min_size=2, max_size=12)
unhurried = settings(deadline=None)


def _rows(
    courses: dict[str, list[tuple[float, float]]], *, split: str = "search", shift: float = 0.0, **same: Any
) -> list[dict[str, Any]]:
    known = {"study": "s", "study_hash": "h", "objective": "mmcl", "pretrain_id": "p", "method": "cleanclip"}
    return [
        {
            **known,
            "trial_id": trial,
            "epoch": epoch,
            "split": split,
            "zeroshot_top1": top1 - (shift if epoch else 0.0),
            "asr_top1": asr,
            "loss": 3.0 - epoch if epoch else None,
            **same,
        }
        for trial, course in courses.items()
        for epoch, (top1, asr) in enumerate(course)
    ]


def _trials(*names: str, **states: str) -> list[dict[str, Any]]:
    return [{"trial_id": n, "number": i, "state": states.get(n, "complete")} for i, n in enumerate(names)]


COURSES = {
    "a": [(0.60, 0.99), (0.50, 0.20), (0.49, 0.40), (0.55, 0.30)],  # one unstable step, ASR back up by 0.10
    "b": [(0.60, 0.99), (0.595, 0.60), (0.594, 0.61), (0.40, 0.01)],  # both changes at the tolerance, not beyond it
}


def test_instability_by_hand() -> None:
    found = measures.instability(_rows(COURSES))
    assert found is not None
    assert (found["trials"], found["steps"], found["unstable_steps"]) == (2, 6, 1)
    assert found["unstable_share"] == pytest.approx(1 / 6)
    assert found["rebound"] == pytest.approx((0.10 + 0.0) / 2)
    # a is best at epoch 1 of 3 (0.50 x 0.80 = 0.40 against 0.55 x 0.70), b at epoch 3 of 3.
    assert [trial["best_epoch"] for trial in found["by_trial"]] == [1, 3]
    assert found["best_at"] == found["best_at_median"] == pytest.approx(2 / 3)


def test_tolerances_change_what_counts() -> None:
    rows = _rows(COURSES)
    counts = {
        (top1, asr): measures.instability(rows, top1_tolerance=top1, asr_tolerance=asr)
        for top1, asr in ((0.0, 0.0), (0.0009, 0.009), (0.001, 0.01), (0.02, 0.01), (0.0, 0.25))
    }
    assert [found and found["unstable_steps"] for found in counts.values()] == [2, 2, 1, 0, 0]


@unhurried
@given(_course, _share, _share)
def test_unstable_steps_as_counted_one_by_one(course: list[tuple[float, float]], top1: float, asr: float) -> None:
    a, s = [point[0] for point in course], [point[1] for point in course]
    # In twentieths, without rounding.
    whole = [(round(20 * x), round(20 * y)) for x, y in course]
    expected = sum(p[0] - q[0] > round(20 * top1) and q[1] - p[1] > round(20 * asr) for p, q in pairwise(whole))
    assert measures.unstable(a, s, top1_tolerance=top1, asr_tolerance=asr).sum() == expected
    # Turned around, what got worse got better: no step is unstable both ways.
    turned = measures.unstable(a[::-1], s[::-1], top1_tolerance=top1, asr_tolerance=asr).sum()
    assert expected + turned <= len(course) - 1


@unhurried
@given(_course)
def test_rebound_is_never_below_zero_and_none_at_the_lowest(course: list[tuple[float, float]]) -> None:
    asr = [point[1] for point in course]
    found = measures.instability(_rows({"a": course}))
    assert found is not None
    assert found["rebound"] >= 0
    assert (found["rebound"] == 0) == (asr[-1] == min(asr))


def test_points_without_a_course_are_left_out() -> None:
    assert measures.instability(_rows({"a": [(0.6, 0.9)]})) is None
    mixed = [{**row, "epoch": row["epoch"] + 4, "alpha": 0.5} for row in _rows({"a": [(0.1, 0.2), (0.0, 0.9)]})]
    assert measures.instability([*_rows(COURSES), *mixed]) == measures.instability(_rows(COURSES))


def _halves(courses: dict[str, list[tuple[float, float]]], **same: Any) -> list[dict[str, Any]]:
    return [*_rows(courses, **same), *_rows(courses, split="report", shift=0.02, **same)]


def test_blind_choices_and_their_regret_by_hand() -> None:
    rows, trials = _halves(COURSES), _trials("a", "b")
    front = [row for row in fronts.compute(rows, trials) if row["kind"] == "any_epoch"]
    choices = measures.defenders_choice(rows, trials, front)
    assert {rule: point and (point["trial_id"], point["epoch"]) for rule, point in choices.items()} == {
        "lowest_loss": ("a", 3),  # both have loss 0 at epoch 3: the trial of lower number
        "highest_top1": ("b", 1),
        "last_epoch": ("a", 3),
    }
    # The front on search: (0.40, 0.01), (0.50, 0.20), (0.55, 0.30), (0.595, 0.60), (0.60, 0.99).
    found = choices["highest_top1"]
    assert found is not None
    assert found["scores"]["search"] == pytest.approx(
        {"zeroshot_top1": 0.595, "asr_top1": 0.60, "regret_asr": 0.0, "regret_asr_within_1": 0.0, "regret_top1": 0.0}
    )
    assert found["scores"]["report"]["zeroshot_top1"] == pytest.approx(0.575)


def test_a_choice_off_the_front_has_regret_in_both() -> None:
    courses = {"a": [(0.60, 0.99), (0.50, 0.20)], "b": [(0.60, 0.99), (0.48, 0.50)]}
    rows, trials = _halves(courses), _trials("a", "b")
    for row in rows:
        row["loss"] = {"a": 2.0, "b": 1.0}[row["trial_id"]] if row["epoch"] else None
    front = [row for row in fronts.compute(rows, trials) if row["kind"] == "any_epoch"]
    found = measures.defenders_choice(rows, trials, front)["lowest_loss"]
    assert found is not None
    assert (found["trial_id"], found["epoch"]) == ("b", 1)
    assert found["scores"]["search"]["regret_asr"] == pytest.approx(0.50 - 0.20)
    assert found["scores"]["search"]["regret_top1"] == pytest.approx(0.50 - 0.48)


def test_rules_that_nothing_meets_choose_nothing() -> None:
    rows = _halves(COURSES, loss=None)
    choices = measures.defenders_choice(rows, _trials("a", "b", a="failed", b="running"), [])
    assert choices["lowest_loss"] is None
    assert choices["last_epoch"] is None
    assert choices["highest_top1"] is not None
    alone = _halves({"a": COURSES["a"][:1]})
    assert set(measures.defenders_choice(alone, _trials("a"), []).values()) == {None}


def test_the_poisoned_model_itself_is_no_choice() -> None:
    """A mixture of weights that holds nothing of the cleaned model has its accuracy, and its backdoor."""
    mixed = [{**row, "trial_id": "a", "epoch": 9, "alpha": 0.0} for row in _halves({"a": COURSES["a"][:1]}, loss=None)]
    rows, trials = [*_halves(COURSES), *mixed], _trials("a", "b")
    found = measures.defenders_choice(rows, trials, [])["highest_top1"]
    assert found is not None
    assert (found["trial_id"], found["epoch"]) == ("b", 1)


@unhurried
@given(st.lists(st.tuples(_share, _share), min_size=1, max_size=20), st.integers(0, 19))
def test_regret_is_none_on_the_front_and_never_below(points: list[tuple[float, float]], at: int) -> None:
    top1, asr = points[at % len(points)]
    every = [{"zeroshot_top1": a, "asr_top1": s} for a, s in points]
    found = measures.regret(top1, asr, every)
    assert min(found.values()) >= 0
    beaten = any(a >= top1 and s <= asr and (a, s) != (top1, asr) for a, s in points)
    assert (found["regret_asr"] > 0 or found["regret_top1"] > 0) == beaten
    assert found["regret_asr_within_1"] >= found["regret_asr"]


def test_a_point_of_accuracy_may_buy_more() -> None:
    front = [{"zeroshot_top1": a, "asr_top1": s} for a, s in ((0.60, 0.90), (0.59, 0.10), (0.589, 0.01))]
    found = measures.regret(0.60, 0.90, front)
    assert found == pytest.approx({"regret_asr": 0.0, "regret_asr_within_1": 0.80, "regret_top1": 0.0})


def test_batchnorm_refresh_is_quoted_beside_the_front_of_all_methods() -> None:
    refreshed = {"r": [(0.60, 0.99), (0.61, 0.95)], "q": [(0.60, 0.99), (0.605, 0.97)]}
    rows = [*_halves(COURSES), *_halves(refreshed, method="batchnorm_refresh", loss=None)]
    run = analysis.Run("run", rows, _trials("a", "b", "q", "r"))
    (found,) = analysis.of_run(run)["batchnorm_refresh"]
    assert found["method"] == "all"
    assert [(point["trial_id"], point["epoch"]) for point in found["points"]] == [("r", 1), ("q", 1)]
    assert found["baseline"]["report"] == {"zeroshot_top1": 0.60, "asr_top1": 0.99}
    first, second = found["points"]
    assert first["scores"]["search"]["regret_asr"] == 0
    assert second["scores"]["search"]["regret_asr"] == pytest.approx(0.02)
    assert analysis.of_run(analysis.Run("run", _halves(COURSES), _trials("a", "b")))["batchnorm_refresh"] == []


def test_measures_of_a_run_by_group_and_on_the_quoted_half() -> None:
    rows = [*_halves(COURSES), *_halves({"c": COURSES["a"]}, method="par")]
    found = analysis.of_run(analysis.Run("run", rows, _trials("a", "b", "c")))
    assert [entry["method"] for entry in found["instability"]] == ["all", "cleanclip", "par"]
    assert [entry["trials"] for entry in found["instability"]] == [3, 2, 1]
    assert {entry["split"] for entry in found["instability"]} == {"report"}
    assert [entry["method"] for entry in found["defender"]] == ["all", "cleanclip", "par"]
    whole = [{**row, "split": "all"} for row in rows if row["split"] == "search"]
    found = analysis.of_run(analysis.Run("run", whole, _trials("a", "b", "c")))
    assert {entry["split"] for entry in found["instability"]} == {"all"}
    assert set(found["defender"][0]["choices"]["highest_top1"]["scores"]) == {"all"}
