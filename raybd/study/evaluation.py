"""How models are evaluated."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from raybd.study.base import Section
from raybd.study.poison import Trigger


class Evaluation(Section):
    """Zero-shot accuracy and attack success rate."""

    templates: str | tuple[str, ...] = Field(
        "openai_imagenet", description="prompt ensemble: a known name, or the list"
    )
    include_target: bool = Field(default=False, description="count triggered images of the target class too")
    search_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of the images that the search sees"
    )
    controls: tuple[Trigger, ...] = Field(
        (), description="triggers that were not planted: how often they lead to the first attack's target"
    )
    batch_size: PositiveInt = Field(256, description="images at a time")
