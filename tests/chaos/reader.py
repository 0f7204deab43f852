"""Reads a run directory all the while that a study runs and breaks: what it sees must be whole, and must stay.

Run as a module, in a process of its own, until its standard input ends; then it prints what it found as JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raybd import tables
from raybd.ledger import Kind, Ledger, State
from raybd.store import Store

_PAUSE = 0.3  # in seconds, but longer where to look takes long: the machine is for the study
_KEYS = {
    "pretrain_epochs": ("pretrain_id", "epoch"),
    "trials": ("trial_id",),
    "epochs": ("trial_id", "epoch", "split"),
}
# What differs between two runs of the same: in the ledger, and in the tables.
_TIMES = {*tables.TIMES, "attempt", "attempts"}


@dataclass
class Findings:
    """What a reader saw.

    Attributes:
        polls: how often everything was read.
        records: how many different records it saw: epochs and ends in the ledger, rows of tables.
        broken: what could not be read, or was not whole.
        lost: records that were there once, and then were not.
        changed: records whose numbers became others.
        again: records that were written anew with the same numbers: an epoch that was done twice.
        weightless: front points whose weights were not there.
    """

    polls: int = 0
    records: int = 0
    broken: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    weightless: list[str] = field(default_factory=list)


def numbers(record: Any) -> Any:
    """Return a record without what differs between two runs of the same."""
    if isinstance(record, Mapping):
        return {key: numbers(value) for key, value in record.items() if key not in _TIMES}
    return record


class Reader:
    """Polls a run directory and remembers every record as it first appeared."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._first: dict[str, Any] = {}
        self.found = Findings()

    def poll(self) -> None:
        """Read everything once."""
        now: dict[str, Any] = {}
        for step in (self._ledger, self._tables, self._parts, self._documents):
            try:
                now |= dict(step())
            except Exception as error:
                self.found.broken.append(f"{step.__name__.strip('_')}: {type(error).__name__}: {error}")
                return
        self._compare(now)
        self._weights()
        self.found.polls += 1

    def _ledger(self) -> Iterator[tuple[str, Any]]:
        """As `raybd status` reads it."""
        for kind in Kind:
            for entry in Ledger(self._store).entries(kind):
                for number, record in entry.epochs.items():
                    yield f"ledger {entry.id} epoch {number}", record
                if entry.ended is not None:
                    yield f"ledger {entry.id} end", entry.ended

    def _tables(self) -> Iterator[tuple[str, Any]]:
        for table in tables.SCHEMAS:
            rows = tables.read(self._store, table).to_pylist()
            for row in rows if table in _KEYS else ():
                keys = _KEYS[table]
                if row.get("state") == State.RUNNING:
                    continue  # it waits at a rung, or has gone on: its row will say more
                yield f"{table} {' '.join(str(row[key]) for key in keys)}", row

    def _parts(self) -> Iterator[tuple[str, Any]]:
        """With pyarrow alone, every file that is there."""
        for name in self._store.names("tables"):
            with self._store.fs.open_input_file(self._store.path(name)) as file:
                pq.ParquetFile(pa.BufferReader(file.read())).read().validate(full=True)
        yield from ()

    def _documents(self) -> Iterator[tuple[str, Any]]:
        for name, end in (("study.json", b"}"), ("report.html", b"</html>")):
            if self._store.exists(name) and not self._store.get(name).rstrip().endswith(end):
                raise ValueError(f"{name} has no end")
        yield from ()

    def _compare(self, now: dict[str, Any]) -> None:
        for name in self._first.keys() - now.keys():
            self.found.lost.append(f"{name}: {self._first.pop(name)}")
        for name, record in now.items():
            before = self._first.setdefault(name, record)
            if before == record or repr(before) == repr(record):  # NaN equals nothing
                continue
            same = repr(numbers(before)) == repr(numbers(record))
            (self.found.again if same else self.found.changed).append(f"{name}: {before} became {record}")
            self._first[name] = record
        self.found.records = len(self._first)

    def _weights(self) -> None:
        """A point may leave the front while we look: then the front that we read next has it no more."""
        missing = [name for name in self._on_front() if not self._store.exists(name)]
        still = self._on_front() if missing else set()
        self.found.weightless += [name for name in missing if name in still and not self._store.exists(name)]

    def _on_front(self) -> set[str]:
        return {name for name in tables.read(self._store, "fronts")["checkpoint"].to_pylist() if name}


def _watch(uri: str) -> None:
    reader, ended = Reader(Store(uri, patience=0)), threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    while not ended.is_set():
        began = time.monotonic()
        reader.poll()
        ended.wait(max(_PAUSE, 2 * (time.monotonic() - began)))
    reader.poll()
    sys.stdout.write(json.dumps(asdict(reader.found)))


if __name__ == "__main__":
    _watch(sys.argv[1])
