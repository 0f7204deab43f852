"""What the trials of test_search_faults.py do, in Ray's processes: each of these loads this file, and no more."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raybd.assignment import Assignment, Notify, done_already, start_record
from raybd.clean.actor import CleanTrial
from raybd.errors import StorageError, StudyError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.store import Store
from raybd.study import Study

HALF = {"n_clean": 10, "correct_clean": 5, "n_triggered": 10, "hit_target": 2, "correct_triggered": 0}


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


def sabotaged(study: Study, store: Store, task: Assignment, notify: Notify) -> Entry:
    """Train, but in its first attempt number 2 is killed in its second epoch, and 3 stops for ever in its first."""
    first = store.names(f"ledger/trials/{task.trial_id}") == []

    def and_then(epoch: int, record: dict[str, Any]) -> None:
        notify(epoch, record)
        due = {(2, 1): signal.SIGKILL, (3, 0): signal.SIGSTOP}.get((task.number, epoch))
        if first and due:
            # In the midst of the epoch, not within this call.
            threading.Timer(0.1, os.kill, (os.getpid(), due)).start()

    return CleanTrial(threads=1, use_gpu=False)(study, store, task, and_then)
