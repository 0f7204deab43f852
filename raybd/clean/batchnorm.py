"""Cleaning by BatchNorm: statistics computed anew and nothing learnt, or held fixed while the rest learns.

B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from raybd.costs import Towers
from raybd.data.pairs import Batch
from raybd.errors import StudyError
from raybd.model import create_on_meta
from raybd.objectives import Loss
from raybd.study import Study
from raybd.train.loop import Training
from raybd.train.recipe import Recipe


def layers(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers of a module that keep running statistics."""
    found = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    return [part for part in found if part.running_mean is not None]


def require_layers(module: nn.Module, *, method: str, model: str) -> None:
    """Raise StudyError where a model has no BatchNorm."""
    if not layers(module):
        raise StudyError(
            f"{method} needs a model with BatchNorm, and {model} has none",
            where="clean.method",
            expected="a model whose image tower is a ResNet, for example RN50",
            fix="choose another method or another model",
        )


@contextmanager
def _collecting(net: nn.Module) -> Iterator[None]:
    """Within, BatchNorm alone is in train mode, from empty statistics, as a cumulative average over batches."""
    modes = [(part, part.training) for part in net.modules()]
    found = layers(net.visual)
    momenta = [layer.momentum for layer in found]
    net.eval()
    try:
        for layer in found:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        with torch.no_grad():
            yield
    finally:
        for layer, momentum in zip(found, momenta, strict=True):
            layer.momentum = momentum
        for part, mode in modes:
            part.training = mode


def refresh(run: Training) -> None:
    """Compute the image tower's BatchNorm statistics anew, with the weights as they are, from all cleaning images.

    mean = average of the batches' means; variance = average of their unbiased variances. The batches are always the
    same ones, so that it gives the same each time. A model without BatchNorm is left as it is.

    Source: the cumulative average is `momentum=None` of torch.nn.BatchNorm2d; arXiv 1803.05407 (SWA), section 3.2,
    recomputes the statistics of averaged weights so.
    """
    net = run.clip.net
    if not layers(net.visual):
        return
    with _collecting(net), run.autocast():
        for batch in run.pairs.without_views().epoch(0, batch_size=run.settings.batch_size):
            pixels = run.clip.normalise(batch.images_BCHW.to(run.context.device, non_blocking=True))
            net.encode_image(pixels.contiguous(memory_format=torch.channels_last))


class BatchNormRefresh(Recipe):
    """No training: statistics from the cleaning images in place of those that triggered images were part of.

    One epoch is enough, more give the same. The loss that is recorded is that of the refreshed model in eval mode.
    """

    optimizes = False
    in_parts = False

    def check(self, study: Study) -> None:
        """Refuse a model without BatchNorm. Errors: StudyError."""
        require_layers(create_on_meta(study.model.name).visual, method="batchnorm_refresh", model=study.model.name)

    def operations(self, cost: Towers, *, views: int) -> tuple[float, float]:
        """Count the loss, forward only, and the statistics."""
        return cost.pair_forward + cost.image_forward, 0.0

    def attach(self, run: Training) -> None:
        """Refuse a model without BatchNorm. Errors: StudyError."""
        require_layers(run.clip.net.visual, method="batchnorm_refresh", model=run.clip.name)

    def begin_epoch(self, run: Training, epoch: int) -> None:
        """Refresh the statistics."""
        refresh(run)

    def set_mode(self, run: Training) -> None:
        """Keep the statistics as they are from here on."""
        run.clip.net.eval()

    def step(self, run: Training, batch: Batch) -> Loss:
        """Return the loss of a batch; nothing is learnt."""
        with torch.no_grad():
            loss = self.loss(run, batch)
        run.guard(loss)
        return loss


class FrozenBatchNorm(Recipe):
    """CleanCLIP with BatchNorm's statistics held as they came; its gains and biases are trained like the rest."""

    def check(self, study: Study) -> None:
        """Refuse a model without BatchNorm. Errors: StudyError."""
        require_layers(create_on_meta(study.model.name).visual, method="frozen_batchnorm", model=study.model.name)

    def attach(self, run: Training) -> None:
        """Refuse a model without BatchNorm. Errors: StudyError."""
        require_layers(run.clip.net.visual, method="frozen_batchnorm", model=run.clip.name)

    def set_mode(self, run: Training) -> None:
        """Train mode, but for BatchNorm."""
        run.clip.net.train()
        for layer in layers(run.clip.net):
            layer.eval()
