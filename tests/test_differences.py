"""Differences between objectives: against the fronts themselves, a slow bootstrap, and cases with a known answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybd import analysis, differences, fronts
from raybd.pools import Pool, gather

unhurried = settings(deadline=None, max_examples=40)
_share = st.one_of(st.integers(1, 6).map(lambda k: k / 6), st.integers(1, 5000).map(lambda k: k / 5000))
_point = st.tuples(_share, _share, _share, _share)  # accuracy and ASR on search, then on report
_courses = st.lists(st.lists(_point, min_size=1, max_size=5), min_size=1, max_size=5)
BASE = (0.6, 0.99, 0.58, 0.98)


def _rows(courses: list[list[Any]], *, objective: str = "mmcl", base: Any = BASE) -> list[dict[str, Any]]:
    known = {"study": "s", "study_hash": "h", "pretrain_id": f"{objective}-1", "method": "cleanclip"}
    return [
        {
            **known,
            "objective": objective,
            "trial_id": f"{objective}-{t:04d}",
            "epoch": epoch,
            "split": split,
            "zeroshot_top1": point[2 * half],
            "asr_top1": point[2 * half + 1],
        }
        for t, course in enumerate(courses)
        for epoch, point in enumerate([base, *course])
        for half, split in enumerate(("search", "report"))
    ]


def _trials(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"trial_id": n, "number": i} for i, n in enumerate(sorted({row["trial_id"] for row in rows}))]


def _slow(rows: list[dict[str, Any]], trials: list[dict[str, Any]]) -> list[float]:
    """The measures through the fronts of these trials."""
    summaries = fronts.summarise(fronts.compute(rows, trials))
    found = next(s for s in summaries if (s["kind"], s["split"]) == ("any_epoch", "report"))
    top1, asr = found["best_top1_at_asr"]["0.05"], found["best_asr_within"]["1"]
    return [
        found["hypervolume_share"],
        top1["zeroshot_top1"] if top1 else np.nan,
        asr["asr_top1"] if asr else np.nan,
    ]


@unhurried
@given(_courses, st.data())
def test_values_of_any_selection_are_those_of_its_fronts(courses: list[Any], data: st.DataObject) -> None:
    rows = _rows(courses)
    trials = _trials(rows)
    pool = gather(rows, trials)
    assert pool is not None
    assert pool.num_trials == len(courses)
    chosen = data.draw(st.lists(st.booleans(), min_size=len(courses), max_size=len(courses)).filter(any))
    everything = [True] * len(courses)
    values = pool.values(np.array([everything, chosen]))
    assert values[0] == pytest.approx(_slow(rows, trials), abs=1e-12, nan_ok=True)
    names = {trial["trial_id"] for trial, kept in zip(trials, chosen, strict=True) if kept}
    some = [row for row in rows if row["trial_id"] in names]
    assert values[1] == pytest.approx(_slow(some, trials), abs=1e-12, nan_ok=True)


GOOD = [[(0.58, 0.04, 0.57, 0.05)], [(0.595, 0.30, 0.58, 0.31)], [(0.50, 0.01, 0.49, 0.02)]]
POOR = [[(0.45, 0.04, 0.44, 0.05)], [(0.595, 0.80, 0.58, 0.81)], [(0.30, 0.01, 0.29, 0.02)]]


def _pool(courses: list[Any], **given: Any) -> Pool:
    rows = _rows(courses, **given)
    found = gather(rows, _trials(rows))
    assert found is not None
    return found


def test_difference_by_hand() -> None:
    found = differences.compare({"mmcl": [_pool(GOOD)], "mmcl_ssl": [_pool(POOR, objective="mmcl_ssl")]})
    by_measure = {entry["measure"]: entry for entry in found}
    assert list(by_measure) == ["hypervolume_share", "best_top1_at_asr_0.05", "best_asr_within_1"]
    best = by_measure["best_top1_at_asr_0.05"]
    assert (best["first"], best["second"]) == ("mmcl", "mmcl_ssl")
    assert (best["first_value"], best["second_value"]) == (0.57, 0.44)
    assert best["difference"] == pytest.approx(0.13)
    assert by_measure["best_asr_within_1"]["difference"] == pytest.approx(0.31 - 0.81)
    assert best["trials"] == [3, 3]
    assert best["runs"] == 1


def test_interval_is_that_of_a_slow_bootstrap() -> None:
    """The same quantiles as resampling rows and making fronts anew, up to the noise of resampling."""
    rows = {"mmcl": _rows(GOOD), "mmcl_ssl": _rows(POOR, objective="mmcl_ssl")}
    pools = {name: [_pool(courses, objective=name)] for name, courses in (("mmcl", GOOD), ("mmcl_ssl", POOR))}
    generator, slow = np.random.default_rng(5), []
    for _ in range(400):
        values = []
        for name, own in rows.items():
            drawn = {f"{name}-{t:04d}" for t in generator.integers(0, 3, size=3)}
            values.append(_slow([row for row in own if row["trial_id"] in drawn], _trials(own))[0])
        slow.append(values[0] - values[1])
    (share, *_) = differences.compare(pools, resamples=4000, level=0.8)
    low, high = np.quantile(slow, [0.1, 0.9])
    assert share["low"] == pytest.approx(low, abs=0.03)
    assert share["high"] == pytest.approx(high, abs=0.03)
    assert share["low"] < share["high"]


def test_trials_that_are_all_alike_leave_no_doubt() -> None:
    """Ten equal trials: every resample is the whole, so the interval is a point."""
    pools = {"a": [_pool(GOOD[:1] * 10)], "b": [_pool(POOR[:1] * 10)]}
    for entry in differences.compare(pools):
        if entry["difference"] is not None:
            assert entry["low"] == pytest.approx(entry["difference"])
            assert entry["high"] == pytest.approx(entry["difference"])


def test_seeds_are_resampled_together() -> None:
    """Where both objectives move alike from seed to seed, their difference is sure, however far the seeds are apart."""
    bases = [(0.6, 0.99, 0.6, 0.99), (0.3, 0.99, 0.3, 0.99), (0.8, 0.99, 0.8, 0.99)]

    def alike(base: Any, lost: float) -> list[Any]:
        return [[(base[0] - lost, 0.04, base[2] - lost, 0.04)]] * 4

    pools = {
        "a": [_pool(alike(base, 0.1), base=base) for base in bases],
        "b": [_pool(alike(base, 0.2), base=base) for base in bases],
    }
    best = differences.compare(pools)[1]
    assert best["runs"] == 3
    assert best["first_value"] == pytest.approx((0.5 + 0.2 + 0.7) / 3)
    assert best["low"] == pytest.approx(0.1)
    assert best["high"] == pytest.approx(0.1)
    # With the seeds of one turned around, the pairs no longer cancel.
    turned = differences.compare({"a": pools["a"], "b": pools["b"][::-1]})[1]
    assert turned["difference"] == pytest.approx(0.1)
    assert turned["high"] - turned["low"] > 0.1


def test_same_seed_same_interval() -> None:
    pools = {"a": [_pool(GOOD)], "b": [_pool(POOR)]}
    assert differences.compare(pools) == differences.compare(pools)
    one, other = differences.compare(pools, resamples=20, seed=1), differences.compare(pools, resamples=20, seed=2)
    assert one != other


def test_selections_looked_at_together_give_what_each_gives_alone() -> None:
    pool = _pool([[tuple(row) for row in course] for course in np.random.default_rng(0).random((30, 5, 4))])
    included_RT = np.random.default_rng(1).random((60, 30)) < np.linspace(0, 1, 60)[:, None]
    alone = np.concatenate([pool.values(included_T[None]) for included_T in included_RT])
    assert pool.values(included_RT) == pytest.approx(alone, abs=1e-12, nan_ok=True)
    assert np.isnan(alone).any()


@pytest.mark.parametrize("count", [1, 2, 5, 40, 1000])
def test_intervals_reach_from_quantile_to_quantile(count: int) -> None:
    values = np.random.default_rng(count).random(count)
    for level in (0.95, 0.8, 0.5, 1.0):
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()
        found = differences._interval(np.append(values, np.nan), level)
        assert found == {"low": low, "high": high, "resamples": count}


def test_no_point_that_qualifies_is_no_number() -> None:
    high = [[(0.59, 0.5, 0.58, 0.5)]]
    found = differences.compare({"a": [_pool(high)], "b": [_pool(GOOD)]})[1]
    assert (found["first_value"], found["difference"], found["low"], found["resamples"]) == (None, None, None, 0)


def test_one_objective_has_nothing_to_differ_from() -> None:
    assert differences.compare({"a": [_pool(GOOD)]}) == []
    assert gather(_rows([[]]), []) is None


def test_differences_and_attainment_of_several_runs() -> None:
    def run(name: str, good: list[Any]) -> analysis.Run:
        rows = [*_rows(good), *_rows(POOR, objective="mmcl_ssl")]
        return analysis.Run(name, rows, _trials(rows))

    one = [run("a", GOOD)]
    assert analysis.analyse(one)["attainment"] == []
    assert [entry["runs"] for entry in analysis.analyse(one)["differences"]] == [1, 1, 1]
    found = analysis.analyse([*one, run("b", POOR), run("c", GOOD)])
    assert [entry["run"] for entry in found["runs"]] == ["a", "b", "c"]
    assert [entry["runs"] for entry in found["differences"]] == [3, 3, 3]
    assert [(entry["objective"], entry["method"]) for entry in found["attainment"]] == [
        ("mmcl", "cleanclip"),
        ("mmcl_ssl", "cleanclip"),
    ]
    levels = found["attainment"][0]["levels"]
    # Two of three runs have the good front, as scored on the report half.
    assert levels["best"]["points"] == levels["median"]["points"]
    assert levels["median"]["points"] == [[0.49, 0.02], [0.57, 0.05], [0.58, 0.31]]
    assert levels["worst"]["hypervolume"] < levels["median"]["hypervolume"]
    # An objective that one run lacks is not compared.
    alone = analysis.Run("d", _rows(GOOD), _trials(_rows(GOOD)))
    found = analysis.analyse([*one, alone])
    assert found["differences"] == []
    assert [entry["objective"] for entry in found["attainment"]] == ["mmcl"]


def test_what_a_front_is_worth_and_how_far_it_hangs_on_single_trials() -> None:
    good, poor = [(0.59, 0.02, 0.57, 0.03)], [(0.5, 0.6, 0.48, 0.62)]
    rows = _rows([good, *[poor] * 4])
    run = analysis.Run("one", rows, _trials(rows))
    found = {entry["measure"]: entry for entry in analysis.worths([run], resamples=400)}
    assert [found[name]["value"] for name in found] == pytest.approx(_slow(rows, _trials(rows)))
    share = found["hypervolume_share"]
    assert (share["run"], share["objective"], share["method"], share["trials"]) == ("one", "mmcl", "cleanclip", 5)
    # Without the one good trial, which a third of all draws lack, the front is that of the poor ones.
    without = _slow(_rows([poor]), _trials(_rows([poor])))[0]
    assert (share["low"], share["high"]) == pytest.approx((without, share["value"]))
    # A draw that lacks it has no point of so low an ASR, and counts as none.
    assert found["best_top1_at_asr_0.05"]["low"] == found["best_top1_at_asr_0.05"]["value"] == 0.57
    assert 0.55 < found["best_top1_at_asr_0.05"]["resamples"] / 400 < 0.8
    assert analysis.worths([run], resamples=400) == list(found.values())


def test_runs_differ_by_objective_and_method_where_both_have_them() -> None:
    good, poor = _rows([[(0.59, 0.02, 0.57, 0.03)]] * 3), _rows([[(0.5, 0.6, 0.48, 0.62)]] * 3)
    other = _rows([[(0.59, 0.02, 0.57, 0.03)]] * 3, objective="ssl")
    runs = [
        analysis.Run("a", good, _trials(good)),
        analysis.Run("b", [*poor, *other], [*_trials(poor), *_trials(other)]),
    ]
    found = analysis.between_runs(runs, resamples=50)
    whose = [(e["objective"], e["method"], e["first"], e["second"], e["measure"]) for e in found]
    assert whose == [("mmcl", "cleanclip", "a", "b", measure.value) for measure in differences.Measure]
    expected = _slow(good, _trials(good))[0] - _slow(poor, _trials(poor))[0]
    assert [found[0][name] for name in ("difference", "low", "high")] == pytest.approx([expected] * 3)
