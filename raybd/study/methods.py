"""Cleaning methods by name, and the settings that only one of them has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import Field, PositiveInt

from raybd.study.base import NonNegativeFloat, PositiveFloat, Section
from raybd.study.training import TrainSettings


class Method(StrEnum):
    """How a poisoned model is cleaned."""

    CLEANCLIP = "cleanclip"
    MMCL = "mmcl"
    SSL = "ssl"
    SHRINK_PERTURB = "shrink_perturb"
    DEEP_CLUSTERING = "deep_clustering"
    PSEUDO_LABELS = "pseudo_labels"
    PAR = "par"
    FT_SAM = "ft_sam"
    ABD = "abd"
    INTERPOLATION = "interpolation"
    BATCHNORM_REFRESH = "batchnorm_refresh"
    FROZEN_BATCHNORM = "frozen_batchnorm"
    IMAGE_TOWER = "image_tower"


@dataclass(frozen=True)
class Traits:
    """What a study has to know of a method.

    Attributes:
        recipe: what carries it out, `MODULE.CLASS` below `raybd.clean`; named only, as a study does without torch.
        loss_weights: of the two losses, where the method has them of itself, whatever the study says.
        takes_steps: whether it learns anything. Where not, its number of epochs is that of its records.
        plain_steps: whether its steps are plain training's on the weighted losses alone: where not, its recipe says
            `in_parts = False`.
        own_image_views: whether it makes the images' augmented views itself.
        learns_images: whether it acts on the image tower, which a loss of captions alone leaves as it is.
    """

    recipe: str
    loss_weights: Mapping[str, float] | None = None
    takes_steps: bool = True
    plain_steps: bool = True
    own_image_views: bool = False
    learns_images: bool = False

    @property
    def looks_at_views(self) -> bool:
        """Whether its losses may look at augmented views."""
        return self.loss_weights is None or self.loss_weights["ssl"] > 0


_MMCL, _SSL = {"mmcl": 1.0, "ssl": 0.0}, {"mmcl": 0.0, "ssl": 1.0}
TRAITS: dict[Method, Traits] = {
    Method.CLEANCLIP: Traits("cleanclip.CleanClip"),
    Method.MMCL: Traits("cleanclip.CleanClip", loss_weights=_MMCL),
    Method.SSL: Traits("cleanclip.CleanClip", loss_weights=_SSL),
    Method.SHRINK_PERTURB: Traits("weights.ShrinkAndPerturb"),
    Method.DEEP_CLUSTERING: Traits("clustering.Clustered", plain_steps=False, learns_images=True),
    Method.PSEUDO_LABELS: Traits("clustering.PseudoLabelled", plain_steps=False, learns_images=True),
    Method.PAR: Traits("par.PerturbAndRecover", loss_weights=_MMCL, plain_steps=False),
    Method.FT_SAM: Traits("sam.SharpnessAware", plain_steps=False),
    Method.ABD: Traits("adversarial.AdversarialViews", plain_steps=False, own_image_views=True),
    Method.INTERPOLATION: Traits("weights.Interpolation"),
    # Nothing is learnt: the loss is recorded only, and without augmented views it costs less.
    Method.BATCHNORM_REFRESH: Traits(
        "batchnorm.BatchNormRefresh", loss_weights=_MMCL, takes_steps=False, plain_steps=False
    ),
    Method.FROZEN_BATCHNORM: Traits("batchnorm.FrozenBatchNorm"),
    Method.IMAGE_TOWER: Traits("weights.ImageTower", learns_images=True),
}
# What a method that takes no step has no use for.
OF_STEPS = frozenset({"lr", "warmup_steps", "schedule", "weight_decay", "beta1", "beta2", "eps"})


def users(setting: str) -> frozenset[Method]:
    """Return the methods that a setting (dotted name, or a section's) has an effect on.

    Methods that fix the loss weights ignore `loss_weights`, those without augmented views their kind, one that takes
    no step what steps have, those with steps of their own `micro_batch_size`, and the sections named after methods are
    theirs alone.
    """
    section = setting.partition(".")[0]
    if section in MethodSettings.__annotations__:
        return frozenset({Method(section)})
    kinds: dict[str, Callable[[Traits], bool]] = {
        **dict.fromkeys(OF_STEPS, lambda traits: traits.takes_steps),
        "loss_weights": lambda traits: traits.loss_weights is None,
        "micro_batch_size": lambda traits: traits.plain_steps,
        "text_view": lambda traits: traits.looks_at_views,
        "image_view": lambda traits: traits.looks_at_views and not traits.own_image_views,
    }
    heeds = kinds.get(section, lambda traits: True)
    return frozenset(method for method, traits in TRAITS.items() if heeds(traits))


class ShrinkPerturb(Section):
    """Once before finetuning: weights ← shrink · weights + perturb · newly drawn weights."""

    shrink: Annotated[float, Field(ge=0, le=1)] = Field(0.95, description="factor of the weights")
    perturb: NonNegativeFloat = Field(1e-4, description="factor of the newly drawn weights")


class DeepClustering(Section):
    """Each epoch: spherical k-means of the cleaning images' embeddings, and a fresh linear head that predicts it."""

    clusters: Annotated[int, Field(ge=2)] = Field(1000, description="of the cleaning images, anew in each epoch")
    iterations: PositiveInt = Field(20, description="of k-means")
    weight: NonNegativeFloat = Field(5.0, description="weight of the head's cross-entropy")


class PseudoLabels(Section):
    """As deep clustering, with the labels that another model gives the cleaning images."""

    weight: NonNegativeFloat = Field(5.0, description="weight of the head's cross-entropy")
    model: str | None = Field(None, description="open_clip name of the model that labels")
    checkpoint: str | None = Field(None, description="its weights: a file, or an open_clip tag")


class Par(Section):
    """Perturb and recover: away from the poisoned model's embeddings, up to a distance."""

    threshold: PositiveFloat = Field(2.15, description="mean squared distance beyond which nothing more is gained")
    noise: NonNegativeFloat = Field(0.1, description="standard deviation of the noise on half of the images, of [0, 1]")
    erase: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="probability of erasing a part of an image")


class FtSam(Section):
    """Sharpness-aware finetuning, the perturbation scaled by each weight."""

    rho: PositiveFloat = Field(0.5, description="length of the step at which the gradient is taken")


class Abd(Section):
    """Adversarial images in place of augmented ones."""

    epsilon: PositiveFloat = Field(8 / 255, description="largest change of a pixel, of [0, 1]")
    steps: PositiveInt = Field(3, description="of projected gradient ascent for each image")
    step_size: PositiveFloat = Field(4 / 255, description="of one step, of [0, 1]")


class Interpolation(Section):
    """Finetune, then walk the line between the poisoned and the finetuned model: a point for each alpha."""

    alphas: tuple[Annotated[float, Field(ge=0, le=1.5)], ...] = Field(
        (0.25, 0.5, 0.75, 1.25), min_length=1, description="0 is the poisoned model, 1 the finetuned one"
    )


class MethodSettings(TrainSettings):
    """Training, and the settings that only one cleaning method has: each section is named after its method."""

    shrink_perturb: ShrinkPerturb = ShrinkPerturb()
    deep_clustering: DeepClustering = DeepClustering()
    pseudo_labels: PseudoLabels = PseudoLabels()
    par: Par = Par()
    ft_sam: FtSam = FtSam()
    abd: Abd = Abd()
    interpolation: Interpolation = Interpolation()
