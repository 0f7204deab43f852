"""What a study's stages work on: classes, training pairs, poison plan, cleaning pairs, evaluation set, models."""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raybd import checkpoint
from raybd.data import cache, shards
from raybd.data.cache import Images
from raybd.data.pairs import CachedPairs, Pairs, Prepare
from raybd.data.shards import Index
from raybd.data.streaming import StreamedPairs
from raybd.data.tokens import remembering
from raybd.data.views import wordnet
from raybd.errors import DataError, StudyError
from raybd.evaluate import EvaluationSet, make_set
from raybd.model import Clip, create, image_size, load_tag, load_weights, tag_file
from raybd.poison import triggers
from raybd.poison.plan import PoisonPlan, cleaning_rows, make_plan
from raybd.provenance import digest
from raybd.seeding import fork
from raybd.study import TRAITS, CleanSettings, Study, TrainSettings, agreement

log = logging.getLogger(__name__)


def prepare(plan: PoisonPlan, settings: TrainSettings, clip: Clip, *, seed: int) -> Prepare:
    """Return what happens to a run's pairs on their way to the model: the plan's poison, and the views it looks at."""
    own_views = isinstance(settings, CleanSettings) and TRAITS[settings.method].own_image_views
    image_view = None if own_views else settings.image_view
    views = (image_view, settings.text_view) if settings.loss_weights.views else None
    return Prepare(plan=plan, tokenize=remembering(clip.tokenizer), views=views, seed=seed)


