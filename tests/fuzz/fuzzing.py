"""What all fuzz tests share: a case is carried out, timed, weighed and counted; it may end in a RaybdError alone."""

from __future__ import annotations

import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from raybd.errors import RaybdError

VALID = "valid"
FUZZ = 1000  # examples of the profile `fuzz`
TALLY: Counter[tuple[str, str]] = Counter()
_SEEN: set[tuple[str, int]] = set()
_LONGEST_MESSAGE = 120_000
_STATUS = Path("/proc/self/status")
Result = TypeVar("Result")


class Hang(BaseException):
    """A case that takes longer than its deadline. No Exception, so that no handler of the product swallows it."""


def fuzzed(share: int) -> settings:
    """Return settings for a test of `share` percent of the profile's examples: `fuzz` has 25 times as many."""
    default = settings.default
    assert default is not None
    return settings(
        max_examples=share * default.max_examples // 100,
        deadline=None,  # `case` has its own, of processor time
        derandomize=default.max_examples < FUZZ,
        suppress_health_check=list(HealthCheck),
    )


def case(
    kind: str, call: Callable[[], Result], *, given: object, seconds: float = 10, megabytes: int = 256
) -> Result | None:
    """Carry out one case: return what the call gives, None where it is refused as it should be.

    Args:
        given: what tells the case from others, for the count of different ones.
        seconds: of processor time; more is a hang.
        megabytes: that the process may grow by meanwhile.

    Errors: AssertionError where an error is not clear, or too much memory was taken; whatever else the call raises.
    """
    _SEEN.add((kind, hash(repr(given))))
    before = _reset_peak()
    try:
        with _deadline(seconds):
            found = call()
    except RaybdError as error:
        TALLY[kind, type(error).__name__] += 1
        check_message(error)
        found = None
    else:
        TALLY[kind, VALID] += 1
    grown = (_peak() - before) // 1024
    assert grown <= megabytes, f"{kind}: took {grown} MB"
    return found


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return bytes of which some are changed, left out, doubled, inserted or cut off, evenly over their length."""
    dice = random.Random(draw(st.integers(0, 2**32)))  # Hypothesis' own integers lie near the ends too often
    for _ in range(dice.choice([0, 1, 1, 2, 3, 4])):
        place, length = dice.randrange(len(content) + 1), dice.choice([1, 2, 4, 16, 64, 512])
        before, part, after = content[:place], content[place : place + length], content[place + length :]
        content = {
            "change": before + dice.randbytes(1) + content[place + 1 :],
            "flip": before + bytes(byte ^ 1 << dice.randrange(8) for byte in part[:1]) + content[place + 1 :],
            "drop": before + after,
            "double": before + part + part + after,
            "zero": before + bytes(len(part)) + after,
            "ones": before + b"\xff" * len(part) + after,
            "insert": before + dice.randbytes(length) + content[place:],
            "cut": before,
        }[dice.choice(["change", "change", "flip", "flip", "drop", "double", "zero", "ones", "insert", "cut"])]
    return content


def check_message(error: RaybdError) -> None:
    """Assert that an error says what and where, in not too many words."""
    text = str(error)
    assert error.what.strip(), "says not what"
    assert error.where.strip(), f"says not where: {text[:1000]}"
    assert len(text) <= _LONGEST_MESSAGE, f"{len(text)} characters: {text[:1000]}"
    assert "Traceback" not in text


def tally() -> Iterator[str]:
    """Yield lines: cases of each kind by outcome, and their number."""
    for kind in sorted({kind for kind, _ in TALLY}):
        ends = {end: count for (k, end), count in sorted(TALLY.items()) if k == kind}
        different = sum(k == kind for k, _ in _SEEN)
        parts = ", ".join(f"{count} {end}" for end, count in ends.items())
        yield f"{kind:<24} {sum(ends.values()):>6} cases, {different:>6} different: {parts}"
    yield f"{'all':<24} {TALLY.total():>6} cases, {len(_SEEN):>6} different"


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise Hang in a call that takes more processor time; one that waits for ever meets pytest's own limit."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _reset_peak() -> int:
    """Forget the largest size of this process so far; return the size that it has, kB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not say how much memory a process takes (no /proc/self/clear_refs)")
    return _peak()


def _peak() -> int:
    found = re.search(r"VmHWM:\s*(\d+)", _STATUS.read_text())
    assert found
    return int(found[1])
