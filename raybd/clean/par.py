"""PAR, perturb and recover: away from the poisoned model's embeddings, held by the contrastive loss.

B batch, D embedding width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from raybd.clean.draws import normal, uniform
from raybd.costs import Towers
from raybd.data.pairs import Batch
from raybd.objectives import Loss, mmcl
from raybd.seeding import fork
from raybd.study import CleanSettings
from raybd.study.methods import Par
from raybd.train.loop import Training
from raybd.train.recipe import Recipe

_NOISY = 0.5  # share of the images that get noise
_ERASED_AREA = (0.02, 0.33)  # of the image, as torchvision's RandomErasing has it
_ERASED_RATIO = (0.3, 3.3)  # height to width


def capped_distance(rows_BD: Tensor, frozen_BD: Tensor, *, threshold: float) -> Tensor:
    """Return the mean squared distance of rows to those of the frozen model; beyond `threshold`, that constant.

    Beyond the threshold there is no gradient: the model is far enough.

    Args:
        rows_BD, frozen_BD: L2-normalised, so the distance lies in [0, 4].

    Differs: nmndeep/PerturbAndRecover@a720440 losses.py gives 0 beyond the threshold. The gradient is the same, and
    a loss that is capped does not jump up where the goal is reached.
    """
    distance = (rows_BD - frozen_BD).square().sum(dim=-1).mean()
    return torch.where(distance <= threshold, distance, torch.full_like(distance, threshold))


def par_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    frozen_image_BD: Tensor,
    frozen_text_BD: Tensor,
    logit_scale: Tensor,
    *,
    threshold: float,
) -> Loss:
    """Return L_MMCL − ½ [T(mean ‖f(x) − f0(x)‖²) + T(mean ‖g(t) − g0(t)‖²)], all rows L2-normalised.

    Source: arXiv 2412.00727; nmndeep/PerturbAndRecover@a720440 losses.py CLIPLoss, which normalises before it takes
    distances. Differs: the logit scale is trained; the published loop reads it as a number.
    """
    contrastive = mmcl(image_BD, text_BD, logit_scale)
    image_term = capped_distance(image_BD, frozen_image_BD, threshold=threshold)
    text_term = capped_distance(text_BD, frozen_text_BD, threshold=threshold)
    return Loss(total=contrastive - 0.5 * (image_term + text_term), terms={"mmcl": contrastive})


def perturbed(images_BCHW: Tensor, *, noise: float, erase: float, seeds: Sequence[int]) -> Tensor:
    """Return images with Gaussian noise on half of them, then with a random rectangle erased from some, in [0, 1].

    A sample's draws depend on its own seed alone. An erased rectangle covers 2 to 33 % of the image, at a ratio of
    sides of 0.3 to 3.3 (torchvision's RandomErasing), and is black.

    Args:
        images_BCHW: float32 in [0, 1], on any device.
        noise: standard deviation.
        erase: probability of erasing.
        seeds: one for each image.

    Differs: a rectangle too long for the image is cut to it; torchvision draws again.
    """
    device, (height, width) = images_BCHW.device, images_BCHW.shape[-2:]
    draws_B6 = uniform([fork(seed, "which") for seed in seeds], 6, device=device)
    added_BCHW = noise * normal([fork(seed, "noise") for seed in seeds], *images_BCHW.shape[1:], device=device)
    noisy_B111 = (draws_B6[:, 0] < _NOISY).view(-1, 1, 1, 1)
    images_BCHW = torch.where(noisy_B111, (images_BCHW + added_BCHW).clamp(0, 1), images_BCHW)

    area_B = height * width * (_ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * draws_B6[:, 2])
    low, high = (math.log(ratio) for ratio in _ERASED_RATIO)
    ratio_B = (low + (high - low) * draws_B6[:, 3]).exp()
    tall_B = (area_B * ratio_B).sqrt().round().clamp(1, height)
    wide_B = (area_B / ratio_B).sqrt().round().clamp(1, width)
    top_B = (draws_B6[:, 4] * (height - tall_B + 1)).floor()
    left_B = (draws_B6[:, 5] * (width - wide_B + 1)).floor()
    y_H, x_W = torch.arange(height, device=device), torch.arange(width, device=device)
    rows_BH = (y_H >= top_B[:, None]) & (y_H < (top_B + tall_B)[:, None])
    columns_BW = (x_W >= left_B[:, None]) & (x_W < (left_B + wide_B)[:, None])
    erased_BHW = rows_BH[:, :, None] & columns_BW[:, None, :] & (draws_B6[:, 1] < erase)[:, None, None]
    return images_BCHW.masked_fill(erased_BHW[:, None], 0.0)


@dataclass
class PerturbAndRecover(Recipe):
    """PAR: plain contrastive finetuning that is rewarded for leaving the poisoned model's embeddings, up to τ.

    The frozen model, in eval mode, sees the same noisy images as the trained one. There is no second view, and
    `loss_weights` are not used: what is added to a step of plain finetuning is the frozen model's forward pass.

    Source: arXiv 2412.00727; nmndeep/PerturbAndRecover@a720440.
    """

    in_parts = False
    settings: Par
    seed: int

    @classmethod
    def of(cls, settings: CleanSettings, *, seed: int) -> Self:
        """Return the recipe of a trial."""
        return cls(settings.par, seed)

    def operations(self, cost: Towers, *, views: int) -> tuple[float, float]:
        """Add the frozen model's forward pass."""
        return views * cost.pair_training + cost.pair_forward, 0.0

    def attach(self, run: Training) -> None:
        """Copy the poisoned model."""
        self._frozen: nn.Module = copy.deepcopy(run.clip.net).requires_grad_(requires_grad=False).eval()

    def loss(self, run: Training, batch: Batch) -> Loss:
        """Return PAR's loss of a batch, its images perturbed."""
        seeds = [fork(self.seed, "perturb", run.epoch, key) for key in batch.keys]
        images = batch.images_BCHW.to(run.context.device, non_blocking=True).float() / 255
        images = perturbed(images, noise=self.settings.noise, erase=self.settings.erase, seeds=seeds)
        pixels, tokens = run.clip.normalise(255 * images), batch.tokens_BL.to(run.context.device)
        image_BD, text_BD, logit_scale = run.encode(pixels, tokens)
        with torch.no_grad(), run.autocast():
            frozen_image_BD, frozen_text_BD, *_ = self._frozen(
                pixels.contiguous(memory_format=torch.channels_last), tokens
            )
        return par_loss(
            image_BD,
            text_BD,
            frozen_image_BD.float(),
            frozen_text_BD.float(),
            logit_scale,
            threshold=self.settings.threshold,
        )
