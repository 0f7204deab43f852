"""A trial's failed attempts: why they failed, what is kept of them, and whether it is tried again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile

from raybd.errors import NonFiniteError, RaybdError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.store import Store
from raybd.study import Failure, Search

# After these a process is not given another trial: its CUDA context may be broken, its memory full.
SPOILING = frozenset({Failure.OUT_OF_MEMORY, Failure.ERROR})
# What torch and CUDA say where they raise no error of its own class.
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "status_alloc_failed")
_LONGEST = 500  # characters of a message
_NAMED = 3  # trials that a reason names


def traceback_name(trial_id: str) -> str:
    """Return where the tracebacks of a trial are kept, relative to the run directory."""
    return f"errors/{trial_id}.txt"


def kind_of(error: BaseException) -> Failure:
    """Return what kind of failure an error within a trial is."""
    if isinstance(error, NonFiniteError):
        return Failure.NON_FINITE
    if isinstance(error, MemoryError):
        return Failure.OUT_OF_MEMORY
    text = "" if isinstance(error, RaybdError) else str(error).lower()
    return Failure.OUT_OF_MEMORY if any(mark in text for mark in _OUT_OF_MEMORY) else Failure.ERROR


def message_of(error: BaseException) -> str:
    """Return an error in one line; errors that raybd did not foresee with the name of their class."""
    if isinstance(error, RaybdError):
        return one_line(error.what)
    name, text = type(error).__name__, one_line(str(error))
    return f"{name}: {text}" if text else name


def one_line(text: str) -> str:
    """Return the first line of a text that is not empty, cut to what a table takes."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:_LONGEST]


@dataclass(frozen=True)
class Reason:
    """Why trials failed: all of one kind, and alike but for numbers."""

    kind: str
    message: str
    trial_ids: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.trial_ids[:_NAMED]) + (", …" if len(self.trial_ids) > _NAMED else "")
        return f"{len(self.trial_ids)} x {self.kind}: {self.message} ({shown})"


def reasons(failed: Iterable[tuple[str, str | None, str | None]]) -> list[Reason]:
    """Return why trials failed, the commonest reason first, of (trial, `error_type`, `error_message`) for each."""
    alike: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for trial_id, kind, message in failed:
        key = (kind or "unknown", re.sub(r"\d[\d.]*(e[+-]?\d+)?", "0", message or ""))
        alike.setdefault(key, []).append((trial_id, message or "no reason was kept"))
    found = [
        Reason(kind, members[0][1], tuple(trial_id for trial_id, _ in members)) for (kind, _), members in alike.items()
    ]
    return sorted(found, key=lambda reason: -len(reason.trial_ids))


def failed_trials(entries: Iterable[Entry]) -> list[tuple[str, str | None, str | None]]:
    """Return (trial, `error_type`, `error_message`) of each ledger entry that ended as failed."""
    return [
        (entry.id, entry.ended["error_type"], entry.ended["error_message"])
        for entry in entries
        if entry.ended is not None and entry.ended["state"] == State.FAILED
    ]


def note(
    store: Store, id: str, kind: Failure, message: str, *, trace: str, of: Kind = Kind.TRIAL, part: str = ""
) -> Entry:
    """Record that an attempt of a trial or pretraining that has started failed; return its entry.

    Tracebacks of one trial are kept in one file, the first attempt's first.

    Args:
        part: of several processes at work on one thing, which: each has a file of its own.
    """
    ledger, now = Ledger(store), datetime.now(UTC).isoformat()
    entry = ledger.entry(of, id)
    name = traceback_name(id + part)
    before = store.get(name) if store.exists(name) else b""
    found = f"failure {len(entry.failures) + 1}, {now}, {kind}: {message}\n\n{trace.rstrip()}\n\n"
    store.put(name, before + found.encode(errors="replace"))
    record = {"kind": kind, "message": message, "epoch": max(entry.epochs, default=None), "time": now}
    ledger.failed(of, id, record)
    return ledger.entry(of, id)


def is_final(entry: Entry, search: Search) -> bool:
    """Say whether a trial is over after its last failure: not to be tried again, or tried often enough.

    Failures count from the last finished epoch on: what always fails at the same place ends, what gets on does not.
    """
    last = entry.failures[-1]
    here = list(takewhile(lambda failure: failure["epoch"] == last["epoch"], reversed(entry.failures)))
    return Failure(last["kind"]) not in search.retry_on or len(here) > search.retries
