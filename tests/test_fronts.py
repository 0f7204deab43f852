"""Fronts from hand-made rows: the search half decides, the report half is quoted."""

from __future__ import annotations

from typing import Any

import pytest

from raybd import fronts
from raybd.report import words

BASE = (0.60, 0.99)
# trial, epoch: (accuracy, ASR) on the search half, and on the report half.
POINTS = {
    ("t-a", 0): (BASE, (0.58, 0.98)),
    ("t-a", 1): ((0.57, 0.10), (0.50, 0.20)),
    ("t-a", 2): ((0.40, 0.05), (0.52, 0.06)),  # beats (t-a, 1) on the report half
    ("t-b", 0): (BASE, (0.58, 0.98)),
    ("t-b", 1): ((0.595, 0.50), (0.60, 0.55)),
    ("t-b", 2): ((0.56, 0.30), (0.61, 0.01)),  # beaten on the search half, best of all on the report half
    ("t-b", 3): ((0.39, 0.06), (0.38, 0.05)),  # beaten
}
TRIALS = [{"trial_id": "t-b", "number": 0}, {"trial_id": "t-a", "number": 1}]


def _rows(points: dict[Any, Any] = POINTS, *, objective: str = "mmcl") -> list[dict[str, Any]]:
    return [
        {
            "study": "demo",
            "study_hash": "abc",
            "pretrain_id": f"{objective}-1",
            "objective": objective,
            "method": "cleanclip",
            "trial_id": trial,
            "epoch": epoch,
            "split": split,
            "zeroshot_top1": top1,
            "asr_top1": asr,
        }
        for (trial, epoch), halves in points.items()
        for split, (top1, asr) in zip(("search", "report"), halves, strict=True)
    ]


def _members(rows: list[dict[str, Any]], kind: str, split: str) -> list[tuple[str, int]]:
    return [(row["trial_id"], row["epoch"]) for row in rows if (row["kind"], row["split"]) == (kind, split)]


def test_search_half_decides_and_report_half_has_the_same_points() -> None:
    rows = fronts.compute(_rows(), TRIALS)
    expected = [("t-a", 2), ("t-a", 1), ("t-b", 1), ("t-b", 0)]
    assert _members(rows, "any_epoch", "search") == expected
    assert _members(rows, "any_epoch", "report") == expected
    quoted = {(row["trial_id"], row["epoch"]): row for row in rows if row["split"] == "report"}
    assert quoted["t-a", 1]["zeroshot_top1"] == 0.50
    assert quoted["t-a", 1]["asr_top1"] == 0.20
    assert quoted["t-a", 1]["baseline_top1"] == 0.58
    assert quoted["t-a", 1]["baseline_asr"] == 0.98


def test_final_front_has_last_epochs_and_the_poisoned_model_only() -> None:
    rows = fronts.compute(_rows(), TRIALS)
    # The last of t-b (0.39, 0.06) is beaten by the last of t-a (0.40, 0.05).
    assert _members(rows, "final", "search") == [("t-a", 2), ("t-b", 0)]


def test_a_trial_that_failed_has_no_final_point() -> None:
    """Its last epoch is only where it failed, and its weights need not be there; its epochs compete all the same."""
    trials = [{**row, "state": "failed" if row["trial_id"] == "t-a" else "complete"} for row in TRIALS]
    rows = fronts.compute(_rows(), trials)
    assert _members(rows, "final", "search") == [("t-b", 3), ("t-b", 0)]
    assert ("t-a", 2) in _members(rows, "any_epoch", "search")


def test_of_equal_points_the_trial_of_lowest_number_stands() -> None:
    """All trials start from the same poisoned model: it is on the front once."""
    rows = fronts.compute(_rows(), TRIALS)
    assert [m for m in _members(rows, "any_epoch", "search") if m[1] == 0] == [("t-b", 0)]
    turned = fronts.compute(_rows(), [{"trial_id": "t-b", "number": 1}, {"trial_id": "t-a", "number": 0}])
    assert [m for m in _members(turned, "any_epoch", "search") if m[1] == 0] == [("t-a", 0)]
    assert fronts.compute(list(reversed(_rows())), TRIALS) == rows


