"""Trials on real Ray, all on one cluster: each fault is one failed trial, or none, and the rest goes on.

Most trials here train nothing: they fail, die or end, as their number says. Those of the last two searches train.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faulty_trials import hopeless, killed_while_idle, lingers, on_a_bad_disk, sabotaged, various

from raybd import tables
from raybd.clean.actor import CleanTrial
from raybd.console import View
from raybd.errors import RaybdError
from raybd.ledger import Entry, Kind, Ledger
from raybd.store import Store
from raybd.study import Study
from raybd.study_directory import StudyDirectory

IDS = {"mmcl": "mmcl-aaaa"}
TRIES = 5


def study_of(num_trials: int, **search: Any) -> Study:
    space = {"lr": {"low": 1e-6, "high": 1e-3, "log": True}}
    return Study.model_validate(
        {
            "name": "made",
            "data": {"root": "emoji-32", "max_train_samples": 256, "max_test_samples": 240},
            "model": {"name": "resnet-tiny-32"},
            "poison": {"num_poisoned": 1, "target_class": "fruit", "trigger": {"size": 6}},
            "pretrain": {"objectives": {"mmcl": {"loss_weights": {"mmcl": 1, "ssl": 0}}}},
            "clean": {
                "num_samples": 96,
                "batch_size": 32,
                "epochs": 3,
                "schedule": "constant_cooldown",
                "loss_weights": {"mmcl": 1, "ssl": 0},
            },
            "evaluation": {"templates": ["a picture of a {}."]},
            "search": {"sampler": "random", "space": space, "num_trials": num_trials, **search},
            "resources": {"use_gpu": False, "concurrent_trials": 2, "num_workers": 1},
        }
    )


def study_that_trains(lrs: Sequence[float], **search: Any) -> Study:
    return study_of(len(lrs), sampler="grid", space={"lr": {"choices": lrs}}, **search)


class Lines(View):
    """Keeps what it would print."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = list[str]()

    def line(self, text: str, *, style: str | None = None) -> None:
        self.lines.append(text)


def note_end(told: list[str], entry: Entry) -> None:
    told.append(entry.id)


