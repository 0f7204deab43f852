"""Which recipe carries a cleaning method out."""

from __future__ import annotations

from collections.abc import Callable

from raybd.clean.cleanclip import CleanClip
from raybd.study import CleanSettings, Method
from raybd.train.recipe import Recipe

# Given a trial's settings and seed.
METHODS: dict[Method, Callable[[CleanSettings, int], Recipe]] = {
    Method.CLEANCLIP: lambda settings, seed: CleanClip(),
    Method.MMCL: lambda settings, seed: CleanClip(),
    Method.SSL: lambda settings, seed: CleanClip(),
}


def recipe(settings: CleanSettings, *, seed: int) -> Recipe:
    """Return the recipe of a trial's method."""
    return METHODS[settings.method](settings, seed)