def test_hypervolume_and_contributions_by_half() -> None:
    rows = fronts.compute(_rows(), TRIALS)
    searched = [row for row in rows if (row["kind"], row["split"]) == ("any_epoch", "search")]
    area = 0.40 * 0.95 + 0.17 * 0.90 + 0.025 * 0.50 + 0.005 * 0.01
    assert [row["hypervolume"] for row in searched] == pytest.approx([area] * 4)
    assert searched[0]["hv_contribution"] == pytest.approx(0.40 * 0.05)
    reported = [row for row in rows if (row["kind"], row["split"]) == ("any_epoch", "report")]
    # On the report half (t-a, 1) = (0.50, 0.20) is beaten by (t-a, 2) = (0.52, 0.06), (t-b, 0) by (t-b, 1).
    assert [row["hypervolume"] for row in reported] == pytest.approx([0.52 * 0.94 + 0.08 * 0.45] * 4)
    # (t-a, 1) takes over part of what (t-a, 2) dominates: (t-a, 2) owns only the rest.
    without = 0.50 * 0.80 + 0.10 * 0.45
    assert reported[0]["hv_contribution"] == pytest.approx(0.52 * 0.94 + 0.08 * 0.45 - without)
    assert reported[1]["hv_contribution"] == 0


def test_checkpoints_of_cleaned_points_and_of_the_poisoned_model() -> None:
    by_point = {(row["trial_id"], row["epoch"]): row["checkpoint"] for row in fronts.compute(_rows(), TRIALS)}
    assert by_point["t-a", 1] == fronts.checkpoint_name("t-a", 1) == "weights/t-a/epoch-0001.safetensors"
    assert by_point["t-b", 0] == "pretrained/mmcl-1.safetensors"


def test_summary_chooses_on_search_and_quotes_its_own_half() -> None:
    summaries = fronts.summarise(fronts.compute(_rows(), TRIALS))
    assert [(s["kind"], s["split"]) for s in summaries] == [
        ("any_epoch", "search"),
        ("any_epoch", "report"),
        ("final", "search"),
        ("final", "report"),
    ]
    searched, reported = summaries[:2]
    assert searched["baseline"] == {"zeroshot_top1": 0.60, "asr_top1": 0.99}
    assert reported["baseline"] == {"zeroshot_top1": 0.58, "asr_top1": 0.98}
    # At most 1 point below 0.60 on search: (0.595, 0.50) and not (0.57, 0.10); 3 points: just (0.57, 0.10).
    chosen = {points: (p["trial_id"], p["epoch"]) for points, p in searched["best_asr_within"].items()}
    assert chosen == {
        "0.5": ("t-b", 1),  # exactly half a point below
        "1": ("t-b", 1),
        "2": ("t-b", 1),
        "3": ("t-a", 1),
        "5": ("t-a", 1),
        "10": ("t-a", 1),
    }
    assert searched["best_asr_within"]["3"]["share_lost"] == pytest.approx(0.03 / 0.60)
    assert reported["best_asr_within"]["3"]["share_lost"] == pytest.approx(0.08 / 0.58)
    assert searched["hypervolume_share"] == pytest.approx(searched["hypervolume"] / 0.60)
    assert reported["hypervolume_share"] == pytest.approx(reported["hypervolume"] / 0.58)
    assert reported["best_asr_within"]["1"]["asr_top1"] == 0.55
    assert reported["best_asr_within"]["3"]["asr_top1"] == 0.20  # though (t-b, 2) has 0.01 there
    ceilings = {c: p and (p["trial_id"], p["epoch"]) for c, p in searched["best_top1_at_asr"].items()}
    assert ceilings == {"0.01": None, "0.05": ("t-a", 2), "0.1": ("t-a", 1)}
    assert reported["best_top1_at_asr"]["0.01"] is None
    assert reported["best_top1_at_asr"]["0.1"]["zeroshot_top1"] == 0.50


def test_objectives_have_fronts_of_their_own() -> None:
    weak = {key: ((a[0] / 2, a[1]), (b[0] / 2, b[1])) for key, (a, b) in POINTS.items()}
    other = [{**row, "trial_id": f"x{row['trial_id']}"} for row in _rows(weak, objective="mmcl_ssl")]
    rows = fronts.compute([*other, *_rows()], TRIALS)
    assert [row for row in rows if row["objective"] == "mmcl"] == fronts.compute(_rows(), TRIALS)
    assert {row["baseline_top1"] for row in rows if row["objective"] == "mmcl_ssl"} == {0.30, 0.29}


def _two_methods() -> list[dict[str, Any]]:
    methods = {"t-a": "cleanclip", "t-b": "par"}
    return [{**row, "method": methods[row["trial_id"]]} for row in _rows()]


