"""The image trunk of `resnet-tiny-32`. Importing it is enough for open_clip to load models that have it.

It needs torch and timm alone: `raybd export` puts this file beside the weights, for whoever has no raybd.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn


class _Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut; the first may halve the resolution."""

    def __init__(self, width_in: int, width_out: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class TinyResNet(nn.Module):
    """A residual net for 32-pixel images: a stem and three stages that halve the resolution, mean-pooled features.

    It has what open_clip's timm wrapper asks of a trunk: `num_features`, `default_cfg`, `reset_classifier`.
    """

    def __init__(self, *, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        stem, *stages = widths
        self.num_features = widths[-1]
        self.default_cfg = {"pool_size": (4, 4), "input_size": (3, 32, 32)}
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        blocks = [_Block(a, b, stride=2) for a, b in zip(widths[:-1], stages, strict=True)]
        self.blocks = nn.Sequential(*blocks)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Accept open_clip's call: there is no classifier to reset."""
        if num_classes or global_pool not in (None, "avg"):
            raise ValueError("TinyResNet gives mean-pooled features only")

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(image_BCHW)))
        return self.blocks(x).mean(dim=(2, 3))


def raybd_resnet_tiny(**_: Any) -> TinyResNet:
    """Build the trunk of `resnet-tiny-32` (timm entry point): 0.3 M parameters."""
    return TinyResNet(widths=(16, 32, 64, 128))


if not timm.models.is_model(raybd_resnet_tiny.__name__):
    timm.models.register_model(raybd_resnet_tiny)
