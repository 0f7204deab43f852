"""The study: one YAML file that says data, model, poison, pretraining, cleaning, search, evaluation and resources.

Every default stands here, beside the setting that it belongs to. `study_file.load` reads the YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from raybd import space as search_space
from raybd.provenance import digest
from raybd.space import Range

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ImageView(StrEnum):
    """Augmentation that makes the second image of a pair for SSL."""

    AUTOAUGMENT = "autoaugment"
    CROP_FLIP_COLOUR = "crop_flip_colour"


class TextView(StrEnum):
    """Augmentation that makes the second caption of a pair for SSL."""

    EDA = "eda"


class Pattern(StrEnum):
    """What a badnet patch shows."""

    NOISE = "noise"
    FIXED = "fixed"


class Placement(StrEnum):
    """Where on the image a patch goes."""

    RANDOM = "random"
    TOP_LEFT = "top_left"
    TOP_RIGHT = "top_right"
    BOTTOM_LEFT = "bottom_left"
    BOTTOM_RIGHT = "bottom_right"
    CENTRE = "centre"
    FOUR_CORNERS = "four_corners"


class Sampler(StrEnum):
    """How the search draws settings."""

    TPE = "tpe"
    NSGA2 = "nsga2"
    RANDOM = "random"
    GRID = "grid"


class Tell(StrEnum):
    """Which epoch of a trial stands for it before Optuna."""

    LARGEST_AREA = "largest_area"
    LAST_EPOCH = "last_epoch"


class Precision(StrEnum):
    """Arithmetic of the forward pass; `auto` is bf16 on a GPU and fp32 elsewhere."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Data(_Section):
    """Webdataset shards. `root` is a folder, an fsspec URL or an embedded set's name; the rest is relative to it."""

    root: str = Field("emoji-32", description="folder, fsspec URL, or an embedded data set's name")
    train: str | tuple[str, ...] = Field("train/*.tar*", description="shards to train on: glob, brace list or list")
    test: str | tuple[str, ...] = Field("test/*.tar*", description="labelled shards to evaluate on; may be full URLs")
    classes: str = Field("classes.json", description="JSON list of classes, or `imagenet`")
    max_train_samples: PositiveInt | None = Field(None, description="use only the first so many training pairs")
    max_broken: Fraction = Field(0.01, description="share of unusable samples above which the data is refused")
    cache_gb: NonNegativeFloat = Field(8.0, description="decode training pairs once if they fit in this; else stream")
    cache_dir: str | None = Field(None, description="where decoded images are kept; default: the user's cache folder")
    loader_workers: NonNegativeInt = Field(2, description="decoding processes for each trainer when streaming")
    shuffle_buffer: PositiveInt = Field(5000, description="samples that streaming mixes")


class Model(_Section):
    """An open_clip model: a built-in name, or one of raybd's own for 32-pixel images."""

    name: str = "resnet-tiny-32"
    start: str | None = Field(None, description="checkpoint to start pretraining from; default: random weights")


class Trigger(_Section):
    """The trigger and where it goes. Sizes are pixels of the image as the model sees it."""

    name: Literal["badnet"] = "badnet"
    size: PositiveInt = 16
    pattern: Pattern = Pattern.NOISE
    placement: Placement = Placement.RANDOM
    wrap: bool = Field(default=False, description="wrap values outside [0, 255] around, as the published code does")


class Poison(_Section):
    """How many training pairs are poisoned, with what, towards which class."""

    trigger: Trigger = Trigger()
    target_class: str = "banana"
    poison_rate: Fraction | None = Field(None, description="share of the training pairs")
    num_poisoned: PositiveInt | None = Field(None, description="number of training pairs")
    templates: str | tuple[str, ...] = Field("openai_imagenet", description="what poisoned captions are made from")

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.poison_rate is None) == (self.num_poisoned is None):
            raise ValueError("give poison_rate or num_poisoned, one of the two")
        return self


class LossWeights(_Section):
    """Weights of the contrastive loss across modalities and of the self-supervised loss within each."""

    mmcl: NonNegativeFloat = 1.0
    ssl: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.mmcl == 0 and self.ssl == 0:
            raise ValueError("mmcl and ssl are both 0: nothing would be learnt")
        return self


