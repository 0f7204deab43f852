"""The search's bookkeeping and the cluster's arithmetic, without starting Ray."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState
from pydantic import ValidationError
from ray.tune.search import Searcher

from raybd import signals
from raybd.assignment import settle
from raybd.clean.trial import Assignment
from raybd.cluster.history import History, distribution, make_sampler, told
from raybd.cluster.search import _Watch
from raybd.cluster.searcher import LedgerSearcher
from raybd.cluster.session import Share, resolve, watched_head
from raybd.errors import ClusterError, DataError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.records import epoch_rows, trial_row
from raybd.space import Range
from raybd.store import Store
from raybd.study import Failure, Resources, Search, Study, Tell

IDS = {"mmcl": "mmcl-aaaa", "mmcl_ssl": "mmcl_ssl-bbbb"}
LR = {"low": 1e-6, "high": 1e-2, "log": True}
MIXED = {
    "lr": LR,
    "weight_decay": {"low": 0.0, "high": 0.5, "step": 0.1},
    "warmup_steps": {"low": 1, "high": 9, "step": 2},
    "batch_size": {"low": 4, "high": 64, "log": True},
    "image_view": {"choices": ["autoaugment", "crop_flip_colour"]},
}


def study_of(*, seed: int = 0, **search: Any) -> Study:
    return Study.model_validate(
        {"name": "made", "seed": seed, "poison": {"num_poisoned": 1}, "search": {"space": {"lr": LR}, **search}}
    )


def record(top1: int, asr: int) -> dict[str, Any]:
    """Return an epoch's record with so many hundredths on the search half; the report half says something else."""
    half = {"n_clean": 100, "correct_clean": top1, "n_triggered": 100, "hit_target": asr, "correct_triggered": 0}
    return {"counts": {"search": half, "report": {**half, "correct_clean": 100, "hit_target": 0}}}


def entry_of(task: dict[str, Any], *points: tuple[int, int], state: str | None = "complete") -> Entry:
    """Return the ledger entry of a trial with these (accuracy, ASR) after epochs 0, 1, …."""
    epochs = {epoch: record(*scores) for epoch, scores in enumerate(points)}
    return Entry(task["trial_id"], dict(task), 1, epochs, {"state": State(state)} if state else None)


def outcome(task: dict[str, Any]) -> Entry:
    """Return what becomes of a trial: it depends on its settings alone, and every seventh fails."""
    if task["number"] % 7 == 5:
        return entry_of(task, (40, 99), state="failed")
    place = (math.log10(task["params"].get("lr", 1e-6)) + 6) / 4  # a method without steps changes little
    top1, asr = round(40 - 30 * place**2), round(99 - 95 * place)
    return entry_of(task, (40, 99), (top1, asr), (top1 - 1, max(0, asr - 2)))


class Driver:
    """Plays Ray's part: asks a searcher for trials, runs them as `outcome` says, and keeps the ledger."""

    def __init__(self, study: Study, entries: list[Entry] | None = None, *, ids: dict[str, str] = IDS) -> None:
        self.ledger = {entry.id: entry for entry in entries or []}
        self.searcher = LedgerSearcher(study, ids, list(self.ledger.values()), self.settle, stop=lambda *_: False)
        self._asked = 0

    def settle(self, task: Assignment) -> Entry:
        return self.ledger[task.trial_id]

    def suggest(self) -> dict[str, Any]:
        """Return the next assignment, under a name of Ray's as `ray`."""
        self._asked += 1
        found = self.searcher.suggest(f"ray-{self._asked}")
        assert isinstance(found, dict)
        return found

    def end(self, entry: Entry, *, ray: int | None = None) -> None:
        self.ledger[entry.id] = entry
        self.searcher.on_trial_complete(f"ray-{ray or self._asked}", {"epoch": 2})

    def drop(self) -> None:
        """Tell of the trial that was suggested last as Tune does where it did not begin."""
        self.searcher.on_trial_complete(f"ray-{self._asked}", error=True)

    def play(self, count: int, result: Callable[[dict[str, Any]], Entry] = outcome) -> list[dict[str, Any]]:
        tasks = []
        for _ in range(count):
            tasks.append(self.suggest())
            self.end(result(tasks[-1]))
        return tasks

    def trials(self, objective: str = "mmcl") -> list[optuna.trial.FrozenTrial]:
        return self.searcher._objectives[objective].history.optuna.get_trials(deepcopy=False)


# What is suggested.


