"""Requests to stop a driver: an object in its run directory, so that whoever sees that can end it, wherever it runs."""

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

NAME = "stop.json"
_LOOK_SECONDS, _LOOK_SECONDS_BUCKET = 1.0, 10.0
_PATIENCE_SECONDS = 5.0


def ask(store: Store, whom: str) -> None:
    """Ask a driver to stop, as SIGTERM does.

    Args:
        whom: the nonce of its lock, or the id of a job whose driver is still to come. No other driver is concerned.
    """
    by = f"process {os.getpid()} on {socket.gethostname()}"
    store.put(NAME, json.dumps({"whom": whom, "by": by}).encode())


def withdraw(store: Store, *whom: str) -> None:
    """Remove a request to one of these."""
    asked = _asked(store)[0]
    if asked and asked in whom:
        store.delete(NAME)


@contextmanager
def obeyed(store: Store, *names: str) -> Iterator[None]:
    """Let a request end the block, which the main thread runs, in the one way in which signals do.

    Args:
        names: what the driver is called in requests, "" being no name. What others were asked is removed.
    """
    store = Store(store.uri, patience=min(store.patience, _PATIENCE_SECONDS))
    done = threading.Event()

    def look() -> None:
        while True:
            # Storage that fails is met by whoever works with it.
            with contextlib.suppress(StorageError):
                whom, by = _asked(store)
                if whom and whom in names:
                    log.warning("asked to stop by %s", by)
                    signals.end_main()
                    return
                if whom:
                    store.delete(NAME)
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
        with contextlib.suppress(StorageError):
            withdraw(store, *names)


def _asked(store: Store) -> tuple[str, str]:
    """Return whom a request concerns and who made it; empty texts where there is none, or none that can be read."""
    try:
        found = json.loads(store.get(NAME))
        return str(found["whom"]), str(found["by"])
    except (DataError, ValueError, TypeError, KeyError, RecursionError):
        return "", ""
