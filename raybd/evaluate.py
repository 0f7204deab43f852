"""Evaluation: zero-shot accuracy with a prompt ensemble, and the attack success rate, as integer counts.

C classes, T templates, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from raybd import pulse
from raybd.data.ahead import delivered
from raybd.data.cache import Images
from raybd.data.pairs import bounds
from raybd.data.prompts import templates
from raybd.data.tokens import remembering
from raybd.errors import DataError
from raybd.metrics import SPLITS, Counts
from raybd.model import Clip
from raybd.poison.plan import Attack, PoisonPlan
from raybd.seeding import fork, share
from raybd.study import Evaluation

_MOST_TRIGGERED_BYTES = 1 << 30  # of each process; what is above is made anew each time


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
        triggered: images that were made before, by probe, first row and number.
    """

    images: Images
    in_search_N: NDArray[np.bool_]
    probes: tuple[Probe, ...]
    seed: int
    prompts: tuple[str, ...]
    num_classes: int
    batch_size: int
    triggered: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)


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
    return remembering(open_clip.get_tokenizer(model))(list(prompts))


@dataclass(frozen=True)
class _Kept:
    """Class embeddings, and all that they were made from."""

    prompts: tuple[str, ...]
    arithmetic: tuple[torch.device, bool, torch.dtype]
    weights: list[Tensor]
    classes_CD: Tensor

    def holds(self, prompts: tuple[str, ...], arithmetic: object, weights: Sequence[Tensor]) -> bool:
        """Say whether they would come out the same now."""
        return (self.prompts, self.arithmetic) == (prompts, arithmetic) and all(
            torch.equal(one, other) for one, other in zip(self.weights, weights, strict=True)
        )


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


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

    Of a model whose text tower is not trained they are kept, and made again once any of its weights differs.

    Args:
        rank, world_size, gather: each rank encodes the prompts of its share of the classes, and `gather` joins the
            ranks' rows. Fewer classes than ranks are encoded by each.
    """
    # Scale and bias of the logits are single numbers, are always trained, and change nothing here.
    of_texts = [p for n, p in clip.net.named_parameters() if not n.startswith("visual.") and p.numel() > 1]
    frozen = not any(p.requires_grad for p in of_texts)
    arithmetic = device, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    kept = _kept.get(clip.net) if frozen else None
    if kept is not None and kept.holds(found.prompts, arithmetic, of_texts):
        return kept.classes_CD
    tokens_PL = _prompt_tokens(clip.name, found.prompts)
    if 1 < world_size <= found.num_classes:
        tokens_CTL = tokens_PL.view(found.num_classes, -1, tokens_PL.shape[-1])
        own_CTL = tokens_CTL[slice(*bounds(found.num_classes, world_size)[rank])]
        classes_CD = gather(_embedded(clip, own_CTL.flatten(0, 1), len(own_CTL), device))
    else:
        classes_CD = _embedded(clip, tokens_PL, found.num_classes, device)
    if frozen:
        _kept[clip.net] = _Kept(found.prompts, arithmetic, [p.detach().clone() for p in of_texts], classes_CD)
    return classes_CD


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
    parts = [np.arange(len(found.images.index)), *(np.flatnonzero(probe.triggered_N) for probe in found.probes)]
    parts = [rows[slice(*bounds(len(rows), world_size)[rank])] for rows in parts]
    mine = [
        (number, rows[start : start + found.batch_size])
        for number, rows in enumerate(parts)
        for start in range(0, len(rows), found.batch_size)
    ]
    predicted: list[list[Tensor]] = [[] for _ in parts]
    with evaluating(clip.net), autocast() if autocast else torch.autocast(device.type, enabled=False):
        shared: dict[str, Any] = {"rank": rank, "world_size": world_size, "gather": gather} if gather else {}
        classes_CD = class_embeddings(clip, found, device=device, **shared)
        images = (_images(found, number, rows) for number, rows in mine)
        for (number, _), images_BCHW in zip(mine, delivered(images, device=device), strict=True):
            pulse.beat()
            predicted[number].append(_predict(clip, images_BCHW, classes_CD))
    # One transfer for each part, after all work is on its way.
    found_M = [torch.cat(some).cpu().numpy() if some else np.zeros(0, dtype=np.int64) for some in predicted]
    return _counted(found, parts, found_M)


def _images(found: EvaluationSet, number: int, rows: NDArray[np.int64]) -> Tensor:
    """Return uint8 images of some rows: clean ones for part 0, else with the trigger of that probe, from 1.

    Triggered images are the same in every evaluation, and kept while they do not take too much memory.
    """
    if not number:
        return torch.from_numpy(found.images.pixels(rows))
    name = number, int(rows[0]), len(rows)
    if (kept := found.triggered.get(name)) is not None:
        return kept
    attack = found.probes[number - 1].attack
    seeds = [fork(found.seed, "evaluate", str(key)) for key in found.images.index.keys[rows]]
    clean_BCHW = torch.from_numpy(found.images.pixels(rows))
    made_BCHW = torch.stack([attack.triggered(image, seed=seed) for image, seed in zip(clean_BCHW, seeds, strict=True)])
    if sum(one.nbytes for one in found.triggered.values()) + made_BCHW.nbytes <= _MOST_TRIGGERED_BYTES:
        found.triggered[name] = made_BCHW
    return made_BCHW


def _counted(
    found: EvaluationSet, rows: Sequence[NDArray[np.int64]], predicted: Sequence[NDArray[np.int64]]
) -> Measured:
    """Return the counts of predictions for rows of the evaluation set: of clean images, then of each probe's."""
    labels_N, right = found.images.index.labels, predicted[0] == found.images.index.labels[rows[0]]
    counts = {
        split: Counts(n_clean=int(half.sum()), correct_clean=int(right[half].sum()))
        for split, half in _halves(found.in_search_N[rows[0]])
    }
    by_probe = []
    for probe, own, classes in zip(found.probes, rows[1:], predicted[1:], strict=True):
        by_probe.append(
            {
                split: Counts(
                    n_triggered=int(half.sum()),
                    hit_target=int((classes == probe.target)[half].sum()),
                    correct_triggered=int((classes == labels_N[own])[half].sum()),
                )
                for split, half in _halves(found.in_search_N[own])
            }
        )
        if probe.role is Role.PLANTED:
            counts = {split: counts[split] + by_probe[-1][split] for split in SPLITS}
    return Measured(counts, tuple(by_probe))


def _halves(in_search: NDArray[np.bool_]) -> tuple[tuple[str, NDArray[np.bool_]], ...]:
    return (("search", in_search), ("report", ~in_search))


def _predict(clip: Clip, images_BCHW: Tensor, classes_CD: Tensor) -> Tensor:
    return cosines(clip, images_BCHW, classes_CD).argmax(dim=-1)


def cosines(clip: Clip, images_BCHW: Tensor, classes_CD: Tensor) -> Tensor:
    """Return how alike uint8 images and classes are, float32 [B, C]."""
    pixels = clip.normalise(images_BCHW).contiguous(memory_format=torch.channels_last)
    features = clip.net.encode_image(pixels, normalize=True).float()
    # Outside autocast: in bf16 close classes would tie, and a tie goes to the lowest class number.
    with torch.autocast(images_BCHW.device.type, enabled=False):
        return features @ classes_CD.T