def test_each_objective_has_a_study_of_its_own_with_two_directions() -> None:
    found = Driver(study_of()).searcher._objectives
    assert list(found) == ["mmcl", "mmcl_ssl"]
    studies = [objective.history.optuna for objective in found.values()]
    assert studies[0] is not studies[1]
    for own in studies:
        assert own.directions == [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    driver = Driver(study_of())
    assert (driver.searcher.metric, driver.searcher.mode) == (None, None)
    driver.play(3)
    assert [len(driver.trials(name)) for name in IDS] == [2, 1]


def test_objectives_take_turns() -> None:
    tasks = Driver(study_of(num_trials=3)).play(6)
    assert [(task["objective"], task["number"]) for task in tasks] == [
        (objective, number) for number in range(3) for objective in IDS
    ]
    assert [task["trial_id"] for task in tasks[:3]] == ["mmcl-0000", "mmcl_ssl-0000", "mmcl-0001"]
    assert {task["pretrain_id"] for task in tasks if task["objective"] == "mmcl_ssl"} == {"mmcl_ssl-bbbb"}
    assert set(tasks[0]) == {"trial_id", "number", "objective", "pretrain_id", "params", "until"}


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2", "grid"])
def test_it_says_when_it_is_done(sampler: str) -> None:
    space = {"warmup_steps": {"low": 1, "high": 3}, "lr": {"choices": [1e-3, 1e-4]}}
    driver = Driver(study_of(num_trials=4, sampler=sampler, space=space))
    remaining = []
    for _ in range(8):
        remaining.append(driver.searcher.remaining)
        driver.play(1)
    assert remaining == [8, 7, 6, 5, 4, 3, 2, 1]
    assert driver.searcher.remaining == 0
    assert driver.searcher.suggest("one more") == Searcher.FINISHED
    assert driver.searcher.suggest("and again") == Searcher.FINISHED


def test_what_runs_is_not_among_the_remaining() -> None:
    driver = Driver(study_of(num_trials=2))
    tasks = [driver.suggest() for _ in range(4)]
    assert len({task["trial_id"] for task in tasks}) == 4
    assert driver.searcher.remaining == 0
    assert driver.searcher.suggest("more") == Searcher.FINISHED
    for number, task in enumerate(tasks):
        driver.end(outcome(task), ray=number + 1)
    assert {trial.state for name in IDS for trial in driver.trials(name)} == {TrialState.COMPLETE}


def test_known_settings_come_first() -> None:
    known = [{"lr": 1e-3, "weight_decay": 0.2}, {"lr": 5e-5}]
    space = {"lr": LR, "weight_decay": {"low": 0.0, "high": 1.0}}
    tasks = Driver(study_of(num_trials=4, known=known, space=space), ids={"mmcl": "m"}).play(4)
    assert tasks[0]["params"] == known[0]
    assert tasks[1]["params"]["lr"] == 5e-5
    assert 0 < tasks[1]["params"]["weight_decay"] < 1  # what a known point leaves open is drawn
    later = [task["params"] for task in tasks[2:]]
    assert all(params["lr"] not in (1e-3, 5e-5) for params in later)
    assert later[0] != later[1]


@pytest.mark.parametrize(
    ("space", "known"),
    [
        ({"lr": LR}, {"lr": 0.5}),
        ({"lr": LR}, {"lr": "fast"}),
        ({"warmup_steps": {"low": 0, "high": 8, "step": 2}}, {"warmup_steps": 3}),
        ({"warmup_steps": {"low": 0, "high": 8}}, {"warmup_steps": 3.5}),
        ({"weight_decay": {"low": 0.0, "high": 1.0, "step": 0.25}}, {"weight_decay": 0.3}),
        ({"image_view": {"choices": ["autoaugment"]}}, {"image_view": "crop_flip_colour"}),
    ],
)
def test_known_settings_that_the_space_lacks_are_refused(space: dict[str, Any], known: dict[str, Any]) -> None:
    """Optuna would try them, and refuse them when the ledger is replayed."""
    (name,) = known
    with pytest.raises(ValidationError, match=rf"known.0.{name}: cannot be "):
        study_of(space=space, known=[known])


def test_known_settings_at_the_ends_of_a_range_can_be_replayed() -> None:
    known = [{"weight_decay": value, "lr": 1e-6} for value in (0.0, 0.3, 0.7)]
    study = study_of(known=known, space={"lr": LR, "weight_decay": {"low": 0.0, "high": 0.7, "step": 0.1}})
    driver = Driver(study, ids={"mmcl": "m"})
    assert [task["params"] for task in driver.play(3)] == known
    again = Driver(study, list(driver.ledger.values()), ids={"mmcl": "m"})
    assert [trial.params for trial in again.trials()] == known


def test_a_grid_is_enumerated_once_and_in_order() -> None:
    space = {
        "loss_weights.ssl": {"choices": [0.0, 1.0]},
        "lr": {"choices": [1e-3, 1e-4], "when": {"loss_weights.ssl": 1.0}},
        "weight_decay": {"low": 0.0, "high": 0.3, "step": 0.1},
    }
    study = study_of(num_trials=100, sampler="grid", space=space)
    driver = Driver(study, ids={"mmcl": "m"})
    assert driver.searcher.remaining == 12
    done = entry_of
    tasks = driver.play(12, lambda task: done(task, (40, 99), (30, 9)))
    assert driver.searcher.suggest("more") == Searcher.FINISHED
    decays = (0.0, 0.1, 0.2, 0.3)
    expected: list[dict[str, Any]] = [{"loss_weights.ssl": 0.0, "weight_decay": decay} for decay in decays]
    # A setting that depends on another varies after those that do not.
    expected += [{"loss_weights.ssl": 1.0, "weight_decay": d, "lr": lr} for d in decays for lr in (1e-3, 1e-4)]
    assert [task["params"] for task in tasks] == expected
    again = Driver(study, list(driver.ledger.values())[:5], ids={"mmcl": "m"})
    assert [task["params"] for task in again.play(7, lambda task: done(task, (40, 99), (30, 9)))] == expected[5:]


def test_a_grid_is_cut_at_the_number_of_trials_and_follows_the_known() -> None:
    space = {"lr": {"choices": [1e-3, 1e-4, 1e-5]}}
    tasks = Driver(study_of(num_trials=2, sampler="grid", space=space), ids={"mmcl": "m"}).play(2)
    assert [task["params"]["lr"] for task in tasks] == [1e-3, 1e-4]
    driver = Driver(study_of(num_trials=9, sampler="grid", space=space, known=[{"lr": 1e-5}]), ids={"mmcl": "m"})
    assert driver.searcher.remaining == 4
    assert [task["params"]["lr"] for task in driver.play(4)] == [1e-5, 1e-3, 1e-4, 1e-5]


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_a_conditional_setting_is_drawn_only_where_it_is_active(sampler: str) -> None:
    space = {
        "image_view": {"choices": ["autoaugment", "crop_flip_colour"], "when": {"loss_weights.ssl": [1.0, 4.0]}},
        "loss_weights.ssl": {"choices": [0.0, 1.0, 4.0]},
        "lr": LR,
    }
    study = study_of(num_trials=30, sampler=sampler, space=space, startup_trials=5, population=5)
    tasks = Driver(study, ids={"mmcl": "m"}).play(30)
    with_ssl = [task["params"]["loss_weights.ssl"] > 0 for task in tasks]
    assert 3 < sum(with_ssl) < 30
    assert [("image_view" in task["params"]) for task in tasks] == with_ssl
    assert all("lr" in task["params"] for task in tasks)


@pytest.mark.parametrize(("sampler", "count"), [("random", 150), ("tpe", 40), ("nsga2", 40)])
def test_draws_stay_within_their_ranges_and_have_their_types(sampler: str, count: int) -> None:
    study = study_of(num_trials=count, sampler=sampler, space=MIXED, startup_trials=10, population=10)
    drawn = [task["params"] for task in Driver(study, ids={"mmcl": "m"}).play(count)]
    for params in drawn:
        assert set(params) == set(MIXED)
        assert 1e-6 <= params["lr"] <= 1e-2
        assert params["weight_decay"] in (0.0, 0.1, 0.2, 0.30000000000000004, 0.3, 0.4, 0.5)
        assert params["warmup_steps"] in (1, 3, 5, 7, 9)
        assert 4 <= params["batch_size"] <= 64
        assert {type(params[name]) for name in ("warmup_steps", "batch_size")} == {int}
        assert params["image_view"] in ("autoaugment", "crop_flip_colour")
    assert len({params["lr"] for params in drawn}) > count / 3
    if sampler == "random":
        assert {params["warmup_steps"] for params in drawn} == {1, 3, 5, 7, 9}
        assert {round(params["weight_decay"], 9) for params in drawn} == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
        # Uniform in the logarithm: half of the draws are below the geometric mean.
        assert 0.4 < sum(params["lr"] < 1e-4 for params in drawn) / count < 0.6
        assert 0.4 < sum(params["batch_size"] < 16 for params in drawn) / count < 0.6


def test_ranges_become_distributions_of_the_settings_type() -> None:
    assert distribution("lr", Range(**LR)) == FloatDistribution(1e-6, 1e-2, log=True)
    assert distribution("weight_decay", Range(low=0, high=7)) == FloatDistribution(0.0, 7.0)
    assert distribution("weight_decay", Range(low=0, high=7, step=2)) == FloatDistribution(0.0, 6.0, step=2)
    assert distribution("epochs", Range(low=2, high=20)) == IntDistribution(2, 20)
    assert distribution("epochs", Range(low=2, high=20, step=4)) == IntDistribution(2, 18, step=4)
    assert distribution("batch_size", Range(low=2, high=64, log=True)) == IntDistribution(2, 64, log=True)
    assert distribution("epochs", Range(choices=(2, 5))) == CategoricalDistribution((2, 5))


# The same again.


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_suggestions_depend_on_the_seed_and_the_results_alone(sampler: str) -> None:
    def params(seed: int, count: int = 16) -> list[dict[str, Any]]:
        study = study_of(seed=seed, sampler=sampler, space=MIXED, startup_trials=3, population=3)
        return [task["params"] for task in Driver(study).play(count)]

    one = params(4)
    assert params(4) == one
    assert params(5)[:6] != one[:6]
    assert one[0] != one[1], "two objectives draw on their own"


def test_the_model_learns_from_what_it_is_told() -> None:
    """Other results, other suggestions: but not before the draws at random are over."""

    def params(result: Callable[[dict[str, Any]], Entry]) -> list[dict[str, Any]]:
        driver = Driver(study_of(sampler="tpe", space=MIXED, startup_trials=4), ids={"mmcl": "m"})
        return [task["params"] for task in driver.play(10, result)]

    def upside_down(task: dict[str, Any]) -> Entry:
        place = (math.log10(task["params"].get("lr", 1e-6)) + 6) / 4  # a method without steps changes little
        return entry_of(task, (40, 99), (round(10 + 30 * place), round(1 + 30 * place)))

    one, other = params(outcome), params(upside_down)
    assert one[:4] == other[:4]
    assert one[5:] != other[5:]


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
@pytest.mark.parametrize("cut", [1, 9, 13])
def test_a_search_rebuilt_from_the_ledger_goes_on_as_if_nothing_had_happened(sampler: str, cut: int) -> None:
    study = study_of(
        sampler=sampler,
        space=MIXED,
        startup_trials=3,
        population=3,
        known=[{"lr": 1e-3, "batch_size": 32}],
        num_trials=10,
    )
    whole = Driver(study)
    tasks = whole.play(20)
    before = Driver(study)
    assert before.play(cut) == tasks[:cut]
    entries = sorted(before.ledger.values(), key=lambda entry: entry.id, reverse=True)  # in whatever order
    after = Driver(study, entries)
    assert after.searcher.remaining == 20 - cut
    assert after.play(20 - cut) == tasks[cut:]
    for name in IDS:
        assert [(t.state, t.values, t.params) for t in after.trials(name)] == [
            (t.state, t.values, t.params) for t in whole.trials(name)
        ]


def test_unfinished_trials_come_first_and_as_they_were() -> None:
    study = study_of(num_trials=4, space=MIXED, sampler="random")
    first = Driver(study)
    ended = [outcome(task) for task in first.play(3)]
    open_ones = [first.suggest(), first.suggest()]  # mmcl_ssl-0001 and mmcl-0002
    entries = [*ended, entry_of(open_ones[0], (40, 99), (39, 50), state=None), entry_of(open_ones[1], state=None)]
    second = Driver(study, entries)
    assert second.searcher.remaining == 2 + (8 - 5)
    found = second.play(2)
    assert sorted(found, key=str) == sorted(open_ones, key=str)
    assert second.searcher.remaining == 3
    later = second.play(3)
    assert sorted(task["trial_id"] for task in later) == ["mmcl-0003", "mmcl_ssl-0002", "mmcl_ssl-0003"]
    assert second.searcher.suggest("more") == Searcher.FINISHED
    assert all(trial.state is not TrialState.RUNNING for name in IDS for trial in second.trials(name))
    assert [len(second.trials(name)) for name in IDS] == [4, 4]


def test_unfinished_trials_beyond_a_lowered_number_are_still_run() -> None:
    task = {"trial_id": "mmcl-0007", "number": 7, "objective": "mmcl", "pretrain_id": "m", "params": {"lr": 1e-3}}
    driver = Driver(study_of(num_trials=1), [entry_of(task, state=None)], ids={"mmcl": "m"})
    assert driver.searcher.remaining == 2
    assert [task["number"] for task in driver.play(2)] == [7, 0]
    assert driver.searcher.suggest("more") == Searcher.FINISHED


def test_trials_of_another_pretrained_model_are_left_out() -> None:
    task = {
        "trial_id": "mmcl-0000",
        "number": 0,
        "objective": "mmcl",
        "pretrain_id": "mmcl-old",
        "params": {"lr": 1e-3},
    }
    gone = {**task, "objective": "siglip", "trial_id": "siglip-0000"}
    driver = Driver(study_of(num_trials=2), [outcome(task), entry_of(gone, state=None)])
    assert driver.trials() == []
    assert driver.searcher.remaining == 4


@pytest.mark.parametrize(
    ("params", "state"),
    [
        ({"unheard_of": 1}, State.COMPLETE),
        ({"unheard_of": 1}, None),
        (None, State.COMPLETE),
        (None, None),
        ({"lr": "high"}, State.COMPLETE),
    ],
)
def test_records_that_no_search_of_this_study_made_are_named(params: Any, state: State | None) -> None:
    task = {"trial_id": "mmcl-0000", "number": 0, "objective": "mmcl", "pretrain_id": "m", "params": params}
    with pytest.raises(DataError, match="not the records of a run") as error:
        Driver(study_of(num_trials=2), [entry_of(task, (40, 99), (39, 9), state=state)], ids={"mmcl": "m"})
    assert error.value.where == "ledger/trials/mmcl-0000"


def test_a_larger_number_of_trials_adds_to_those_that_ended() -> None:
    driver = Driver(study_of(num_trials=2, sampler="random"))
    tasks = driver.play(4)
    more = Driver(study_of(num_trials=3, sampler="random"), list(driver.ledger.values()))
    assert more.searcher.remaining == 2
    assert [task["trial_id"] for task in more.play(2)] == ["mmcl-0002", "mmcl_ssl-0002"]
    assert tasks == Driver(study_of(num_trials=3, sampler="random")).play(6)[:4]


# What Optuna is told.


def _points(entry: Entry, rule: Tell) -> tuple[float, float] | None:
    return told(entry, rule)


def test_the_epoch_that_stands_for_a_trial() -> None:
    task = {"trial_id": "t"}
    # Areas after epoch 0: 0.30 * 0.50, 0.25 * 0.90, 0.20 * 0.95; the poisoned model itself never counts.
    entry = entry_of(task, (90, 10), (30, 50), (25, 10), (20, 5))
    assert _points(entry, Tell.LARGEST_AREA) == (0.25, 0.10)
    assert _points(entry, Tell.LAST_EPOCH) == (0.20, 0.05)
    disordered = Entry("t", {}, 1, {epoch: entry.epochs[epoch] for epoch in (3, 0, 2, 1)}, entry.ended)
    assert _points(disordered, Tell.LARGEST_AREA) == (0.25, 0.10)
    assert _points(disordered, Tell.LAST_EPOCH) == (0.20, 0.05)
    # Of equal areas the first stands.
    assert _points(entry_of(task, (9, 9), (50, 50), (25, 0)), Tell.LARGEST_AREA) == (0.5, 0.5)


@pytest.mark.parametrize("rule", list(Tell))
def test_what_has_no_point_is_not_told(rule: Tell) -> None:
    task = {"trial_id": "t"}
    assert told(entry_of(task, (40, 99), (30, 9), state="failed"), rule) is None
    assert told(entry_of(task, (40, 99), (30, 9), state=None), rule) is None
    assert told(entry_of(task, (40, 99)), rule) is None
    assert told(entry_of(task), rule) is None
    assert told(entry_of(task, (40, 99), (30, 9), state="stopped"), rule) == (0.3, 0.09)


@pytest.mark.parametrize("tell", ["largest_area", "last_epoch"])
def test_optuna_is_told_by_the_studys_rule(tell: str) -> None:
    driver = Driver(study_of(tell=tell), ids={"mmcl": "m"})
    driver.play(1, lambda task: entry_of(task, (40, 99), (30, 10), (2, 5)))
    expected = [0.30, 0.10] if tell == "largest_area" else [0.02, 0.05]
    (trial,) = driver.trials()
    assert (trial.state, trial.values) == (TrialState.COMPLETE, expected)
    (again,) = Driver(study_of(tell=tell), list(driver.ledger.values()), ids={"mmcl": "m"}).trials()
    assert (again.state, again.values) == (TrialState.COMPLETE, expected)


def test_failures_are_told_as_failures_and_nothing_is_left_running() -> None:
    driver = Driver(study_of(num_trials=6), ids={"mmcl": "m"})
    ends: list[Callable[[dict[str, Any]], Entry]] = [
        lambda task: entry_of(task, (40, 99), (30, 9), state="failed"),
        lambda task: entry_of(task, state="failed"),
        lambda task: entry_of(task, (40, 99)),  # complete, and without an epoch of cleaning
        lambda task: entry_of(task, (40, 99), (30, 9)),
        lambda task: entry_of(task, (40, 99), (0, 100), state="stopped"),
    ]
    for end in ends:
        driver.end(end(driver.suggest()))
    dropped = driver.suggest()
    driver.drop()
    assert driver.suggest() == dropped, "it did not begin: it is no failure, and comes again"
    driver.end(entry_of(dropped, state="failed"))
    states = [TrialState.FAIL] * 3 + [TrialState.COMPLETE] * 2 + [TrialState.FAIL]
    assert [trial.state for trial in driver.trials()] == states
    assert [trial.values for trial in driver.trials()] == [None, None, None, [0.3, 0.09], [0.0, 1.0], None]
    again = Driver(study_of(num_trials=6), list(driver.ledger.values()), ids={"mmcl": "m"})
    assert [trial.state for trial in again.trials()] == states
    assert again.searcher.remaining == 0


def test_a_search_that_is_broken_off_leaves_nothing_running() -> None:
    driver = Driver(study_of(num_trials=4), ids={"mmcl": "m"})
    driver.play(1)
    driver.suggest()
    driver.suggest()
    driver.searcher.close()
    assert [trial.state for trial in driver.trials()] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]


