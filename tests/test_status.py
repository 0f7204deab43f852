"""What `raybd status` says of a run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from raybd import failures, tables
from raybd.assignment import Assignment, settle, start_record
from raybd.ledger import Kind, Ledger
from raybd.report import status
from raybd.store import Store
from raybd.study import Failure, Study

STUDY = Study.model_validate({"name": "made", "poison": {"num_poisoned": 1}})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def start(store: Store, number: int, until: int | None = None) -> Assignment:
    task = Assignment(f"mmcl-{number:04d}", number, "mmcl", "mmcl-aaaa", {}, until)
    Ledger(store).start(Kind.TRIAL, task.trial_id, start_record(STUDY, task))
    return task


def test_a_run_without_trials(store: Store) -> None:
    assert list(status.lines(store)) == ["trials: none yet"]


def test_reasons_retries_and_where_the_tracebacks_are(store: Store) -> None:
    for number in range(6):
        task = start(store, number)
        if number < 3:
            failures.note(store, task.trial_id, Failure.OUT_OF_MEMORY, f"no room for {number} GiB", trace="")
            settle(store, STUDY, task)
        elif number == 3:
            settle(store, STUDY, task, reason=(Failure.SETTINGS, "they do not fit"))
    task = start(store, 6)
    for kind in (Failure.HUNG, Failure.DIED, Failure.HUNG):
        failures.note(store, task.trial_id, kind, "made", trace="")
    task = start(store, 7)
    failures.note(store, task.trial_id, Failure.DIED, "made", trace="")
    Ledger(store).end(Kind.TRIAL, task.trial_id, {"state": "complete"})
    assert list(status.lines(store)) == [
        "trials: 4 failed, 3 running or interrupted, 1 complete",
        "  3 x out_of_memory: no room for 0 GiB (mmcl-0000, mmcl-0001, mmcl-0002)",
        "  1 x settings: they do not fit (mmcl-0003)",
        f"tracebacks: {store.root}/errors/TRIAL.txt",
        "tried again after failures: 2",
        "  mmcl-0006: 2 x hung, 1 x died; running or interrupted",
        "  mmcl-0007: 1 x died; complete",
    ]


def test_trials_that_wait_at_a_rung_are_told_from_those_that_run(store: Store) -> None:
    for number in range(3):
        start(store, number, until=1)
    Ledger(store).pause(Kind.TRIAL, "mmcl-0000", {"epoch": 1})
    Ledger(store).pause(Kind.TRIAL, "mmcl-0001", {"epoch": 1})
    start(store, 1)  # goes on
    assert list(status.lines(store)) == ["trials: 2 running or interrupted, 1 waiting at a rung"]


def test_pretraining_whose_workers_failed(store: Store) -> None:
    started = {"settings": {"epochs": 3}}
    Ledger(store).start(Kind.PRETRAIN, "mmcl-aaaa", started)
    Ledger(store).epoch(Kind.PRETRAIN, "mmcl-aaaa", 1, {})
    failures.note(store, "mmcl-aaaa", Failure.HUNG, "made", trace="", of=Kind.PRETRAIN, part="-rank1")
    assert next(status.lines(store)) == (
        "pretraining mmcl-aaaa: epoch 1/3, running or interrupted; failures: 1 x hung, the last one: made"
    )
    assert store.names("errors") == ["errors/mmcl-aaaa-rank1.txt"]


def test_trials_that_others_ran_are_counted_in_the_tables(store: Store) -> None:
    now = datetime.now(UTC)
    for number, state in enumerate(("complete", "complete", "failed")):
        row = {"trial_id": f"t{number}", "state": state, "started": now, "ended": now}
        row |= {"pretrain_id": "p", "objective": "mmcl", "method": "cleanclip"}
        row |= {"error_type": "error", "error_message": "boom"} if state == "failed" else {}
        tables.write(store, "trials", f"t{number}", [row])
    assert list(status.lines(store)) == ["trials: 2 complete, 1 failed", "  1 x error: boom (t2)"]
