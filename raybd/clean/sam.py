"""FT-SAM: finetuning whose gradient is taken where the loss is worst nearby, nearby being relative to each weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from raybd.costs import Towers
from raybd.data.pairs import Batch
from raybd.objectives import Loss
from raybd.study import CleanSettings
from raybd.study.methods import FtSam
from raybd.train.grad_cache import untracked
from raybd.train.loop import Training
from raybd.train.recipe import Recipe


@torch.no_grad()
def ascent(weights: Sequence[Tensor], gradients: Sequence[Tensor], *, rho: float) -> list[Tensor]:
    """Return ρ g w² / ‖|w| g‖ for each weight, the norm over all of them; zeros where no gradient is left.

    Source: arXiv 2304.11823 (FT-SAM); the scaling by |w| is that of arXiv 2102.11600 (ASAM).
    """
    scaled = [weight.abs() * gradient for weight, gradient in zip(weights, gradients, strict=True)]
    norm = torch.stack([part.norm() for part in scaled]).norm()
    length = torch.where(norm > 0, rho / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(norm))
    return [length * part * weight.abs() for part, weight in zip(scaled, weights, strict=True)]


@contextmanager
def _moved(weights: Sequence[Tensor], by: Sequence[Tensor]) -> Iterator[None]:
    """Add to weights, and put them back afterwards to the same bits."""
    kept = [weight.detach().clone() for weight in weights]
    try:
        for weight, change in zip(weights, by, strict=True):
            weight.data.add_(change)
        yield
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.data.copy_(before)


@dataclass
class SharpnessAware(Recipe):
    """FT-SAM on the weighted sum of losses: two passes for each step, the optimizer's state and step as ever.

    BatchNorm's statistics are those of the first pass, at the weights themselves. The loss that is reported is that
    pass's too. The norm is over all trained parameters, logit scale and norms' gains included.
    """

    in_parts = False
    settings: FtSam

    @classmethod
    def of(cls, settings: CleanSettings, *, seed: int) -> Self:
        """Return the recipe of a trial."""
        return cls(settings.ft_sam)

    def operations(self, cost: Towers, *, views: int) -> tuple[float, float]:
        """Count two passes for each step."""
        return 2 * views * cost.pair_training, 0.0

    def step(self, run: Training, batch: Batch) -> Loss:
        """Take the gradient at w + ρ g w² / ‖|w| g‖ and step from w."""
        loss = self._backward(run, batch)
        found = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
        with _moved(found, ascent(found, [p.grad for p in found], rho=self.settings.rho)), untracked(run.clip.net):
            self._backward(run, batch)
        run.optimizer.step()
        return loss

    def _backward(self, run: Training, batch: Batch) -> Loss:
        loss = self.loss(run, batch)
        run.guard(loss)
        run.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        return loss