def test_an_end_that_was_told_or_that_nobody_asked_for_is_ignored() -> None:
    driver = Driver(study_of(), ids={"mmcl": "m"})
    driver.play(1)
    driver.searcher.on_trial_complete("ray-1", {"epoch": 2})
    driver.searcher.on_trial_complete("of another", error=True)
    assert [trial.state for trial in driver.trials()] == [TrialState.COMPLETE]


def test_nothing_is_saved_and_nothing_restored() -> None:
    driver = Driver(study_of())
    driver.searcher.save("nowhere")
    with pytest.raises(RuntimeError, match="rebuilt from the ledger"):
        driver.searcher.restore("nowhere")


# Trials whose process died.


def test_a_trial_that_died_is_settled_as_failed(tmp_path: Any) -> None:
    store, study = Store(str(tmp_path)), study_of()
    task = Assignment("mmcl-0003", 3, "mmcl", "mmcl-aaaa", {"lr": 1e-3})
    entry = settle(store, study, task)  # it died before it could say that it had started
    assert entry.ended is not None
    assert (entry.ended["state"], entry.ended["error_type"]) == (State.FAILED, "died")
    assert (entry.started["number"], entry.started["params"], entry.attempts) == (3, {"lr": 1e-3}, 1)
    row = trial_row(entry)
    assert (row["state"], row["lr"], row["epochs_done"]) == ("failed", 1e-3, None)
    assert epoch_rows(entry) == []
    assert settle(store, study, task) == entry
    assert [found.id for found in Ledger(store).entries(Kind.TRIAL)] == ["mmcl-0003"]

    ledger = Ledger(store)
    ledger.start(Kind.TRIAL, "mmcl-0004", {**entry.started, "number": 4, "trial_id": "mmcl-0004"})
    ledger.epoch(Kind.TRIAL, "mmcl-0004", 0, record(40, 99))
    entry = settle(store, study, Assignment("mmcl-0004", 4, "mmcl", "mmcl-aaaa", {"lr": 1e-3}))
    assert entry.ended is not None
    assert (entry.ended["error_type"], sorted(entry.epochs), entry.attempts) == ("died", [0], 1)


