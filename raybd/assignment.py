"""What a trial is asked to do, and what the ledger keeps of its start and its end: for trials that train and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from raybd.errors import DataError, StudyError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.metrics import Counts
from raybd.seeding import fork
from raybd.space import Value
from raybd.store import Store
from raybd.study import Study

Point = tuple[float, float]
Notify = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class Assignment:
    """What a trial is to do.

    Attributes:
        number: its place among the trials of its pretrain objective, from 0.
        params: the searched settings, by dotted name.
    """

    trial_id: str
    number: int
    objective: str
    pretrain_id: str
    params: Mapping[str, Value]


def start_record(study: Study, task: Assignment) -> dict[str, Any]:
    """Return what the ledger keeps of a trial's start. Errors: StudyError where the settings do not fit together."""
    try:
        settings = study.clean.settings(task.params)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise StudyError(f"settings {dict(task.params)} do not fit together: {reasons}", where=task.trial_id) from None
    return {
        "study": study.name,
        "study_hash": study.hash(),
        "trial_id": task.trial_id,
        "number": task.number,
        "objective": task.objective,
        "pretrain_id": task.pretrain_id,
        "method": settings.method,
        "params": dict(task.params),
        "settings": settings.model_dump(mode="json"),
        "seed": fork(study.seed, "trial", task.objective, task.number),
        "started": datetime.now(UTC).isoformat(),
    }


def point(record: Mapping[str, Any]) -> Point:
    """Return accuracy and ASR on what a search looks at, from an epoch's record: the search half, or all images."""
    counted = record["counts"]
    found = Counts(**(counted["search"] if "search" in counted else counted["all"]))
    return found.correct_clean / found.n_clean, found.hit_target / found.n_triggered


# Carries an assignment out to its end, in the process of a Ray actor: picklable, and nothing heavy is imported before
# it is called. It gets study, run directory, assignment and whom to tell of each epoch; it returns the ended entry.
CarryOut = Callable[[Study, Store, Assignment, Notify], Entry]


def state_name(id: str) -> str:
    """Return where the state of a run that is under way is kept."""
    return f"state/{id}.safetensors"


def drop_state(store: Store, id: str) -> None:
    """Remove the state of a run that has ended, and its note of progress."""
    store.delete(state_name(id))
    store.delete(f"progress/{id}.json")


def settle(store: Store, study: Study, task: Assignment) -> Entry:
    """Return a trial's ended ledger entry; one that could not start, or whose process died, is ended as failed here."""
    ledger = Ledger(store)
    reason = ("WorkerDied", "the trial's process died (killed, or out of memory) and its retries are used up")
    try:
        entry = ledger.entry(Kind.TRIAL, task.trial_id)
    except DataError:
        try:
            record = start_record(study, task)
        except StudyError as error:
            reason = (type(error).__name__, error.what)
            record = {**start_record(study, replace(task, params={})), "params": dict(task.params)}
        ledger.start(Kind.TRIAL, task.trial_id, record)
        entry = ledger.entry(Kind.TRIAL, task.trial_id)
    if entry.ended is not None:
        return entry
    ended = {"state": State.FAILED, "error_type": reason[0], "error_message": reason[1]}
    drop_state(store, task.trial_id)
    return ledger.end(Kind.TRIAL, task.trial_id, {**ended, "ended": datetime.now(UTC).isoformat()})
