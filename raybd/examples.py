"""`examples.json` of a run directory: what the models say of a few test images, clean and with the trigger."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from raybd.errors import DataError, dotted
from raybd.store import Store

NAME = "examples.json"
TOP = 5
_PNG = b"\x89PNG\r\n\x1a\n"


def is_png(content: bytes) -> bool:
    """Say whether bytes begin as a PNG does."""
    return content.startswith(_PNG)


def _png(text: str) -> str:
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    if not is_png(content):
        raise ValueError("no PNG")
    return text


_Png = Annotated[str, AfterValidator(_png)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Guess(_Record):
    """A class that a model says of an image, and how sure it is of it: softmax over all classes."""

    name: str
    share: float = Field(ge=0, le=1)


class Image(_Record):
    """A test image and what an attack makes of it; pictures are PNG in base64.

    Attributes:
        label: what it shows.
        trigger: settings of the attack's trigger, as JSON.
        change: the pixels that the trigger changes, on grey.
    """

    key: str
    label: str
    trigger: str
    target_class: str
    clean: _Png
    change: _Png
    triggered: _Png


class Model(_Record):
    """What a model says of each image, the likeliest class first. Epoch 0 is the poisoned model, of no trial."""

    objective: str
    pretrain_id: str
    trial_id: str | None
    epoch: int = Field(ge=0)
    clean: list[list[Guess]]
    triggered: list[list[Guess]]


class Examples(_Record):
    """Images, and what each model says of them.

    Attributes:
        templates: prompts of each class that class embeddings were made of.
        of_templates: prompts of each class in an evaluation.
    """

    templates: int
    of_templates: int
    images: list[Image]
    models: list[Model]


def write(store: Store, examples: Examples) -> None:
    """Write them into the run directory, in the place of those that are there."""
    store.put(NAME, examples.model_dump_json().encode())


def read(store: Store) -> Examples | None:
    """Return what is there; None where there is nothing. Errors: DataError on a damaged file."""
    if not store.exists(NAME):
        return None
    where = store.path(NAME)
    try:
        found = Examples.model_validate_json(store.get(NAME))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{dotted(first['loc'])}: {first['msg']}"
        raise DataError(problem, where=where, fix="remove it: the next `raybd run` makes it anew") from None
    if any(len(said) != len(found.images) for model in found.models for said in (model.clean, model.triggered)):
        raise DataError("not every model has every image", where=where, fix="remove it")
    return found
