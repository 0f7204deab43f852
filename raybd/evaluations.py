"""Evaluating models that are there: the poisoned models and front points of a run, or one file, on any shards."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raybd import checkpoint, provenance, tables
from raybd.data import cache, prompts, shards
from raybd.data.cache import Images
from raybd.data.shards import Index
from raybd.errors import DataError, StudyError
from raybd.evaluate import Role, make_set, measure
from raybd.model import Clip, create, image_size, load_weights
from raybd.poison import triggers
from raybd.poison.plan import Attack, PoisonPlan, planted
from raybd.retrieval import captioned, lure, retrieve
from raybd.run_models import Point, points, study_of
from raybd.seeding import share
from raybd.store import Store
from raybd.study import Data, Study
from raybd.study_file import anchored, load
from raybd.tables import RECALL_AT

Row = dict[str, Any]
# What is asked of a model: the columns of its task in the `evaluations` table, one row for each attack.
Measure = Callable[[Clip, torch.device], list[Row]]
log = logging.getLogger(__name__)


class Task(StrEnum):
    """What is measured."""

    ZEROSHOT = "zeroshot"
    RETRIEVAL = "retrieval"


@dataclass(frozen=True)
class Request:
    """What to evaluate on; None takes what the study has, or with `data` what is usual there.

    Attributes:
        data: root of other shards.
        test: their pattern, if not `test/*.tar*`.
        classes: name of a known list, or a file, if not the root's `classes.json`.
    """

    task: Task = Task.ZEROSHOT
    data: str | None = None
    test: str | None = None
    classes: str | None = None
    templates: str | None = None
    target_class: str | None = None


class Evaluator:
    """A request made ready: shards read, names checked, before any model is loaded.

    Args:
        study: gives the model, the triggers and, where the request has none, data, classes and templates.

    Attributes:
        counted_N: True for images that are counted: all but those that the study's search looked at.

    Errors: StudyError, DataError.
    """

    def __init__(self, study: Study, request: Request) -> None:
        if request.task is Task.RETRIEVAL and (request.classes or request.templates):
            raise StudyError(
                "retrieval has captions for classes and templates", where="--retrieval", fix="leave the other out"
            )
        self.study, self.request = anchored(study), request
        self.data = _data(self.study.data, request)
        self._size = image_size(study.model.name)
        self._attacks = [
            replace(attack, target_class=request.target_class or attack.target_class)
            for attack in planted(study.poison, seed=study.seed)
        ]
        for attack in self._attacks:
            triggers.check(attack.trigger, height=self._size, width=self._size, where="poison.trigger")
        urls = shards.find_shards(self.data, self.data.test, field_name="data.test")
        labelled = request.task is Task.ZEROSHOT
        images = cache.load_images(urls, size=self._size, cache_dir=self.data.cache_dir, labelled=labelled)
        _check(images.index, self.data)
        self.data_hash = cache.content_hash(images.index)
        self.counted_N = ~self._searched(images.index)
        if not self.counted_N.any():
            raise DataError("the search has looked at every image", where="data.test", fix="evaluate on other images")
        self._measure = self._zeroshot(images) if labelled else self._retrieval(images)

    def _searched(self, index: Index) -> NDArray[np.bool_]:
        """Say which images the study's search looked at: those of its own test shards, wherever they lie, in its half.

        What the search chose by is not reported.
        """
        own, seed, part = self.study.data, self.study.seed, self.study.evaluation.search_share
        searched_N = np.array([share(seed, "split", str(key)) < part for key in index.keys], dtype=bool)
        searched_N &= index.labels >= 0  # without a label an image is not in a search
        if self.request.data or self.request.test:
            try:
                urls = shards.find_shards(own, own.test, field_name="data.test")
            except DataError:
                log.warning("the study's own test shards are not here: all images count, as if the search saw none")
                return np.zeros(len(index), dtype=bool)
            theirs = cache.load_images(urls, size=self._size, cache_dir=own.cache_dir, labelled=True).index
            known = set(_samples(theirs))
            searched_N &= np.array([sample in known for sample in _samples(index)], dtype=bool)
        return searched_N

    def _zeroshot(self, images: Images) -> Measure:
        classes = shards.classes(self.data)
        for attack in self._attacks:
            shards.target_label(self.data, attack.target_class, where="--target-class")
        evaluation = self.study.evaluation
        if self.request.templates:
            evaluation = evaluation.model_copy(update={"templates": self.request.templates})
        plan = PoisonPlan({}, tuple(self._attacks))
        found = make_set(images, classes=classes, plan=plan, evaluation=evaluation, seed=self.study.seed)
        found = replace(found, in_search_N=~self.counted_N)
        same = {"classes": self.data.classes, "templates": _text(evaluation.templates)}

        def rows(clip: Clip, device: torch.device) -> list[Row]:
            measured = measure(clip, found, device=device)
            clean = measured.counts["report"]
            result = []
            for probe, halves in zip(found.probes, measured.by_probe, strict=True):
                counts = replace(halves["report"], n_clean=clean.n_clean, correct_clean=clean.correct_clean)
                result.append({**same, **_attack(probe.attack, probe.role), **counts.columns()})
            return result

        return rows

    def _retrieval(self, images: Images) -> Measure:
        study = self.study
        found = captioned(images, counted_N=self.counted_N, seed=study.seed, batch_size=study.evaluation.batch_size)
        texts = [
            [
                template(attack.target_class)
                for template in prompts.templates(settings.templates or (), field="poison.templates")
            ]
            for attack, settings in zip(self._attacks, study.poison.attacks, strict=True)
        ]
        lures = [lure(found, attack, own) for attack, own in zip(self._attacks, texts, strict=True)]

        def rows(clip: Clip, device: torch.device) -> list[Row]:
            recall, of_lures = retrieve(clip, found, lures, device=device)
            result = []
            for one, lured, settings in zip(lures, of_lures, study.poison.attacks, strict=True):
                row: Row = {"templates": _text(settings.templates), "n_images": recall.n_images}
                row |= {"n_texts": recall.n_texts, "n_triggered": lured.n_triggered}
                row |= _at_k("image_to_text", recall.image_to_text, recall.n_images)
                row |= _at_k("text_to_image", recall.text_to_image, recall.n_texts)
                row |= _at_k("retrieval_asr", lured.triggered, lured.n_triggered)
                row |= _at_k("retrieval_control", lured.clean, lured.n_triggered)
                result.append({**row, **_attack(one.attack, Role.PLANTED)})
            return result

        return rows

    @cached_property
    def _clip(self) -> Clip:
        """The model, whose weights each point replaces."""
        return create(self.study.model.name, seed=0)

    def rows(self, point: Point, weights: dict[str, Tensor], *, device: torch.device) -> list[Row]:
        """Evaluate a model: rows of the `evaluations` table, one for each attack.

        Errors: CheckpointError on weights of another model; TrialError where its embeddings are not finite.
        """
        load_weights(self._clip, weights, where=point.checkpoint)
        self._clip.net.to(device)
        same = {
            "study": self.study.name,
            "task": str(self.request.task),
            "data": self.data.root,
            "data_hash": self.data_hash,
            "split": "all" if self.counted_N.all() else "report",
            "code": provenance.code_version(),
        }
        return [{**asdict(point), **same, **row} for row in self._measure(self._clip, device)]

    def part(self, point: Point) -> str:
        """Return the name of the part of the `evaluations` table that a point's rows make.

        The same point evaluated again on the same data in the same way replaces its part.
        """
        asked = [self.data_hash, self.data.classes, self.request.templates, self.request.target_class]
        return f"{point.name}-{self.request.task}-{provenance.digest(asked)}"


def evaluate_run(
    store: Store,
    request: Request,
    *,
    chosen: Sequence[str] = (),
    notify: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Evaluate models of a run, see `points`; each one's rows are in its `evaluations` table as soon as they are made.

    Args:
        notify: told of each model that is done.

    Errors: RaybdError, before the first model is evaluated where it can be.
    """
    study, record = study_of(store)
    models = points(store, record, chosen)
    evaluator, device = Evaluator(study, request), device_here()
    found = []
    for number, point in enumerate(models, start=1):
        weights = checkpoint.from_bytes(store.get(point.checkpoint), where=store.path(point.checkpoint))
        rows = [{**row, "study_hash": record["hash"]} for row in evaluator.rows(point, weights, device=device)]
        tables.write(store, "evaluations", evaluator.part(point), rows)
        found += rows
        notify(f"evaluated {number} of {len(models)}: {point.checkpoint}")
    return _whole(found)


