"""What short trials are made of: the real ones' settings cut down, images at random, and a context that keeps notes.

They take the time and the memory of real ones, batch by batch, and need neither data nor a run directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from raybd.data.cache import Images
from raybd.data.pairs import CachedPairs
from raybd.data.shards import Index
from raybd.evaluate import EvaluationSet, Probe, Role
from raybd.model import Clip
from raybd.poison.plan import Attack, PoisonPlan
from raybd.seeding import fork
from raybd.study import CleanSettings, Method, Study, TrainSettings
from raybd.train.context import Progress
from raybd.train.inputs import prepare

CAPTION = "a photo of a small brown {} on the green grass of a park"
CLASSES = ("dog", "cat")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Have torch compute in so many threads, for the length of a `with`."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Notes:
    """A context that keeps the records of a run on one device in memory."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    records: list[dict[str, Any]] = field(default_factory=list)

    def report(
        self, epoch: int, record: dict[str, Any], weights: Callable[[], bytes], state: Callable[[], bytes] | None = None
    ) -> None:
        self.records.append(record)

    def last_epoch(self) -> int:
        return -1

    def load_state(self) -> bytes | None:
        return None

    def progress(self, progress: Progress) -> None:
        pass


def shortened(settings: TrainSettings, pairs: int, *, epochs: int) -> TrainSettings:
    """Return settings for a run on a few pairs that learns next to nothing: speed does not depend on what is learnt."""
    changes: dict[str, Any] = {"epochs": epochs, "lr": 1e-9, "warmup_steps": 0}
    if isinstance(settings, CleanSettings):
        changes["num_samples"] = pairs
        if settings.method is Method.DEEP_CLUSTERING:
            clusters = max(2, min(settings.deep_clustering.clusters, pairs // 2))
            changes["deep_clustering"] = settings.deep_clustering.model_copy(update={"clusters": clusters})
    return settings.model_copy(update=changes)


def _images(size: int, count: int) -> Images:
    """Return images at random, labelled in turn."""
    keys = np.array([f"probe-{i:06d}" for i in range(count)])
    labels = np.arange(count) % len(CLASSES)
    captions = np.array([CAPTION.format(CLASSES[label]) for label in labels], dtype=object)
    index = Index(("probe",), keys, captions, labels, np.zeros(count, dtype=np.int64), np.arange(count))
    pixels_MCHW = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return Images(index, pixels_MCHW, np.arange(count))


def pairs(study: Study, settings: TrainSettings, clip: Clip, count: int) -> CachedPairs:
    """Return so many pairs, none of them poisoned."""
    return CachedPairs(_images(clip.image_size, count), prepare(PoisonPlan({}, ()), settings, clip, seed=study.seed))


def evaluation_set(study: Study, size: int, count: int, prompts: int) -> EvaluationSet:
    """Return images with as many triggers as the study tries, and so many prompts."""
    images = _images(size, count)
    labels_N = images.index.labels
    tried = [*(attack.trigger for attack in study.poison.attacks), *study.evaluation.controls]
    triggered_N = labels_N >= 0 if study.evaluation.include_target else labels_N != 0
    probes = tuple(
        Probe(Role.PLANTED, Attack(trigger, CLASSES[0], fork(study.seed, "probe", number)), 0, triggered_N)
        for number, trigger in enumerate(tried)
    )
    each = prompts // len(CLASSES)
    texts = tuple(f"a photo of {number} {name}s." for name in CLASSES for number in range(each))
    return EvaluationSet(
        images, labels_N == 0, probes, study.seed, texts, len(CLASSES), batch_size=study.evaluation.batch_size
    )
