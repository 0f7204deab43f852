"""Successive halving and the collapse guard: their arithmetic, and searches that use them on recorded curves."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from pydantic import ValidationError
from ray.tune.search import Searcher

from raybd import curves, fronts, pareto, tables
from raybd.assignment import Assignment, settle, stop
from raybd.cluster.searcher import LedgerSearcher
from raybd.console import View
from raybd.curves import Curve, epoch_record
from raybd.errors import DataError, StudyError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.records import trial_row
from raybd.replay import Recorded, ReplayTrial
from raybd.replaying import ReplayRun
from raybd.stopping import (
    Decision,
    collapse,
    decide,
    expected_epochs,
    expected_of_equals,
    next_rung,
    places,
    ranked,
)
from raybd.store import Store
from raybd.study import Resources, Stopping, Study
from raybd.study_directory import StudyDirectory

Points = Mapping[str, Sequence[tuple[float, float]]]
HALVES = Stopping(rungs=(1, 3), keep=0.5)
EPOCHS, TRIALS = 6, 12

rates = st.integers(0, 20).map(lambda n: n / 20)
trials = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3), st.lists(st.tuples(rates, rates), min_size=1, max_size=4), max_size=12
)


# --- ranking


def area(points: Sequence[tuple[float, float]]) -> float:
    return pareto.hypervolume(*zip(*points, strict=True)) if points else 0.0


def ranked_plainly(found: Points) -> list[str]:
    """Return what `ranked` should: every trial that is left is looked at for each place."""
    left, order, layer = dict(sorted(found.items())), list[str](), list[tuple[float, float]]()
    while left:
        added = {name: area([*layer, *points]) - area(layer) for name, points in left.items()}
        best = max(left, key=added.__getitem__)
        if layer and added[best] <= 1e-12:
            layer = []
            continue
        order.append(best)
        layer += left.pop(best)
    return order


@given(trials)
def test_each_place_goes_to_the_trial_that_adds_most(found: Points) -> None:
    order = ranked(found)
    assert sorted(order) == sorted(found)
    plainly = ranked_plainly(found)
    # Sums of the same areas in another order may break ties of real numbers differently: what is added is the same.
    for place, (one, other) in enumerate(zip(order, plainly, strict=True)):
        if one != other:
            before = [point for name in order[:place] for point in found[name]]
            assert area([*before, *found[one]]) == pytest.approx(area([*before, *found[other]]), abs=1e-9)
            return


@given(trials, st.integers(0, 13))
def test_the_first_of_all_are_the_same_where_no_more_are_wanted(found: Points, most: int) -> None:
    assert ranked(found, most=most) == ranked(found)[:most]


@given(trials)
def test_a_trial_of_a_later_layer_is_dominated_by_those_before(found: Points) -> None:
    order = ranked(found)
    for earlier, later in itertools.pairwise(order):
        # A trial whose every point another one beats strictly in both never stands before it.
        beaten = all(any(top1 > t and asr < a for top1, asr in found[later]) for t, a in found[earlier]) and all(
            t > 0 and a < 1 for t, a in found[earlier]
        )
        assert not beaten


@given(trials, st.randoms(use_true_random=False))
def test_the_order_in_which_trials_arrive_does_not_matter(found: Points, shuffler: random.Random) -> None:
    items = list(found.items())
    shuffler.shuffle(items)
    assert ranked(dict(items)) == ranked(found)


def test_of_equals_the_first_name_is_first() -> None:
    assert ranked({"b": [(0.5, 0.5)], "a": [(0.5, 0.5)], "c": [(0.9, 0.1)]}) == ["c", "a", "b"]


# --- rungs


@pytest.mark.parametrize(
    ("done", "epochs", "expected"), [(0, 6, 1), (1, 6, 3), (3, 6, None), (0, 1, None), (1, 3, None), (0, 2, 1)]
)
def test_a_trial_waits_at_rungs_before_its_last_epoch(done: int, epochs: int, expected: int | None) -> None:
    assert next_rung(HALVES, done=done, epochs=epochs) == expected


@pytest.mark.parametrize(("keep", "arrived", "expected"), [(0.5, 34, 17), (0.5, 1, 1), (0.1, 3, 1), (0.9, 10, 9)])
def test_a_share_goes_on_and_at_least_one(keep: float, arrived: int, expected: int) -> None:
    assert places(Stopping(rungs=(1,), keep=keep), arrived) == expected


@given(st.sets(st.integers(1, 9)), st.floats(0.01, 1.0), st.integers(0, 40), st.integers(1, 9))
def test_epochs_of_equal_trials_need_no_list_of_them(rungs: set[int], keep: float, count: int, planned: int) -> None:
    rules = Stopping.model_construct(rungs=tuple(sorted(rungs)), keep=keep)
    assert expected_of_equals(rules, count, planned) == sum(expected_epochs(rules, [planned] * count))


def test_only_what_came_before_a_rung_counts_there() -> None:
    found = {"early": {0: (0.5, 1.0), 1: (0.5, 0.2)}, "late": {0: (0.5, 1.0), 1: (0.5, 0.9), 2: (0.5, 0.0)}}
    assert decide(HALVES, 1, found) == Decision(
        ("early",), {"late": "rung at epoch 1: place 2 of 2, the first 1 go on"}
    )
    assert decide(HALVES, 2, found).go_on == ("late",)


def test_collapse_is_measured_against_the_poisoned_model() -> None:
    guard = Stopping(collapse_below=0.5, grace_epochs=2)
    points = {0: (0.6, 1.0), 1: (0.1, 0.0), 2: (0.29, 0.0), 3: (0.3, 0.0)}
    assert [collapse(guard, epoch, points) is not None for epoch in range(4)] == [False, False, True, False]
    assert collapse(Stopping(), 2, points) is None
    reason = collapse(guard, 2, points)
    assert reason == "accuracy collapsed: 29.00% after epoch 2, below 30.00%, 0.5 of the poisoned model's"


@pytest.mark.parametrize("rungs", [(3, 1), (2, 2), (0,), tuple(range(1, 30))])
def test_rungs_rise(rungs: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError):
        Stopping(rungs=rungs)


# --- searches


def sweep(*, epochs: int = EPOCHS, trials: int = TRIALS) -> tuple[Curve, ...]:
    """Return curves of two pretrain objectives: the higher the learning rate, the lower both rates."""
    found = []
    for objective in ("mmcl", "mmcl_ssl"):
        for i in range(trials):
            counted = {}
            for n in range(epochs + 1):
                hit = 990 if n == 0 else max(0, 950 - 70 * i - (17 * i * n) % 50 - 20 * n)
                right = 500 - 15 * i * (n > 0) - (13 * i + 7 * n) % 23
                counts = {"n_clean": 1000, "correct_clean": right, "n_triggered": 1000, "hit_target": hit}
                counted[n] = epoch_record({"epoch": n}, {"all": {**counts, "correct_triggered": None}})
            name = (f"{objective}-{i:04d}", objective, "cleanclip", f"{objective}-made")
            found.append(Curve(*name, {"lr": 10.0 ** (i / 2 - 8)}, counted))
    return tuple(found)


CURVES = sweep()


def study_of(*, trials: int = TRIALS, sampler: str = "grid", **stops: Any) -> Study:
    lrs = sorted({curve.settings["lr"] for curve in CURVES})
    return Study.model_validate(
        {
            "name": "made",
            "poison": {"num_poisoned": 1},
            "pretrain": {"objectives": {"mmcl": {}, "mmcl_ssl": {}}},
            "clean": {"epochs": EPOCHS},
            "search": {
                "sampler": sampler,
                "num_trials": trials,
                "startup_trials": 3,
                "space": {"lr": {"choices": lrs}},
                "stopping": stops or {"rungs": [1, 3]},
            },
        }
    )


class Search:
    """Plays Ray's part on a run directory: several workers, each a trial or a rung of one at a time."""

    def __init__(self, study: Study, where: Path, *, workers: int = 1, seed: int = 0) -> None:
        self.study, self.store = study, Store(str(where))
        self.ledger, self.workers, self.order = Ledger(self.store), workers, random.Random(seed)
        recorded = Recorded(CURVES, nearest=False)
        recorded.check(study)
        self.searcher = LedgerSearcher(
            study,
            recorded.pretrain_ids(study),
            self.ledger.entries(Kind.TRIAL),
            lambda task: settle(self.store, study, task),
            stop=lambda trial_id, reason: stop(self.store, trial_id, reason).ended is not None,
        )
        self.epochs: list[tuple[str, int]] = []
        self.asked = 0

    def run(self, *, most: int = 10**6) -> dict[str, Entry]:
        """Carry the search out, or so many assignments of it; those that run then are lost, as when a driver dies."""
        running: dict[str, Assignment] = {}
        for _ in range(most):
            while len(running) < self.workers:
                self.asked += 1
                found = self.searcher.suggest(str(self.asked))
                if not isinstance(found, dict):
                    assert found == Searcher.FINISHED or running, "nothing runs and nothing is suggested"
                    break
                running[str(self.asked)] = Assignment(**found)
            if not running:
                break
            ray = self.order.choice(sorted(running))
            task = running.pop(ray)

            def notify(epoch: int, record: dict[str, Any], trial_id: str = task.trial_id) -> None:
                self.epochs.append((trial_id, epoch))

            ReplayTrial(CURVES, nearest=False)(self.study, self.store, task, notify)
            self.searcher.on_trial_complete(ray)
        return {entry.id: entry for entry in self.ledger.entries(Kind.TRIAL)}