def evaluate_file(path: str, request: Request, *, study: str, model: str | None = None) -> list[Row]:
    """Evaluate a lone checkpoint; nothing is written.

    Args:
        study: file or name of the study whose trigger it is tried with.
        model: open_clip name, if not the study's.

    Errors: RaybdError.
    """
    found = load(study, overrides=[f"model.name={model}"] if model else [])
    evaluator = Evaluator(found, request)
    rows = evaluator.rows(Point(path), checkpoint.read(path), device=device_here())
    return _whole({**row, "study_hash": found.hash()} for row in rows)


def _whole(rows: Iterable[Row]) -> list[Row]:
    """Return rows with every column of the table, as they are read from it."""
    return [{**dict.fromkeys(tables.SCHEMAS["evaluations"].names), **row} for row in rows]


def device_here() -> torch.device:
    """Return the first GPU of this process, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _data(own: Data, request: Request) -> Data:
    """Return what to evaluate on. Of another root the study's patterns and classes say nothing."""
    changed: Row = {}
    if request.data:
        fields = Data.model_fields
        changed = {"root": request.data, "test": fields["test"].default, "classes": fields["classes"].default}
    if request.test:
        changed["test"] = request.test
    if request.classes:
        file = Path(request.classes)
        changed["classes"] = str(file.absolute()) if os.path.isfile(file) else request.classes
    return own.model_copy(update=changed)


def _check(index: Index, data: Data) -> None:
    """Refuse too many broken samples; one without a label is not broken, and left out. Errors: DataError."""
    broken = tuple(skip for skip in index.skipped if skip.reason != shards.NO_LABEL)
    shards.check_share(replace(index, skipped=broken) if len(index) else index, most=data.max_broken, what="data.test")
    if len(index.skipped) > len(broken):
        log.warning("%d images without a label are left out", len(index.skipped) - len(broken))


def _samples(index: Index) -> Iterator[tuple[str, str]]:
    return zip(index.keys.tolist(), index.captions.tolist(), strict=True)


def _text(templates: str | Sequence[str] | None) -> str:
    return templates if isinstance(templates, str) else json.dumps(templates, ensure_ascii=False)


def _attack(attack: Attack, role: Role) -> Row:
    return {"role": str(role), "trigger": attack.text(), "target_class": attack.target_class}


def _at_k(measure: str, hits: Sequence[int], total: int) -> Row:
    found: Row = {}
    for k, count in zip(RECALL_AT, hits, strict=True):
        found |= {f"{measure}_at_{k}": count / total, f"{measure}_hits_at_{k}": count}
    return found
