"""Settings of a training run, and pretraining with its objectives."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from raybd.study.base import NonNegativeFloat, PositiveFloat, Section, plain_name


class ImageView(StrEnum):
    """Augmentation that makes the second image of a pair for SSL."""

    AUTOAUGMENT = "autoaugment"
    CROP_FLIP_COLOUR = "crop_flip_colour"


class TextView(StrEnum):
    """Augmentation that makes the second caption of a pair for SSL."""

    EDA = "eda"


class Precision(StrEnum):
    """Arithmetic of the forward pass; `auto` is bf16 on a GPU and fp32 elsewhere."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class Schedule(StrEnum):
    """Learning rate after the warm-up: see `raybd.train.schedule.learning_rate`."""

    COSINE = "cosine"
    CONSTANT_COOLDOWN = "constant_cooldown"
    PAR = "par"


class LossWeights(Section):
    """Weights of the loss terms, of images with their captions and of each modality with its augmented views.

    `mmcl` has weight 1 wherever it is left out: an objective without it says `mmcl: 0`.
    """

    mmcl: NonNegativeFloat = Field(1.0, description="contrastive loss across modalities (CLIP)")
    ssl: NonNegativeFloat = Field(0.0, description="mean of image_ssl and text_ssl (CleanCLIP)")
    image_ssl: NonNegativeFloat = Field(0.0, description="images against their augmented views")
    text_ssl: NonNegativeFloat = Field(0.0, description="captions against their augmented views")
    nt_xent: NonNegativeFloat = Field(0.0, description="SimCLR's symmetric loss, in place of ssl")
    siglip: NonNegativeFloat = Field(0.0, description="sigmoid loss across modalities, with a bias that is learnt")
    siglip_mean: NonNegativeFloat = Field(0.0, description="the same, mean over all combinations and without a bias")

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not any(vars(self).values()):
            raise ValueError("all loss weights are 0: nothing would be learnt")
        return self

    @property
    def views(self) -> bool:
        """Whether a term needs the augmented views."""
        return bool(self.ssl or self.image_ssl or self.text_ssl or self.nt_xent)

    @property
    def uses_images(self) -> bool:
        """Whether a term uses the rows of images: all do but one."""
        return any(weight for term, weight in vars(self).items() if term != "text_ssl")

    @property
    def uses_texts(self) -> bool:
        """Whether a term uses the rows of captions."""
        return any(weight for term, weight in vars(self).items() if term != "image_ssl")


class TrainSettings(Section):
    """Everything about one training run, pretraining or cleaning, apart from data and model."""

    epochs: NonNegativeInt = Field(description="passes over the training pairs")
    batch_size: Annotated[int, Field(ge=2)] = Field(description="global batch in pairs, over all workers")
    micro_batch_size: PositiveInt | None = Field(
        None,
        description="pairs whose activations a worker holds at a time; the gradient is that of the whole batch, for "
        "one more forward pass; BatchNorm in train mode normalises each micro batch by itself",
    )
    lr: PositiveFloat = Field(description="learning rate after the warm-up, its largest")
    warmup_steps: NonNegativeInt = Field(description="optimizer steps over which the learning rate rises from 0")
    schedule: Schedule = Schedule.COSINE
    weight_decay: NonNegativeFloat = Field(0.1, description="AdamW's")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="AdamW's decay of the mean gradient")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="AdamW's decay of the squared gradient")
    eps: PositiveFloat = Field(1e-8, description="AdamW's, in the denominator")
    loss_weights: LossWeights = LossWeights()
    image_view: ImageView = ImageView.AUTOAUGMENT
    text_view: TextView = TextView.EDA
    precision: Precision = Precision.AUTO


class PretrainObjective(Section):
    """One pretrain objective: what it has of its own, loss weights above all; the rest is from `pretrain`."""

    loss_weights: LossWeights | None = None
    epochs: NonNegativeInt | None = None
    batch_size: Annotated[int, Field(ge=2)] | None = None
    micro_batch_size: PositiveInt | None = None
    lr: PositiveFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    weight_decay: NonNegativeFloat | None = None
    image_view: ImageView | None = None
    text_view: TextView | None = None


class Pretrain(TrainSettings):
    """Pretraining: one run for each objective, on the poisoned pairs."""

    epochs: NonNegativeInt = Field(64, description="0 takes the model that is started from as it is")
    batch_size: Annotated[int, Field(ge=2)] = 2048
    lr: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt = 10_000
    objectives: dict[Annotated[str, AfterValidator(plain_name)], PretrainObjective] = Field(
        default_factory=lambda: {
            "mmcl": PretrainObjective(loss_weights=LossWeights(mmcl=1, ssl=0)),
            "mmcl_ssl": PretrainObjective(loss_weights=LossWeights(mmcl=1, ssl=1)),
        },
        min_length=1,
        description="a model is pretrained for each, and cleaned: names of yours",
    )

    def settings(self, objective: str) -> TrainSettings:
        """Return the settings in force for one objective."""
        common = self.model_dump(exclude={"objectives"})
        own = self.objectives[objective].model_dump(exclude_none=True)
        return TrainSettings(**{**common, **own})
