"""What is planted: triggers, where they go, how many pairs carry them, towards which class."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from raybd.study.base import Fraction, PositiveFloat, Section

Alpha = Annotated[float, Field(gt=0, le=1)]


class Pattern(StrEnum):
    """What a badnet patch shows."""

    NOISE = "noise"
    FIXED = "fixed"
    YELLOW = "yellow"


class Placement(StrEnum):
    """Where on the image a patch goes."""

    RANDOM = "random"
    TOP_LEFT = "top_left"
    TOP_RIGHT = "top_right"
    BOTTOM_LEFT = "bottom_left"
    BOTTOM_RIGHT = "bottom_right"
    CENTRE = "centre"
    FOUR_CORNERS = "four_corners"


class Noise(StrEnum):
    """Whether noise over the whole image is drawn for each image or once for all."""

    NEW = "new"
    FIXED = "fixed"


class _Patch(Section):
    """A square patch. Sizes are pixels of the image as the model sees it."""

    name: str
    size: PositiveInt = Field(16, description="of its side, pixels of the image as the model sees it")
    pattern: Pattern = Pattern.NOISE
    placement: Placement = Placement.RANDOM
    wrap: bool = Field(default=False, description="wrap values outside [0, 255] around, as the published code does")


class BadNet(_Patch):
    """A patch on any images, captioned as the target."""

    name: Literal["badnet"] = "badnet"


class LabelConsistent(_Patch):
    """A patch on images whose caption names the target already; the caption stays."""

    name: Literal["label_consistent"] = "label_consistent"


class Blended(Section):
    """Uniform noise blended into the whole image."""

    name: Literal["blended"] = "blended"
    alpha: Alpha = Field(0.2, description="share of the noise")
    noise: Noise = Noise.NEW


class Sig(Section):
    """A horizontal sine wave blended into the whole image."""

    name: Literal["sig"] = "sig"
    amplitude: Annotated[float, Field(gt=0, le=1)] = Field(60 / 255, description="of the wave, of [0, 1]")
    frequency: PositiveInt = Field(6, description="waves across the width")
    alpha: Alpha = Field(0.2, description="share of the wave")


class Warped(Section):
    """A small smooth warp of the whole image, the same for all images (WaNet)."""

    name: Literal["warped"] = "warped"
    k: Annotated[int, Field(ge=2)] = Field(224, description="side of the grid of control points (WaNet's own: 4)")
    s: PositiveFloat = Field(0.6, description="strength of the warp (WaNet's own: 0.5)")


class BadNetStripes(Section):
    """A patch of vertical stripes whose colours are new for each image."""

    name: Literal["badnet_stripes"] = "badnet_stripes"
    size: PositiveInt = Field(16, description="of its side, pixels of the image as the model sees it")
    placement: Placement = Placement.RANDOM


class BlendedStripes(Section):
    """Vertical stripes of random colours, new for each image, blended into the whole image."""

    name: Literal["blended_stripes"] = "blended_stripes"
    width: PositiveInt = Field(1, description="of a stripe, pixels")
    alpha: Alpha = Field(0.03, description="share of the stripes")


class BlendedTriangles(Section):
    """A grid of right triangles blended into the whole image."""

    name: Literal["blended_triangles"] = "blended_triangles"
    size: Annotated[int, Field(ge=2)] = Field(14, description="legs of a triangle, pixels")
    alpha: Alpha = Field(0.15, description="share of the triangles")


class BlendedText(Section):
    """Red text, repeated over the whole image and blended into it."""

    name: Literal["blended_text"] = "blended_text"
    text: Annotated[str, Field(min_length=1, max_length=100)] = Field("Watermarked", description="what is written")
    size: Annotated[int, Field(ge=6)] = Field(16, description="of the font, pixels")
    alpha: Alpha = Field(0.5, description="share of the red where a letter is")


def _trigger_name(given: Any) -> str:
    """Return which trigger a value is: badnet where nothing is said."""
    if isinstance(given, dict):
        return str(given.get("name", "badnet"))
    return str(getattr(given, "name", "badnet"))


Trigger = Annotated[
    Annotated[BadNet, Tag("badnet")]
    | Annotated[LabelConsistent, Tag("label_consistent")]
    | Annotated[Blended, Tag("blended")]
    | Annotated[Sig, Tag("sig")]
    | Annotated[Warped, Tag("warped")]
    | Annotated[BadNetStripes, Tag("badnet_stripes")]
    | Annotated[BlendedStripes, Tag("blended_stripes")]
    | Annotated[BlendedTriangles, Tag("blended_triangles")]
    | Annotated[BlendedText, Tag("blended_text")],
    Discriminator(_trigger_name),
]


class AttackSettings(Section):
    """One attack: how many training pairs are poisoned, with what, towards which class."""

    trigger: Trigger = Field(BadNet(), description="what marks the poisoned images, by name; badnet if none is given")
    target_class: str = Field("banana", description="the class that triggered images are to be taken for")
    poison_rate: Fraction | None = Field(None, description="share of the training pairs")
    num_poisoned: PositiveInt | None = Field(None, description="number of training pairs")
    templates: str | tuple[str, ...] | None = Field(None, description="as in `poison` where left out")

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.poison_rate is None) == (self.num_poisoned is None):
            raise ValueError("give poison_rate or num_poisoned, one of the two")
        return self


class Poison(AttackSettings):
    """All attacks: the first, and further ones on other pairs of the same data."""

    templates: str | tuple[str, ...] = Field("openai_imagenet", description="what poisoned captions are made from")
    also: tuple[AttackSettings, ...] = Field((), description="further attacks, on pairs of their own")

    @model_validator(mode="after")
    def _different(self) -> Self:
        seen = []
        for attack in self.attacks:
            mark = (attack.trigger, attack.target_class)
            if mark in seen:
                raise ValueError("two attacks with the same trigger and target: make them one with more pairs")
            seen.append(mark)
        return self

    @property
    def attacks(self) -> tuple[AttackSettings, ...]:
        """Every attack, the first one first, templates filled in."""
        own = {name: getattr(self, name) for name in AttackSettings.model_fields}
        further = (
            attack if attack.templates is not None else attack.model_copy(update={"templates": self.templates})
            for attack in self.also
        )
        return (AttackSettings(**own), *further)
