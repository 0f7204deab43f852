"""Augmented views for SSL: a second image and a second caption, drawn anew for each sample and epoch."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from raybd.study import ImageView, TextView

log = logging.getLogger(__name__)
_SHARE_OF_WORDS = 0.1


def image_views(images_BCHW: Tensor, name: ImageView, *, seeds: Sequence[int]) -> Tensor:
    """Return an augmented copy of each uint8 image [B, 3, H, W], of the same shape.

    A sample's view depends on its own seed alone, not on the batch that it comes in.

    autoaugment: torchvision's, ImageNet policy (arXiv 1805.09501). crop_flip_colour: a cheap view for small images.
    Differs: augments the image as the model sees it; vsahil/attack-cleanclip@3d4bd74 does so before resizing.
    """
    if name is ImageView.AUTOAUGMENT:
        return _autoaugment(images_BCHW, seeds)
    return _crop_flip_colour(images_BCHW, seeds)


class _AutoAugment(v2.AutoAugment):
    """torchvision's AutoAugment with its draws and its operations apart, so that equal operations share one call."""

    def draw(self, seed: int, height: int, width: int) -> list[tuple[str, float]]:
        """Return the operations that torchvision would apply after `torch.manual_seed(seed)`."""
        generator = torch.Generator().manual_seed(seed)
        policy = self._policies[int(torch.randint(len(self._policies), (), generator=generator))]
        found = []
        for operation, probability, magnitude_index in policy:
            if not torch.rand((), generator=generator) <= probability:
                continue
            magnitudes, signed = self._AUGMENTATION_SPACE[operation]
            strengths = magnitudes(10, height, width)
            strength = 0.0
            if strengths is not None:
                strength = float(strengths[magnitude_index])
                if signed and torch.rand((), generator=generator) <= 0.5:
                    strength = -strength
            found.append((operation, strength))
        return found

    def run(self, images_BCHW: Tensor, operation: str, strength: float) -> Tensor:
        """Apply one operation to every image."""
        return self._apply_image_or_video_transform(
            images_BCHW, operation, strength, interpolation=self.interpolation, fill=self._fill
        )


@cache
def _policy() -> _AutoAugment:
    return _AutoAugment(v2.AutoAugmentPolicy.IMAGENET)


def _autoaugment(images_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
    policy = _policy()
    draws = [policy.draw(seed, *images_BCHW.shape[-2:]) for seed in seeds]
    views_BCHW = images_BCHW.clone()
    for step in range(2):
        groups: dict[tuple[str, float], list[int]] = defaultdict(list)
        for i, operations in enumerate(draws):
            if step < len(operations):
                groups[operations[step]].append(i)
        for (operation, strength), rows in groups.items():
            views_BCHW[rows] = policy.run(views_BCHW[rows], operation, strength)
    return views_BCHW


def _crop_flip_colour(images_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
    """A crop of 40 to 100 % of the area, a flip half of the time, brightness, contrast and saturation within 40 %."""
    draws_BK = torch.stack([torch.rand(7, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    scale_B = (0.4 + 0.6 * draws_BK[:, 0]).sqrt()
    shift_B2 = (2 * draws_BK[:, 1:3] - 1) * (1 - scale_B)[:, None]
    flip_B = torch.where(draws_BK[:, 3] < 0.5, -1.0, 1.0)
    theta_B23 = torch.zeros(len(seeds), 2, 3)
    theta_B23[:, 0, 0], theta_B23[:, 1, 1], theta_B23[:, :, 2] = scale_B * flip_B, scale_B, shift_B2
    grid_BHW2 = F.affine_grid(theta_B23, list(images_BCHW.shape), align_corners=False)
    x_BCHW = F.grid_sample(images_BCHW.float(), grid_BHW2, padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = (0.6 + 0.8 * draws_BK[:, 4 + i, None, None, None] for i in range(3))
    x_BCHW = x_BCHW * brightness
    grey_B1HW = (x_BCHW * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    x_BCHW = grey_B1HW + saturation * (x_BCHW - grey_B1HW)
    mean_B111 = grey_B1HW.mean(dim=(2, 3), keepdim=True)
    x_BCHW = mean_B111 + contrast * (x_BCHW - mean_B111)
    return x_BCHW.round().clamp(0, 255).to(torch.uint8)


@cache
def wordnet() -> Any | None:
    """Return nltk's WordNet reader; None where nltk or its data is not installed, which is said once."""
    try:
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
