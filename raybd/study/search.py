"""The search: how settings are drawn, from what space, and which epoch stands for a trial."""

from __future__ import annotations

import itertools
from enum import StrEnum
from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from raybd import space as search_space
from raybd.errors import Misfit
from raybd.space import Range
from raybd.study.base import Section
from raybd.study.cleaning import Clean, searchable


class Sampler(StrEnum):
    """How the search draws settings."""

    TPE = "tpe"
    NSGA2 = "nsga2"
    RANDOM = "random"
    GRID = "grid"


class Tell(StrEnum):
    """Which epoch of a trial stands for it before Optuna."""

    LARGEST_AREA = "largest_area"
    LAST_EPOCH = "last_epoch"


class Failure(StrEnum):
    """Why a trial failed: `error_type` in the table of trials."""

    DIED = "died"  # its process was killed or crashed
    HUNG = "hung"  # ended after `hang_minutes` without a finished step
    OUT_OF_MEMORY = "out_of_memory"  # of the host or the GPU
    NON_FINITE = "non_finite"  # its loss is not finite
    ERROR = "error"  # any other error within it
    SETTINGS = "settings"  # its settings do not fit together: it could not start


def _may_pass(kind: Failure) -> Failure:
    if kind is Failure.SETTINGS:
        raise ValueError("settings that do not fit together never will")
    return kind


def _known_setting(name: str) -> str:
    if name not in searchable():
        raise ValueError(f"{name!r} is not a setting of cleaning: one of {', '.join(searchable())}")
    return name


Searched = Annotated[str, AfterValidator(_known_setting)]


def _range_fault(name: str, found: Range) -> str:
    """Return why a searched setting cannot have the values that its range has, "" if it can."""
    kind = searchable()[name]
    values = [v for v in (found.low, found.high, *(found.choices or ())) if v is not None]
    if kind is int and any(not isinstance(v, int) for v in (*values, found.step or 1)):
        return "takes whole numbers"
    if kind is float and any(isinstance(v, str) for v in values):
        return "takes numbers"
    if kind is str and found.choices is None:
        return "takes names, give them as choices"
    for value in values:
        try:
            Clean().settings({name: value})
        except ValidationError as error:
            return f"cannot be {value}: {error.errors()[0]['msg']}"
    return ""


class Stopping(Section):
    """Which trials end before their last epoch. Off unless `rungs` or `collapse_below` is given."""

    rungs: tuple[PositiveInt, ...] = Field(
        (), max_length=20, description="epochs after which trials wait for all others, are ranked, and a share goes on"
    )
    keep: float = Field(0.5, gt=0, lt=1, description="share of the trials at a rung that goes on")
    collapse_below: float = Field(
        0.0, ge=0, lt=1, description="a trial with less than this share of the poisoned model's accuracy ends; 0: never"
    )
    grace_epochs: PositiveInt = Field(1, description="the first epoch after which accuracy counts as collapsed")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if any(later <= earlier for earlier, later in itertools.pairwise(self.rungs)):
            raise Misfit([(("rungs",), f"{list(self.rungs)} must rise")])
        return self


class Search(Section):
    """Which cleanings are tried."""

    num_trials: PositiveInt = Field(20, description="trials for each pretrain objective")
    sampler: Sampler = Field(Sampler.TPE, description="how the search draws settings")
    startup_trials: NonNegativeInt = Field(10, description="trials that tpe draws at random before it models")
    population: PositiveInt = Field(50, description="population of nsga2")
    space: dict[Searched, Range] = Field(
        default_factory=dict, description="what is searched: settings of `clean`, by dotted name, each with its range"
    )
    known: tuple[dict[Searched, search_space.Value], ...] = Field((), description="settings to try first")
    tell: Tell = Field(Tell.LARGEST_AREA, description="which epoch stands for a trial before Optuna")
    stopping: Stopping = Stopping()
    retries: NonNegativeInt = Field(
        1,
        description="how often a trial that failed is tried again, from its last finished epoch; counted anew after "
        "each epoch, and the death of a whole machine does not count",
    )
    retry_on: tuple[Annotated[Failure, AfterValidator(_may_pass)], ...] = Field(
        (Failure.DIED, Failure.HUNG, Failure.OUT_OF_MEMORY, Failure.ERROR),
        description="which failures are tried again: a loss that is not finite would be so again",
    )
    max_failed: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of all planned trials above which failures (five at least) end the search; 1: never",
    )
    hang_minutes: NonNegativeFloat = Field(
        30.0,
        description="a trial that finishes no step, batch or epoch for so long is ended, with a traceback; 0: never",
    )

    @property
    def trials_each(self) -> int:
        """Trials for each pretrain objective: `num_trials`, or fewer where a grid has no more points."""
        if self.sampler is not Sampler.GRID:
            return self.num_trials
        return min(self.num_trials, len(search_space.grid(self.space)) + len(self.known))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            search_space.ordered(self.space)
            if self.sampler is Sampler.GRID:
                search_space.grid(self.space)
        except Misfit as error:
            raise error.below("space") from None
        faults: list[tuple[tuple[str | int, ...], str]] = [
            (("space", name), fault) for name, found in self.space.items() if (fault := _range_fault(name, found))
        ]
        for i, point in enumerate(self.known):
            for name, value in point.items():
                if name not in self.space:
                    faults.append((("known", i, name), "is not in the space"))
                    continue
                found = self.space[name]
                whole = searchable()[name] is not int or isinstance(value, int)
                if not (whole and found.contains(value)):
                    faults.append((("known", i, name), f"cannot be {value}: {search_space.describe(found)}"))
        if faults:
            raise Misfit(faults)
        return self
