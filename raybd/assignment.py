"""What a trial is asked to do, and what the ledger keeps of its start and its end: for trials that train and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from raybd import stopping
from raybd.errors import DataError, StudyError, dotted
from raybd.ledger import Entry, Kind, Ledger, State, reading
from raybd.metrics import Counts
from raybd.seeding import fork
from raybd.space import Value
from raybd.stopping import Point
from raybd.store import Store
from raybd.study import Failure, Stopping, Study

# Of a run directory: what raybd writes there.
_FOLDERS = (
    *("ledger", "tables", "state", "progress", "pretrained", "weights", "errors"),
    *("jobs", "stop", "tensorboard", "tracked"),
)
_FILES = ("study.json", "skipped.json", "preview.png", "examples.json", "report.html", "driver.lock")

Notify = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class Assignment:
    """What a trial is to do.

    Attributes:
        number: its place among the trials of its pretrain objective, from 0.
        params: the searched settings, by dotted name.
        until: the epoch after which it waits to be compared with other trials; None where it runs to its end.
    """

    trial_id: str
    number: int
    objective: str
    pretrain_id: str
    params: Mapping[str, Value]
    until: int | None = None


def start_record(study: Study, task: Assignment) -> dict[str, Any]:
    """Return what the ledger keeps of a trial's start. Errors: StudyError where the settings do not fit together."""
    try:
        settings = study.clean.settings(task.params)
    except ValidationError as error:
        reasons = "; ".join(f"{dotted(e['loc'])}: {e['msg']}" for e in error.errors())
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
        "until": task.until,
        "started": datetime.now(UTC).isoformat(),
    }


def point(record: Mapping[str, Any]) -> Point:
    """Return accuracy and ASR on what a search looks at, from an epoch's record: the search half, or all images."""
    counted = record["counts"]
    found = Counts(**(counted["search"] if "search" in counted else counted["all"]))
    return found.correct_clean / found.n_clean, found.hit_target / found.n_triggered


# Carries an assignment out to its end, in the process of a Ray actor: picklable, and nothing heavy is imported before
# it is called. It gets study, run directory, assignment and whom to tell of each epoch; it returns the entry as it
# has ended or waits at a rung.
CarryOut = Callable[[Study, Store, Assignment, Notify], Entry]


class Stops:
    """Says after which epoch a trial ends before its last one.

    Args:
        until: the rung at which it waits, None if there is none ahead.
        points: of the epochs so far; whoever adds to them keeps them up to date.
    """

    def __init__(self, rules: Stopping, until: int | None, points: Mapping[int, Point]) -> None:
        self._rules, self._until, self._points = rules, until, points
        self._reason: str | None = None
        self._waits = False

    def __call__(self, epoch: int) -> bool:
        """Say whether the trial ends after an epoch."""
        self._reason = stopping.collapse(self._rules, epoch, self._points)
        self._waits = self._reason is None and epoch == self._until
        return self._waits or self._reason is not None

    def outcome(self) -> dict[str, Any] | None:
        """Return state and reason of the end of a trial; None for one that waits at its rung."""
        if self._waits:
            return None
        return {"state": State.STOPPED, "stop_reason": self._reason} if self._reason else {"state": State.COMPLETE}


def state_name(id: str) -> str:
    """Return where the state of a run that is under way is kept."""
    return f"state/{id}.safetensors"


def drop_state(store: Store, id: str) -> None:
    """Remove the state of a run that has ended, and its note of progress."""
    store.delete(state_name(id))
    store.delete(f"progress/{id}.json")


def remove_leftovers(store: Store) -> None:
    """Remove what processes that were killed left: half-written files, and states of runs that have ended."""
    store.remove_temporaries(_FOLDERS, files=_FILES)
    for name in (*store.names("state"), *store.names("progress")):
        id = name.partition("/")[2].rpartition(".")[0]
        if any(Ledger(store).has_ended(kind, id) for kind in Kind):
            store.delete(name)


def require_started(store: Store, study: Study, task: Assignment) -> Entry:
    """Return a trial's ledger entry; a start is recorded for one that did not get as far as that."""
    ledger = Ledger(store)
    try:
        return ledger.entry(Kind.TRIAL, task.trial_id)
    except DataError:
        pass
    try:
        record = start_record(study, task)
    except StudyError:
        record = {**start_record(study, replace(task, params={})), "params": dict(task.params)}
    ledger.start(Kind.TRIAL, task.trial_id, record)
    return ledger.entry(Kind.TRIAL, task.trial_id)


def done_already(ledger: Ledger, task: Assignment) -> Entry | None:
    """Return the entry of a trial that has ended or waits at the rung of its assignment; None where there is work."""
    try:
        entry = ledger.entry(Kind.TRIAL, task.trial_id)
    except DataError:
        return None
    return entry if entry.ended is not None or _waits_at_its_rung(entry, task) else None


def _waits_at_its_rung(entry: Entry, task: Assignment) -> bool:
    """Say whether a trial waits where its assignment ends: at an earlier rung it has only been told to go on."""
    return entry.waits and bool(entry.pauses[-1]["epoch"] == task.until)


def settle(store: Store, study: Study, task: Assignment, *, reason: tuple[Failure, str] | None = None) -> Entry:
    """Return a trial's ledger entry as it waits at a rung or has ended; otherwise it is ended as failed here.

    Args:
        reason: why it failed, if not as its last attempt did.
    """
    entry = require_started(store, study, task)
    if entry.ended is not None or _waits_at_its_rung(entry, task):
        return entry
    return _end(store, task.trial_id, failed_record(entry, reason=reason))


def stop(store: Store, trial_id: str, reason: str) -> Entry:
    """End a trial that waits at a rung as stopped, and return its entry. Errors: DataError if it never started."""
    entry = Ledger(store).entry(Kind.TRIAL, trial_id)
    if entry.ended is not None:
        return entry
    last = {name: entry.pauses[-1][name] for name in ("weight_decay_in_force", "node", "device")}
    record = {"state": State.STOPPED, "stop_reason": reason, **last, "device_seconds": seconds_before(entry)}
    return _end(store, trial_id, {**record, "ended": datetime.now(UTC).isoformat()})


def seconds_before(entry: Entry) -> float:
    """Return the device-seconds of a trial up to the rung that it left last. Errors: DataError where they are none."""
    with reading(f"ledger/{Kind.TRIAL}/{entry.id}"):
        return sum(float(pause["device_seconds"]) for pause in entry.pauses)


def _end(store: Store, trial_id: str, record: dict[str, Any]) -> Entry:
    entry = Ledger(store).end(Kind.TRIAL, trial_id, record)
    drop_state(store, trial_id)
    return entry


def failed_record(entry: Entry, *, reason: tuple[Failure, str] | None = None) -> dict[str, Any]:
    """Return what the ledger keeps of the end of a trial that failed."""
    if reason is None and entry.failures:
        reason = (Failure(entry.failures[-1]["kind"]), entry.failures[-1]["message"])
    kind, message = reason or (Failure.DIED, "it did not come to an end, and nobody knows why")
    ended = datetime.now(UTC).isoformat()
    # Of an attempt that died nobody knows the cost; that of the rungs before is known.
    known = {"device_seconds": seconds_before(entry)} if entry.pauses else {}
    return {"state": State.FAILED, "error_type": kind, "error_message": message, "ended": ended, **known}