class TrainSettings(_Section):
    """Everything about one training run, pretraining or cleaning, apart from data and model."""

    epochs: PositiveInt
    batch_size: Annotated[int, Field(ge=2)] = Field(description="global batch, over all workers")
    lr: PositiveFloat
    warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: PositiveFloat = 1e-8
    loss_weights: LossWeights = LossWeights()
    image_view: ImageView = ImageView.AUTOAUGMENT
    text_view: TextView = TextView.EDA
    precision: Precision = Precision.AUTO


class PretrainObjective(_Section):
    """One pretrain objective: what it has of its own, loss weights above all; the rest is from `pretrain`."""

    loss_weights: LossWeights | None = None
    epochs: PositiveInt | None = None
    batch_size: Annotated[int, Field(ge=2)] | None = None
    lr: PositiveFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    weight_decay: NonNegativeFloat | None = None
    image_view: ImageView | None = None
    text_view: TextView | None = None


def _plain_name(name: str) -> str:
    if not name or not name.replace("_", "").isalnum() or not name.isascii():
        raise ValueError(f"{name!r} must be letters, digits and _")
    return name


class Pretrain(TrainSettings):
    """Pretraining: one run for each objective, on the poisoned pairs."""

    epochs: PositiveInt = 64
    batch_size: Annotated[int, Field(ge=2)] = 2048
    lr: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt = 10_000
    objectives: dict[Annotated[str, AfterValidator(_plain_name)], PretrainObjective] = Field(
        default_factory=lambda: {
            "mmcl": PretrainObjective(loss_weights=LossWeights(mmcl=1, ssl=0)),
            "mmcl_ssl": PretrainObjective(loss_weights=LossWeights(mmcl=1, ssl=1)),
        },
        min_length=1,
    )

    def settings(self, objective: str) -> TrainSettings:
        """Return the settings in force for one objective."""
        common = self.model_dump(exclude={"objectives"})
        own = self.objectives[objective].model_dump(exclude_none=True)
        return TrainSettings(**{**common, **own})


class CleanSettings(TrainSettings):
    """The settings of one cleaning trial: each may be searched."""

    method: Literal["cleanclip"] = "cleanclip"
    epochs: PositiveInt = 20
    batch_size: Annotated[int, Field(ge=2)] = 64
    lr: PositiveFloat = 1e-4
    warmup_steps: NonNegativeInt = 50
    loss_weights: LossWeights = LossWeights(mmcl=1, ssl=1)

    @field_validator("loss_weights", mode="before")
    @classmethod
    def _cleanclip_weights(cls, given: Any) -> Any:
        """Take CleanCLIP's weight, 1, for one that is left out."""
        return {"mmcl": 1.0, "ssl": 1.0, **given} if isinstance(given, dict) else given


class Clean(CleanSettings):
    """Cleaning: the set it finetunes on, and the settings wherever the search does not draw them."""

    num_samples: PositiveInt = Field(100_000, description="cleaning pairs, drawn from what the poison left alone")
    leaked_poison: NonNegativeInt = Field(0, description="poisoned pairs that slip into the cleaning set")

    def settings(self, params: Mapping[str, Any]) -> CleanSettings:
        """Return the settings with the searched `params` (dotted names) put in. Errors: pydantic's ValidationError."""
        values = self.model_dump(exclude={"num_samples", "leaked_poison"})
        for name, value in params.items():
            *parents, leaf = name.split(".")
            inner = values
            for parent in parents:
                inner = inner[parent]
            inner[leaf] = value
        return CleanSettings(**values)


def searchable() -> dict[str, type]:
    """Return the settings that a search may draw, by dotted name, with their types."""
    kinds: dict[str, type] = {}
    for name, field in CleanSettings.model_fields.items():
        if name == "loss_weights":
            kinds |= {f"loss_weights.{weight}": float for weight in LossWeights.model_fields}
        elif name != "precision":
            text = str(field.annotation)
            kinds[name] = float if "float" in text else int if "int" in text else str
    return kinds


def _known_setting(name: str) -> str:
    if name not in searchable():
        raise ValueError(f"{name!r} is not a setting of cleaning: one of {', '.join(searchable())}")
    return name


Searched = Annotated[str, AfterValidator(_known_setting)]


