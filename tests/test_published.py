"""Our measures on the published CC3M sweep give the numbers that were published of it.

The sweep was measured once on all images, so that points are chosen and quoted on the same ones (`split` is `all`).
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from raybd import analysis, measures
from raybd.fronts import Row

SWEEP = Path(__file__).resolve().parents[2] / "shared" / "published" / "cc3m_sweep.csv"
# pretrain objective, cleaning loss: points on the front, hypervolume. From the README beside the table.
EXPECTED = {
    ("mmcl", "mmcl"): (30, 0.1371),
    ("mmcl", "ssl"): (36, 0.1521),
    ("mmcl", "mmcl_ssl"): (23, 0.1742),
    ("mmcl_ssl", "mmcl"): (30, 0.1557),
    ("mmcl_ssl", "ssl"): (25, 0.1184),
    ("mmcl_ssl", "mmcl_ssl"): (42, 0.1640),
}
CLEANCLIP = "mmcl_ssl"


@pytest.fixture(scope="module")
def run() -> analysis.Run:
    if not SWEEP.exists():
        pytest.skip(f"THE PUBLISHED NUMBERS ARE NOT CHECKED: there is no {SWEEP}")
    with SWEEP.open(newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [
        {
            "study": "cc3m",
            "study_hash": "published",
            "objective": row["pretrain_objective"],
            "pretrain_id": row["pretrain_objective"],
            "method": row["cleaning_loss"],
            "trial_id": f"{row['pretrain_objective']}-{row['cleaning_loss']}-{float(row['lr']):.5f}",
            "epoch": int(row["epoch"]),
            "split": "all",
            "zeroshot_top1": float(row["zeroshot_top1"]),
            "asr_top1": float(row["asr_top1"]),
        }
        for row in rows
    ]
    trials = [{"trial_id": name, "number": i} for i, name in enumerate(sorted({row["trial_id"] for row in epochs}))]
    assert len(trials) == 68
    return analysis.Run("cc3m", epochs, trials)


@pytest.fixture(scope="module")
def found(run: analysis.Run) -> dict[str, Any]:
    return analysis.of_run(run)


def _summary(found: dict[str, Any], objective: str, method: str) -> Row:
    (summary,) = [
        s for s in found["fronts"] if (s["objective"], s["method"], s["kind"]) == (objective, method, "any_epoch")
    ]
    return summary


@pytest.mark.parametrize("group", EXPECTED, ids=lambda group: f"{group[0]}-cleaned-by-{group[1]}")
def test_fronts_and_hypervolumes(found: dict[str, Any], group: tuple[str, str]) -> None:
    size, area = EXPECTED[group]
    summary = _summary(found, *group)
    assert len(summary["front"]) == size
    assert round(summary["hypervolume"], 4) == area


def test_every_group_is_there_and_the_front_over_all_methods(found: dict[str, Any]) -> None:
    groups = {(s["objective"], s["method"]) for s in found["fronts"]}
    assert groups == {*EXPECTED, ("mmcl", "all"), ("mmcl_ssl", "all")}
    for objective in ("mmcl", "mmcl_ssl"):
        best = max(EXPECTED[o, m][1] for o, m in EXPECTED if o == objective)
        assert _summary(found, objective, "all")["hypervolume"] >= best - 5e-5


@pytest.mark.parametrize(("objective", "top1", "asr"), [("mmcl", 16.49, 4.92), ("mmcl_ssl", 14.16, 3.02)])
def test_best_accuracy_of_cleanclip_at_low_asr(found: dict[str, Any], objective: str, top1: float, asr: float) -> None:
    point = _summary(found, objective, CLEANCLIP)["best_top1_at_asr"]["0.05"]
    assert round(100 * point["zeroshot_top1"], 2) == top1
    assert round(100 * point["asr_top1"], 2) == asr
    if objective == "mmcl_ssl":
        assert round(100 * point["share_lost"], 1) == 16.9
    else:
        assert point["share_lost"] < 0  # more accurate than the poisoned model


@pytest.mark.parametrize(("objective", "asr"), [("mmcl", 0.25), ("mmcl_ssl", 42.4)])
def test_best_asr_of_cleanclip_within_a_point(found: dict[str, Any], objective: str, asr: float) -> None:
    point = _summary(found, objective, CLEANCLIP)["best_asr_within"]["1"]
    digits = 2 if asr < 1 else 1
    assert round(100 * point["asr_top1"], digits) == asr


@pytest.mark.parametrize(("objective", "unstable", "rebound"), [("mmcl", 0.8, 0.6), ("mmcl_ssl", 3.3, 4.4)])
def test_instability_of_cleanclip(run: analysis.Run, objective: str, unstable: float, rebound: float) -> None:
    """The published numbers are those of the CleanCLIP runs without that of learning rate 4e-3.

    It ends at 0.3 % accuracy: a ruined model, which is steady. With it: 0.8 and 3.1 %, 0.6 and 4.1 points.
    """
    rows = [row for row in run.groups[objective, objective, CLEANCLIP] if not row["trial_id"].endswith("0.00400")]
    steady = measures.instability(rows)
    assert steady is not None
    assert (steady["trials"], steady["steps"]) == (12, 240)
    assert round(100 * steady["unstable_share"], 1) == unstable
    assert round(100 * steady["rebound"], 1) == rebound


def test_instability_of_all_cleanclip_runs(found: dict[str, Any]) -> None:
    steady = {entry["objective"]: entry for entry in found["instability"] if entry["method"] == CLEANCLIP}
    assert {name: round(100 * entry["unstable_share"], 1) for name, entry in steady.items()} == {
        "mmcl": 0.8,
        "mmcl_ssl": 3.1,
    }
    assert {name: round(100 * entry["rebound"], 1) for name, entry in steady.items()} == {"mmcl": 0.6, "mmcl_ssl": 4.1}


def test_objectives_differ(run: analysis.Run) -> None:
    entries = {e["measure"]: e for e in analysis.between_objectives([run]) if e["method"] == CLEANCLIP}
    assert entries["best_top1_at_asr_0.05"]["difference"] == pytest.approx(0.1649 - 0.1416, abs=1e-4)
    assert entries["best_asr_within_1"]["difference"] == pytest.approx(0.0025 - 0.424, abs=1e-3)
    assert entries["hypervolume_share"]["low"] > 0
