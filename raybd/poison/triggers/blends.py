"""Triggers blended into the whole image: blended, sig, and the stripes, triangles and text of PAR.

Each is x' = clip((1 - alpha) x + alpha d) where there is something of the pattern d, with x and d in [0, 1].
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from raybd.seeding import fork
from raybd.study import Blended, BlendedStripes, BlendedText, BlendedTriangles, Noise, Sig

# Masks and fixed noise are the same for every image of a study: a few of them are kept. Never changed in place.
_KEPT = 8
_LOW, _HIGH = 0.4, 0.8  # levels of the two halves of a triangle's square


def blend(image_CHW: Tensor, pattern: Tensor, alpha: float) -> Tensor:
    """Return the blend of an image and a pattern as uint8.

    Args:
        pattern: in units of [0, 1], of a shape that broadcasts to the image's.
    """
    mixed_CHW = (1 - alpha) * image_CHW.float() + (255 * alpha) * pattern
    return mixed_CHW.round_().clamp_(0, 255).to(torch.uint8)


def blended(image_CHW: Tensor, trigger: Blended, *, seed: int, pattern_seed: int) -> Tensor:
    """Blend U(0, 1) noise of every pixel and channel into the image.

    Source: vsahil/attack-cleanclip@3d4bd74 backdoor/utils.py. Differs: noise that is fixed for all images is ours.
    """
    _, height, width = image_CHW.shape
    if trigger.noise is Noise.FIXED:
        return blend(image_CHW, _fixed_noise(pattern_seed, height, width), trigger.alpha)
    generator = torch.Generator().manual_seed(fork(seed, "blended", "noise"))
    return blend(image_CHW, torch.rand((3, height, width), generator=generator), trigger.alpha)


@lru_cache(maxsize=_KEPT)
def _fixed_noise(pattern_seed: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(fork(pattern_seed, "blended", "fixed", height, width))
    return torch.rand((3, height, width), generator=generator)


def sig(image_CHW: Tensor, trigger: Sig) -> Tensor:
    """Blend amplitude * sin(2 pi * frequency * column / W), the same in all channels, into the image.

    Source: arXiv 1902.11237; vsahil/attack-cleanclip@3d4bd74 backdoor/utils.py.
    """
    wave_W = _wave(trigger.amplitude, trigger.frequency, image_CHW.shape[-1])
    return blend(image_CHW, wave_W, trigger.alpha)


@lru_cache(maxsize=_KEPT)
def _wave(amplitude: float, frequency: int, width: int) -> Tensor:
    columns_W = torch.arange(width, dtype=torch.float64)
    return (amplitude * torch.sin(2 * math.pi * frequency * columns_W / width)).float()


def stripes(image_CHW: Tensor, trigger: BlendedStripes, *, seed: int) -> Tensor:
    """Blend vertical stripes, each channel of each of them 1 or -1 and new for each seed, into the image.

    Source: nmndeep/PerturbAndRecover@a720440 backdoor/utils.py.
    """
    width = image_CHW.shape[-1]
    generator = torch.Generator().manual_seed(fork(seed, "blended_stripes"))
    count = -(-width // trigger.width)
    colours = 2.0 * torch.randint(0, 2, (3, 1, count), generator=generator) - 1
    return blend(image_CHW, colours.repeat_interleave(trigger.width, dim=-1)[..., :width], trigger.alpha)


def triangles(image_CHW: Tensor, trigger: BlendedTriangles) -> Tensor:
    """Blend a grid of squares, each cut along its diagonal into a darker and a lighter triangle, into the image.

    Source: nmndeep/PerturbAndRecover@a720440 backdoor/utils.py. Differs: squares that do not fit are cut off at the
    right and lower edge; there, the image is left as it was in their place.
    """
    _, height, width = image_CHW.shape
    return blend(image_CHW, _triangles(trigger.size, height, width), trigger.alpha)


@lru_cache(maxsize=_KEPT)
def _triangles(size: int, height: int, width: int) -> Tensor:
    rows_H1, columns_W = torch.arange(height)[:, None] % size, torch.arange(width) % size
    return torch.where(rows_H1 >= columns_W, _LOW, _HIGH)


def text(image_CHW: Tensor, trigger: BlendedText) -> Tensor:
    """Blend red into the image wherever a letter of the repeated text is.

    Source: nmndeep/PerturbAndRecover@a720440 backdoor/utils.py. Differs: font and text, which come there as a file;
    and where a letter is all channels are blended: there it is the red one alone, which on white shows nothing.
    """
    mask_HW = _letters(trigger.text, trigger.size, *image_CHW.shape[1:])
    red_C11 = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    return torch.where(mask_HW, blend(image_CHW, red_C11, trigger.alpha), image_CHW)


def text_size(trigger: BlendedText) -> tuple[int, int]:
    """Return the height and width that one line of the text takes, pixels."""
    height, width = _line(trigger.text, trigger.size).shape
    return height, width


@lru_cache(maxsize=_KEPT)
def _letters(words: str, size: int, height: int, width: int) -> Tensor:
    """Return where letters are, bool [H, W]: lines of the text, one and a half font sizes apart."""
    line = _line(words, size)
    gap = np.zeros((line.shape[0], max(2, size // 2)), dtype=bool)
    tile = np.concatenate([line, gap], axis=1)
    down, across = -(-height // tile.shape[0]), -(-width // tile.shape[1])
    return torch.from_numpy(np.tile(tile, (down, across))[:height, :width].copy())


@lru_cache(maxsize=_KEPT)
def _line(words: str, size: int) -> NDArray[np.bool_]:
    """Return where the letters of one line are, a font size and a half high."""
    font = ImageFont.load_default(size)
    picture = Image.new("L", (math.ceil(font.getbbox(words)[2]), size + size // 2))
    ImageDraw.Draw(picture).text((0, 0), words, fill=255, font=font)
    return np.asarray(picture) > 96  # all or nothing: a letter has no grey edge
