"""The benchmark of dry runs: what was predicted for the settings that runs had, beside what they took."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from raybd import costs, planning
from raybd.clean import registry
from raybd.ledger import Entry
from raybd.study import CleanSettings
from raybd.study_file import load
from raybd.train.probe import Speed


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("prediction")


def test_runs_are_compared_by_their_own_settings_and_evaluations(script: ModuleType) -> None:
    study = load(str(Path(__file__).parent / "studies" / "tiny.yaml"))
    found = script.Comparison(study, Speed(training=1e9, forward=2e9, how="given"))
    settings: CleanSettings = study.clean.settings({"num_samples": 40, "epochs": 2})
    took = [(0.0, 0.001), (3.0, 1.0), (5.0, 2.0)]  # the poisoned model was looked at by another trial
    epochs = {n: {"train_seconds": train, "evaluate_seconds": look} for n, (train, look) in enumerate(took)}
    for _ in range(2):
        found.add(Entry("t", {}, 1, epochs, {"device_seconds": 12.0}), settings)
    (own,) = found.kinds.values()
    assert (own.runs, own.epochs, own.looks) == (2, 4, 4)
    cost = registry.cost(study.model.name, settings, pairs=40) / 1e9
    tower, sizes = costs.towers(study.model.name), planning.sizes(study)
    look = (2 * sizes.images * tower.image_forward + 44 * tower.text_forward) / 2e9
    assert own.training == pytest.approx((2 * cost, 16.0))
    assert own.evaluation == pytest.approx((4 * look, 2 * 3.001))
    assert own.whole == pytest.approx((2 * cost + 4 * look, 24.0))
    assert f"{cost / 2:.2f} → 4.00 | {16 / (2 * cost):.2f}" in script.table(found.kinds)


def test_what_was_predicted_to_take_nothing_has_no_ratio(script: ModuleType) -> None:
    found = script.Seconds(runs=2, epochs=2, looks=4, training=(0.0, 1.0), evaluation=(2.0, 4.0))
    assert script.table({"no training": found}).splitlines()[-1] == (
        "| no training | 2 | 0 → 0.50 | – | 0.50 → 1.00 | 2.00 | – | – |"
    )
