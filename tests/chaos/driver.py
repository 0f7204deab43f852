"""The command that is run and run again: `raybd run` in a process of its own."""

from __future__ import annotations

import logging
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger("chaos")

COMPLETE, ENVIRONMENT, INTERRUPTED = 0, 3, 130
TERMINATED_WITHIN = 30.0  # a spot notice leaves no more, in seconds
HEADLESS_ENDS_WITHIN = 90.0
GIVES_UP_WITHIN = 180.0


@dataclass
class Driver:
    """`raybd run STUDY --run-dir … --address …`, called as often as it takes.

    Args:
        arguments: all of the command's but its name.
        log: file that takes what it prints, over all calls.

    Attributes:
        calls: how often it was called.
        wrong_ends: what it did at its ends that it should not have done.
    """

    arguments: list[str]
    environment: dict[str, str]
    log: Path
    calls: int = 0
    wrong_ends: list[str] = field(default_factory=list)
    _offset: int = 0

    def start(self) -> None:
        """Call the command (again)."""
        self.calls += 1
        with open(self.log, "ab") as output:
            self._offset = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raybd", *self.arguments],
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # A shell's background job ignores Ctrl-C, and so would its children.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.poll()

    def printed(self) -> str:
        """Return what this call has printed so far."""
        return self.log.read_bytes()[self._offset :].decode(errors="replace")

    def kill(self) -> bool:
        """Kill it; say whether it was alive."""
        if self.code is not None:
            return False
        self.process.kill()
        self.process.wait()
        return True

    def terminate(self) -> bool:
        """Send SIGTERM and see that it ends as promised: in time, with code 130 and the command that goes on."""
        if self.code is not None:
            return False
        self.process.terminate()
        began = time.monotonic()
        code = self._wait(TERMINATED_WITHIN)
        resume = shlex.join(["raybd", *self.arguments])
        if code is None:
            self._wrong(f"SIGTERM: still running after {TERMINATED_WITHIN:.0f} s")
            self.kill()
        elif code == -signal.SIGTERM and "loading torch" not in self.printed():
            pass  # it had not come as far as to run Python of ours
        elif code not in (INTERRUPTED, COMPLETE):
            self._wrong(f"SIGTERM: exit code {code} after {time.monotonic() - began:.1f} s")
        elif code == INTERRUPTED and resume not in self.printed():
            self._wrong(f"SIGTERM: the command that goes on is not printed: {resume}")
        return True

    def end_without_head(self) -> None:
        """Wait for it to notice that its cluster is gone; end it if it does not."""
        if self._wait(HEADLESS_ENDS_WITHIN) is None:
            self.kill()
        elif self.code == COMPLETE and "report: " not in self.printed():
            self._wrong("head killed: exit code 0 without a report")

    def end_without_disk(self, hold: Callable[[], None]) -> None:
        """Wait for it to give up; a disk that stays full is the environment's fault.

        Args:
            hold: called all the while: it keeps the disk full.
        """
        code, deadline = None, time.monotonic() + GIVES_UP_WITHIN
        while code is None and time.monotonic() < deadline:
            hold()
            code = self._wait(0.2)
        if code is None:
            self._wrong(f"disk full: still running after {GIVES_UP_WITHIN:.0f} s")
            self.kill()
        elif code not in (ENVIRONMENT, COMPLETE):
            self._wrong(f"disk full: exit code {code}")

    def ended_by_itself(self) -> None:
        """Note that it ended although nothing that happened should have ended it."""
        self._wrong(f"ended by itself: exit code {self.code}")

    def _wait(self, seconds: float) -> int | None:
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None

    def _wrong(self, what: str) -> None:
        lines = self.printed().strip().splitlines()[-12:]
        self.wrong_ends.append("\n    ".join([what, *lines]))
        log.error(self.wrong_ends[-1])