def test_settings_that_do_not_fit_together_are_a_failed_trial(tmp_path: Any) -> None:
    store, study = Store(str(tmp_path)), study_of()
    params = {"loss_weights.mmcl": 0.0, "loss_weights.ssl": 0.0}
    reason = (Failure.SETTINGS, "all loss weights are 0")
    entry = settle(store, study, Assignment("mmcl-0000", 0, "mmcl", "mmcl-aaaa", params), reason=reason)
    assert entry.ended is not None
    assert (entry.ended["state"], entry.ended["error_type"]) == (State.FAILED, "settings")
    assert entry.ended["error_message"] == "all loss weights are 0"
    assert entry.started["params"] == params
    assert trial_row(entry)["state"] == "failed"
    with pytest.raises(DataError, match="never started"):
        Ledger(store).entry(Kind.TRIAL, "mmcl-0001")


# Samplers.


def test_the_samplers_are_those_that_were_asked_for() -> None:
    tpe = make_sampler(Search(sampler="tpe", startup_trials=7), seed=1)
    assert type(tpe) is TPESampler
    assert (tpe._multivariate, tpe._group, tpe._constant_liar, tpe._n_startup_trials) == (True, True, True, 7)
    nsga = make_sampler(Search(sampler="nsga2", population=12), seed=1)
    assert type(nsga) is NSGAIISampler
    assert nsga.population_size == 12
    assert type(make_sampler(Search(sampler="random"), seed=1)) is RandomSampler
    make_sampler(Search(sampler="random"), seed=2**62 + 1)  # seeds of any size


