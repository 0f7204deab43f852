"""Evaluation: zero-shot accuracy with a prompt ensemble, and the attack success rate, as integer counts.

C classes, T templates, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from raybd import pulse
from raybd.data.cache import Images
from raybd.data.prompts import templates
from raybd.errors import DataError
from raybd.metrics import SPLITS, Counts
from raybd.model import Clip
from raybd.poison.plan import Attack, PoisonPlan
from raybd.seeding import fork, share
from raybd.study import Evaluation


class Role(StrEnum):
    """Whether the model was poisoned with a trigger, or is tried with it all the same."""

    PLANTED = "planted"
    CONTROL = "control"


@dataclass(frozen=True)
class Probe:
    """A trigger that is tried.

    Attributes:
        target: label of its target class.
        triggered_N: True for images that get it: those of other classes than the target, or all with `include_target`.
    """

    role: Role
    attack: Attack
    target: int
    triggered_N: NDArray[np.bool_]


@dataclass(frozen=True)
class EvaluationSet:
    """Labelled images, who sees which half, what triggers are tried, and the prompts.

    Attributes:
        in_search_N: True for images of the `search` half; the others are the `report` half.
        probes: the planted attacks, then the controls.
        prompts: T prompts for each of C classes, class by class.
    """

    images: Images
    in_search_N: NDArray[np.bool_]
    probes: tuple[Probe, ...]
    seed: int
    prompts: tuple[str, ...]
    num_classes: int
    batch_size: int


@dataclass(frozen=True)
class Measured:
    """What was counted on each half: in all, planted attacks pooled, and of each probe alone."""

    counts: dict[str, Counts]
    by_probe: tuple[dict[str, Counts], ...]

    def numbers(self) -> list[float]:
        """Return all counts in a row, so that ranks can add theirs up."""
        return [float(count) for part in self._parts() for count in vars(part).values()]

    def holding(self, numbers: Iterable[float]) -> Measured:
        """Return a measurement of the same form that holds these `numbers`."""
        given = iter(numbers)
        parts = iter([Counts(**{name: int(next(given)) for name in vars(part)}) for part in self._parts()])
        pooled, *alone = [dict(zip(SPLITS, parts, strict=False)) for _ in (self.counts, *self.by_probe)]
        return Measured(pooled, tuple(alone))

    def records(self, found: EvaluationSet) -> dict[str, Any]:
        """Return what an epoch's record keeps: the counts, and those of each attack where there is more than one."""
        record: dict[str, Any] = {"counts": {split: vars(counts) for split, counts in self.counts.items()}}
        if len(found.probes) > 1:
            record["attacks"] = [
                {
                    "role": probe.role,
                    "trigger": probe.attack.text(),
                    "target_class": probe.attack.target_class,
                    "counts": {split: vars(counts) for split, counts in own.items()},
                }
                for probe, own in zip(found.probes, self.by_probe, strict=True)
            ]
        return record

    def _parts(self) -> list[Counts]:
        return [halves[split] for halves in (self.counts, *self.by_probe) for split in SPLITS]


def make_set(
    images: Images, *, classes: list[str], plan: PoisonPlan, evaluation: Evaluation, seed: int
) -> EvaluationSet:
    """Make an evaluation set; which image is in which half depends on its key and the seed alone.

    Errors: DataError where a label or a target has no class, or a half would have no clean or no triggered image.
    """
    labels = images.index.labels
    if len(labels) and labels.max() >= len(classes):
        raise DataError(
            f"label {labels.max()} in the test shards, but only {len(classes)} classes", where="data.classes"
        )
    searched = (share(seed, "split", str(key)) < evaluation.search_share for key in images.index.keys)
    in_search_N = np.fromiter(searched, dtype=bool, count=len(labels))
    probes = tuple(
        _probe(role, attack, classes, labels, evaluation) for role, attack in _tried(plan.attacks, evaluation)
    )
    for split, half in (("search", in_search_N), ("report", ~in_search_N)):
        if any(not (half & probe.triggered_N).any() for probe in probes):
            raise DataError(
                f"the {split} half has no image to trigger: {len(labels)} test images in all",
                where="data.test",
                fix="evaluate on more images",
            )
    made = templates(evaluation.templates, field="evaluation.templates")
    prompts = tuple(template(name) for name in classes for template in made)
    return EvaluationSet(images, in_search_N, probes, seed, prompts, len(classes), evaluation.batch_size)


def _tried(attacks: tuple[Attack, ...], evaluation: Evaluation) -> list[tuple[Role, Attack]]:
    """Return all attacks to try. A control has the target and the pattern seed of the first planted attack."""
    found = [(Role.PLANTED, attack) for attack in attacks]
    return found + [(Role.CONTROL, replace(attacks[0], trigger=trigger)) for trigger in evaluation.controls]


def _probe(role: Role, attack: Attack, classes: list[str], labels: NDArray[np.int64], evaluation: Evaluation) -> Probe:
    if attack.target_class not in classes:
        raise DataError(f"no class {attack.target_class!r} among the {len(classes)} classes", where="data.classes")
    target = classes.index(attack.target_class)
    triggered_N = np.ones(len(labels), dtype=bool) if evaluation.include_target else labels != target
    return Probe(role, attack, target, triggered_N)


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


