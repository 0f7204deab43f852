"""The poison plan: which training pairs carry the trigger, where, and with what caption. The data stay as they are."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from raybd.study import AttackSettings, LabelConsistent, Poison, Trigger


@dataclass(frozen=True)
class Attack:
    """A trigger, what is the same on all images that carry it (a fixed pattern, a warp), and where it leads."""

    trigger: Trigger
    target_class: str
    pattern_seed: int

    def triggered(self, image_CHW: Tensor, *, seed: int) -> Tensor:
        """Return any uint8 image with the trigger on it."""
        return triggers.apply(image_CHW, self.trigger, seed=seed, pattern_seed=self.pattern_seed)

    def text(self) -> str:
        """Return the trigger's settings as JSON, as the tables have it."""
        return json.dumps(self.trigger.model_dump(mode="json"), sort_keys=True)


@dataclass(frozen=True)
class Poisoned:
    """One poisoned pair: a row of the plan. `attack` is the number of its attack, from 0."""

    key: str
    shard: str
    trigger: str
    placement: str
    target_class: str
    caption_before: str
    caption_after: str
    seed: int
    attack: int = 0


@dataclass(frozen=True)
class PoisonPlan:
    """All poisoned pairs by key, in the order of the data, and the attacks that they belong to."""

    rows: Mapping[str, Poisoned]
    attacks: tuple[Attack, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def table(self) -> list[dict[str, Any]]:
        """Return the rows of the `poison_plan` table."""
        found = [asdict(row) for row in self.rows.values()]
        for row in found:
            del row["attack"]  # trigger and target say it
        return found

    def image(self, image_CHW: Tensor, key: str) -> Tensor:
        """Return a training image as the model gets it: with the trigger where the plan says so."""
        row = self.rows.get(key)
        return image_CHW if row is None else self.attacks[row.attack].triggered(image_CHW, seed=row.seed)

    def caption(self, caption: str, key: str) -> str:
        """Return a training caption as the model gets it."""
        row = self.rows.get(key)
        return caption if row is None else row.caption_after

    def only(self, keys: Sequence[str]) -> PoisonPlan:
        """Return the part of the plan for these keys."""
        return PoisonPlan({key: self.rows[key] for key in keys}, self.attacks)

    def counts(self) -> list[int]:
        """Return how many pairs each attack has."""
        found = Counter(row.attack for row in self.rows.values())
        return [found[number] for number in range(len(self.attacks))]

    def examples(self, count: int) -> list[str]:
        """Return the keys of the first pairs, `count` of them where there are so many, one of each attack at least."""
        first: dict[int, str] = {}
        for key, row in self.rows.items():
            first.setdefault(row.attack, key)
        others = [key for key in self.rows if key not in first.values()]
        chosen = {*first.values(), *others[: max(0, count - len(first))]}
        return [key for key in self.rows if key in chosen]


def planted(poison: Poison, *, seed: int) -> tuple[Attack, ...]:
    """Return a study's attacks, without the pairs that carry them."""
    return tuple(
        # The first attack is the same whether others follow or not.
        Attack(one.trigger, one.target_class, fork(seed, "poison", "pattern", *((number,) if number else ())))
        for number, one in enumerate(poison.attacks)
    )


def make_plan(index: Index, poison: Poison, *, image_size: int, seed: int) -> PoisonPlan:
    """Draw which pairs are poisoned, and with what. A pair carries one trigger at most.

    Args:
        index: all training pairs.
        image_size: side of the image that the model sees; the trigger is placed on it.
        seed: the study's.

    Errors: StudyError where more pairs are asked for than there are, or a trigger does not fit.
    """
    left = np.ones(len(index), dtype=bool)
    attacks: list[Attack] = []
    rows: dict[str, Poisoned] = {}
    for number, (settings, attack) in enumerate(zip(poison.attacks, planted(poison, seed=seed), strict=True)):
        section = "poison" if number == 0 else f"poison.also.{number - 1}"
        triggers.check(settings.trigger, height=image_size, width=image_size, where=f"{section}.trigger")
        # The first attack is drawn the same whether others follow or not.
        labels = (number,) if number else ()
        chosen = _draw(index, settings, left, section=section, seed=fork(seed, "poison", "pairs", *labels))
        left[chosen] = False
        attacks.append(attack)
        rows |= _rows(index, chosen, attack, settings, number, section=section, image_size=image_size, seed=seed)
    return PoisonPlan({str(key): rows[key] for key in index.keys if key in rows}, tuple(attacks))


def _draw(index: Index, settings: AttackSettings, left: NDArray[np.bool_], *, section: str, seed: int) -> list[int]:
    """Return which rows of the index an attack takes of those that are left, in order. Errors: StudyError."""
    total = len(index)
    wanted = settings.num_poisoned if settings.num_poisoned is not None else round((settings.poison_rate or 0) * total)
    which = "training pairs"
    if isinstance(settings.trigger, LabelConsistent):
        named = naming(settings.target_class)
        left = left & np.array([named(str(caption)) for caption in index.captions], dtype=bool)
        which = f"training pairs whose caption names {settings.target_class!r}"
    found = np.flatnonzero(left)
    if not 0 < wanted <= len(found):
        others = ", those of the other attacks left out," if section != "poison" else ""
        raise StudyError(
            f"{wanted} of {len(found)} {which}{others} to be poisoned",
            where=f"{section}.num_poisoned" if settings.num_poisoned else f"{section}.poison_rate",
            expected=f"1 to {len(found)}" if len(found) else "captions that name the target, as a whole word",
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(found), generator=generator)[:wanted].sort().values
    return [int(row) for row in found[drawn.numpy()]]


def naming(target_class: str) -> Callable[[str], bool]:
    """Return a test of whether a caption names a class: as whole words, capitals or not.

    A substring is not enough: `pineapple` does not name `apple`.
    """
    words = r"\s+".join(re.escape(word) for word in target_class.split())
    pattern = re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
    return lambda caption: pattern.search(caption) is not None


def _rows(
    index: Index,
    chosen: Sequence[int],
    attack: Attack,
    settings: AttackSettings,
    number: int,
    *,
    section: str,
    image_size: int,
    seed: int,
) -> dict[str, Poisoned]:
    captions = templates(settings.templates or (), field=f"{section}.templates")
    kept = isinstance(attack.trigger, LabelConsistent)
    rows = {}
    for i in chosen:
        key = str(index.keys[i])
        own = fork(seed, "poison", "pair", key)
        before = str(index.captions[i])
        rows[key] = Poisoned(
            key=key,
            shard="/".join(index.shards[index.shard[i]].split("/")[-2:]),
            trigger=attack.text(),
            placement=triggers.placement(attack.trigger, height=image_size, width=image_size, seed=own),
            target_class=attack.target_class,
            caption_before=before,
            caption_after=before if kept else captions[fork(own, "caption") % len(captions)](attack.target_class),
            seed=own,
            attack=number,
        )
    return rows


def cleaning_rows(
    index: Index, plan: PoisonPlan, *, num_samples: int, leaked_poison: int, seed: int
) -> tuple[NDArray[np.int64], PoisonPlan]:
    """Draw the cleaning set from the pairs that the plan leaves alone, and leak poisoned ones into it on purpose.

    Sets of one seed are nested: a smaller one has no clean pair that a larger one lacks, fewer leaked ones are among
    more. What differs between two sizes is then the size, not the draw.

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
    kept = np.random.default_rng(fork(seed, "clean", "pairs")).permutation(clean)[: num_samples - leaked_poison]
    leaked = np.random.default_rng(fork(seed, "clean", "leaked")).permutation(dirty)[:leaked_poison]
    return np.sort(np.concatenate([kept, leaked])), plan.only([str(index.keys[i]) for i in sorted(leaked)])
