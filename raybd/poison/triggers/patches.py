"""Triggers that put a square patch on the image: badnet, label_consistent, badnet_stripes."""

from __future__ import annotations

import torch
from torch import Tensor

from raybd.errors import StudyError
from raybd.seeding import fork
from raybd.study import BadNet, BadNetStripes, LabelConsistent, Pattern, Placement

Corner = tuple[int, int]
Patch = BadNet | LabelConsistent | BadNetStripes


def check(size: int, *, height: int, width: int, where: str) -> None:
    """Raise StudyError where something of `size` pixels does not fit an image."""
    if size > min(height, width):
        raise StudyError(
            f"a trigger of {size} pixels does not fit the {height}x{width} image that the model sees",
            where=f"{where}.size",
            fix=f"make it at most {min(height, width)}",
        )


def place(trigger: Patch, *, height: int, width: int, seed: int) -> tuple[Corner, ...]:
    """Return the (top, left) corner of each copy of the patch; random places are drawn from `seed`.

    Errors: StudyError where the patch is larger than the image.
    """
    check(trigger.size, height=height, width=width, where="poison.trigger")
    bottom, right = height - trigger.size, width - trigger.size
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


def patch(image_CHW: Tensor, trigger: Patch, *, seed: int, pattern_seed: int) -> Tensor:
    """Return the patch as floats in units of [0, 1], not clipped, shape [3, size, size].

    noise: the image's mean of each channel + N(0, 1), new for each seed. fixed: one pattern of fully on and fully
    off channels for all images, from `pattern_seed`. yellow: red and green on, blue off. Stripes: each channel of
    each column is 1 or -1, new for each seed.

    Source: vsahil/attack-cleanclip@3d4bd74 backdoor/utils.py (noise, yellow); nmndeep/PerturbAndRecover@a720440
    backdoor/utils.py (stripes). Differs: the fixed pattern is ours.
    """
    size, generator = trigger.size, torch.Generator()
    if isinstance(trigger, BadNetStripes):
        generator.manual_seed(fork(seed, "badnet_stripes"))
        return (2.0 * torch.randint(0, 2, (3, 1, size), generator=generator) - 1).expand(3, size, size)
    if trigger.pattern is Pattern.YELLOW:
        return torch.tensor([1.0, 1.0, 0.0])[:, None, None].expand(3, size, size)
    if trigger.pattern is Pattern.FIXED:
        generator.manual_seed(fork(pattern_seed, "badnet", "fixed", size))
        return torch.randint(0, 2, (3, size, size), generator=generator).float()
    generator.manual_seed(fork(seed, "badnet", "noise"))
    mean_C = image_CHW.float().mean(dim=(1, 2)) / 255
    return mean_C[:, None, None] + torch.randn((3, size, size), generator=generator)


def apply(image_CHW: Tensor, trigger: Patch, *, seed: int, pattern_seed: int) -> Tensor:
    """Return a copy of the image with the patch in each of its places.

    Differs: values outside the range are clipped; with `wrap` they wrap modulo 256 as in the published code.
    """
    _, height, width = image_CHW.shape
    corners = place(trigger, height=height, width=width, seed=seed)
    levels = (patch(image_CHW, trigger, seed=seed, pattern_seed=pattern_seed) * 255).round().to(torch.int64)
    wrap = not isinstance(trigger, BadNetStripes) and trigger.wrap
    pixels = (levels % 256 if wrap else levels.clamp(0, 255)).to(torch.uint8)
    triggered_CHW = image_CHW.clone()
    for top, left in corners:
        triggered_CHW[:, top : top + trigger.size, left : left + trigger.size] = pixels
    return triggered_CHW
