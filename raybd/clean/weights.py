"""Cleaning by what is done to weights as a whole: shrunk and perturbed, interpolated, or left alone in one tower."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn

from raybd.clean import batchnorm
from raybd.costs import Towers
from raybd.model import create
from raybd.study import CleanSettings
from raybd.study.methods import ShrinkPerturb
from raybd.train.loop import Training
from raybd.train.recipe import Recipe

_TEMPERATURE = ("logit_scale", "logit_bias")


class ShrinkAndPerturb(Recipe):
    """CleanCLIP from weights moved towards those of a new model: θ ← λ₁ θ + λ₂ θ_new, once, before finetuning.

    θ are all parameters, with the gains and biases of norms; θ_new are those of a new model, initialised as
    before pretraining. The logit scale is a temperature and stays, a bias with it, and so do BatchNorm's statistics,
    which finetuning renews.

    Args:
        settings: λ₁ is `shrink`, λ₂ is `perturb`.
        seed: of the new model.

    Source: arXiv 1910.08475 (shrink and perturb); arXiv 2311.14948 uses it for cleaning, λ₁ = 0.95, λ₂ = 1e-4.
    """

    def __init__(self, settings: ShrinkPerturb, *, seed: int) -> None:
        self._settings, self._seed = settings, seed

    @classmethod
    def of(cls, settings: CleanSettings, *, seed: int) -> Self:
        """Return the recipe of a trial."""
        return cls(settings.shrink_perturb, seed=seed)

    def start(self, run: Training) -> None:
        """Move the weights."""
        new = dict(create(run.clip.name, seed=self._seed).net.named_parameters())
        with torch.no_grad():
            for name, weight in run.clip.net.named_parameters():
                if name not in _TEMPERATURE:
                    weight.mul_(self._settings.shrink).add_(new[name].to(weight), alpha=self._settings.perturb)


class Interpolation(Recipe):
    """CleanCLIP, then points on the line between the model as it came and the finetuned one, without training.

    θ(a) = (1 − a) θ_poisoned + a θ_finetuned for each parameter, with BatchNorm's statistics refreshed from the
    cleaning images for each a. At a = 1 that is the finetuned model with refreshed statistics; a > 1 goes beyond it.

    Args:
        alphas: the values of a, in the order in which they become points.

    Source: arXiv 2109.01903 (WiSE-FT); arXiv 2210.09545 (Fine-mixing) mixes backdoored weights so.
    """

    def __init__(self, alphas: tuple[float, ...]) -> None:
        self.alphas = alphas
        self._poisoned: dict[str, Tensor] = {}

    @classmethod
    def of(cls, settings: CleanSettings, *, seed: int) -> Self:
        """Return the recipe of a trial."""
        return cls(settings.interpolation.alphas)

    def operations(self, cost: Towers, *, views: int) -> tuple[float, float]:
        """Add BatchNorm's statistics of each point."""
        return views * cost.pair_training, len(self.alphas) * cost.image_forward if cost.has_batchnorm else 0.0

    def attach(self, run: Training) -> None:
        """Copy the weights as they came."""
        self._poisoned = {name: weight.detach().clone() for name, weight in run.clip.net.named_parameters()}

    def points(self, run: Training, *, first: int = 0) -> Iterator[float]:
        """Set the weights of each point from the `first`-th on; afterwards the model is the finetuned one again."""
        net = run.clip.net
        finetuned = {name: value.clone() for name, value in net.state_dict().items()}
        for alpha in self.alphas[first:]:
            with torch.no_grad():
                for name, weight in net.named_parameters():
                    weight.copy_((1.0 - alpha) * self._poisoned[name] + alpha * finetuned[name])
            run.clamp_scale()
            batchnorm.refresh(run)
            yield alpha
        net.load_state_dict(finetuned)


class ImageTower(Recipe):
    """CleanCLIP of the image tower alone: text tower and logit scale stay bit for bit as they came.

    The triggers are in images, and the text tower is half of what finetuning can spoil.
    """

    def __init__(self) -> None:
        self._frozen: list[nn.Parameter] = []

    def operations(self, cost: Towers, *, views: int) -> tuple[float, float]:
        """Count the text tower forward only."""
        return views * (cost.image_training + cost.text_forward), 0.0

    def attach(self, run: Training) -> None:
        """Take the gradient from every parameter outside the image tower."""
        found = run.clip.net.named_parameters()
        self._frozen = [p for name, p in found if not name.startswith("visual.") and p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(requires_grad=False)

    def set_mode(self, run: Training) -> None:
        """Train mode in the image tower only."""
        run.clip.net.eval()
        run.clip.net.visual.train()

    def detach(self, run: Training) -> None:
        """Give the gradient back."""
        for parameter in self._frozen:
            parameter.requires_grad_(requires_grad=True)
