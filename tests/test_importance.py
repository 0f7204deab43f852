"""Importance of settings: against an independent implementation, and what is said of few trials."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from raybd import importance


def test_share_is_eta_squared_of_kruskal_and_wallis() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], [9, 6, 12])
    score = generator.integers(0, 6, len(groups)) + 1.5 * groups  # with ties
    found = importance.importance(groups, score.astype(np.float64), seed=1)
    h = stats.kruskal(*(score[groups == group] for group in range(3))).statistic
    assert found["share"] == pytest.approx((h - 2) / (len(groups) - 3))
    assert found["share"] > found["chance"] > 0


def test_chance_covers_what_says_nothing() -> None:
    """Of 200 settings that say nothing 1 in 20 passes: more than 22 would come about once in 2,000 times."""
    generator = np.random.default_rng(1)
    groups = np.repeat([0, 1, 2, 3], 5)
    found = [importance.importance(groups, generator.normal(size=20), seed=number) for number in range(200)]
    assert sum(one["share"] > one["chance"] for one in found) <= 22


def test_scores_that_are_all_the_same_say_nothing() -> None:
    assert importance.importance(np.array([0, 0, 1, 1]), np.ones(4), seed=0) == {"share": 0.0, "chance": 0.0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7], None),  # too few trials
        ([3] * 12, None),
        (list("aabbaabb"), [0, 0, 1, 1, 0, 0, 1, 1]),
        (list("abcdefgh"), None),  # names have no neighbours
        ([5.0, 1.0, 6.0, 2.0, 7.0, 3.0, 8.0, 4.0], [1, 0, 1, 0, 1, 0, 1, 0]),
        ([0.0] * 6 + [1.0, 2.0, 3.0], [0] * 6 + [1] * 3),
        ([math.nan, *range(8)], None),
        ([10**400, *range(8)], None),  # no float is as large
        ([True, False] * 4, [1, 0] * 4),
        ([None, [1]] * 4, [1, 0] * 4),
    ],
)
def test_groups_of_values(values: list[Any], expected: list[int] | None) -> None:
    found = importance.grouped(values)
    assert (found if found is None else found.tolist()) == expected


def _rows(count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Trials whose ASR hangs on lr and whose accuracy on the method; the report half is scored by other numbers."""
    epochs, trials = [], []
    generator = np.random.default_rng(3)
    for number in range(count):
        lr, method = float(10 ** generator.uniform(-6, -3)), ("par", "cleanclip")[number % 2]
        same = {"trial_id": f"t{number}", "objective": "mmcl", "pretrain_id": "p"}
        settings = {"lr": lr} | ({"par.threshold": 1.0 + number} if method == "par" else {})
        trials.append({**same, "method": method, "params_json": json.dumps(settings)})
        for epoch in range(3):
            for split in ("search", "report"):
                rates = {"zeroshot_top1": 0.5 + 0.1 * (number % 2) - 0.01 * epoch, "asr_top1": -math.log10(lr) / 10}
                if (split == "search") == (epoch == 1):
                    rates["asr_top1"] /= 2
                epochs.append({**same, "method": method, "epoch": epoch, "split": split, **rates})
    return epochs, trials


def test_settings_are_judged_for_each_search_objective() -> None:
    epochs, trials = _rows(24)
    assert {row["epoch"] for row in importance.best_epochs(epochs).values()} == {1}  # best on the search half
    assert {row["split"] for row in importance.best_epochs(epochs).values()} == {"report"}
    found = {entry["setting"]: entry for entry in importance.of_run(epochs, trials)}
    assert set(found) == {"lr", "method", "par.threshold"}
    assert found["par.threshold"]["trials"] == 12
    assert found["lr"]["asr_top1"]["share"] > 0.8
    assert found["lr"]["zeroshot_top1"]["share"] < found["lr"]["zeroshot_top1"]["chance"]
    assert found["method"]["zeroshot_top1"]["share"] == pytest.approx(1.0, abs=0.05)
    assert importance.of_run(epochs, trials[:7]) == []


def test_permutations_in_blocks_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, score = np.repeat([0, 1, 2], 5), np.random.default_rng(2).normal(size=15)
    found = importance.importance(groups, score, seed=1)
    monkeypatch.setattr(importance, "_BLOCK", importance._PERMUTATIONS)
    assert importance.importance(groups, score, seed=1) == pytest.approx(found)
