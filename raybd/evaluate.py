"""Evaluation: zero-shot accuracy with a prompt ensemble, and the attack success rate, as integer counts.

C classes, T templates, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from raybd.data.cache import Images
from raybd.data.prompts import templates
from raybd.errors import DataError
from raybd.metrics import SPLITS, Counts
from raybd.model import Clip
from raybd.poison.plan import PoisonPlan
from raybd.seeding import fork, share
from raybd.study import Evaluation


@dataclass(frozen=True)
class EvaluationSet:
    """Labelled images, who sees which half, the trigger, and the prompts.

    Attributes:
        in_search_N: True for images of the `search` half; the others are the `report` half.
        triggered_N: True for images that get the trigger: those of other classes, or all with `include_target`.
        prompts: T prompts for each of C classes, class by class.
    """

    images: Images
    in_search_N: NDArray[np.bool_]
    triggered_N: NDArray[np.bool_]
    target: int
    plan: PoisonPlan
    seed: int
    prompts: tuple[str, ...]
    num_classes: int
    batch_size: int


def make_set(
    images: Images, *, classes: list[str], target: int, plan: PoisonPlan, evaluation: Evaluation, seed: int
) -> EvaluationSet:
    """Make an evaluation set; which image is in which half depends on its key and the seed alone.

    Errors: DataError where a label has no class, or a half would have no clean or no triggered image.
    """
    labels = images.index.labels
    if len(labels) and labels.max() >= len(classes):
        raise DataError(
            f"label {labels.max()} in the test shards, but only {len(classes)} classes", where="data.classes"
        )
    searched = (share(seed, "split", str(key)) < evaluation.search_share for key in images.index.keys)
    in_search_N = np.fromiter(searched, dtype=bool, count=len(labels))
    triggered_N = np.ones(len(labels), dtype=bool) if evaluation.include_target else labels != target
    for split, half in (("search", in_search_N), ("report", ~in_search_N)):
        if not (half & triggered_N).any():
            raise DataError(
                f"the {split} half has no image to trigger: {len(labels)} test images in all",
                where="data.test",
                fix="evaluate on more images",
            )
    made = templates(evaluation.templates, field="evaluation.templates")
    prompts = tuple(template(name) for name in classes for template in made)
    return EvaluationSet(
        images, in_search_N, triggered_N, target, plan, seed, prompts, len(classes), evaluation.batch_size
    )


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and every part of it back into the mode that it was in."""
    modes = [(part, part.training) for part in net.modules()]
    net.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


@lru_cache(maxsize=2)
def _prompt_tokens(model: str, prompts: tuple[str, ...]) -> Tensor:
    return open_clip.get_tokenizer(model)(list(prompts))


def class_embeddings(clip: Clip, found: EvaluationSet, *, device: torch.device) -> Tensor:
    """Return normalised class embeddings [C, D]: the mean of the normalised prompt embeddings, normalised again."""
    tokens_PL = _prompt_tokens(clip.name, found.prompts)
    parts = [clip.net.encode_text(part.to(device), normalize=True).float() for part in tokens_PL.split(1024)]
    mean_CD = torch.cat(parts).view(found.num_classes, -1, parts[0].shape[-1]).mean(dim=1)
    return F.normalize(mean_CD, dim=-1)


def evaluate(
    clip: Clip,
    found: EvaluationSet,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    autocast: Callable[[], torch.autocast] | None = None,
) -> dict[str, Counts]:
    """Count right and attacked images, for each half. The mode of every module is as it was afterwards.

    Clean and triggered images go the same way; the trigger is put last, on the image that the model sees, and is
    the same for an image in every evaluation.

    Args:
        rank, world_size: count every `world_size`-th batch only; the caller adds the ranks up.
    """
    totals = dict.fromkeys(SPLITS, Counts())
    with evaluating(clip.net), autocast() if autocast else torch.autocast(device.type, enabled=False):
        classes_CD = class_embeddings(clip, found, device=device)
        starts = range(0, len(found.images.index), found.batch_size)
        for start in starts[rank::world_size]:
            rows = np.arange(start, min(start + found.batch_size, len(found.images.index)))
            for split, counts in _count(clip, found, rows, classes_CD, device).items():
                totals[split] = totals[split] + counts
    return totals


def _count(
    clip: Clip, found: EvaluationSet, rows: NDArray[np.int64], classes_CD: Tensor, device: torch.device
) -> dict[str, Counts]:
    clean_BCHW = torch.from_numpy(found.images.pixels(rows))
    hit_rows = np.flatnonzero(found.triggered_N[rows])
    triggered = [
        found.plan.triggered(clean_BCHW[i], seed=fork(found.seed, "evaluate", str(found.images.index.keys[rows[i]])))
        for i in hit_rows
    ]
    both = torch.cat([clean_BCHW, torch.stack(triggered)]) if triggered else clean_BCHW
    pixels = clip.normalise(both.to(device)).contiguous(memory_format=torch.channels_last)
    features = clip.net.encode_image(pixels, normalize=True).float()
    # Outside autocast: in bf16 close classes would tie, and a tie goes to the lowest class number.
    with torch.autocast(device.type, enabled=False):
        predicted = (features @ classes_CD.T).argmax(dim=-1).cpu().numpy()
    labels, clean, attacked = found.images.index.labels[rows], predicted[: len(rows)], predicted[len(rows) :]
    counts = {}
    for split, half in (("search", found.in_search_N[rows]), ("report", ~found.in_search_N[rows])):
        hit_half = half[hit_rows]
        counts[split] = Counts(
            n_clean=int(half.sum()),
            correct_clean=int((clean == labels)[half].sum()),
            n_triggered=int(hit_half.sum()),
            hit_target=int((attacked == found.target)[hit_half].sum()),
            correct_triggered=int((attacked == labels[hit_rows])[hit_half].sum()),
        )
    return counts
