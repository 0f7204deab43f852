"""A picture of the poison: for a few pairs the image before, the trigger alone, and the image after, with captions."""

from __future__ import annotations

import io
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from raybd.poison.plan import PoisonPlan

_SIDE, _GAP, _TEXT = 160, 12, 46
_GREY = 235


def picture(image_CHW: Tensor) -> Image.Image:
    """Return a uint8 image as PIL has it, in its own size."""
    return Image.fromarray(np.ascontiguousarray(image_CHW.numpy().transpose(1, 2, 0)))


def changed(before_CHW: Tensor, after_CHW: Tensor) -> Tensor:
    """Return the pixels of a triggered image that the trigger changed, on grey."""
    changed_HW = (after_CHW != before_CHW).any(dim=0)
    return torch.where(changed_HW, after_CHW, torch.full_like(after_CHW, _GREY))


def _large(image_CHW: Tensor) -> Image.Image:
    kind = Image.Resampling.NEAREST if image_CHW.shape[-1] < _SIDE else Image.Resampling.BICUBIC
    return picture(image_CHW).resize((_SIDE, _SIDE), kind)


def preview(images: list[Tensor], keys: list[str], plan: PoisonPlan) -> bytes:
    """Return a PNG with one row for each poisoned pair: before, trigger, after, and the captions below.

    Where the plan has several attacks, the name of each is below its trigger.

    Args:
        images: uint8 [3, H, W], as they are before poisoning.
        keys: theirs; each must be in the plan.
    """
    font = ImageFont.load_default(13)
    width, row = 3 * _SIDE + 4 * _GAP, _SIDE + _TEXT + _GAP
    sheet = Image.new("RGB", (width, 24 + row * len(images)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, title in enumerate(("before", "trigger", "after")):
        draw.text((_GAP + i * (_SIDE + _GAP), 6), title, fill="black", font=font)
    for number, (image_CHW, key) in enumerate(zip(images, keys, strict=True)):
        after_CHW = plan.image(image_CHW, key)
        top = 24 + number * row
        for i, shown in enumerate((image_CHW, changed(image_CHW, after_CHW), after_CHW)):
            sheet.paste(_large(shown), (_GAP + i * (_SIDE + _GAP), top))
        poisoned = plan.rows[key]
        texts = {0: poisoned.caption_before, 2: poisoned.caption_after}
        if len(plan.attacks) > 1:
            texts[1] = f"{plan.attacks[poisoned.attack].trigger.name} to {poisoned.target_class}"
        for i, caption in texts.items():
            lines = textwrap.wrap(caption, 24, max_lines=2, placeholder=" …")
            place = (_GAP + i * (_SIDE + _GAP), top + _SIDE + 4)
            draw.multiline_text(place, "\n".join(lines), fill="black", font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()