def told(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return what must not depend on who ran what when: epochs, state and reason of each trial."""
    return {
        name: (sorted(entry.epochs), entry.ended and (entry.ended["state"], entry.ended.get("stop_reason")))
        for name, entry in entries.items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what becomes of the trials with one worker and no fault."""
    return told(Search(study_of(), tmp_path_factory.mktemp("whole")).run())


def test_a_share_goes_on_at_each_rung_and_the_others_say_why_not(whole: dict[str, Any]) -> None:
    for objective in ("mmcl", "mmcl_ssl"):
        ends = [(epochs[-1], *ended) for name, (epochs, ended) in whole.items() if name.startswith(f"{objective}-")]
        assert sorted(end[:2] for end in ends) == sorted(
            [(1, State.STOPPED)] * 6 + [(3, "stopped")] * 3 + [(6, "complete")] * 3
        )
        reasons = sorted(reason for _, _, reason in ends if reason)
        assert reasons[0] == "rung at epoch 1: place 10 of 12, the first 6 go on"
        assert sum(reason.startswith("rung at epoch 3: place") and "of 6" in reason for reason in reasons) == 3


def test_those_that_go_on_are_the_best_of_all_at_that_rung(whole: dict[str, Any]) -> None:
    points = {
        curve.trial_id: {n: stopping_point(record) for n, record in curve.epochs.items()}
        for curve in CURVES
        if curve.objective == "mmcl"
    }
    best = decide(HALVES, 1, points).go_on
    assert {name for name, (epochs, _) in whole.items() if epochs[-1] > 1 and name < "mmcl_"} == set(best)


def stopping_point(record: Mapping[str, Any]) -> tuple[float, float]:
    counted = record["counts"]["all"]
    return counted["correct_clean"] / 1000, counted["hit_target"] / 1000


@pytest.mark.parametrize("workers", [2, 5, 30])
def test_the_number_of_workers_changes_nothing(workers: int, tmp_path: Path, whole: dict[str, Any]) -> None:
    assert told(Search(study_of(), tmp_path, workers=workers, seed=workers).run()) == whole


@pytest.mark.parametrize(("most", "workers"), [(1, 1), (11, 1), (23, 3), (24, 1), (25, 1), (29, 4), (36, 2), (41, 1)])
def test_a_search_that_was_killed_goes_on_as_if_nothing_had_happened(
    most: int, workers: int, tmp_path: Path, whole: dict[str, Any]
) -> None:
    first = Search(study_of(), tmp_path, workers=workers, seed=most)
    first.run(most=most)
    second = Search(study_of(), tmp_path, workers=workers)
    assert told(second.run()) == whole
    assert len(first.epochs + second.epochs) == len(set(first.epochs + second.epochs))
    assert Search(study_of(), tmp_path).searcher.remaining == 0


def test_a_driver_that_died_while_it_stopped_trials_decides_the_same_again(
    tmp_path: Path, whole: dict[str, Any]
) -> None:
    first = Search(study_of(), tmp_path)
    calls = itertools.count()
    first.searcher._stop = lambda trial_id, reason: next(calls) < 3 and bool(stop(first.store, trial_id, reason))
    first.run()
    states = [
        ended
        for _, ended in told(
            Ledger(first.store).entries(Kind.TRIAL) and {e.id: e for e in first.ledger.entries(Kind.TRIAL)}
        ).values()
    ]
    assert 0 < sum(state is not None for state in states) < 24
    assert told(Search(study_of(), tmp_path).run()) == whole


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_optuna_is_told_of_each_trial_once_at_its_first_rung(sampler: str, tmp_path: Path) -> None:
    search = Search(study_of(sampler=sampler), tmp_path)
    entries = search.run()
    again = Search(study_of(sampler=sampler), tmp_path)
    for name in ("mmcl", "mmcl_ssl"):
        live, rebuilt = (
            s.searcher._objectives[name].history.optuna.get_trials(deepcopy=False) for s in (search, again)
        )
        assert [(t.state, t.values, t.params) for t in live] == [(t.state, t.values, t.params) for t in rebuilt]
        assert {t.state for t in live} == {TrialState.COMPLETE}
        for trial in live:
            record = entries[f"{name}-{trial.number:04d}"].epochs[1]
            assert tuple(trial.values) == stopping_point(record)


def test_more_trials_than_before_are_compared_with_those_that_were_stopped(tmp_path: Path) -> None:
    first = Search(study_of(trials=6), tmp_path)
    first.run()
    more = Search(study_of(trials=TRIALS), tmp_path)
    assert more.searcher.remaining == 12
    entries = more.run()
    assert all(entry.ended is not None for entry in entries.values())
    for objective in ("mmcl", "mmcl_ssl"):
        later = [e for e in entries.values() if e.started["objective"] == objective and e.started["number"] >= 6]
        reasons = [e.ended["stop_reason"] for e in later if e.ended and e.ended.get("stop_reason")]
        assert all("of 12" in reason for reason in reasons if "epoch 1" in reason)


def test_a_trial_shorter_than_a_rung_is_no_part_of_it(tmp_path: Path) -> None:
    study = study_of(rungs=[3, 5])
    study = study.model_copy(update={"clean": replace_epochs(study, 3)})
    assert {
        end for end, _ in ((epochs[-1], ended) for epochs, ended in told(Search(study, tmp_path).run()).values())
    } == {3}


def replace_epochs(study: Study, epochs: int) -> Any:
    return study.clean.model_copy(update={"epochs": epochs})


def test_a_collapsed_trial_stops_and_takes_no_place(tmp_path: Path) -> None:
    found = told(Search(study_of(rungs=[2], collapse_below=0.8), tmp_path).run())
    why = {name: (epochs[-1], str(ended[1])) for name, (epochs, ended) in found.items()}
    early = {name for name, (last, reason) in why.items() if reason.startswith("accuracy collapsed") and last <= 2}
    assert early
    for objective in ("mmcl-", "mmcl_ssl-"):
        arrived = [name for name in why if name.startswith(objective) and name not in early]
        stopped = [reason for name in arrived if (reason := why[name][1]).startswith("rung")]
        assert len(stopped) == len(arrived) - places(HALVES, len(arrived))
        assert all(f"of {len(arrived)}," in reason for reason in stopped)


def test_the_table_says_state_reason_and_epochs(tmp_path: Path) -> None:
    entry = next(
        e for e in Search(study_of(), tmp_path).run().values() if e.ended and e.ended["state"] == State.STOPPED
    )
    row = trial_row(entry)
    assert (row["state"], row["epochs_done"], row["attempt"]) == (
        "stopped",
        sorted(entry.epochs)[-1],
        len(entry.pauses),
    )
    assert row["stop_reason"].startswith("rung at epoch")
    waiting = replace(entry, ended=None, until=entry.pauses[-1]["epoch"])
    assert waiting.waits
    assert trial_row(waiting)["state"] == "running"


def test_rungs_that_no_curve_has_are_refused() -> None:
    study = study_of(rungs=[2])
    gap = tuple(replace(curve, epochs={n: r for n, r in curve.epochs.items() if n != 2}) for curve in CURVES)
    with pytest.raises(StudyError, match="epoch 2 of mmcl-0000 is not recorded"):
        Recorded(gap, nearest=False).check(study)


def test_who_was_told_to_go_on_and_died_before_it_started_has_failed(tmp_path: Path) -> None:
    study = study_of()
    search = Search(study, tmp_path)
    search.run(most=24)  # all are at their first rung
    entry = next(entry for entry in search.ledger.entries(Kind.TRIAL) if entry.waits)
    started = entry.started
    at_it = Assignment(entry.id, started["number"], started["objective"], started["pretrain_id"], started["params"], 1)
    assert settle(search.store, study, at_it).waits
    ended = settle(search.store, study, replace(at_it, until=3)).ended
    assert ended is not None
    assert ended["state"] == State.FAILED
    assert ended["device_seconds"] == sum(pause["device_seconds"] for pause in entry.pauses)


def test_the_last_epoch_of_a_trial_that_has_not_ended_keeps_its_weights(tmp_path: Path) -> None:
    """Its process died between that epoch and the end; another trial's end comes before its own."""
    directory = StudyDirectory(study_of(), Store(str(tmp_path)), View())
    search = Search(directory.study, tmp_path)
    search.run()
    name = next(e.id for e in search.ledger.entries(Kind.TRIAL) if e.ended and e.ended["state"] == State.COMPLETE)
    directory.store.delete(f"ledger/trials/{name}/ended.json")
    kept = [fronts.checkpoint_name(name, epoch) for epoch in range(1, EPOCHS + 1)]
    for weights in kept:
        directory.store.put(weights, b"weights")
    # Beaten by an epoch of its own, as a last epoch may be: on no front but `final`.
    record = json.loads(directory.store.get(f"ledger/trials/{name}/epoch-{EPOCHS:04d}.json"))
    record["counts"]["all"] |= {"correct_clean": 1, "hit_target": 999}
    directory.store.put(f"ledger/trials/{name}/epoch-{EPOCHS:04d}.json", json.dumps(record).encode())
    directory.load_tables()
    directory._update_fronts()
    on_front = {row["checkpoint"] for row in tables.read(directory.store, "fronts").to_pylist()}
    assert kept[-1] not in on_front
    left = set(directory.store.names("weights"))
    assert kept[-1] in left
    assert left - {kept[-1]} == set(kept) & on_front
    # As it ends, it is on `final` if no other last epoch beats it; then its weights may go.
    search.ledger.end(Kind.TRIAL, name, {"state": State.COMPLETE, "ended": datetime.now(UTC).isoformat()})
    directory.load_tables()
    directory._update_fronts()
    assert kept[-1] not in directory.store.names("weights")


def test_tables_of_an_earlier_raybd_and_fronts_that_are_gone_are_written_anew(tmp_path: Path) -> None:
    """It wrote a part for each trial, in place of one for many."""
    directory = StudyDirectory(study_of(), Store(str(tmp_path)), View())
    store = directory.store
    Search(directory.study, tmp_path).run()
    directory.load_tables()
    directory._update_fronts()
    whole = {table: tables.read(store, table) for table in ("epochs", "trials", "fronts")}
    assert whole["fronts"].num_rows
    shared = store.names("tables/trials")
    rows = {table: whole[table].to_pylist() for table in ("epochs", "trials")}
    own = rows["trials"][3]["trial_id"]
    for table in rows:
        tables.write(store, table, own, [row for row in rows[table] if row["trial_id"] == own])
    for name in store.names("tables/fronts"):
        store.delete(name)
    with pytest.raises(DataError):
        tables.read(store, "epochs")
    directory.load_tables()
    directory._update_fronts()
    assert {table: tables.read(store, table) for table in whole} == whole
    assert store.names("tables/trials") == shared
    # As that raybd left them: nothing is shared yet.
    for table in rows:
        for name in store.names(f"tables/{table}"):
            store.delete(name)
        for row in rows["trials"]:
            mine = [found for found in rows[table] if found["trial_id"] == row["trial_id"]]
            tables.write(store, table, row["trial_id"], mine)
    StudyDirectory(directory.study, store, View()).load_tables()
    assert {table: tables.read(store, table) for table in whole} == whole
    assert store.names("tables/trials") == shared


def test_a_record_with_a_number_that_is_none_is_told_as_such(tmp_path: Path) -> None:
    directory = StudyDirectory(study_of(), Store(str(tmp_path)), View())
    search = Search(directory.study, tmp_path)
    search.run(most=4)
    name = next(name for name in directory.store.names("ledger/trials") if name.endswith("started-001.json"))
    for number in ("3", None, 3.5):
        record = json.loads(directory.store.get(name)) | {"number": number}
        directory.store.put(name, json.dumps(record).encode())
        with pytest.raises(DataError):
            directory.load_tables()


# --- on Ray


@pytest.mark.ray
def test_on_ray_several_workers_leave_what_one_leaves_without_it(tmp_path: Path, whole: dict[str, Any]) -> None:
    """A call that is broken off in the midst, and a second one; the tables say of each trial what the ledger has."""
    curves.write(Store(str(tmp_path / "on")), CURVES)
    on, run = str(tmp_path / "on" / "sweep.parquet"), Store(str(tmp_path / "run"))
    study = study_of().model_copy(update={"resources": Resources(concurrent_trials=2, use_gpu=False)})

    class Broken(View):
        """Breaks off once a few trials wait."""

        def line(self, text: str, *, style: str | None = None) -> None:
            if "mmcl-0009 waits" in text:
                raise KeyboardInterrupt
            super().line(text, style=style)

    with pytest.raises(KeyboardInterrupt):
        ReplayRun(study, run, Broken(), on=on).run()
    waiting = [entry for entry in Ledger(run).entries(Kind.TRIAL) if entry.waits]
    assert len(waiting) > 8
    rows = tables.read(run, "trials").to_pylist()
    assert {row["state"] for row in rows} == {"running"}
    assert len(rows) >= len(waiting) - 2

    outcome = ReplayRun(study, run, View(), on=on).run()
    assert outcome.failed == 0
    entries = {entry.id: entry for entry in Ledger(run).entries(Kind.TRIAL)}
    assert told(entries) == whole
    rows = tables.read(run, "trials").to_pylist()
    assert {row["trial_id"]: (row["state"], row["stop_reason"]) for row in rows} == {
        name: (ended["state"], ended.get("stop_reason")) for name, entry in entries.items() if (ended := entry.ended)
    }
    epochs = [(row["trial_id"], row["epoch"]) for row in tables.read(run, "epochs").to_pylist()]
    assert sorted(epochs) == sorted((name, epoch) for name, entry in entries.items() for epoch in entry.epochs)
    final = [row for row in tables.read(run, "fronts").to_pylist() if row["kind"] == "final" and row["epoch"]]
    assert all(row["epoch"] == EPOCHS for row in final)
