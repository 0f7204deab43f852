"""Brace lists: `train-{000..009}.tar` for ten shards."""

from __future__ import annotations

import re

from braceexpand import braceexpand

from raybd.data import limits
from raybd.errors import DataError

_MAX_LENGTH = 4096


def expand(pattern: str, *, field_name: str) -> list[str]:
    """Return what a brace list stands for. Errors: DataError, before a list that is too long takes memory."""
    if len(pattern) > _MAX_LENGTH:
        raise DataError(f"a pattern of {len(pattern)} characters", where=field_name, fix="give several as a list")
    try:
        most = _most_names(pattern)
        if most > limits.MAX_SHARDS or most * len(pattern) > limits.MAX_SHARDS * limits.MAX_NAME:
            raise DataError(
                f"stands for more than {limits.MAX_SHARDS} shards: {pattern[:80]}",
                where=field_name,
                fix="give several patterns as a list",
            )
        return list(braceexpand(pattern))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a brace list: {error}", where=field_name, expected="train-{000..009}.tar") from None


def _most_names(pattern: str) -> int:
    """Return how many names a brace list stands for at most; where braces are nested they may be fewer."""
    most, open_braces = 1, list[tuple[int, int]]()  # where each starts, and commas since
    for place, mark in enumerate(pattern):
        if mark == "{":
            open_braces.append((place, 0))
        elif mark == "," and open_braces:
            open_braces[-1] = (open_braces[-1][0], open_braces[-1][1] + 1)
        elif mark == "}" and open_braces:
            start, commas = open_braces.pop()
            ends = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(\.\.-?\d+)?", pattern[start + 1 : place])
            most *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else commas + 1
    return most