def test_several_methods_also_have_a_front_of_all() -> None:
    rows = fronts.compute(_two_methods(), TRIALS)
    assert [*dict.fromkeys(row["method"] for row in rows)] == ["all", "cleanclip", "par"]
    every = [row for row in rows if row["method"] == "all"]
    assert [{**row, "method": "cleanclip"} for row in every] == fronts.compute(_rows(), TRIALS)
    own = [row for row in rows if row["method"] == "par"]
    assert _members(own, "any_epoch", "search") == [("t-b", 3), ("t-b", 2), ("t-b", 1), ("t-b", 0)]
    assert {s["method"] for s in fronts.summarise(rows)} == {"all", "cleanclip", "par"}
    # One method alone needs no second front of the same trials.
    assert {row["method"] for row in fronts.compute(_rows(), TRIALS)} == {"cleanclip"}


def test_a_poisoned_model_measured_several_times_has_one_baseline_for_all_methods() -> None:
    rows = []
    for method, trial, measured in (("cleanclip", "t", (0.50, 0.99)), ("mmcl", "u", (0.51, 0.98))):
        same = {
            "study": "s",
            "study_hash": "h",
            "pretrain_id": "p",
            "objective": "mmcl",
            "method": method,
            "split": "all",
        }
        for epoch, (top1, asr) in enumerate((measured, (0.4, 0.1))):
            rows.append({**same, "trial_id": trial, "epoch": epoch, "zeroshot_top1": top1, "asr_top1": asr})
    for given in (rows, rows[::-1]):
        found = fronts.compute(given, [])
        assert {(row["baseline_top1"], row["baseline_asr"]) for row in found} == {(0.51, 0.98)}
        assert {row["method"] for row in found} == {"all", "cleanclip", "mmcl"}


def test_points_without_training_compete_but_are_no_last_epoch() -> None:
    mixed = [{**row, "trial_id": "t-a", "epoch": 3, "alpha": 0.5} for row in _rows() if row["epoch"] == 3]
    rows = fronts.compute([*_rows(), *mixed], TRIALS)
    # (t-a, 3) equals (t-b, 3), which is beaten; as the last epoch it would stand in for (t-a, 2).
    assert _members(rows, "final", "search") == [("t-a", 2), ("t-b", 0)]
    better = [{**row, "zeroshot_top1": 0.59, "asr_top1": 0.01} for row in mixed]
    rows = fronts.compute([*_rows(), *better], TRIALS)
    assert _members(rows, "any_epoch", "search") == [("t-a", 3), ("t-b", 1), ("t-b", 0)]


def test_results_that_know_no_halves_are_chosen_and_quoted_on_all_images() -> None:
    whole = [{**row, "split": "all"} for row in _rows() if row["split"] == "search"]
    rows = fronts.compute(whole, TRIALS)
    same = ("trial_id", "epoch", "kind", "zeroshot_top1", "asr_top1", "hv_contribution", "hypervolume")
    expected = [row for row in fronts.compute(_rows(), TRIALS) if row["split"] == "search"]
    assert [[row[name] for name in same] for row in rows] == [[row[name] for name in same] for row in expected]
    assert {row["split"] for row in rows} == {"all"}
    assert {row["checkpoint"] for row in rows} == {None}
    (summary, final), halves = fronts.summarise(rows), fronts.summarise(expected)
    assert (summary["kind"], final["kind"]) == ("any_epoch", "final")
    assert summary["best_asr_within"]["3"]["asr_top1"] == halves[0]["best_asr_within"]["3"]["asr_top1"] == 0.10


def test_nothing_in_nothing_out() -> None:
    assert fronts.compute([], []) == []
    assert fronts.summarise([]) == []


def test_points_without_training_are_told_by_their_place_on_the_line() -> None:
    rows = []
    points = [(0, None, 0.5, 1.0), (1, None, 0.4, 0.3), (2, 0.75, 0.45, 0.5)]
    for epoch, alpha, top1, asr in points:
        for split in ("search", "report"):
            same = {"study": "s", "study_hash": "h", "pretrain_id": "p", "objective": "mmcl", "method": "interpolation"}
            rates = {"zeroshot_top1": top1, "asr_top1": asr}
            rows.append({**same, **rates, "trial_id": "t", "epoch": epoch, "alpha": alpha, "split": split})
    trial = {"trial_id": "t", "number": 0, "state": "complete", "objective": "mmcl", "method": "interpolation"}
    found = fronts.compute(rows, [{**trial, "pretrain_id": "p"}])
    final = {row["epoch"] for row in found if row["kind"] == "final"}
    assert final == {0, 1}
    told = [words.epoch(point) for point in fronts.summarise(found)[0]["front"]]
    assert told == ["1", "α 0.75", "0"]
