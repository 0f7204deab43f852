"""What all sections of a study are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A section of the study: no unknown keys, never changed after it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def plain_name(name: str) -> str:
    """Return a name of letters, digits and _, which may be part of a file's; ValueError on another."""
    if len(name) > 100:
        raise ValueError(f"a name of {len(name)} characters: at most 100")
    if not name or not name.replace("_", "").isalnum() or not name.isascii():
        raise ValueError(f"{name!r} must be letters, digits and _")
    return name
