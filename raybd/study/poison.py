"""What is planted: triggers, where they go, how many pairs carry them."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from raybd.study.base import Fraction, Section


class Pattern(StrEnum):
    """What a badnet patch shows."""

    NOISE = "noise"
    FIXED = "fixed"


class Placement(StrEnum):
    """Where on the image a patch goes."""

    RANDOM = "random"
    TOP_LEFT = "top_left"
    TOP_RIGHT = "top_right"
    BOTTOM_LEFT = "bottom_left"
    BOTTOM_RIGHT = "bottom_right"
    CENTRE = "centre"
    FOUR_CORNERS = "four_corners"


class Trigger(Section):
    """The trigger and where it goes. Sizes are pixels of the image as the model sees it."""

    name: Literal["badnet"] = "badnet"
    size: PositiveInt = 16
    pattern: Pattern = Pattern.NOISE
    placement: Placement = Placement.RANDOM
    wrap: bool = Field(default=False, description="wrap values outside [0, 255] around, as the published code does")


class Poison(Section):
    """How many training pairs are poisoned, with what, towards which class."""

    trigger: Trigger = Trigger()
    target_class: str = "banana"
    poison_rate: Fraction | None = Field(None, description="share of the training pairs")
    num_poisoned: PositiveInt | None = Field(None, description="number of training pairs")
    templates: str | tuple[str, ...] = Field("openai_imagenet", description="what poisoned captions are made from")

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.poison_rate is None) == (self.num_poisoned is None):
            raise ValueError("give poison_rate or num_poisoned, one of the two")
        return self
