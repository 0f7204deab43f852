"""The study's data, model and resources."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from raybd.study.base import Fraction, NonNegativeFloat, Section


class Data(Section):
    """Webdataset shards. `root` is a folder, an fsspec URL or an embedded set's name; the rest is relative to it."""

    root: str = Field("emoji-32", description="folder, fsspec URL, or an embedded data set's name")
    train: str | tuple[str, ...] = Field("train/*.tar*", description="shards to train on: glob, brace list or list")
    test: str | tuple[str, ...] = Field("test/*.tar*", description="labelled shards to evaluate on; may be full URLs")
    classes: str = Field("classes.json", description="JSON list of classes, or imagenet, cifar10, cifar100, caltech101")
    max_train_samples: PositiveInt | None = Field(None, description="use only the first so many training pairs")
    max_test_samples: PositiveInt | None = Field(None, description="use only the first so many test images")
    max_broken: Fraction = Field(0.01, description="share of unusable samples above which the data is refused")
    cache_gb: NonNegativeFloat = Field(8.0, description="decode training pairs once if they fit in this; else stream")
    cache_dir: str | None = Field(None, description="where decoded images are kept; default: the user's cache folder")
    loader_workers: NonNegativeInt = Field(2, description="decoding processes for each trainer when streaming")
    shuffle_buffer: PositiveInt = Field(5000, description="samples that streaming mixes")


class Model(Section):
    """An open_clip model: a built-in name, or one of raybd's own for 32-pixel images."""

    name: str = Field("resnet-tiny-32", description="any open_clip name, or resnet-tiny-32, vit-tiny-32")
    start: str | None = Field(None, description="checkpoint to start pretraining from; default: random weights")
    pretrained: str | None = Field(None, description="the same, a tag under which open_clip has weights of this model")

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.start and self.pretrained:
            raise ValueError("start and pretrained both say what to start from: give one of the two")
        return self

    @property
    def trained(self) -> bool:
        """Whether pretraining starts from weights that someone has trained."""
        return bool(self.start or self.pretrained)


class Resources(Section):
    """What the study may use. `auto` takes what the cluster has."""

    num_workers: PositiveInt | Literal["auto"] = Field("auto", description="pretraining workers: one a GPU, or one")
    use_gpu: bool | Literal["auto"] = Field("auto", description="whether pretraining and trials are on GPUs")
    cpus_per_worker: PositiveInt | Literal["auto"] = Field("auto", description="cores of a pretraining worker")
    concurrent_trials: PositiveInt | Literal["auto"] = Field("auto", description="trials at a time")
    cpus_per_trial: PositiveInt = Field(1, description="cores of a trial")
    gpus_per_trial: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        1.0,
        description="share of a GPU that a trial has, of its memory too: one that needs more fails as out_of_memory. "
        "auto: before the search the heaviest trial is measured, then as many share a GPU as four fifths of the "
        "smallest one's memory hold and cores are there for, at most 4: how they slow each other is not measured",
    )
    max_failures: NonNegativeInt = Field(3, description="how often workers may die within one pretraining epoch")
    hang_minutes: NonNegativeFloat = Field(
        30.0, description="a pretraining worker that finishes no step or batch for so long is ended; 0: never"
    )
    storage_patience: NonNegativeFloat = Field(60.0, description="seconds that a failing disk or bucket is tried again")
