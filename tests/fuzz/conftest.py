"""Profiles of the fuzz tests, and the tally of their cases at the end of a session.

As a part of all tests each is a fixed draw of cases; `--hypothesis-profile=fuzz` (`make fuzz`) draws 25 times as many,
others at each call.
"""

from __future__ import annotations

import fuzzing
import pytest
from hypothesis import settings

settings.register_profile("fuzz", max_examples=fuzzing.FUZZ, derandomize=False, print_blob=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many cases there were of each kind, and how they ended."""
    if fuzzing.TALLY:
        terminalreporter.section("fuzz cases by kind and outcome")
        for line in fuzzing.tally():
            terminalreporter.write_line(line)