def test_nsga2_breeds_after_its_first_population() -> None:
    study = study_of(sampler="nsga2", population=4, num_trials=12)
    driver = Driver(study, ids={"mmcl": "m"})
    driver.play(12)
    key = NSGAIISampler._get_generation_key()
    generations = [trial.system_attrs[key] for trial in driver.trials()]
    # Number 5 failed and does not count.
    assert generations == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    again = Driver(study, list(driver.ledger.values()), ids={"mmcl": "m"})
    assert [trial.system_attrs[key] for trial in again.trials()] == generations


# The cluster.


def test_everything_auto_on_two_cpus() -> None:
    assert resolve(Resources(), cpus=2, gpus=0) == Share(
        num_workers=1,
        use_gpu=False,
        cpus_per_worker=2,
        concurrent_trials=2,
        cpus_per_trial=1,
        gpus_per_trial=0.0,
    )


def test_everything_auto_on_four_gpus_with_two_trials_on_each() -> None:
    assert resolve(Resources(gpus_per_trial=0.5), cpus=16, gpus=4) == Share(
        num_workers=4,
        use_gpu=True,
        cpus_per_worker=4,
        concurrent_trials=8,
        cpus_per_trial=1,
        gpus_per_trial=0.5,
    )


@pytest.mark.parametrize(
    ("wanted", "cpus", "gpus", "trials"),
    [
        ({}, 16, 4, 4),
        ({"cpus_per_trial": 8}, 16, 4, 2),
        ({"gpus_per_trial": 0.5, "num_workers": 1}, 3, 4, 3),
        ({"gpus_per_trial": 0.4}, 64, 4, 8),  # two fit on each: what is left of them does not add up to a GPU
        ({"gpus_per_trial": 0.1}, 64, 3, 30),
        ({"use_gpu": False}, 16, 4, 16),
        ({"concurrent_trials": 3}, 16, 4, 3),
        ({"cpus_per_trial": 3}, 8, 0, 2),
    ],
)
def test_how_many_trials_run_at_a_time(wanted: dict[str, Any], cpus: int, gpus: int, trials: int) -> None:
    assert resolve(Resources(**wanted), cpus=cpus, gpus=gpus).concurrent_trials == trials


