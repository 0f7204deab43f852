"""Faults of trials on real Ray: each is one failed trial, or none; nothing runs for ever, and the rest goes on.

The trials here train nothing: they fail, die or end, as their number says.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raybd.assignment import Assignment, Notify, done_already, start_record
from raybd.errors import RaybdError, StorageError, StudyError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.store import Store
from raybd.study import Study

IDS = {"mmcl": "mmcl-aaaa"}
TRIES = 5
HALF = {"n_clean": 10, "correct_clean": 5, "n_triggered": 10, "hit_target": 2, "correct_triggered": 0}


def study_of(num_trials: int, **search: Any) -> Study:
    space = {"lr": {"low": 1e-6, "high": 1e-3, "log": True}}
    return Study.model_validate(
        {
            "name": "made",
            "poison": {"num_poisoned": 1},
            "pretrain": {"objectives": {"mmcl": {"loss_weights": {"mmcl": 1, "ssl": 0}}}},
            "search": {"sampler": "random", "space": space, "num_trials": num_trials, **search},
            "resources": {"use_gpu": False, "concurrent_trials": 2, "num_workers": 1},
        }
    )


def epochs(store: Store, task: Assignment, *numbers: int, notify: Notify) -> None:
    for number in numbers:
        record = {"counts": {"search": HALF, "report": HALF}}
        Ledger(store).epoch(Kind.TRIAL, task.trial_id, number, record)
        notify(number, record)


def various(study: Study, store: Store, task: Assignment, notify: Notify) -> Entry:
    """End well, but number 1 has an error, 2 dies once, 3 always, 4 cannot start, 5 runs out of memory once."""
    attempt = Ledger(store).start(Kind.TRIAL, task.trial_id, start_record(study, task))
    if task.number == 1:
        raise ZeroDivisionError("made")
    if task.number == 3:
        os._exit(1)
    if task.number == 4:
        raise StudyError("settings that do not fit together")
    epochs(store, task, 0, notify=notify)
    if attempt == 1 and task.number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if attempt == 1 and task.number == 5:
        raise MemoryError
    epochs(store, task, 1, notify=notify)
    return ended(store, task)


class Lingering:
    """What a thread takes long to let go of when it ends: Ray waits two seconds for it, then drops the next trial."""

    kept = threading.local()

    def __del__(self) -> None:
        time.sleep(5)


def lingers(study: Study, store: Store, task: Assignment, notify: Notify) -> Entry:
    """Wait at the rung, or end; two of them leave behind a process that cannot be used again at once."""

    def meanwhile() -> None:
        if task.number in {0, 5}:
            Lingering.kept.it = Lingering()

    return to_the_rung_or_the_end(study, store, task, notify, meanwhile)


def killed_while_idle(study: Study, store: Store, task: Assignment, notify: Notify) -> Entry:
    """Wait at the rung, or end; the first trial's process, which waits for the second one, is killed by that."""
    pid = Path(store.root) / "pid"

    def meanwhile() -> None:
        if task.until is not None and task.number == 0:
            pid.write_text(str(os.getpid()))
            # Were it at its rung before the other has a process, it would hand its own on.
            while len(Ledger(store).entries(Kind.TRIAL)) < 2:
                time.sleep(0.1)

    at = to_the_rung_or_the_end(study, store, task, notify, meanwhile)
    if task.until is not None and task.number == 1:
        while not any(entry.waits and entry.id == "mmcl-0000" for entry in Ledger(store).entries(Kind.TRIAL)):
            time.sleep(0.1)
        time.sleep(2)  # Tune knows of it by then
        os.kill(int(pid.read_text()), signal.SIGKILL)  # and then there is little time left to learn of this
    return at


def to_the_rung_or_the_end(
    study: Study, store: Store, task: Assignment, notify: Notify, meanwhile: Callable[[], None]
) -> Entry:
    if (done := done_already(Ledger(store), task)) is not None:
        return done
    Ledger(store).start(Kind.TRIAL, task.trial_id, start_record(study, task))
    meanwhile()
    if task.until is None:
        epochs(store, task, 2, notify=notify)
        return ended(store, task)
    epochs(store, task, 0, task.until, notify=notify)
    place = {"weight_decay_in_force": None, "node": "here", "device": "cpu", "device_seconds": 1.0}
    return Ledger(store).pause(Kind.TRIAL, task.trial_id, {"epoch": task.until, **place})


def ended(store: Store, task: Assignment) -> Entry:
    end = {"state": State.COMPLETE, "ended": datetime.now(UTC).isoformat()}
    return Ledger(store).end(Kind.TRIAL, task.trial_id, end)


def hopeless(study: Study, store: Store, task: Assignment, notify: Notify) -> Entry:
    raise StudyError(f"nothing fits at {task.number}")


def on_a_bad_disk(study: Study, store: Store, task: Assignment, notify: Notify) -> Entry:
    Ledger(store).start(Kind.TRIAL, task.trial_id, start_record(study, task))
    epochs(store, task, 0, notify=notify)
    if task.number == 1:
        raise StorageError("the disk is full")
    epochs(store, task, 1, notify=notify)
    return ended(store, task)


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
            ("hopeless", study_of(12), 2, hopeless),
            ("hopeless, and nevertheless", study_of(12, max_failed=1), 2, hopeless),
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
            trials = [trial for own in made for trial in own._objectives["mmcl"].optuna.get_trials()]
            states = {f"{trial.params['lr']:.6g}": trial.state.name for trial in trials}
            found[name] = {"error": error, "told": told, "optuna": sorted(states.values()), "dropped": len(dropped)}
            found[name]["searches"] = len(made)
    print(json.dumps(found))  # noqa: T201


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


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


pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


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
