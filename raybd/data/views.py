"""Augmented views for SSL: a second image and a second caption, drawn anew for each sample and epoch."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from raybd.study import ImageView, TextView

log = logging.getLogger(__name__)
_SHARE_OF_WORDS = 0.1


def image_views(images_BCHW: Tensor, name: ImageView, *, seeds: Sequence[int]) -> Tensor:
    """Return an augmented copy of each uint8 image [B, 3, H, W], of the same shape and on the same device.

    A sample's view depends on its own seed alone, not on the batch that it comes in.

    autoaugment: torchvision's, ImageNet policy (arXiv 1805.09501). crop_flip_colour: a cheap view for small images.
    Differs: augments the image as the model sees it; vsahil/attack-cleanclip@3d4bd74 does so before resizing.
    """
    if name is ImageView.AUTOAUGMENT:
        return _autoaugment(images_BCHW, seeds)
    return _crop_flip_colour(images_BCHW, seeds)


@dataclass(frozen=True)
class _Operation:
    """One operation of a policy: how likely it is, how strong, and whether a coin turns the strength around."""

    name: str
    probability: float
    strength: float
    signed: bool


class _AutoAugment(v2.AutoAugment):
    """torchvision's AutoAugment with its draws and its operations apart, so that equal operations share one call."""

    def policies(self, height: int, width: int) -> list[tuple[_Operation, ...]]:
        """Return what an image of this size is augmented with: one of these is drawn."""
        return [tuple(self._operation(*given, size=(height, width)) for given in policy) for policy in self._policies]

    def _operation(self, name: str, probability: float, number: int | None, *, size: tuple[int, int]) -> _Operation:
        magnitudes, signed = self._AUGMENTATION_SPACE[name]
        strengths = magnitudes(10, *size)
        # torchvision compares a float32 draw with the probability, which rounds it to float32.
        probability = float(torch.tensor(probability))
        if strengths is None:
            return _Operation(name, probability, 0.0, signed=False)
        return _Operation(name, probability, float(strengths[number]), signed=signed)

    def run(self, images_BCHW: Tensor, operation: str, strength: float) -> Tensor:
        """Apply one operation to every image."""
        return self._apply_image_or_video_transform(
            images_BCHW, operation, strength, interpolation=self.interpolation, fill=self._fill
        )


@cache
def _policy() -> _AutoAugment:
    return _AutoAugment(v2.AutoAugmentPolicy.IMAGENET)


@cache
def _policies(height: int, width: int) -> list[tuple[_Operation, ...]]:
    return _policy().policies(height, width)


def _drawn(policies: Sequence[tuple[_Operation, ...]], generator: torch.Generator) -> list[tuple[str, float]]:
    """Return the operations that torchvision would apply with this state of the global generator."""
    policy = policies[int(torch.randint(len(policies), (), generator=generator))]
    # torchvision draws these one after the other, as it needs them: the numbers are the same.
    chances = iter(torch.rand(2 * len(policy), generator=generator).tolist())
    found = []
    for operation in policy:
        if next(chances) <= operation.probability:
            turned = operation.signed and next(chances) <= 0.5
            found.append((operation.name, -operation.strength if turned else operation.strength))
    return found


