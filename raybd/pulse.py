"""Signs of life of this process: whatever works for long calls `beat` at each step, and a watch may listen."""

from __future__ import annotations

from collections.abc import Callable

_listener: Callable[[], None] | None = None


def beat() -> None:
    """Say that this process has got on: a training step, a batch evaluated, a sample read."""
    if _listener is not None:
        _listener()


def listen(listener: Callable[[], None] | None) -> None:
    """Have a function called at each beat, in place of the one before; None for nobody."""
    global _listener
    _listener = listener