def test_a_head_that_is_gone_ends_what_runs_on_it() -> None:
    # As a command does: where these tests are started in the background Ctrl-C, and so SIGINT, is nothing by itself.
    with signals.interruptible(pytest.fail):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            with watched_head(address, seconds=0.5):
                time.sleep(1.5)
            with pytest.raises(KeyboardInterrupt), watched_head(address, seconds=0.5):  # the user's own
                raise KeyboardInterrupt
        began = time.monotonic()
        with pytest.raises(ClusterError, match="does not answer any more"), watched_head(address, seconds=0.5):
            time.sleep(60)
        assert time.monotonic() - began < 30


def test_a_head_that_is_gone_ends_a_process_that_cannot_break_off() -> None:
    code = (
        "import time\n"
        "from raybd.cluster import session\n"
        "session._LEAVE_SECONDS = 0.5\n"
        "with session.watched_head('127.0.0.1:1', seconds=0.5):\n"
        "    while True:\n"
        "        try:\n"
        "            time.sleep(60)\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == ClusterError.exit_code
    assert "127.0.0.1:1: the head of the Ray cluster does not answer any more" in done.stderr


def test_workers_share_the_cpus() -> None:
    assert resolve(Resources(num_workers=3), cpus=8, gpus=0).cpus_per_worker == 2
    assert resolve(Resources(), cpus=64, gpus=2).cpus_per_worker == 8  # no more than a GPU's worker can use
    assert resolve(Resources(use_gpu=False), cpus=64, gpus=2).cpus_per_worker == 64
    assert resolve(Resources(num_workers=2, cpus_per_worker=1), cpus=64, gpus=2).cpus_per_worker == 1
    share = resolve(Resources(use_gpu=False, gpus_per_trial=0.5), cpus=8, gpus=2)
    assert (share.num_workers, share.gpus_per_trial) == (1, 0.0)


@pytest.mark.parametrize(
    ("wanted", "cpus", "gpus", "what", "field"),
    [
        ({"num_workers": 3}, 2, 0, "3 CPUs for pretraining asked for, 2 there", "resources.num_workers"),
        ({"cpus_per_worker": 4}, 2, 0, "4 CPUs for pretraining asked for, 2 there", "resources.num_workers"),
        ({"num_workers": 5}, 16, 4, "5 GPUs for pretraining asked for, 4 there", "resources.num_workers"),
        ({"use_gpu": True}, 4, 0, "1 GPUs for pretraining asked for, 0 there", "resources.num_workers"),
        ({"cpus_per_trial": 3}, 2, 0, "3 CPUs for a trial asked for, 2 there", "resources.cpus_per_trial"),
    ],
)
def test_what_can_never_be_placed_is_refused(
    wanted: dict[str, Any], cpus: int, gpus: int, what: str, field: str
) -> None:
    with pytest.raises(ClusterError, match=what) as caught:
        resolve(Resources(**wanted), cpus=cpus, gpus=gpus)
    assert caught.value.where == field
    assert caught.value.exit_code == 3
    share = resolve(Resources(**wanted), cpus=cpus, gpus=gpus, may_grow=True)
    assert share.concurrent_trials >= 1
    assert share.cpus_per_worker >= 1


class Listed:
    """A trial in Tune's list."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id, self.over = trial_id, False

    def is_finished(self) -> bool:
        return self.over


def test_a_drop_is_seen_wherever_the_trial_stands_in_the_list() -> None:
    told: list[str] = []
    watch = _Watch(None, lambda *_: None, told.append)  # type: ignore[arg-type]
    again, new = Listed("again"), Listed("new")
    watch.on_step_end(1, [again])
    watch.on_step_end(2, [new, again])  # a trial is added, and one that failed goes to the end, in one step
    new.over = True
    watch.on_step_end(3, [new, again])
    watch.on_step_end(4, [new, again])
    assert told == ["new"]


# A long search.


@pytest.fixture
def few_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raybd.cluster.history._BEST", 5)
    monkeypatch.setattr("raybd.cluster.history.History.__init__.__kwdefaults__", {"shown": 20})


def long_study() -> Study:
    return study_of(sampler="tpe", num_trials=200, startup_trials=5)


@pytest.mark.usefixtures("few_shown")
def test_of_a_long_search_tpe_is_shown_the_best_and_a_share_of_the_others() -> None:
    driver = Driver(long_study(), ids={"mmcl": IDS["mmcl"]})
    most, scores = 0, []
    for task in driver.play(150):
        scores.append(told(driver.ledger[task["trial_id"]], Tell.LARGEST_AREA))
        most = max(most, len(driver.trials()))
    shown = {tuple(trial.values) for trial in driver.trials() if trial.state is TrialState.COMPLETE}
    found = [score for score in scores if score is not None]
    best = max(found, key=lambda score: score[0] * (1 - score[1]))
    assert best in shown
    assert shown <= set(found)
    assert len(driver.trials()) < 40


@pytest.mark.usefixtures("few_shown")
def test_tpe_is_shown_enough_to_model_however_many_it_draws_at_random_first() -> None:
    history, left = History(Search(sampler="tpe", startup_trials=30), seed=1), []
    for number in range(130):
        history.add({}, (0.5, number / 1000))
        left.append(len(history.optuna.get_trials(deepcopy=False)))
    assert min(left[30:]) >= 30
    assert max(left) == 120


@pytest.mark.usefixtures("few_shown")
def test_what_is_under_way_while_trials_are_left_out_is_told_all_the_same() -> None:
    driver = Driver(long_study(), ids={"mmcl": IDS["mmcl"]})
    early = driver.suggest()
    driver.play(90)
    driver.end(entry_of(early, (40, 99), (39, 1)), ray=1)
    states = [trial.state for trial in driver.trials()]
    assert TrialState.RUNNING not in states
    (found,) = [trial for trial in driver.trials() if trial.values == [0.39, 0.01]]
    assert found.params == early["params"]


@pytest.mark.usefixtures("few_shown")
def test_a_long_search_goes_on_as_if_it_had_not_been_broken_off() -> None:
    whole = Driver(long_study(), ids={"mmcl": IDS["mmcl"]})
    tasks = whole.play(120)
    first = Driver(long_study(), ids={"mmcl": IDS["mmcl"]})
    first.play(83)
    again = Driver(long_study(), list(first.ledger.values()), ids={"mmcl": IDS["mmcl"]})
    assert again.play(37) == tasks[83:]
