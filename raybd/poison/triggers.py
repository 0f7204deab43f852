"""Triggers: pure functions of an image and a seed. Any resolution; the same seed gives the same pixels.

C channels (3), H height, W width; images are uint8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raybd.errors import StudyError
from raybd.seeding import fork
from raybd.study import Pattern, Placement, Trigger

Corner = tuple[int, int]


def place(trigger: Trigger, *, height: int, width: int, seed: int) -> tuple[Corner, ...]:
    """Return the (top, left) corner of each copy of the patch; random places are drawn from `seed`.

    Errors: StudyError where the patch is larger than the image.
    """
    size = trigger.size
    if size > min(height, width):
        raise StudyError(
            f"a trigger of {size} pixels does not fit the {height}x{width} image that the model sees",
            where="poison.trigger.size",
            fix=f"make it at most {min(height, width)}",
        )
    bottom, right = height - size, width - size
    fixed = {
        Placement.TOP_LEFT: ((0, 0),),
        Placement.TOP_RIGHT: ((0, right),),
        Placement.BOTTOM_LEFT: ((bottom, 0),),
        Placement.BOTTOM_RIGHT: ((bottom, right),),
        Placement.CENTRE: ((bottom // 2, right // 2),),
        Placement.FOUR_CORNERS: ((0, 0), (0, right), (bottom, 0), (bottom, right)),
    }
    if trigger.placement is not Placement.RANDOM:
        return fixed[trigger.placement]
    return ((fork(seed, "top") % (bottom + 1), fork(seed, "left") % (right + 1)),)


def format_corners(corners: tuple[Corner, ...]) -> str:
    """Return places as text for the poison plan: `top,left` pairs, split by blanks."""
    return " ".join(f"{top},{left}" for top, left in corners)


def badnet_patch(image_CHW: Tensor, trigger: Trigger, *, seed: int, pattern_seed: int) -> Tensor:
    """Return the patch as floats in units of [0, 1], not clipped, shape [3, size, size].

    noise: the image's mean of each channel + N(0, 1), new for each seed. fixed: one pattern of fully on and fully
    off channels for all images, from `pattern_seed`.

    Source: vsahil/attack-cleanclip@3d4bd74 backdoor/utils.py (noise). Differs: the fixed pattern is ours.
    """
    size = trigger.size
    generator = torch.Generator()
    if trigger.pattern is Pattern.FIXED:
        generator.manual_seed(fork(pattern_seed, "badnet", "fixed", size))
        return torch.randint(0, 2, (3, size, size), generator=generator).float()
    generator.manual_seed(fork(seed, "badnet", "noise"))
    mean_C = image_CHW.float().mean(dim=(1, 2)) / 255
    return mean_C[:, None, None] + torch.randn((3, size, size), generator=generator)


def apply(image_CHW: Tensor, trigger: Trigger, *, seed: int, pattern_seed: int) -> Tensor:
    """Return a copy of the image that carries the trigger.

    Args:
        image_CHW: uint8, as the model sees it (after resizing and cropping).
        trigger: name, size, pattern, placement.
        seed: of this image: its place and its noise.
        pattern_seed: of the study: the fixed pattern.

    Differs: values outside the range are clipped; with `trigger.wrap` they wrap modulo 256 as in the published code.
    """
    _, height, width = image_CHW.shape
    corners = place(trigger, height=height, width=width, seed=seed)
    patch = badnet_patch(image_CHW, trigger, seed=seed, pattern_seed=pattern_seed) * 255
    patch = patch.round().to(torch.int64)
    pixels = (patch % 256 if trigger.wrap else patch.clamp(0, 255)).to(torch.uint8)
    triggered_CHW = image_CHW.clone()
    for top, left in corners:
        triggered_CHW[:, top : top + trigger.size, left : left + trigger.size] = pixels
    return triggered_CHW