def _check_range(name: str, found: Range) -> None:
    """Raise ValueError where a searched setting could not have the values that its range has."""
    kind = searchable()[name]
    values = [v for v in (found.low, found.high, *(found.choices or ())) if v is not None]
    if kind is int and any(not isinstance(v, int) for v in (*values, found.step or 1)):
        raise ValueError(f"space.{name}: takes whole numbers")
    if kind is float and any(isinstance(v, str) for v in values):
        raise ValueError(f"space.{name}: takes numbers")
    if kind is str and found.choices is None:
        raise ValueError(f"space.{name}: takes names, give them as choices")
    for value in values:
        try:
            Clean().settings({name: value})
        except ValidationError as error:
            raise ValueError(f"space.{name}: cannot be {value}: {error.errors()[0]['msg']}") from None


class Search(_Section):
    """Which cleanings are tried."""

    num_trials: PositiveInt = Field(20, description="trials for each pretrain objective")
    sampler: Sampler = Sampler.TPE
    startup_trials: NonNegativeInt = Field(10, description="trials that tpe draws at random before it models")
    population: PositiveInt = Field(50, description="population of nsga2")
    space: dict[Searched, Range] = Field(default_factory=dict)
    known: tuple[dict[Searched, search_space.Value], ...] = Field((), description="settings to try first")
    tell: Tell = Field(Tell.LARGEST_AREA, description="which epoch stands for a trial before Optuna")
    retries: NonNegativeInt = Field(1, description="how often a trial whose process died is tried again")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        search_space.ordered(self.space)
        for name, found in self.space.items():
            _check_range(name, found)
        if self.sampler is Sampler.GRID:
            search_space.grid(self.space)
        for i, point in enumerate(self.known):
            for name, value in point.items():
                if name not in self.space:
                    raise ValueError(f"known[{i}]: {name} is not in the space")
                found = self.space[name]
                whole = searchable()[name] is not int or isinstance(value, int)
                if not (whole and found.contains(value)):
                    raise ValueError(f"known[{i}]: {name} cannot be {value}: {search_space.describe(found)}")
        return self


class Evaluation(_Section):
    """Zero-shot accuracy and attack success rate."""

    templates: str | tuple[str, ...] = Field(
        "openai_imagenet", description="prompt ensemble: a known name, or the list"
    )
    include_target: bool = Field(default=False, description="count triggered images of the target class too")
    search_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of the images that the search sees"
    )
    batch_size: PositiveInt = 256


class Resources(_Section):
    """What the study may use. `auto` takes what the cluster has."""

    num_workers: PositiveInt | Literal["auto"] = Field("auto", description="pretraining workers: one a GPU, or one")
    use_gpu: bool | Literal["auto"] = "auto"
    cpus_per_worker: PositiveInt | Literal["auto"] = "auto"
    concurrent_trials: PositiveInt | Literal["auto"] = "auto"
    cpus_per_trial: PositiveInt = 1
    gpus_per_trial: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_failures: NonNegativeInt = Field(3, description="how often pretraining workers may die before giving up")


# They change what is done, or how, but not what it gives: they may differ between two calls on one run directory.
FREE_SETTINGS = ("resources", "search.num_trials", "search.retries", "data.cache_dir", "data.loader_workers")


class Study(_Section):
    """A whole study, every default resolved."""

    name: Annotated[str, AfterValidator(_plain_name)]
    seed: NonNegativeInt = 0
    data: Data = Data()
    model: Model = Model()
    poison: Poison
    pretrain: Pretrain = Pretrain()
    clean: Clean = Clean()
    search: Search = Search()
    evaluation: Evaluation = Evaluation()
    resources: Resources = Resources()

    def resolved(self) -> dict[str, Any]:
        """Return all settings as plain JSON-able data."""
        return self.model_dump(mode="json")

    def hash(self) -> str:
        """Return the hash that each row of the tables carries: of all settings but the free ones."""
        found = self.resolved()
        for name in FREE_SETTINGS:
            section, _, setting = name.partition(".")
            if setting:
                del found[section][setting]
            else:
                del found[section]
        return digest(found)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, at: str = "") -> list[str]:
    """Return `field: old → new` for each setting that two resolved studies have differently."""
    found = []
    for key in sorted(set(old) | set(new)):
        name = f"{at}.{key}" if at else key
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, at=name)
        elif before != after:
            found.append(f"{name}: {before} → {after}")
    return found
