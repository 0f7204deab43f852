"""Where a study's numbers go beside its tables."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from raybd.study.base import Section


class TrackerName(StrEnum):
    """A service that keeps track of experiments."""

    MLFLOW = "mlflow"
    WANDB = "wandb"


class Recording(Section):
    """Copies of epochs, settings and hypervolumes to look at; nothing is read from them."""

    tensorboard: bool = Field(default=True, description="write event files for TensorBoard into the run directory")
    trackers: tuple[TrackerName, ...] = Field(
        (), description="where they go besides: mlflow, wandb (Weights & Biases), each where it is installed"
    )