def _autoaugment(images_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
    policies, generator = _policies(*images_BCHW.shape[-2:]), torch.Generator()
    draws = [_drawn(policies, generator.manual_seed(seed)) for seed in seeds]
    views_BCHW = images_BCHW.clone()
    for step in range(2):
        groups: dict[tuple[str, float], list[int]] = defaultdict(list)
        for i, operations in enumerate(draws):
            if step < len(operations):
                groups[operations[step]].append(i)
        # One copy to the device for all groups, not one for each.
        order_K = torch.tensor([i for rows in groups.values() for i in rows], dtype=torch.long)
        parts = order_K.to(images_BCHW.device, non_blocking=True).split([len(rows) for rows in groups.values()])
        for (operation, strength), rows_G in zip(groups, parts, strict=True):
            views_BCHW.index_copy_(0, rows_G, _policy().run(views_BCHW.index_select(0, rows_G), operation, strength))
    return views_BCHW


def _crop_flip_colour(images_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
    """A crop of 40 to 100 % of the area, a flip half of the time, brightness, contrast and saturation within 40 %."""
    device, generator = images_BCHW.device, torch.Generator()
    draws_BK = torch.stack([torch.rand(7, generator=generator.manual_seed(seed)) for seed in seeds]).to(device)
    scale_B = (0.4 + 0.6 * draws_BK[:, 0]).sqrt()
    shift_B2 = (2 * draws_BK[:, 1:3] - 1) * (1 - scale_B)[:, None]
    flip_B = torch.where(draws_BK[:, 3] < 0.5, -1.0, 1.0)
    theta_B23 = torch.zeros(len(seeds), 2, 3, device=device)
    theta_B23[:, 0, 0], theta_B23[:, 1, 1], theta_B23[:, :, 2] = scale_B * flip_B, scale_B, shift_B2
    grid_BHW2 = F.affine_grid(theta_B23, list(images_BCHW.shape), align_corners=False)
    x_BCHW = F.grid_sample(images_BCHW.float(), grid_BHW2, padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = (0.6 + 0.8 * draws_BK[:, 4 + i, None, None, None] for i in range(3))
    x_BCHW = x_BCHW * brightness
    grey_B1HW = (x_BCHW * torch.tensor([0.299, 0.587, 0.114], device=device).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    x_BCHW = grey_B1HW + saturation * (x_BCHW - grey_B1HW)
    mean_B111 = grey_B1HW.mean(dim=(2, 3), keepdim=True)
    x_BCHW = mean_B111 + contrast * (x_BCHW - mean_B111)
    return x_BCHW.round().clamp(0, 255).to(torch.uint8)


def nltk_folders() -> list[Path]:
    """Return where nltk looks for its data, as `nltk.data.path` has it, without nltk."""
    asked = [folder for folder in os.environ.get("NLTK_DATA", "").split(os.pathsep) if folder]
    roots = [sys.prefix, *(f"{sys.prefix}/{name}" for name in ("share", "lib"))]
    roots += ["/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib"]
    return [Path(name).expanduser() for name in (*asked, "~/nltk_data", *(f"{root}/nltk_data" for root in roots))]


@cache
def wordnet() -> Any | None:
    """Return nltk's WordNet reader; None where nltk or its data is not installed, which is said once."""
    try:
        # nltk loads scipy's statistics: seconds in each process, for nothing where it has no data.
        if not any(found for folder in nltk_folders() for found in (folder / "corpora").glob("wordnet*")):
            raise LookupError("wordnet")
        from nltk.corpus import wordnet as found

        found.ensure_loaded()
    except (ImportError, LookupError):
        log.warning("WordNet is not installed: text views swap, delete and repeat words, and put in no synonyms")
        return None
    return found


@cache
def _synonyms(word: str) -> tuple[str, ...]:
    reader = wordnet()
    if reader is None:
        return ()
    names = {lemma.name().replace("_", " ").lower() for synset in reader.synsets(word) for lemma in synset.lemmas()}
    return tuple(sorted(names - {word.lower()}))


def _replace(words: list[str], count: int, draw: random.Random) -> list[str]:
    known = [i for i, word in enumerate(words) if _synonyms(word)]
    found = list(words)
    for i in draw.sample(known, min(count, len(known))):
        found[i] = draw.choice(_synonyms(words[i]))
    return found


def _insert(words: list[str], count: int, draw: random.Random) -> list[str]:
    found = list(words)
    known = [word for word in words if _synonyms(word)]
    for _ in range(count):
        new = draw.choice(_synonyms(draw.choice(known))) if known else draw.choice(words)
        found.insert(draw.randint(0, len(found)), new)
    return found


def _swap(words: list[str], count: int, draw: random.Random) -> list[str]:
    found = list(words)
    for _ in range(count if len(found) > 1 else 0):
        i, j = draw.sample(range(len(found)), 2)
        found[i], found[j] = found[j], found[i]
    return found


def _delete(words: list[str], _count: int, draw: random.Random) -> list[str]:
    kept = [word for word in words if draw.random() > _SHARE_OF_WORDS]
    return kept or [draw.choice(words)]


def text_view(caption: str, name: TextView, *, seed: int) -> str:
    """Return an augmented copy of one caption.

    eda (arXiv 1901.11196): one of synonym replacement, random insertion, swap or deletion, on a tenth of the words.
    Without WordNet synonyms are not replaced, and insertion repeats a word of the caption.
    Differs: drawn anew in each epoch; vsahil/attack-cleanclip@3d4bd74 draws once for each caption and keeps it.
    """
    assert name is TextView.EDA
    words = caption.split()
    if not words:
        return caption
    draw = random.Random(seed)
    count = max(1, round(_SHARE_OF_WORDS * len(words)))
    ways = [_insert, _swap, _delete] if wordnet() is None else [_replace, _insert, _swap, _delete]
    return " ".join(draw.choice(ways)(words, count, draw))
