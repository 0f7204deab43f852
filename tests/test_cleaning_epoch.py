"""The benchmark of a cleaning epoch: all ways do the same work, on a handful of drawings."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from raybd.study_file import load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("cleaning_epoch")


def test_all_ways_do_the_same_work(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYBD_CACHE", str(tmp_path / "cache"))
    small = ["clean.num_samples=48", "clean.batch_size=16", "data.max_test_samples=88", "data.train=test/*.tar*"]
    study = load("demo", overrides=[*small, "clean.method=cleanclip", "clean.loss_weights.ssl=1"])
    how = {"folder": str(tmp_path / "run"), "rounds": 1, "workers": 0, "eda_each_epoch": True}
    bench = script.Bench(study, torch.device("cpu"), **how)
    evaluate = bench.floor.evaluate
    bench.floor.evaluate = lambda: script.Found(*(script.numbers(evaluate()) - np.array([9, 0, 0, 0])))
    with pytest.raises(SystemExit, match="not the same work"):
        bench.check_counts()
    bench.floor.evaluate = evaluate
    bench.run()  # it stops where counts or mean losses differ
    assert {way.step for way in (bench.training, bench.floor, bench.plain, bench.published)} == {2 * 3}
    times = bench.times
    assert [len(part) for own in times.values() for part in (own.train, own.evaluate, own.epoch)] == [1] * 12
    assert script.ratio(times, "floor", "floor") == 1
    assert len(script.table(times).splitlines()) == 2 + len(script.WAYS)


@pytest.mark.parametrize(("compiled", "pays"), [(8.0, 15.0), (12.0, float("inf"))])
def test_compiling_pays_by_what_each_later_epoch_saves(script: ModuleType, compiled: float, pays: float) -> None:
    times = {"floor": script.Times(epoch=[10.0, 10.0]), script.COMPILED: script.Times(epoch=[compiled, compiled])}
    assert script.worth(times, first=compiled + 30) == (30.0, pays)
