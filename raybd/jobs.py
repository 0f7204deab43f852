"""Detached runs: which job of Ray's was to drive a run directory, where, and how far it got: a record for each job."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from threading import Event

from raybd import signals
from raybd.errors import ClusterError, DataError, StorageError
from raybd.store import Store

FOLDER = "jobs"
# Ray gives up a job that has waited 15 minutes for its place, where its head was told of no other time
# (RAY_JOB_START_TIMEOUT_SECONDS); from its place to a driver that holds the run directory takes a minute or two.
BEGINS_WITHIN_MINUTES = 20
# What the driver of a job is told by its environment: the job's id, and the command that the user gave.
JOB, COMMAND = "RAYBD_JOB", "RAYBD_COMMAND"
# Shorter than a run's: at its end nobody waits long for a note, while the run directory is still held.
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """A job of Ray's that drives a run directory, or did.

    Attributes:
        id: what Ray's job API calls it.
        address: of the cluster's job API, as the user gave it.
        host: the machine that submitted it.
        submitted: when, in ISO form.
        began: when its driver held the run directory, "" as long as it has not.
        ended: when its driver ended, or the job without one, and how; "" as long as none has, and where it was killed.
        command: the one that submitted it, as the user gave it.
    """

    id: str
    address: str
    host: str
    submitted: str
    began: str = ""
    ended: str = ""
    command: str = ""

    @property
    def waits(self) -> bool:
        """Its driver is still to come, as far as is known."""
        return not self.began and not self.ended

    @property
    def overdue(self) -> bool:
        """Its driver has not come in `BEGINS_WITHIN_MINUTES`, by the clocks of here and of who submitted it."""
        try:
            waited = datetime.now(UTC) - datetime.fromisoformat(self.submitted)
        except (ValueError, TypeError):  # a record that is not ours, or in part
            return False
        return self.waits and waited > timedelta(minutes=BEGINS_WITHIN_MINUTES)


def own() -> str:
    """Return the id of the job that this process drives a run for; "" where it is none."""
    return os.environ.get(JOB, "")


def command() -> str:
    """Return the command that goes on with what this process does, as the user gave it."""
    return os.environ.get(COMMAND) or shlex.join(["raybd", *sys.argv[1:]])


def end_command(address: str, id: str) -> str:
    """Return the command that ends a job, also one that still waits for its driver."""
    return shlex.join(["ray", "job", "stop", "--address", address, id])


def look_command(address: str, id: str) -> str:
    """Return the command that says what Ray knows of a job."""
    return shlex.join(["ray", "job", "status", "--address", address, id])


def submitted(store: Store, id: str, *, address: str, command: str = "") -> None:
    """Record in a run directory that a job is to drive it, which a command of the user's submitted."""
    _put(store, Job(id, address, socket.gethostname(), _now(), command=command))


def forget(store: Store, id: str) -> None:
    """Remove the record of a job that no cluster took."""
    store.delete(_name(id))


def failed(store: Store, id: str, reason: str) -> None:
    """Record that a job has ended without a driver, if it had none."""
    if (found := read(store, id)) and found.waits:
        _put(store, replace(found, ended=f"{_now()}, before its driver began: {reason}"))


@contextmanager
def driven(store: Store, taken: Event | None = None) -> Iterator[None]:
    """Record, where this is the driver of a job, that it has begun its work, which the block is, and how that ends.

    Args:
        taken: set when another driver has taken the run directory over, which ends the block as Ctrl-C does.

    Errors: ClusterError where this is another folder than the one which the job was submitted for.
    """
    if not (id := own()):
        yield
        return
    found = read(store, id)
    if found is None:
        raise ClusterError(
            f"not the run directory that {id} was submitted with: that is a folder of another machine",
            where=store.uri,
            fix="give --run-dir a bucket, or a folder that this machine and all of the cluster mount",
        )
    _put(store, begun := replace(found, began=_now(), ended=""))
    how = "its work is done"
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt) or signals.received()
        how = "it was stopped" if interrupted else str(error).partition("\n")[0] or type(error).__name__
        if interrupted and taken is not None and taken.is_set():
            how = "another driver took the run directory over"
        raise
    finally:
        store = Store(store.uri, patience=min(store.patience, _PATIENCE_SECONDS))
        with contextlib.suppress(StorageError):
            _put(store, replace(begun, ended=f"{_now()}: {how}"))


def read(store: Store, id: str) -> Job | None:
    """Return what is recorded of a job; None where nothing is that can be read."""
    try:
        found = json.loads(store.get(_name(id)))
        return Job(**{field.name: str(found.get(field.name, "")) for field in fields(Job)})
    except (DataError, ValueError, AttributeError, RecursionError):
        return None


def last(store: Store) -> Job | None:
    """Return the job that was submitted last for a run directory; None where none was."""
    return max(recorded(store), key=lambda job: job.submitted, default=None)


def recorded(store: Store) -> list[Job]:
    """Return all jobs that were submitted for a run directory, but those whose record cannot be read."""
    ids = [name.rpartition("/")[2].removesuffix(".json") for name in store.names(FOLDER, suffix=".json")]
    return [job for id in ids if (job := read(store, id))]


def _put(store: Store, job: Job) -> None:
    store.put(_name(job.id), json.dumps(asdict(job)).encode())


def _name(id: str) -> str:
    return f"{FOLDER}/{id}.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
