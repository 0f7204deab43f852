"""One driver for each run directory: two that write into one would undo each other's work.

On a local filesystem the kernel keeps the lock and frees it when the driver dies. A bucket has no locks: there an
object says who drives and is renewed all the while; one that is not renewed any more is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raybd import jobs, signals, stop
from raybd.errors import DataError, LockedError, StorageError
from raybd.store import Store

NAME = "driver.lock"
_RENEW_SECONDS, _STALE_SECONDS, _SETTLE_SECONDS = 20.0, 120.0, 2.0
# Shorter than a run's: at its end nobody waits long for a lock to be given back.
_LOCK_PATIENCE_SECONDS = 5.0
_LOOK_SECONDS = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def only_driver(store: Store) -> Iterator[None]:
    """Hold the lock of a run directory for the length of a `with`, which a request to stop ends as a signal does.

    Errors: LockedError, at once, where another driver holds it, and names that one; LockedError out of the block where
        another driver took a bucket over, because this one had been silent for two minutes; as of `jobs.driven`.
    """
    own = _self()
    held = _local(store, own) if store.local else _renewed(store, own)
    with held as taken, jobs.driven(store, taken), stop.obeyed(store, own["nonce"], own["job"]):
        yield


def holder(store: Store) -> dict[str, Any] | None:
    """Return what the driver of a run directory says of itself, see `described`; None where there is none.

    It is empty of one that is just starting.
    """
    if store.local and store.patiently("look at", NAME, lambda: _is_free(Path(store.path(NAME)))):
        return None
    found = _read(store)
    if store.local and "renewed" not in found:
        return found
    silent = time.time() - found.get("renewed", 0.0) > _STALE_SECONDS
    return None if not found or silent or _dead(found) else found


def described(holder: dict[str, Any]) -> str:
    """Return who drives a run directory, in words."""
    if not holder:
        return "one that is just starting"
    job = f", as job {holder['job']}" if holder.get("job") else ""
    return f"process {holder['pid']} on {holder['host']}{job}, since {holder['started']}: {holder['command']}"


def _self() -> dict[str, Any]:
    """Return who this driver is."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": jobs.command(),
        "job": jobs.own(),
        "nonce": uuid.uuid4().hex,
    }


def locked(store: Store, holder: dict[str, Any], fix: str) -> LockedError:
    """Return the error of who finds a run directory held, which names the holder."""
    return LockedError(f"another driver works on this run directory: {described(holder)}", where=store.uri, fix=fix)


def _parsed(content: bytes) -> dict[str, Any]:
    """Return what a lock says of its holder; nothing where it is empty, or not whole."""
    try:
        found = json.loads(content)
        if "renewed" in found:
            found["renewed"] = float(found["renewed"])
        return {**found, "pid": int(found["pid"])} if {"host", "pid", "started", "command"} <= set(found) else {}
    except (ValueError, TypeError, OverflowError, RecursionError):
        return {}


@contextmanager
def _local(store: Store, own: dict[str, Any]) -> Iterator[threading.Event]:
    """Hold a lock of the kernel's on a file, which is removed afterwards; so is a folder that stayed empty.

    Yields an event as `_renewed` does.
    """
    path, root = Path(store.path(NAME)), Path(store.root)
    new = not root.exists()
    try:
        file = store.patiently("make", NAME, lambda: _acquire(path), answers=(BlockingIOError,))
    except BlockingIOError:
        holder = {}
        with contextlib.suppress(FileNotFoundError):
            holder = _parsed(path.read_bytes())
        raise locked(store, holder, fix="wait for it, stop it, or give another --run-dir") from None
    if file is None:
        with _renewed(store, own) as taken:
            yield taken
        return
    try:
        # What it says is for people: the lock is held without it too, on a full disk for instance.
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.write(file, json.dumps(own).encode())
        yield threading.Event()  # the kernel takes no lock away
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(file)
        if new:
            with contextlib.suppress(OSError):
                root.rmdir()


def _is_free(path: Path) -> bool:
    """Say whether the kernel knows of nobody who holds a lock's file; False where it keeps no locks."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (*_NO_LOCKS, errno.EWOULDBLOCK):
            raise
        return False
    finally:
        os.close(file)
    return True


def _acquire(path: Path) -> int | None:
    """Return the locked file; None where the filesystem has no locks. Errors: BlockingIOError where it is taken."""
    until = time.monotonic() + _LOOK_SECONDS
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file after it was opened here: then this lock is of nothing.
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            # Who only looks whether a driver has it holds it for an instant.
            if time.monotonic() > until:
                os.close(file)
                raise
            time.sleep(_LOOK_SECONDS / 10)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                raise
            # One with content is the object by which another driver holds this directory.
            if os.fstat(file).st_size == 0:
                path.unlink(missing_ok=True)
            os.close(file)
            return None
        os.close(file)


@contextmanager
def _renewed(store: Store, own: dict[str, Any]) -> Iterator[threading.Event]:
    """Hold an object that says who drives, and renew it all the while.

    Yields an event, set when another driver has taken it over; then the block is interrupted.
    """
    patient, store = store, Store(store.uri, patience=min(store.patience, _LOCK_PATIENCE_SECONDS))
    own = {**own, "beat": 0}
    _wait_for_silence(patient)
    _beat(patient, own)
    # Of two that came at the same moment the one that wrote last has it.
    time.sleep(_SETTLE_SECONDS)
    if (found := _read(patient)).get("nonce") != own["nonce"]:
        raise locked(store, found, fix="wait for it, stop it, or give another --run-dir")
    over, taken = threading.Event(), threading.Event()

    def renew() -> None:
        while not over.wait(_RENEW_SECONDS):
            # A bucket that does not answer for a while is met by whoever works with it.
            with contextlib.suppress(StorageError):
                if _read(store).get("nonce") != own["nonce"]:
                    taken.set()
                    signals.interrupt_main()
                    return
                own["beat"] += 1
                _beat(store, own)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield taken
    except KeyboardInterrupt:
        if not taken.is_set():
            raise
        raise locked(store, _read(store), fix="leave it to that one: this one was silent for too long") from None
    finally:
        over.set()
        thread.join(timeout=_LOCK_PATIENCE_SECONDS)
        with contextlib.suppress(StorageError):
            if _read(store).get("nonce") == own["nonce"]:
                store.delete(NAME)


def _wait_for_silence(store: Store) -> None:
    """Return where nobody drives. Errors: LockedError where somebody does: says so by the clock, or by a new beat."""
    found = _read(store)
    if not found or _dead(found):
        return
    if time.time() - found.get("renewed", 0.0) > _STALE_SECONDS:
        # Clocks may differ: who drives renews the object while we look.
        time.sleep(2 * _RENEW_SECONDS)
        if _read(store) == found:
            return
    raise locked(
        store,
        found,
        fix=f"wait for it, stop it, or give another --run-dir; if it died, try again in {_STALE_SECONDS:.0f} seconds",
    )


def _dead(holder: dict[str, Any]) -> bool:
    """Say whether a holder was a process of this machine and is no more."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _beat(store: Store, own: dict[str, Any]) -> None:
    store.put(NAME, json.dumps({**own, "renewed": time.time()}).encode())


def _read(store: Store) -> dict[str, Any]:
    try:
        return _parsed(store.get(NAME))
    except DataError:
        return {}
