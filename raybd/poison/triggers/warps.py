"""Triggers that move pixels: warped (WaNet)."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from raybd.seeding import fork
from raybd.study import Warped


def warped(image_CHW: Tensor, trigger: Warped, *, pattern_seed: int) -> Tensor:
    """Warp the image: sample it, bilinearly, at identity + s * noise / side, in coordinates from -1 to 1.

    Source: arXiv 2102.10369; vsahil/attack-cleanclip@3d4bd74 backdoor/utils.py. Differs: images need not be square
    (then each axis is divided by its own side); the noise comes from a seed, not from a file; values are rounded.
    """
    _, height, width = image_CHW.shape
    grid = _grid(trigger.k, trigger.s, pattern_seed, height, width)
    found = F.grid_sample(image_CHW.float()[None], grid, mode="bilinear", align_corners=True)[0]
    return found.round_().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=8)
def _grid(k: int, s: float, pattern_seed: int, height: int, width: int) -> Tensor:
    """Return where each pixel is sampled, [1, H, W, 2] as (column, row).

    The noise is U(-1, 1) on k x k points over its mean absolute value, scaled to the image bicubically.
    """
    generator = torch.Generator().manual_seed(fork(pattern_seed, "warped", k))
    points_12KK = 2 * torch.rand((1, 2, k, k), generator=generator) - 1
    points_12KK /= points_12KK.abs().mean()
    noise_12HW = F.interpolate(points_12KK, size=(height, width), mode="bicubic", align_corners=True)
    rows_HW, columns_HW = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    moved = [columns_HW + s * noise_12HW[0, 0] / width, rows_HW + s * noise_12HW[0, 1] / height]
    return torch.stack(moved, dim=-1).clamp_(-1, 1)[None]
