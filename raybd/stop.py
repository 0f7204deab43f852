"""Requests to stop a driver: objects in its run directory, so that whoever sees that can end it, wherever it runs.

One for each driver that is asked, which that one alone removes: a request to a job waits for its driver, whoever works
on the run directory until then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from raybd import signals
from raybd.errors import DataError, StorageError
from raybd.store import Store

log = logging.getLogger(__name__)

FOLDER = "stop"
_LOOK_SECONDS, _LOOK_SECONDS_BUCKET = 1.0, 10.0
_PATIENCE_SECONDS = 5.0


def ask(store: Store, whom: str) -> None:
    """Ask a driver to stop, as SIGTERM does.

    Args:
        whom: the nonce of its lock, or the id of a job whose driver is still to come. No other driver is concerned.
    """
    by = f"process {os.getpid()} on {socket.gethostname()}"
    store.put(_name(whom), json.dumps({"by": by}).encode())


def withdraw(store: Store, *whom: str) -> None:
    """Remove the requests to these, "" being nobody."""
    for name in filter(None, whom):
        store.delete(_name(name))
    if store.local:
        with contextlib.suppress(OSError):  # as long as others are asked
            os.rmdir(store.path(FOLDER))


@contextmanager
def obeyed(store: Store, *names: str) -> Iterator[None]:
    """Let a request end the block, which the main thread runs, in the one way in which signals do.

    Args:
        names: what the driver is called in requests, "" being no name.
    """
    store = Store(store.uri, patience=min(store.patience, _PATIENCE_SECONDS))
    done = threading.Event()

    def look() -> None:
        while True:
            # Storage that fails is met by whoever works with it.
            with contextlib.suppress(StorageError):
                by = next(filter(None, (_asked(store, name) for name in names)), "")
                # That it is over may have come while storage was asked.
                if by and not done.is_set():
                    log.warning("asked to stop by %s", by)
                    signals.end_main()
                    return
            if done.wait(_LOOK_SECONDS if store.local else _LOOK_SECONDS_BUCKET):
                return

    thread = threading.Thread(target=look, daemon=True)
    try:
        thread.start()  # a request that is there already may interrupt this
        yield
    finally:
        done.set()
        if thread.is_alive():
            thread.join(timeout=_PATIENCE_SECONDS)
        # Neither storage that fails, nor what others put in the place of requests, is an error of the block.
        with contextlib.suppress(StorageError, DataError):
            withdraw(store, *names)


def _asked(store: Store, whom: str) -> str:
    """Return who asks one to stop; "" where nobody does, or in no way that can be read."""
    try:
        return str(json.loads(store.get(_name(whom)))["by"]) if whom else ""
    except (DataError, ValueError, TypeError, KeyError, RecursionError):
        return ""


def _name(whom: str) -> str:
    return f"{FOLDER}/{whom}.json"
