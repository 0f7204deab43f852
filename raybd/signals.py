"""Ctrl-C, the notice of a spot machine (SIGTERM) and a closed terminal (SIGHUP) end a command in one way.

The first raises KeyboardInterrupt in the main thread, whatever it does; later ones change nothing. A process that does
not end by itself in time is ended: a spot machine goes 30 seconds after its notice or later.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
GRACE_SECONDS = 20.0
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _State:
    """What this process knows of signals: whether they interrupt it, and whether one has."""

    armed = False
    received = False
    from_within = False
    terminals: tuple[int, ...] = ()
    said = threading.Event()
    last_words: Callable[[], None] = staticmethod(lambda: None)


@contextmanager
def interruptible(last_words: Callable[[], None]) -> Iterator[None]:
    """Let signals interrupt a block as Ctrl-C does; outside the main thread, where none arrives, do nothing.

    Args:
        last_words: called once when the first signal comes, in a thread of its own: a second signal may still end this
            process before it comes to that by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    _State.armed, _State.received, _State.last_words = True, False, staticmethod(last_words)
    _State.said.clear()
    _State.terminals = tuple(stream for stream in (1, 2) if os.isatty(stream))
    arm()
    try:
        yield
    finally:
        _State.armed = False
        for number, handler in before.items():
            # Once one has come the process ends: none of those that follow may break into that, nor into Python's own
            # end, which takes every handler back but this one.
            signal.signal(number, signal.SIG_IGN if _State.received else handler)
        # Python ends by SIGINT, whatever its exit code, if the last text that it executed was interrupted, as those of
        # dataclasses are while modules are imported: this is one that was not.
        exec("")


def arm() -> None:
    """Take the signals of an interruptible block back from Ray, which takes them when it starts and when it ends."""
    if not _State.armed:
        return
    for number in _NUMBERS:
        # Under nohup a closed terminal is nothing to end for.
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def received() -> bool:
    """Say whether this process was interrupted; if so, its last words are said when this returns."""
    return _State.received and (_State.said.wait(timeout=GRACE_SECONDS) or True)


def interrupt() -> None:
    """End an interruptible block as a signal does."""
    if not _State.received:
        _State.received = True
        for target in (_say, _end):
            threading.Thread(target=target, daemon=True).start()
        raise KeyboardInterrupt


def interrupt_main() -> None:
    """Raise KeyboardInterrupt in the main thread, from another one: who waits there makes an error of it."""
    _State.from_within = True
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def end_main() -> None:
    """End an interruptible block from another thread, as the notice of a spot machine does; without one, do nothing."""
    if not _State.armed:  # the signal would end the process, whatever it does by now
        return
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _handle(number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT and _State.from_within:
        _State.from_within = False
        raise KeyboardInterrupt
    if number == signal.SIGHUP:
        # Nobody reads on, and to write to a terminal that is gone is an error. It is none any more by now, says isatty.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in _State.terminals:
            os.dup2(nowhere, stream)
        os.close(nowhere)
    interrupt()


def _say() -> None:
    try:
        _State.last_words()
    finally:
        _State.said.set()


def _end() -> None:
    """End this process where it does not end by itself."""
    time.sleep(GRACE_SECONDS)
    os._exit(INTERRUPTED)