def main(root: str) -> None:
    """Run all searches on one cluster, and print for each its error and the states of Optuna's trials."""
    from raybd.cluster import search
    from raybd.cluster.session import session

    made, dropped = [], []

    class Kept(search.LedgerSearcher):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            made.append(self)

        def dropped(self, trial_id: str) -> None:
            before = len(self._dropped)
            super().dropped(trial_id)
            dropped.extend([trial_id] * (len(self._dropped) - before))

    search.LedgerSearcher = Kept  # type: ignore[misc]
    found = {}
    with session(study_of(1).resources) as share:
        both = study_of(2, stopping={"rungs": [1], "keep": 0.9}, retries=0)
        rungs = study_of(6, stopping={"rungs": [1], "keep": 0.5})
        for name, study, at_once, carry_out in (
            ("various", study_of(7), 2, various),
            ("hopeless", study_of(12), 1, hopeless),
            ("hopeless, and nevertheless", study_of(12, max_failed=1), 1, hopeless),
            ("on_a_bad_disk", study_of(6), 2, on_a_bad_disk),
            ("lingers", rungs, 2, lingers),
            ("lingers alone", rungs, 1, lingers),
            # Ray may learn of the death before it hands a trial to the dead process: once is enough that it does not.
            *((f"killed while idle, {number}", both, 2, killed_while_idle) for number in range(TRIES)),
        ):
            if any(of.startswith("killed") and result["dropped"] for of, result in found.items()):
                break
            made.clear()
            dropped.clear()
            told, error = [], None
            try:
                store = Store(f"{root}/{name.removesuffix(', and nevertheless')}")
                ends = partial(note_end, told)
                of_it = replace(share, concurrent_trials=at_once)
                search.run_search(study, IDS, store, of_it, carry_out, on_epoch=lambda *_: None, on_end=ends)
            except RaybdError as raised:
                error = [type(raised).__name__, str(raised)]
            trials = [trial for own in made for trial in own._objectives["mmcl"].history.optuna.get_trials()]
            states = {f"{trial.params['lr']:.6g}": trial.state.name for trial in trials}
            found[name] = {"error": error, "told": told, "optuna": sorted(states.values()), "dropped": len(dropped)}
            found[name]["searches"] = len(made)
        for name, study, carry_out in (
            ("sabotaged", study_that_trains([1e-4, 1e30, 2e-4, 3e-4], hang_minutes=0.2), sabotaged),
            (
                "halving",
                study_that_trains(
                    [0.001, 0.002, 0.004, 0.008, 0.016],
                    stopping={"rungs": [1, 2], "keep": 0.5, "collapse_below": 0},
                ),
                CleanTrial(threads=1, use_gpu=False),
            ),
        ):
            view = Lines()
            directory = StudyDirectory(study, Store(f"{root}/{name}"), view)
            directory.share = replace(share, concurrent_trials=2)
            directory.load_tables()
            directory.run_trials(IDS, carry_out)
            found[name] = {"lines": view.lines}
    print(json.dumps(found))  # noqa: T201


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directories of all searches; those that train have a model to clean, which is not trained either."""
    from raybd import checkpoint
    from raybd.model import create
    from raybd.train.pretraining import weights_name

    root = tmp_path_factory.mktemp("faults")
    weights = checkpoint.to_bytes(create("resnet-tiny-32", seed=0).net.state_dict())
    for name in ("sabotaged", "halving"):
        Store(f"{root}/{name}").put(weights_name(IDS["mmcl"]), weights)
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    """What all the searches led to."""
    code = f"import test_search_faults; test_search_faults.main({str(root)!r})"
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def entries(root: Path, name: str) -> list[Entry]:
    return Ledger(Store(f"{root}/{name}")).entries(Kind.TRIAL)


pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def test_each_fault_is_one_failed_trial_or_none(root: Path, found: dict[str, Any]) -> None:
    known = {
        entry.started["number"]: (
            entry.ended["state"] if entry.ended else None,
            (entry.ended or {}).get("error_type"),
            entry.attempts,
            [failure["kind"] for failure in entry.failures],
        )
        for entry in entries(root, "various")
    }
    assert known == {
        0: ("complete", None, 1, []),
        1: ("failed", "error", 2, ["error", "error"]),
        2: ("complete", None, 2, ["died"]),
        3: ("failed", "died", 2, ["died", "died"]),
        4: ("failed", "settings", 1, []),
        5: ("complete", None, 2, ["out_of_memory"]),
        6: ("complete", None, 1, []),
    }
    assert found["various"]["error"] is None
    # The driver is told of each end once.
    assert sorted(found["various"]["told"]) == [f"mmcl-{number:04d}" for number in range(7)]
    store = Store(f"{root}/various")
    assert "ZeroDivisionError: made" in store.get("errors/mmcl-0001.txt").decode()
    assert "\x1b" not in store.get("errors/mmcl-0001.txt").decode()


def test_optuna_is_left_with_nothing_that_runs(found: dict[str, Any]) -> None:
    assert found["various"]["optuna"] == ["COMPLETE"] * 4 + ["FAIL"] * 3
    assert set(found["hopeless"]["optuna"]) == {"FAIL"}
    assert set(found["on_a_bad_disk"]["optuna"]) <= {"COMPLETE", "FAIL"}


def test_too_many_failures_end_the_search_until_the_study_says_otherwise(root: Path, found: dict[str, Any]) -> None:
    kind, text = found["hopeless"]["error"]
    assert kind == "TrialError"
    assert "7 of 12 planned trials failed (58%), more than search.max_failed=0.5 allows" in text
    assert "most often 7 x settings: nothing fits at " in text
    assert found["hopeless, and nevertheless"]["error"] is None
    states = [entry.ended["state"] for entry in entries(root, "hopeless") if entry.ended]
    assert states == ["failed"] * 12


def test_a_bad_disk_ends_the_search_and_fails_no_trial(root: Path, found: dict[str, Any]) -> None:
    assert found["on_a_bad_disk"]["error"] == ["StorageError", "the disk is full"]
    known = {entry.started["number"]: entry for entry in entries(root, "on_a_bad_disk")}
    assert (known[1].ended, known[1].failures, sorted(known[1].epochs)) == (None, (), [0])
    assert all(entry.ended is None or entry.ended["state"] == "complete" for entry in known.values())


@pytest.mark.parametrize("name", ["lingers", "lingers alone"])
def test_a_trial_that_ray_drops_is_run_by_another_process(root: Path, found: dict[str, Any], name: str) -> None:
    """A process that cannot be used again takes its next trial with it, and Ray tells nobody."""
    assert found[name]["error"] is None
    assert found[name]["dropped"] >= 1, "no trial was dropped: this tests nothing"
    known = {entry.id: entry for entry in entries(root, name)}
    assert [entry.ended["state"] if entry.ended else None for entry in known.values()].count("complete") == 3
    assert [entry.ended["state"] if entry.ended else None for entry in known.values()].count("stopped") == 3
    assert not any(entry.failures for entry in known.values())
    assert found[name]["optuna"] == ["COMPLETE"] * 6
    assert sorted(found[name]["told"]) == sorted([*known, *known])  # at its rung, and at its end


def test_a_process_that_dies_between_two_trials_is_no_failure_of_the_next(root: Path, found: dict[str, Any]) -> None:
    """Ray sees it die only as it hands the next trial to it, and tells of two errors: the trial has not begun."""
    names = [name for name in found if name.startswith("killed while idle")]
    assert found[names[-1]]["dropped"] >= 1, "no trial met the dead process: this tests nothing"
    for name in names:
        assert found[name]["error"] is None
        for entry in entries(root, name):
            assert (entry.ended or {})["state"] == "complete"
            assert (entry.attempts, entry.failures) == (2, ())
        assert found[name]["optuna"] == ["COMPLETE"] * 2


def test_trials_that_train_fail_die_and_hang_each_alone(root: Path, found: dict[str, Any]) -> None:
    store, known = Store(f"{root}/sabotaged"), entries(root, "sabotaged")
    trials = {row["number"]: row for row in tables.read(store, "trials").to_pylist()}
    assert {number: (row["state"], row["error_type"], row["attempt"]) for number, row in trials.items()} == {
        0: ("complete", None, 1),
        1: ("failed", "non_finite", 1),
        2: ("complete", None, 2),
        3: ("complete", None, 2),
    }
    assert "loss is nan" in trials[1]["error_message"]
    assert [[failure["kind"] for failure in entry.failures] for entry in known] == [
        [],
        ["non_finite"],
        ["died"],
        ["hung"],
    ]
    assert "Traceback" in store.get("errors/mmcl-0001.txt").decode()
    assert "raybd/train/loop.py" in store.get("errors/mmcl-0003.txt").decode()  # where it was stopped
    points = Counter((row["trial_id"], row["epoch"], row["split"]) for row in tables.read(store, "epochs").to_pylist())
    assert set(points.values()) == {1}
    assert len(points) == 2 * (3 * 4 + 1)


def test_trials_that_train_wait_go_on_and_keep_the_weights_of_the_front(root: Path, found: dict[str, Any]) -> None:
    run, printed = Store(f"{root}/halving"), "\n".join(found["halving"]["lines"])
    assert "waits at the rung of epoch 1" in printed
    assert "stopped: rung at epoch 1: place 3 of 5, the first 2 go on" in printed
    known = entries(root, "halving")
    assert sorted(max(entry.epochs) for entry in known) == [1, 1, 1, 2, 3]  # of five two go on, of two one
    assert sorted(entry.attempts for entry in known) == [1, 1, 1, 2, 3]
    assert run.names("state") == []
    assert run.names("weights")
    kept = {row["checkpoint"] for row in tables.read(run, "fronts").to_pylist()}
    assert {name for name in kept if name.startswith("weights/")} == set(run.names("weights"))
    assert {row["stop_reason"] is None for row in tables.read(run, "trials").to_pylist()} == {True, False}