class Inputs:
    """A study's inputs, each made when it is first asked for and then kept."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._start_counts: dict[str, dict[str, Any]] = {}

    @cached_property
    def image_size(self) -> int:
        """Side of the image that the model sees, in pixels."""
        return image_size(self.study.model.name)

    @cached_property
    def classes(self) -> list[str]:
        """Class names, by label."""
        return shards.classes(self.study.data)

    @cached_property
    def _train_shards(self) -> list[str]:
        return shards.find_shards(self.study.data, self.study.data.train, field_name="data.train")

    @cached_property
    def streamed(self) -> bool:
        """Whether training pairs are read anew in each epoch because, decoded, they do not fit the cache's budget."""
        found = cache.load_index(self._train_shards, cache_dir=self.study.data.cache_dir)
        most = self.study.data.max_train_samples or len(found)
        return min(len(found), most) * 3 * self.image_size**2 > self.study.data.cache_gb * 1e9

    @cached_property
    def _train_images(self) -> Images:
        data = self.study.data
        found = cache.load_images(self._train_shards, size=self.image_size, cache_dir=data.cache_dir)
        self._check(found.index, "data.train")
        return found.take(np.arange(min(len(found.index), data.max_train_samples or len(found.index))))

    @cached_property
    def train_index(self) -> Index:
        """All training pairs. Errors: DataError where too many are unusable."""
        if not self.streamed:
            return self._train_images.index
        found = cache.load_index(self._train_shards, cache_dir=self.study.data.cache_dir)
        self._check(found, "data.train")
        return found.take(np.arange(min(len(found), self.study.data.max_train_samples or len(found))))

    def _check(self, index: Index, what: str) -> None:
        shards.check_share(index, most=self.study.data.max_broken, what=what)
        if index.skipped:
            first = index.skipped[0]
            log.warning(
                "%s: %d unusable samples skipped, %s first: %s", what, len(index.skipped), first.key, first.reason
            )

    def train_images(self, keys: list[str]) -> dict[str, NDArray[np.uint8]]:
        """Return images of a few training pairs as they are before poisoning, uint8 [3, S, S]; no broken ones."""
        images = self._some_images(keys) if self.streamed else self._train_images
        place = {str(key): i for i, key in enumerate(images.index.keys)}
        return {key: images.pixels(np.array([place[key]]))[0] for key in keys if key in place}

    def _some_images(self, keys: list[str]) -> Images:
        wanted = {
            str(key): int(number) for key, number in zip(self.train_index.keys, self.train_index.shard, strict=True)
        }
        holding = sorted({wanted[key] for key in keys})
        return cache.load_images(
            [self._train_shards[number] for number in holding],
            size=self.image_size,
            cache_dir=self.study.data.cache_dir,
            keys=keys,
        )

    @cached_property
    def plan(self) -> PoisonPlan:
        """The poison plan."""
        return make_plan(self.train_index, self.study.poison, image_size=self.image_size, seed=self.study.seed)

    @cached_property
    def evaluation_set(self) -> EvaluationSet:
        """The labelled test images and what is tried on them. Errors: DataError."""
        data = self.study.data
        found = shards.find_shards(data, data.test, field_name="data.test")
        images = cache.load_images(found, size=self.image_size, cache_dir=data.cache_dir, labelled=True)
        self._check(images.index, "data.test")
        return make_set(
            images.take(np.arange(min(len(images.index), data.max_test_samples or len(images.index)))),
            classes=self.classes,
            plan=self.plan,
            evaluation=self.study.evaluation,
            seed=self.study.seed,
        )

    def _check_attacks(self) -> None:
        """Refuse targets that are no class, triggers that do not fit, controls that are planted. Errors: RaybdError."""
        attacks, size = self.study.poison.attacks, self.image_size
        for number, attack in enumerate(attacks):
            section = f"poison.also.{number - 1}" if number else "poison"
            triggers.check(attack.trigger, height=size, width=size, where=f"{section}.trigger")
            shards.target_label(self.study.data, attack.target_class, where=f"{section}.target_class")
        for number, trigger in enumerate(self.study.evaluation.controls):
            where = f"evaluation.controls.{number}"
            triggers.check(trigger, height=size, width=size, where=where)
            if trigger in [attack.trigger for attack in attacks]:
                raise StudyError(
                    "this trigger is planted: it is no control",
                    where=where,
                    fix="remove it: planted triggers are measured anyway",
                )

    @property
    def skipped(self) -> list[dict[str, str]]:
        """What could not be used, of training and test shards, for the run's record."""
        found = (*self.train_index.skipped, *self.evaluation_set.images.index.skipped)
        return [{"shard": skip.shard, "key": skip.key, "reason": skip.reason} for skip in found]

    def pretraining_pairs(self, settings: TrainSettings, clip: Clip, *, seed: int) -> Pairs:
        """Return all training pairs, poisoned as planned."""
        prepared = prepare(self.plan, settings, clip, seed=seed)
        if not self.streamed:
            return CachedPairs(self._train_images, prepared)
        data = self.study.data
        return StreamedPairs(
            self.train_index,
            prepared,
            size=self.image_size,
            workers=data.loader_workers,
            shuffle_buffer=data.shuffle_buffer,
        )

    def _cleaning_rows(self, settings: CleanSettings) -> tuple[NDArray[np.int64], PoisonPlan]:
        return cleaning_rows(
            self.train_index,
            self.plan,
            num_samples=settings.num_samples,
            leaked_poison=settings.num_leaked,
            seed=self.study.seed,
        )

    @cached_property
    def _cleaning_images(self) -> Images:
        """The images of every cleaning set that a trial may have, decoded once. Errors: DataError."""
        sets = agreement.cleaning_sets(self.study.clean, self.study.search.space)
        rows = np.unique(np.concatenate([self._cleaning_rows(settings)[0] for settings in sets]))
        if not self.streamed:
            return self._train_images.take(rows)
        keys = {str(key) for key in self.train_index.keys[rows]}
        images = cache.load_images(
            self._train_shards, size=self.image_size, cache_dir=self.study.data.cache_dir, keys=keys
        )
        self._check(images.index, "the cleaning set")
        return images

    def _cleaning(self, settings: CleanSettings) -> tuple[Images, PoisonPlan]:
        images, (rows, leaked) = self._cleaning_images, self._cleaning_rows(settings)
        return images.take(np.flatnonzero(np.isin(images.index.keys, self.train_index.keys[rows]))), leaked

    def cleaning_pairs(self, settings: CleanSettings, clip: Clip, *, seed: int) -> Pairs:
        """Return the cleaning pairs of a trial: clean, but for what is leaked on purpose. Errors: DataError."""
        images, leaked = self._cleaning(settings)
        return CachedPairs(images, prepare(leaked, settings, clip, seed=seed))

    def start_counts(self, pretrain_id: str) -> dict[str, Any]:
        """Return where the counts of a poisoned model are kept: all trials start with them, and one has to count."""
        return self._start_counts.setdefault(pretrain_id, {})

    def new_model(self, settings: TrainSettings, *, seed: int) -> Clip:
        """Return the model to pretrain: random weights, or those that `model` names.

        Errors: StudyError where open_clip has no such weights; CheckpointError where they cannot be had or read.
        """
        model = self.study.model
        sigmoid = settings.loss_weights.siglip > 0 and not model.trained
        clip = create(model.name, seed=fork(seed, "weights"), sigmoid=sigmoid)
        if model.start:
            load_weights(clip, checkpoint.read(model.start), where=model.start)
        elif model.pretrained:
            load_tag(clip, model.pretrained, where="model.pretrained")
        return clip

    @cached_property
    def _start_hash(self) -> str | None:
        """A hash of the weights that pretraining starts from, None where they are random."""
        model = self.study.model
        path = model.start
        if model.pretrained:
            path = tag_file(model.name, model.pretrained, where="model.pretrained")
        if not path:
            return None
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def _pixels_hash(self) -> str:
        """A hash of the training images; of the shards' sizes and times where they are streamed."""
        return cache.fingerprint(self._train_shards) if self.streamed else self._train_images.digest

    def pretrain_id(self, objective: str, *, code: str) -> str:
        """Return the name of a pretraining run: the objective and a hash of all that its weights depend on.

        Args:
            code: version of the code that made it, or will.
        """
        study, settings = self.study, self.study.pretrain.settings(objective)
        parts = {
            "data": [
                cache.content_hash(self.train_index),
                self._pixels_hash,
                study.data.max_train_samples,
                self.streamed,
            ],
            "model": [study.model.name, self._start_hash],
            "poison": study.poison.model_dump(mode="json"),
            "settings": settings.model_dump(mode="json"),
            "evaluation": [
                cache.content_hash(self.evaluation_set.images.index),
                self.evaluation_set.images.digest,
                study.evaluation.model_dump(mode="json"),
            ],
            "seed": study.seed,
            "code": code,
            # Text views have synonyms only where WordNet is installed.
            "synonyms": settings.loss_weights.views and wordnet() is not None,
        }
        return f"{objective}-{digest(parts, length=10)}"

    def check(self) -> None:
        """Make all that the stages need, so that what is wrong shows before any long work. Errors: RaybdError."""
        self._check_attacks()
        clip = self.new_model(self.study.pretrain.settings(next(iter(self.study.pretrain.objectives))), seed=0)
        sets = agreement.cleaning_sets(self.study.clean, self.study.search.space)
        smallest = min(len(self.cleaning_pairs(settings, clip, seed=0)) for settings in sets)
        if not len(self.evaluation_set.images.index) or not smallest:
            raise DataError("nothing to evaluate or to clean on", where="data")


@lru_cache(maxsize=2)
def _inputs(text: str) -> Inputs:
    return Inputs(Study.model_validate_json(text))


def inputs_for(study: Study) -> Inputs:
    """Return a study's inputs, the same object for equal studies within a process."""
    return _inputs(study.model_dump_json())