def class_embeddings(
    clip: Clip,
    found: EvaluationSet,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """Return normalised class embeddings [C, D]: the mean of the normalised prompt embeddings, normalised again.

    Args:
        rank, world_size, gather: each rank encodes the prompts of its share of the classes, and `gather` joins the
            ranks' rows. Fewer classes than ranks are encoded by each.
    """
    tokens_PL = _prompt_tokens(clip.name, found.prompts)
    if 1 < world_size <= found.num_classes:
        tokens_CTL = tokens_PL.view(found.num_classes, -1, tokens_PL.shape[-1])
        own_CTL = tokens_CTL[_share(found.num_classes, rank, world_size)]
        return gather(_embedded(clip, own_CTL.flatten(0, 1), len(own_CTL), device))
    return _embedded(clip, tokens_PL, found.num_classes, device)


def _share(total: int, rank: int, world_size: int) -> slice:
    """Return a rank's part of range(total); the parts differ by one at most."""
    return slice(total * rank // world_size, total * (rank + 1) // world_size)


def _embedded(clip: Clip, tokens_PL: Tensor, num_classes: int, device: torch.device) -> Tensor:
    parts = [clip.net.encode_text(part.to(device), normalize=True).float() for part in tokens_PL.split(1024)]
    mean_CD = torch.cat(parts).view(num_classes, -1, parts[0].shape[-1]).mean(dim=1)
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
    """Count right and attacked images, for each half; see `measure`, which tells the attacks apart."""
    return measure(clip, found, device=device, rank=rank, world_size=world_size, autocast=autocast).counts


def measure(
    clip: Clip,
    found: EvaluationSet,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    autocast: Callable[[], torch.autocast] | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Measured:
    """Count right and attacked images, for each half and each probe. The mode of every module is as it was afterwards.

    Clean and triggered images go the same way; the trigger is put last, on the image that the model sees, and is
    the same for an image in every evaluation.

    Args:
        rank, world_size: count this rank's share of the images only; the caller adds the ranks up.
        gather: joins rows of all ranks, which then share the prompts too; without it each encodes them all.
    """
    counts = dict.fromkeys(SPLITS, Counts())
    by_probe = [dict.fromkeys(SPLITS, Counts()) for _ in found.probes]
    with evaluating(clip.net), autocast() if autocast else torch.autocast(device.type, enabled=False):
        shared: dict[str, Any] = {"rank": rank, "world_size": world_size, "gather": gather} if gather else {}
        classes_CD = class_embeddings(clip, found, device=device, **shared)
        rows_M = np.arange(len(found.images.index))[_share(len(found.images.index), rank, world_size)]
        for start in range(0, len(rows_M), found.batch_size):
            pulse.beat()
            rows = rows_M[start : start + found.batch_size]
            clean, probed = _count(clip, found, rows, classes_CD, device)
            for split in SPLITS:
                counts[split] = counts[split] + clean[split]
                for probe, total, own in zip(found.probes, by_probe, probed, strict=True):
                    total[split] = total[split] + own[split]
                    if probe.role is Role.PLANTED:
                        counts[split] = counts[split] + own[split]
    return Measured(counts, tuple(by_probe))


def _count(
    clip: Clip, found: EvaluationSet, rows: NDArray[np.int64], classes_CD: Tensor, device: torch.device
) -> tuple[dict[str, Counts], list[dict[str, Counts]]]:
    """Return the counts of one batch for each half: of clean images, and of each probe's triggered ones."""
    clean_BCHW = torch.from_numpy(found.images.pixels(rows))
    labels, in_search = found.images.index.labels[rows], found.in_search_N[rows]
    seeds = [fork(found.seed, "evaluate", str(key)) for key in found.images.index.keys[rows]]
    clean: dict[str, Counts] = {}
    probed = []
    for probe in found.probes:
        hit_rows = np.flatnonzero(probe.triggered_N[rows])
        triggered = [probe.attack.triggered(clean_BCHW[i], seed=seeds[i]) for i in hit_rows]
        images = [clean_BCHW] if not clean else []
        images += [torch.stack(triggered)] if triggered else []
        if not images:
            probed.append(dict.fromkeys(SPLITS, Counts()))
            continue
        predicted = _predict(clip, torch.cat(images), classes_CD, device)
        if not clean:  # clean images go with the first probe's, in one batch
            right, predicted = predicted[: len(rows)] == labels, predicted[len(rows) :]
            clean = {
                split: Counts(n_clean=int(half.sum()), correct_clean=int(right[half].sum()))
                for split, half in _halves(in_search)
            }
        probed.append(
            {
                split: Counts(
                    n_triggered=int(half.sum()),
                    hit_target=int((predicted == probe.target)[half].sum()),
                    correct_triggered=int((predicted == labels[hit_rows])[half].sum()),
                )
                for split, half in _halves(in_search[hit_rows])
            }
        )
    return clean, probed


def _halves(in_search: NDArray[np.bool_]) -> tuple[tuple[str, NDArray[np.bool_]], ...]:
    return (("search", in_search), ("report", ~in_search))


def _predict(clip: Clip, images_BCHW: Tensor, classes_CD: Tensor, device: torch.device) -> NDArray[np.int64]:
    pixels = clip.normalise(images_BCHW.to(device)).contiguous(memory_format=torch.channels_last)
    features = clip.net.encode_image(pixels, normalize=True).float()
    # Outside autocast: in bf16 close classes would tie, and a tie goes to the lowest class number.
    with torch.autocast(device.type, enabled=False):
        return np.asarray((features @ classes_CD.T).argmax(dim=-1).cpu().numpy())
