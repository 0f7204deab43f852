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


def test_all_ways_take_the_same_steps_and_count_the_same(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYBD_CACHE", str(tmp_path))
    small = ["clean.num_samples=48", "data.max_train_samples=120", "data.max_test_samples=88", "clean.batch_size=16"]
    study = load("demo", overrides=[*small, "clean.method=cleanclip", "clean.loss_weights.ssl=1"])
    bench = script.Bench(study, torch.device("cpu"), rounds=1, workers=0, eda_each_epoch=True)
    bench.run()  # it stops where the counts or the mean losses differ
    steps = {way.step for way in (bench.training, bench.floor, bench.plain, bench.published)}
    assert steps == {2 * 3}
    # On the same batches the steps themselves are the same, in either layout.
    ours, floor = (dict(clip.net.state_dict()) for clip in (bench.floor.clip, bench.plain.clip))
    for name, weights in ours.items():
        torch.testing.assert_close(weights, floor[name], rtol=0.02, atol=0.02)
    times = bench.times
    assert [len(part) for own in times.values() for part in (own.train, own.evaluate, own.epoch)] == [1] * 12
    assert script.ratio(times, "floor", "floor") == 1
    assert len(script.table(times).splitlines()) == 2 + len(script.WAYS)


def test_other_work_is_found_out(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYBD_CACHE", str(tmp_path))
    small = ["clean.num_samples=32", "data.max_train_samples=120", "data.max_test_samples=88"]
    study = load("demo", overrides=[*small, "clean.method=cleanclip", "clean.loss_weights.ssl=1"])
    bench = script.Bench(study, torch.device("cpu"), rounds=1, workers=0, eda_each_epoch=False)
    bench.check_counts()
    evaluate = bench.floor.evaluate
    monkeypatch.setattr(
        bench.floor, "evaluate", lambda: script.Found(*(script.numbers(evaluate()) - np.array([9, 0, 0, 0])))
    )
    with pytest.raises(SystemExit, match="not the same work"):
        bench.check_counts()
