"""Every place of a cluster file, whatever it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raybd.study.mistakes import Place


def walk(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any, Any]]:
    """Yield place, key and value of all that is below a value; keys are as YAML has them, of a list numbers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        at = (*place, key if isinstance(value, list) else str(key))
        yield at, key, inner
        yield from walk(inner, at)
