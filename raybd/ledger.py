"""The ledger: what was started, which epochs are done, what ended. The source of truth of a run directory.

Append-only: one small file for each event, whole or absent. Tables, fronts and Optuna's studies are rebuilt from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from raybd.errors import DataError, SupersededError
from raybd.store import Store

Record = dict[str, Any]
_END, _SO_FAR = "ended.json", ("started-", "epoch-", "failed-", "paused-")


class Kind(StrEnum):
    """What a ledger entry is of."""

    PRETRAIN = "pretrain"
    TRIAL = "trials"


class State(StrEnum):
    """Where a trial stands."""

    RUNNING = "running"
    COMPLETE = "complete"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Entry:
    """One pretraining run or trial.

    Attributes:
        started: the record of its first start.
        attempts: how often it was started.
        epochs: the record of each finished epoch, by number.
        ended: the record of its end, None while it runs or after its process died.
        failures: the records of attempts that failed, the first one first.
        pauses: the records of attempts that ended at a rung, where the trial waits to be compared with others, the
            lowest rung first.
        until: the rung that its last attempt was to end at, None if none or where it has ended.
    """

    id: str
    started: Record
    attempts: int
    epochs: dict[int, Record]
    ended: Record | None
    failures: tuple[Record, ...] = ()
    pauses: tuple[Record, ...] = ()
    until: int | None = None

    @property
    def waits(self) -> bool:
        """Whether it waits at a rung: it got there, and no attempt was started that is to go beyond.

        Which attempt got there says nothing: one that was thought dead may do so after the next one has started.
        """
        return self.ended is None and bool(self.pauses) and bool(self.pauses[-1]["epoch"] == self.until)


class Ledger:
    """The ledger of one run directory."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def start(self, kind: Kind, id: str, record: Record) -> int:
        """Record a start, `until` which rung in the record; return the number of the attempt, from 1.

        Earlier attempts that still run count no more.
        """
        return self._append(kind, id, "started-", record)

    def require_last(self, kind: Kind, id: str, attempt: int) -> None:
        """Raise SupersededError where a later attempt has started, or the run was ended, by whoever thought it dead."""
        if self.has_ended(kind, id) or len(self._names(kind, id, "started-")) > attempt:
            raise SupersededError(f"attempt {attempt} counts no more", where=f"ledger/{kind}/{id}")

    def epoch(self, kind: Kind, id: str, epoch: int, record: Record) -> None:
        """Record a finished epoch. One that is recorded already stays as it is: numbers once seen do not change."""
        self._put_new(f"ledger/{kind}/{id}/epoch-{epoch:04d}.json", record)

    def epochs(self, kind: Kind, id: str) -> set[int]:
        """Return the numbers of the epochs that are recorded."""
        return {_number(name) for name in self._names(kind, id, "epoch-")}

    def last_epoch(self, kind: Kind, id: str) -> int:
        """Return the last epoch that is recorded, -1 if none is."""
        return max(self.epochs(kind, id), default=-1)

    def failed(self, kind: Kind, id: str, record: Record) -> None:
        """Record that an attempt failed; whether the entry ends with it is another matter."""
        self._append(kind, id, "failed-", record)

    def failure_count(self, kind: Kind, id: str) -> int:
        """Return how many attempts are recorded as failed."""
        return len(self._names(kind, id, "failed-"))

    def pause(self, kind: Kind, id: str, record: Record) -> Entry:
        """Record that an attempt ended at a rung, `epoch` in the record; return the entry."""
        self._append(kind, id, "paused-", record)
        return self.entry(kind, id)

    def end(self, kind: Kind, id: str, record: Record) -> Entry:
        """Record an end, and return the entry; one that has ended stays as it is.

        The record holds all that the entry has, so that readers of an ended one need one file.
        """
        entry = self.entry(kind, id)
        content: Record = {"started": entry.started, "attempts": entry.attempts, "ended": record}
        content |= {"failures": entry.failures, "pauses": entry.pauses}
        content["epochs"] = {str(number): entry.epochs[number] for number in sorted(entry.epochs)}
        self._put_new(f"ledger/{kind}/{id}/{_END}", content)
        return self.entry(kind, id)

    def has_ended(self, kind: Kind, id: str) -> bool:
        """Say whether an entry has ended."""
        return self._store.exists(f"ledger/{kind}/{id}/{_END}")

    def entry(self, kind: Kind, id: str) -> Entry:
        """Return one entry. Errors: DataError if it never started."""
        names = self._names(kind, id)
        if not names:
            raise DataError("never started", where=f"ledger/{kind}/{id}")
        return self._read(id, names, self._store.get_each(_wanted(names)))

    def entries(self, kind: Kind) -> list[Entry]:
        """Return all entries of a kind, by id."""
        found = sorted(self._by_id(kind).items())
        contents = self._store.get_each([name for _, names in found for name in _wanted(names)])
        return [self._read(id, names, contents) for id, names in found]

    def ids(self, kind: Kind) -> list[str]:
        """Return the ids of all entries of a kind, sorted; none of them is read."""
        return sorted(self._by_id(kind))

    def _by_id(self, kind: Kind) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self._store.names(f"ledger/{kind}", suffix=".json"):
            found.setdefault(name.split("/")[2], []).append(name)
        return found

    def _names(self, kind: Kind, id: str, prefix: str = "") -> list[str]:
        names = self._store.names(f"ledger/{kind}/{id}", suffix=".json")
        return [name for name in names if name.rsplit("/", 1)[1].startswith(prefix)]

    def _read(self, id: str, names: list[str], contents: Iterator[bytes]) -> Entry:
        """Return an entry.

        Args:
            contents: begins with the files that are wanted of it.
        """
        held = {name: next(contents) for name in _wanted(names)}
        with reading(f"{self._store.root}/{names[0].rsplit('/', 1)[0]}"):
            entry = self._assembled(id, held)
            _check(entry)
        return entry

    def _assembled(self, id: str, held: Mapping[str, bytes]) -> Entry:
        last = {name.rsplit("/", 1)[1]: name for name in held}

        def get(name: str) -> Record:
            return self._parsed(name, held[name])

        if _END in last:
            found = get(last[_END])
            epochs = {int(number): record for number, record in found["epochs"].items()}
            failures, pauses = (tuple(found.get(name, ())) for name in ("failures", "pauses"))
            return Entry(id, found["started"], found["attempts"], epochs, found["ended"], failures, pauses)

        def of(prefix: str) -> list[str]:
            return [last[name] for name in sorted((n for n in last if n.startswith(prefix)), key=_number)]

        starts, epochs = of("started-"), {_number(path): get(path) for path in of("epoch-")}
        started = get(starts[0]) if starts else {}
        failures, pauses = (tuple(map(get, of(prefix))) for prefix in ("failed-", "paused-"))
        # Nothing but a trial at a rung asks how far the last attempt was to go.
        until = get(starts[-1])["until"] if starts and pauses else None
        pauses = tuple(sorted(pauses, key=lambda pause: int(pause["epoch"])))
        return Entry(id, started, len(starts), epochs, None, failures, pauses, until)

    def _append(self, kind: Kind, id: str, prefix: str, record: Record) -> int:
        """Record something under the next number, from 1; return the number."""
        number = len(self._names(kind, id, prefix)) + 1
        while not self._put_new(f"ledger/{kind}/{id}/{prefix}{number:03d}.json", record):
            number += 1
        return number

    def _put_new(self, name: str, record: Record) -> bool:
        return self._store.put_new(name, json.dumps(record, sort_keys=True, allow_nan=True).encode())

    def _parsed(self, name: str, content: bytes) -> Record:
        try:
            return dict(json.loads(content))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"not a ledger record: {error}", where=self._store.path(name)) from None


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Raise a DataError where records lack something, or have it of another kind, within a `with`."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"not the records of a run: {error!r}"[:500], where=where) from None


def _wanted(names: list[str]) -> list[str]:
    """Return which files of an entry are read: its end, which holds all, or else what there is of it so far."""
    ends = [name for name in names if name.endswith(f"/{_END}")]
    return ends or [name for name in names if name.rsplit("/", 1)[1].startswith(_SO_FAR)]


def _number(name: str) -> int:
    """Return the number in the name of a record."""
    return int(name.rpartition("-")[2].removesuffix(".json"))


def _check(entry: Entry) -> None:
    """Raise TypeError or ValueError where an entry is not made of records, or of those of another run."""
    for record in (
        entry.started,
        *entry.epochs.values(),
        *entry.failures,
        *entry.pauses,
        *([] if entry.ended is None else [entry.ended]),
    ):
        if not isinstance(record, dict):
            raise TypeError(f"{record!r} is no record")
    own = entry.started.get("trial_id", entry.started.get("pretrain_id", entry.id))
    if own != entry.id:
        raise ValueError(f"records of {own!r} under {entry.id!r}")
    if not isinstance(entry.attempts, int):
        raise TypeError(f"{entry.attempts!r} is no number of attempts")
    if entry.ended is not None and not isinstance(entry.ended.get("state"), str | None):
        raise TypeError(f"{entry.ended['state']!r} is no state")
