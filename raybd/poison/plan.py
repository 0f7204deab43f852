"""The poison plan: which training pairs carry the trigger, where, and with what caption. The data stay as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raybd.data.prompts import templates
from raybd.data.shards import Index
from raybd.errors import DataError, StudyError
from raybd.poison import triggers
from raybd.seeding import fork
from raybd.study import Poison, Trigger


@dataclass(frozen=True)
class Poisoned:
    """One poisoned pair: a row of the plan."""

    key: str
    shard: str
    trigger: str
    placement: str
    target_class: str
    caption_before: str
    caption_after: str
    seed: int


@dataclass(frozen=True)
class PoisonPlan:
    """All poisoned pairs by key, the trigger and the seed of its fixed pattern."""

    rows: Mapping[str, Poisoned]
    trigger: Trigger
    pattern_seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def table(self) -> list[dict[str, Any]]:
        """Return the rows of the `poison_plan` table."""
        return [asdict(row) for row in self.rows.values()]

    def image(self, image_CHW: Tensor, key: str) -> Tensor:
        """Return a training image as the model gets it: with the trigger where the plan says so."""
        row = self.rows.get(key)
        return image_CHW if row is None else self.triggered(image_CHW, seed=row.seed)

    def caption(self, caption: str, key: str) -> str:
        """Return a training caption as the model gets it."""
        row = self.rows.get(key)
        return caption if row is None else row.caption_after

    def triggered(self, image_CHW: Tensor, *, seed: int) -> Tensor:
        """Return any uint8 image with the trigger on it."""
        return triggers.apply(image_CHW, self.trigger, seed=seed, pattern_seed=self.pattern_seed)

    def only(self, keys: Sequence[str]) -> PoisonPlan:
        """Return the part of the plan for these keys."""
        return PoisonPlan({key: self.rows[key] for key in keys}, self.trigger, self.pattern_seed)


def make_plan(index: Index, poison: Poison, *, image_size: int, seed: int) -> PoisonPlan:
    """Draw which pairs are poisoned, and with what.

    Args:
        index: all training pairs.
        image_size: side of the image that the model sees; the trigger is placed on it.
        seed: the study's.

    Errors: StudyError where more pairs are asked for than there are, or the trigger does not fit.
    """
    total = len(index)
    wanted = poison.num_poisoned if poison.num_poisoned is not None else round((poison.poison_rate or 0) * total)
    if not 0 < wanted <= total:
        raise StudyError(
            f"{wanted} of {total} training pairs to be poisoned",
            where="poison.num_poisoned" if poison.num_poisoned else "poison.poison_rate",
            expected=f"1 to {total}",
        )
    generator = torch.Generator().manual_seed(fork(seed, "poison", "pairs"))
    chosen = torch.randperm(total, generator=generator)[:wanted].sort().values.tolist()
    captions = templates(poison.templates, field="poison.templates")
    rows = {}
    for i in chosen:
        key = str(index.keys[i])
        own = fork(seed, "poison", "pair", key)
        corners = triggers.place(poison.trigger, height=image_size, width=image_size, seed=own)
        rows[key] = Poisoned(
            key=key,
            shard="/".join(index.shards[index.shard[i]].split("/")[-2:]),
            trigger=json.dumps(poison.trigger.model_dump(mode="json"), sort_keys=True),
            placement=triggers.format_corners(corners),
            target_class=poison.target_class,
            caption_before=str(index.captions[i]),
            caption_after=captions[fork(own, "caption") % len(captions)](poison.target_class),
            seed=own,
        )
    return PoisonPlan(rows, poison.trigger, fork(seed, "poison", "pattern"))


def cleaning_rows(
    index: Index, plan: PoisonPlan, *, num_samples: int, leaked_poison: int, seed: int
) -> tuple[NDArray[np.int64], PoisonPlan]:
    """Draw the cleaning set from the pairs that the plan leaves alone, and leak poisoned ones into it on purpose.

    Returns: rows of `index` in order (num_samples of them, leaked ones included), and the plan of the leaked.

    Errors: DataError where there are too few pairs.
    """
    poisoned = np.array([str(key) in plan.rows for key in index.keys])
    clean, dirty = np.flatnonzero(~poisoned), np.flatnonzero(poisoned)
    if num_samples - leaked_poison > len(clean) or leaked_poison > min(len(dirty), num_samples):
        raise DataError(
            f"{num_samples} cleaning pairs, {leaked_poison} of them poisoned, cannot be drawn from {len(clean)} clean "
            f"and {len(dirty)} poisoned training pairs",
            where="clean.num_samples",
            fix=f"ask for at most {len(clean)} clean pairs",
        )
    draw = np.random.default_rng(fork(seed, "clean", "pairs"))
    kept = draw.choice(clean, size=num_samples - leaked_poison, replace=False)
    leaked = draw.choice(dirty, size=leaked_poison, replace=False)
    return np.sort(np.concatenate([kept, leaked])), plan.only([str(index.keys[i]) for i in sorted(leaked)])
