"""The study: one YAML file that says data, model, poison, pretraining, cleaning, search, evaluation and resources.

Every default stands here, beside the setting that it belongs to. `study_file.load` reads the YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, NonNegativeInt, model_validator

from raybd.errors import Misfit
from raybd.provenance import digest
from raybd.study import agreement
from raybd.study.base import Section, plain_name
from raybd.study.cleaning import Clean, CleanSettings, searchable
from raybd.study.data import Data, Model, Resources
from raybd.study.evaluation import Evaluation
from raybd.study.methods import TRAITS, Method
from raybd.study.poison import (
    AttackSettings,
    BadNet,
    BadNetStripes,
    Blended,
    BlendedStripes,
    BlendedText,
    BlendedTriangles,
    LabelConsistent,
    Noise,
    Pattern,
    Placement,
    Poison,
    Sig,
    Trigger,
    Warped,
)
from raybd.study.recording import Recording, TrackerName
from raybd.study.search import Failure, Sampler, Search, Stopping, Tell
from raybd.study.training import (
    ImageView,
    LossWeights,
    Precision,
    Pretrain,
    PretrainObjective,
    Schedule,
    TextView,
    TrainSettings,
)

__all__ = [
    "FREE_SETTINGS",
    "TRAITS",
    "AttackSettings",
    "BadNet",
    "BadNetStripes",
    "Blended",
    "BlendedStripes",
    "BlendedText",
    "BlendedTriangles",
    "Clean",
    "CleanSettings",
    "Data",
    "Evaluation",
    "Failure",
    "ImageView",
    "LabelConsistent",
    "LossWeights",
    "Method",
    "Model",
    "Noise",
    "Pattern",
    "Placement",
    "Poison",
    "Precision",
    "Pretrain",
    "PretrainObjective",
    "Recording",
    "Resources",
    "Sampler",
    "Schedule",
    "Search",
    "Sig",
    "Stopping",
    "Study",
    "Tell",
    "TextView",
    "TrackerName",
    "TrainSettings",
    "Trigger",
    "Warped",
    "differences",
    "searchable",
]

# They change what is done, or how, but not what it gives: they may differ between two calls on one run directory.
FREE_SETTINGS = (
    "resources",
    "record",
    "search.num_trials",
    "search.retries",
    "search.retry_on",
    "search.max_failed",
    "search.hang_minutes",
    "data.cache_dir",
    "data.loader_workers",
)


class Study(Section):
    """A whole study, every default resolved."""

    name: Annotated[str, AfterValidator(plain_name)] = Field(description="letters, digits and _; results: runs/NAME")
    seed: NonNegativeInt = Field(0, description="all randomness comes from it")
    data: Data = Data()
    model: Model = Model()
    poison: Poison
    pretrain: Pretrain = Pretrain()
    clean: Clean = Clean()
    search: Search = Search()
    evaluation: Evaluation = Evaluation()
    resources: Resources = Resources()
    record: Recording = Recording()

    @model_validator(mode="after")
    def _methods_agree(self) -> Self:
        if faults := list(agreement.faults(self.clean, self.search.space)):
            raise Misfit(faults)
        return self

    @model_validator(mode="after")
    def _something_to_clean(self) -> Self:
        untrained = [name for name in self.pretrain.objectives if self.pretrain.settings(name).epochs == 0]
        if untrained and not self.model.trained:
            what = f"0 for {', '.join(untrained)}: a model that nobody trained"
            raise Misfit([(("pretrain", "epochs"), f"{what}; give model.start or model.pretrained, or train")])
        if len(untrained) > 1:
            what = f"0 for {', '.join(untrained)}: all the same model; name one of them"
            raise Misfit([(("pretrain", "epochs"), what)])
        return self

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
