"""Triggers: pure functions of an image and seeds. Any resolution; the same seeds give the same pixels.

C channels (3), H height, W width; images are uint8, as the model sees them (after resizing and cropping).
"""

from __future__ import annotations

from torch import Tensor

from raybd.errors import StudyError
from raybd.poison.triggers import blends, patches, warps
from raybd.poison.triggers.patches import place
from raybd.study import (
    BadNet,
    BadNetStripes,
    Blended,
    BlendedStripes,
    BlendedText,
    BlendedTriangles,
    LabelConsistent,
    Sig,
    Trigger,
    Warped,
)

__all__ = ["apply", "check", "place", "placement"]

WHOLE = "whole image"


def apply(image_CHW: Tensor, trigger: Trigger, *, seed: int, pattern_seed: int) -> Tensor:
    """Return a copy of the image that carries the trigger.

    Args:
        image_CHW: uint8 [3, H, W].
        seed: of this image: its place, its noise, its colours.
        pattern_seed: of the attack: what is the same on all images, such as a fixed pattern or a warp.

    Errors: StudyError where the trigger does not fit the image.
    """
    check(trigger, height=image_CHW.shape[1], width=image_CHW.shape[2])
    match trigger:
        case BadNet() | LabelConsistent() | BadNetStripes():
            return patches.apply(image_CHW, trigger, seed=seed, pattern_seed=pattern_seed)
        case Warped():
            return warps.warped(image_CHW, trigger, pattern_seed=pattern_seed)
        case Blended():
            return blends.blended(image_CHW, trigger, seed=seed, pattern_seed=pattern_seed)
        case Sig():
            return blends.sig(image_CHW, trigger)
        case BlendedStripes():
            return blends.stripes(image_CHW, trigger, seed=seed)
        case BlendedTriangles():
            return blends.triangles(image_CHW, trigger)
        case BlendedText():
            return blends.text(image_CHW, trigger)


def check(trigger: Trigger, *, height: int, width: int, where: str = "poison.trigger") -> None:
    """Refuse a trigger that does not fit an image.

    Args:
        where: the section of the study that the trigger is in.

    Errors: StudyError.
    """
    if isinstance(trigger, BadNet | LabelConsistent | BadNetStripes | BlendedTriangles):
        patches.check(trigger.size, height=height, width=width, where=where)
    elif isinstance(trigger, Sig) and 2 * trigger.frequency >= width:
        raise StudyError(
            f"{trigger.frequency} waves cannot be seen across the {width} pixels that the model sees",
            where=f"{where}.frequency",
            fix=f"make it at most {(width - 1) // 2}",
        )
    elif isinstance(trigger, BlendedStripes) and trigger.width > width:
        raise StudyError(
            f"a stripe of {trigger.width} pixels is wider than the {width} pixels that the model sees",
            where=f"{where}.width",
            fix=f"make it at most {width}",
        )
    elif isinstance(trigger, BlendedText):
        needed = blends.text_size(trigger)
        if needed[0] > height or needed[1] > width:
            raise StudyError(
                f"the text takes {needed[0]}x{needed[1]} pixels (height x width), more than the {height}x{width} "
                "image that the model sees",
                where=f"{where}.text",
                fix="make the text shorter, or its size smaller",
            )


def placement(trigger: Trigger, *, height: int, width: int, seed: int) -> str:
    """Return where a trigger goes, as text for the poison plan: `top,left` pairs, split by blanks."""
    if isinstance(trigger, BadNet | LabelConsistent | BadNetStripes):
        corners = place(trigger, height=height, width=width, seed=seed)
        return " ".join(f"{top},{left}" for top, left in corners)
    return WHOLE
