"""Cleaning: the settings of one trial, and which of them a search may draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator
from pydantic.fields import FieldInfo

from raybd.study.base import Fraction, PositiveFloat, Section
from raybd.study.methods import TRAITS, Method, MethodSettings
from raybd.study.training import LossWeights
from raybd.terms import TERMS


class CleanSettings(MethodSettings):
    """The settings of one cleaning trial: each may be searched."""

    method: Method = Field(Method.CLEANCLIP, description="how the poisoned model is cleaned")
    num_samples: PositiveInt = Field(100_000, description="cleaning pairs, drawn from what the poison left alone")
    leaked_poison: NonNegativeInt = Field(0, description="poisoned pairs that slip into the cleaning set")
    leaked_share: Fraction = Field(0.0, description="the same as a share of the cleaning set")
    epochs: PositiveInt = Field(20, description="passes over the cleaning pairs; each one is evaluated")
    batch_size: Annotated[int, Field(ge=2)] = 64
    lr: PositiveFloat = 1e-4
    warmup_steps: NonNegativeInt = 50
    loss_weights: LossWeights = LossWeights(mmcl=1, ssl=1)

    @field_validator("loss_weights", mode="before")
    @classmethod
    def _cleanclip_weights(cls, given: Any) -> Any:
        """Take CleanCLIP's weight, 1, for one that is left out."""
        return {"mmcl": 1.0, "ssl": 1.0, **given} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _one_leak(self) -> Self:
        if self.leaked_poison and self.leaked_share:
            raise ValueError("give leaked_poison or leaked_share, one of the two")
        return self

    @property
    def num_leaked(self) -> int:
        """Poisoned pairs in the cleaning set."""
        return self.leaked_poison or round(self.leaked_share * self.num_samples)


class Clean(CleanSettings):
    """Cleaning: the settings of trials wherever the search does not draw them."""

    def settings(self, params: Mapping[str, Any]) -> CleanSettings:
        """Return the settings with the searched `params` (dotted names) put in, and the method's own loss weights.

        Errors: pydantic's ValidationError.
        """
        values = self.model_dump()
        for name, value in params.items():
            *parents, leaf = name.split(".")
            inner = values
            for parent in parents:
                inner = inner[parent]
            inner[leaf] = value
        traits = TRAITS.get(values["method"])
        if traits is not None and traits.loss_weights is not None:
            values["loss_weights"] = {**dict.fromkeys(TERMS, 0.0), **traits.loss_weights}
        return CleanSettings(**values)


# How it is computed, not what.
_NOT_SEARCHED = ("precision", "micro_batch_size")


def searchable() -> dict[str, type]:
    """Return the settings that a search may draw, by dotted name, with their types."""
    kinds: dict[str, type] = {}
    for name, field in CleanSettings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            kinds |= {f"{name}.{leaf}": _kind(inner) for leaf, inner in kind.model_fields.items() if _scalar(inner)}
        elif name not in _NOT_SEARCHED:
            kinds[name] = _kind(field)
    return kinds


def _kind(field: FieldInfo) -> type:
    text = str(field.annotation)
    return float if "float" in text else int if "int" in text else str


def _scalar(field: FieldInfo) -> bool:
    return "tuple" not in str(field.annotation)
