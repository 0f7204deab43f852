"""The benchmark of samplers, on a small sweep and without Ray."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from raybd import pareto
from raybd.curves import Curve, epoch_record


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        return importlib.import_module("search_efficiency")


def sweep() -> list[Curve]:
    """Return curves of which each has a point of the front: the higher the learning rate, the lower both rates."""
    found = []
    for objective in ("mmcl", "mmcl_ssl"):
        for i in range(6):
            epochs = {}
            for n in range(4):
                hit = 990 if n == 0 else 900 - 150 * i - n
                counts = {
                    "n_clean": 1000,
                    "correct_clean": 500 - 40 * i - 5 * n,
                    "n_triggered": 1000,
                    "hit_target": hit,
                }
                epochs[n] = epoch_record({"epoch": n}, {"all": {**counts, "correct_triggered": None}})
            whose = (f"{objective}-{i:04d}", objective, "cleanclip", f"{objective}-made")
            found.append(Curve(*whose, {"lr": 10.0 ** (i - 6)}, epochs))
    return found


def test_every_search_spends_the_same_and_a_whole_grid_finds_all(benchmark: ModuleType, tmp_path: Path) -> None:
    found = sweep()
    for sampler in benchmark.SAMPLERS:
        spent = benchmark.drive(benchmark.study_of(found, sampler, seed=3), found, str(tmp_path / sampler))
        for objective in ("mmcl", "mmcl_ssl"):
            areas = benchmark.progress(spent, objective)
            assert len(areas) == 6 * 3
            assert areas == sorted(areas)
            shares = benchmark.at_shares(areas, benchmark.full(found, objective), 6 * 3)
            assert all(0 < share <= 1 + 1e-12 for share in shares)
            if sampler == "grid":
                assert shares[-1] == pytest.approx(1)
                assert shares[0] < 0.9


def test_halving_spends_less_and_is_told_from_random_search_after_as_many_epochs(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "RUNGS", (1,))
    monkeypatch.setattr(benchmark, "SEARCHES", ("random", "grid + halving"))
    plain, halved = benchmark.measure(sweep(), 2)[:2]
    assert plain["epochs"] == [1.0, 1.0]
    # Six trials for an epoch, two of them for two more, of eighteen epochs.
    assert halved["epochs"] == pytest.approx([10 / 18] * 2)
    assert halved["ends"] == [shares[-1] for shares in halved["shares"]]
    assert all(0 < share <= 1 + 1e-12 for share in (*halved["ends"], *halved["random"]))
    (line,) = (line for line in benchmark.halving_table([plain, halved]).splitlines() if "grid + halving" in line)
    assert line.startswith("| mmcl | grid + halving | 55.56 |")


def test_the_order_of_the_grid_depends_on_the_seed(benchmark: ModuleType) -> None:
    orders = [[p["lr"] for p in benchmark.study_of(sweep(), "grid", seed=s).search.known] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_progress_is_the_hypervolume_of_all_points_so_far(benchmark: ModuleType, tmp_path: Path) -> None:
    found = sweep()
    spent = benchmark.drive(benchmark.study_of(found, "random", seed=0), found, str(tmp_path))
    top1, asr, expected = [], [], []
    for objective, record in spent:
        if objective == "mmcl":
            counted = record["counts"]["all"]
            top1.append(counted["correct_clean"] / 1000)
            asr.append(counted["hit_target"] / 1000)
            if record["epoch"]:
                expected.append(pareto.hypervolume(top1, asr))
    assert benchmark.progress(spent, "mmcl") == pytest.approx(expected)


def test_other_trials_on_ray_stop_the_benchmark(benchmark: ModuleType, tmp_path: Path) -> None:
    found = sweep()
    for seed in (0, 1):
        benchmark.drive(benchmark.study_of(found, "random", seed=seed), found, str(tmp_path / str(seed)))
    one, other = (benchmark.trials(str(tmp_path / str(seed))) for seed in (0, 1))
    assert len(one) == 12
    benchmark.assert_same(one, dict(reversed(one.items())))
    with pytest.raises(SystemExit, match="other trials"):
        benchmark.assert_same(one, other)


def test_intervals_hold_the_mean_and_narrow_with_more_seeds(benchmark: ModuleType) -> None:
    few, many = [0.2, 0.4, 0.9], [0.2, 0.4, 0.9] * 20
    mean, low, high = benchmark.interval(few)
    assert mean == pytest.approx(0.5)
    assert low < mean < high
    _, low_many, high_many = benchmark.interval(many)
    # The standard error of the mean of 60 such values: 0.294 / sqrt(60).
    assert high_many - low_many == pytest.approx(2 * 1.96 * 0.294 / 60**0.5, rel=0.05)
    assert benchmark.interval([0.7, 0.7]) == pytest.approx((0.7, 0.7, 0.7))
