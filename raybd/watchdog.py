"""Ends a process that hangs: one beside it, which listens for signs of life, notes where it hung, and kills it.

A thread could do this only while the interpreter lets it run: a process that holds its lock, or is stopped, has none.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from raybd import pulse

if TYPE_CHECKING:
    from raybd.ledger import Kind
    from raybd.store import Store

log = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0  # how often the watching process sees whether the watched one is still its parent
_DUMP_SECONDS = 3.0  # how long a traceback may take
_NOTE_SECONDS = 60  # how long the storage may take for it


class Watchdog:
    """Watches over this process for the length of a `with`: without a beat for too long it is noted, then killed.

    What was noted is a failed attempt, with the traceback of every thread.

    Args:
        kind, id: the entry of the ledger that this process works on.
        part: which of several processes that do.
        seconds: without a beat; 0 watches nothing.
    """

    def __init__(self, store: Store, kind: Kind, id: str, *, seconds: float, part: str = "") -> None:
        self._store, self._kind, self._id, self._part, self._seconds = store, kind, id, part, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._dump: IO[bytes] | None = None
        self._pipe, self._last, self._pid = -1, 0.0, os.getpid()

    def __enter__(self) -> Self:
        if not self._seconds:
            return self
        self._dump = tempfile.NamedTemporaryFile(prefix="raybd-hang-")
        # Written by the signal's handler in C, whoever holds the interpreter.
        faulthandler.register(signal.SIGUSR2, file=self._dump, all_threads=True, chain=False)
        arguments = [str(self._seconds), str(self._pid), self._dump.name]
        arguments += [self._store.uri, self._kind, self._id, self._part]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            stdin=subprocess.PIPE,
            # As this process sees them: Ray may have put the code elsewhere than the environment says.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)
        pulse.listen(self._beat)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        pulse.listen(None)
        process, self._process = self._process, None
        if process is not None and self._dump is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            faulthandler.unregister(signal.SIGUSR2)
            self._dump.close()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Beat for the length of a `with` that waits for another process: as long as this one could go on at once."""
        if self._process is None:
            yield
            return
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self._often):
                self._beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._beat()

    @property
    def _often(self) -> float:
        return min(1.0, self._seconds / 10)

    def _beat(self) -> None:
        now = time.monotonic()
        # A few in the time that may pass are enough; children that were forked are not watched.
        if self._process is None or now - self._last < self._often / 2 or os.getpid() != self._pid:
            return
        self._last = now
        with contextlib.suppress(BlockingIOError):
            try:
                os.write(self._pipe, b".")
            except BrokenPipeError:
                log.warning("%s is no longer watched: the watching process is gone", self._id)
                self._close()


def _hangs(pid: int, *, seconds: float) -> bool:
    """Wait until a parent has given no sign of life on standard input for so long; False when it is gone or done."""
    waited = 0.0
    while os.getppid() == pid:
        asked = min(seconds - waited, _LOOK_SECONDS)
        began = time.monotonic()
        ready, _, _ = select.select([0], [], [], asked)
        if ready:
            if not os.read(0, 4096):
                return False
            waited = 0.0
            continue
        # No more than was asked for: a machine that slept, or had no time for either process, proves nothing.
        waited += min(time.monotonic() - began, asked)
        if waited >= seconds:
            return True
    return False


def _traceback(pid: int, dump: str) -> str:
    """Have a process write its traceback, and return it."""
    os.kill(pid, signal.SIGUSR2)
    os.kill(pid, signal.SIGCONT)  # one that was stopped takes no signal before
    size, deadline = -1, time.monotonic() + _DUMP_SECONDS
    while time.monotonic() < deadline and not 0 < size == os.path.getsize(dump):
        size = os.path.getsize(dump)
        time.sleep(0.2)
    with open(dump, encoding="utf-8", errors="replace") as file:
        return file.read() or "no traceback: the process took no signal"


def main(arguments: list[str]) -> None:
    """Watch over the parent process until it is done, gone, or ended here."""
    seconds, pid, (dump, uri, kind, id, part) = float(arguments[0]), int(arguments[1]), arguments[2:]
    # Ctrl-C and the like are for the driver to answer; this process ends with its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not _hangs(pid, seconds=seconds):
        return
    try:
        # Slow to import, and seldom needed.
        from raybd import failures
        from raybd.ledger import Kind
        from raybd.store import Store
        from raybd.study import Failure

        # A storage that hangs as well must not save the process.
        signal.signal(signal.SIGALRM, lambda *_: sys.exit("the storage takes no note of a process that hung"))
        signal.alarm(_NOTE_SECONDS)
        message = f"no finished step, batch or epoch for {seconds / 60:g} minutes"
        trace = _traceback(pid, dump)
        failures.note(Store(uri), id, Failure.HUNG, message, trace=trace, of=Kind(kind), part=part)
    finally:
        if os.getppid() == pid:
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
