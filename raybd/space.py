"""Search spaces: ranges of cleaning settings, as plain data; the sampler that draws from them lives elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raybd.errors import Misfit

Value = float | int | str
_MAX_GRID = 100_000


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


class Range(BaseModel):
    """The values that one searched setting may take.

    Either `low` and `high` (with `log`, and `step` to walk in steps), or `choices`. `when` makes the setting
    conditional: it is drawn only if each setting named there has one of the values given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float | int | None = Field(None, description="smallest value")
    high: float | int | None = Field(None, description="largest value, included")
    log: bool = Field(default=False, description="draw uniformly in the logarithm")
    step: float | int | None = Field(None, description="distance between neighbouring values")
    choices: tuple[Value, ...] | None = Field(None, description="the values themselves")
    when: dict[str, Value | tuple[Value, ...]] = Field(
        default_factory=dict, description="setting: value(s) it must have"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.step is not None or self.log:
                raise ValueError("choices stand alone: leave out low, high, log and step")
            if not self.choices:
                raise ValueError("choices is empty: give at least one value")
            if len(set(self.choices)) != len(self.choices):
                raise ValueError("choices repeats a value")
            if not all(isinstance(value, str) or _finite(value) for value in self.choices):
                raise ValueError("choices must be finite")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        if not (_finite(self.low) and _finite(self.high)):
            raise ValueError("low and high must be finite")
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}: swap them")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low > 0, got {self.low}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        if self.step is not None and not (_finite(self.step) and self.step > 0):
            raise ValueError(f"step must be positive and finite, got {self.step}")
        return self

    def grid(self) -> list[Value]:
        """Return every value, for ranges that have finitely many; ValueError says why where there are not."""
        if self.choices is not None:
            return list(self.choices)
        assert self.low is not None
        assert self.high is not None
        integer = isinstance(self.low, int) and isinstance(self.high, int)
        if self.step is None and not integer:
            raise ValueError("a grid needs choices, or low and high with step")
        if self.log:
            raise ValueError("a grid needs choices instead of a log range")
        step = self.step if self.step is not None else 1
        steps = (self.high - self.low) / step
        if steps >= _MAX_GRID:
            raise ValueError(f"a grid of more than {_MAX_GRID} values: make step larger")
        count = math.floor(steps + 1e-9) + 1
        if isinstance(self.low, int) and isinstance(step, int):
            return [self.low + i * step for i in range(count)]
        # In decimals, as Optuna counts: in binary 0.1 + 2 * 0.1 is above 0.3.
        return [float(Decimal(str(self.low)) + i * Decimal(str(step))) for i in range(count)]

    def contains(self, value: Value) -> bool:
        """Say whether the setting may have a value."""
        if self.choices is not None:
            return value in self.choices
        assert self.low is not None
        assert self.high is not None
        if isinstance(value, str) or not self.low <= value <= self.high:
            return False
        place = (value - self.low) / self.step if self.step is not None else 0
        # Of infinitely many steps there is none that a value would lie beside.
        return not math.isfinite(place) or abs(place - round(place)) < 1e-8

    def active(self, params: Mapping[str, Value]) -> bool:
        """Say whether the setting takes part, given the settings drawn before it."""
        for name, wanted in self.when.items():
            allowed = wanted if isinstance(wanted, tuple) else (wanted,)
            if params.get(name) not in allowed:
                return False
        return True


Space = dict[str, Range]


def ordered(space: Space) -> list[tuple[str, Range]]:
    """Return the ranges, each after those that its `when` names; Misfit on an unknown one or a ring."""
    done: dict[str, Range] = {}
    left = dict(space)
    while left:
        ready = [name for name, found in left.items() if all(other in done for other in found.when)]
        if not ready:
            name, found = next(iter(left.items()))
            missing = sorted(set(found.when) - set(space))
            reason = f"{missing[0]!r}, which is not searched" if missing else "a setting that depends on it in turn"
            raise Misfit([((name,), f"`when` names {reason}")])
        for name in ready:
            done[name] = left.pop(name)
    return list(done.items())


def grid(space: Space) -> list[dict[str, Value]]:
    """Return every combination once, conditional settings only where active; the first setting varies slowest.

    Errors: Misfit where they are not finitely many, or too many.
    """
    points: list[dict[str, Value]] = [{}]
    for name, found in ordered(space):
        try:
            values = found.grid()
        except ValueError as error:
            raise Misfit([((name,), str(error))]) from None
        if len(points) * len(values) > _MAX_GRID:
            raise Misfit([((), f"a grid of more than {_MAX_GRID} combinations")])
        points = list(
            itertools.chain.from_iterable(
                [{**point, name: value} for value in values] if found.active(point) else [point] for point in points
            )
        )
    return points


def describe(found: Range) -> str:
    """Return one line for a table: `1e-05 … 0.001 (log)` or `1, 2, 4`."""
    if found.choices is not None:
        return ", ".join(str(value) for value in found.choices)
    extra = " (log)" if found.log else f" (step {found.step})" if found.step is not None else ""
    return f"{found.low} … {found.high}{extra}"
