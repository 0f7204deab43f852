"""What the models of a run say of a few test images, clean and triggered, before and after cleaning."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raybd import checkpoint, examples, fronts
from raybd.errors import DataError
from raybd.evaluate import EvaluationSet, Probe, Role, class_embeddings, cosines, evaluating
from raybd.examples import TOP, Examples, Guess, Image, Model
from raybd.model import Clip, create, load_weights
from raybd.poison.preview import changed, picture
from raybd.run_models import Point
from raybd.seeding import fork, share
from raybd.store import Store
from raybd.train.inputs import Inputs

_IMAGES = 4
# Encoding the prompts of a thousand classes takes a CPU longer than all else here: so many are enough for an example.
_MOST_PROMPTS = 2000
# Of points on a front the one that is shown: the least ASR within so many points of accuracy, the first that there is.
_WITHIN = ("1", "2", "3", "5", "10")


def shown_points(store: Store, pretrain_ids: dict[str, str], rows: Sequence[dict[str, Any]]) -> list[Point]:
    """Return the poisoned models, each followed by the cleaned one that stands for its front.

    That is the front point of least ASR within one point of accuracy on the search half; where there is none, within
    more, and then the one with the largest accuracy x (1 - ASR).

    Args:
        pretrain_ids: by objective.
        rows: of the `fronts` table.
    """
    found = []
    for objective, pretrain_id in pretrain_ids.items():
        poisoned = Point(f"pretrained/{pretrain_id}.safetensors", 0, pretrain_id, objective)
        own = [row for row in rows if row["pretrain_id"] == pretrain_id and row["kind"] == "any_epoch"]
        several = any(row["method"] == fronts.ALL_METHODS for row in own)
        cleaned = _cleaned([row for row in own if not several or row["method"] == fronts.ALL_METHODS])
        found += [point for point in (poisoned, cleaned) if point and store.exists(point.checkpoint)]
    return found


def _cleaned(rows: Sequence[dict[str, Any]]) -> Point | None:
    searched = [row for row in rows if row["split"] == fronts.HALVES[0] and row["epoch"] and row["checkpoint"]]
    if not searched:
        return None
    (summary,) = fronts.summarise(row for row in rows if row["split"] == fronts.HALVES[0])
    within = (summary["best_asr_within"][points] for points in _WITHIN)
    best = next((point for point in within if point and point["epoch"]), None)
    best = best or max(searched, key=lambda row: row["zeroshot_top1"] * (1 - row["asr_top1"]))
    row = next(row for row in searched if (row["trial_id"], row["epoch"]) == (best["trial_id"], best["epoch"]))
    names = ("checkpoint", "epoch", "pretrain_id", "objective", "method", "trial_id")
    return Point(**{name: row[name] for name in names})


def are_there(store: Store, points: Sequence[Point]) -> bool:
    """Say whether `examples.json` of a run is of these models; one that is damaged is of none."""
    try:
        there = examples.read(store)
    except DataError:
        return False
    wanted = [(point.pretrain_id, point.trial_id, point.epoch) for point in points]
    return there is not None and [(model.pretrain_id, model.trial_id, model.epoch) for model in there.models] == wanted


def update(store: Store, inputs: Inputs, points: Sequence[Point], *, device: torch.device) -> None:
    """Write `examples.json` of a run anew; what is there, damaged or of other models, goes first.

    Errors: CheckpointError on weights of another model.
    """
    store.delete(examples.NAME)
    examples.write(store, of_points(store, inputs, points, device=device))


def of_points(store: Store, inputs: Inputs, points: Iterable[Point], *, device: torch.device) -> Examples:
    """Return what models say of some images of the report half, of different classes where there are so many.

    Where several attacks were planted, the images take turns. Triggers are as in every evaluation.

    Errors: CheckpointError on weights of another model.
    """
    found, classes = inputs.evaluation_set, inputs.classes
    every = len(found.prompts) // found.num_classes
    some = max(1, min(every, _MOST_PROMPTS // found.num_classes))
    found = replace(found, prompts=tuple(text for place, text in enumerate(found.prompts) if place % every < some))
    images, pixels_BCHW = _images(found, classes)
    clip, models = create(inputs.study.model.name, seed=0), []
    for point in points:
        where = store.path(point.checkpoint)
        load_weights(clip, checkpoint.from_bytes(store.get(point.checkpoint), where=where), where=where)
        clip.net.to(device)
        said = _said(clip, found, pixels_BCHW.to(device), classes)
        whose = {"objective": point.objective, "pretrain_id": point.pretrain_id, "trial_id": point.trial_id}
        halves = {"clean": said[: len(images)], "triggered": said[len(images) :]}
        models.append(Model.model_validate({**whose, "epoch": point.epoch, **halves}))
    return Examples(templates=some, of_templates=every, images=images, models=models)


def _images(found: EvaluationSet, classes: Sequence[str]) -> tuple[list[Image], Tensor]:
    """Return some images, and the pixels of all clean ones, then of all triggered ones, uint8 [2 * N, 3, H, W]."""
    planted = [probe for probe in found.probes if probe.role is Role.PLANTED]
    images, clean, triggered = [], [], []
    for probe, row in _chosen(found, planted):
        attack, key = probe.attack, str(found.images.index.keys[row])
        before_CHW = torch.from_numpy(found.images.pixels(np.array([row]))[0])
        after_CHW = attack.triggered(before_CHW, seed=fork(found.seed, "evaluate", key))
        images.append(
            Image(
                key=key,
                label=classes[int(found.images.index.labels[row])],
                trigger=attack.text(),
                target_class=attack.target_class,
                clean=_png(before_CHW),
                change=_png(changed(before_CHW, after_CHW)),
                triggered=_png(after_CHW),
            )
        )
        clean.append(before_CHW)
        triggered.append(after_CHW)
    return images, torch.stack([*clean, *triggered])


def _chosen(found: EvaluationSet, planted: Sequence[Probe]) -> list[tuple[Probe, int]]:
    """Return rows of the report half, each with an attack that triggers it: attacks take turns, drawn by the keys.

    Other classes go first. No image needs to be one that all attacks trigger: where their targets are all classes there
    is none.
    """
    rows = np.flatnonzero(~found.in_search_N).tolist()
    rows.sort(key=lambda row: share(found.seed, "examples", str(found.images.index.keys[row])))
    chosen: list[tuple[Probe, int]] = []
    seen = set[int]()
    for number in range(_IMAGES):
        probe, taken = planted[number % len(planted)], {row for _, row in chosen}
        left = [row for row in rows if probe.triggered_N[row] and row not in taken]
        row = next((row for row in left if int(found.images.index.labels[row]) not in seen), left[0] if left else None)
        if row is not None:
            chosen.append((probe, row))
            seen.add(int(found.images.index.labels[row]))
    return chosen


def _said(clip: Clip, found: EvaluationSet, images_BCHW: Tensor, classes: Sequence[str]) -> list[list[Guess]]:
    """Return the likeliest classes of each image."""
    with evaluating(clip.net):
        classes_CD = class_embeddings(clip, found, device=images_BCHW.device)
        logits_BC = cosines(clip, images_BCHW, classes_CD) * clip.net.logit_scale.exp()
        best = logits_BC.softmax(dim=-1).topk(min(TOP, len(classes)))
    return [
        [Guess(name=classes[label], share=min(1.0, sure)) for sure, label in zip(shares, labels, strict=True)]
        for shares, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _png(image_CHW: Tensor) -> str:
    sink = io.BytesIO()
    picture(image_CHW).save(sink, "PNG")
    return base64.b64encode(sink.getvalue()).decode()
