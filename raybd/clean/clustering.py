"""Deep clustering and pseudo-labels: a fresh linear head each epoch has to tell classes that no caption gives.

B batch, N cleaning pairs, D embedding width, K classes of the head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Self

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybd import model
from raybd.clean.kmeans import spherical_kmeans
from raybd.costs import Towers, towers
from raybd.data.pairs import Batch
from raybd.errors import StudyError
from raybd.evaluate import class_embeddings, evaluating
from raybd.objectives import Loss
from raybd.seeding import fork
from raybd.study import CleanSettings, Study
from raybd.study.methods import DeepClustering, PseudoLabels
from raybd.train.loop import Training, make_optimizer
from raybd.train.recipe import Recipe

_BATCH = 256  # images that are embedded at a time


def embeddings(run: Training, clip: model.Clip) -> tuple[list[str], Tensor]:
    """Return all keys and normalised image embeddings [N, D] of the cleaning pairs, in eval mode, float32.

    The images are those that training gets, leaked poison included, brought to the model's size where it is another.
    """
    keys: list[str] = []
    parts = []
    with evaluating(clip.net), run.autocast():
        for batch in run.pairs.without_views().epoch(0, batch_size=_BATCH):
            pixels = batch.images_BCHW.to(run.context.device)
            if pixels.shape[-1] != clip.image_size:
                size = [clip.image_size, clip.image_size]
                resized = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False)
                pixels = resized.clamp(0, 255)
            pixels = clip.normalise(pixels).contiguous(memory_format=torch.channels_last)
            parts.append(clip.net.encode_image(pixels, normalize=True).float())
            keys += batch.keys
    # In one order, whatever order they came in.
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return [keys[i] for i in order], torch.cat(parts)[torch.tensor(order, device=parts[0].device)]


class LabelledImages(Recipe, ABC):
    """Plain training plus `weight` times the cross-entropy of a linear head, made anew for each epoch.

    The head sees the normalised embeddings of the original images. It has an AdamW of its own with the settings and
    the learning rate of the run; neither is part of the model.
    """

    in_parts = False

    def __init__(self, *, weight: float, seed: int) -> None:
        self._weight, self._seed = weight, seed

    @abstractmethod
    def labels(self, run: Training, epoch: int) -> tuple[dict[str, int], int]:
        """Return the class of each cleaning image by key, and how many classes there are."""

    def begin_epoch(self, run: Training, epoch: int) -> None:
        """Label the images, make the head and its optimizer."""
        self._labels, classes = self.labels(run, epoch)
        width = open_clip.get_model_config(run.clip.name)["embed_dim"]
        generator = torch.Generator().manual_seed(fork(self._seed, "head", epoch))
        self._head = nn.Linear(width, classes)
        with torch.no_grad():
            for parameter in self._head.parameters():
                parameter.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
        self._head.to(run.context.device)
        self._optimizer = make_optimizer(self._head, run.settings)

    def loss(self, run: Training, batch: Batch) -> Loss:
        """Return the run's loss plus the head's, on one pass through the model."""
        found = run.features(batch)
        plain = run.loss_of(found)
        target_B = torch.tensor([self._labels[key] for key in batch.keys], device=run.context.device)
        return replace(plain, total=plain.total + self._weight * F.cross_entropy(self._head(found.image_BD), target_B))

    def step(self, run: Training, batch: Batch) -> Loss:
        """Step the model and the head."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = super().step(run, batch)
        for group in self._optimizer.param_groups:
            group["lr"] = run.optimizer.param_groups[0]["lr"]
        self._optimizer.step()
        return loss


class Clustered(LabelledImages):
    """Deep clustering: each epoch, spherical k-means of the embeddings as they are now says which image is which.

    Source: arXiv 1807.05520; arXiv 2311.14948 uses it for cleaning, k = 1000, 20 iterations, weight 5.
    """

    def __init__(self, settings: DeepClustering, *, seed: int) -> None:
        super().__init__(weight=settings.weight, seed=seed)
        self._settings = settings

    @classmethod
    def of(cls, settings: CleanSettings, *, seed: int) -> Self:
        """Return the recipe of a trial."""
        return cls(settings.deep_clustering, seed=seed)

    def operations(self, cost: Towers, *, views: int) -> tuple[float, float]:
        """Add the embeddings that are clustered."""
        return views * cost.pair_training + cost.image_forward, 0.0

    def attach(self, run: Training) -> None:
        """Refuse more clusters than images. Errors: StudyError."""
        check_clusters(self._settings.clusters, len(run.pairs))

    def labels(self, run: Training, epoch: int) -> tuple[dict[str, int], int]:
        """Cluster the cleaning images."""
        keys, rows_ND = embeddings(run, run.clip)
        seed = fork(self._seed, "clusters", epoch)
        found = spherical_kmeans(rows_ND, self._settings.clusters, iterations=self._settings.iterations, seed=seed)
        return dict(zip(keys, found.labels_N.tolist(), strict=True)), self._settings.clusters


class PseudoLabelled(LabelledImages):
    """As deep clustering, with the classes that another model takes the images for, by the prompts of the evaluation.

    The labels are made once for each attempt of a trial; they do not change.

    Source: arXiv 2311.14948, section on deep clustering with a stronger model's labels. Differs: the other model sees
    images as the study's model does, brought from that size to its own.
    """

    def __init__(self, settings: PseudoLabels, *, seed: int) -> None:
        super().__init__(weight=settings.weight, seed=seed)
        self._settings = settings

    @classmethod
    def of(cls, settings: CleanSettings, *, seed: int) -> Self:
        """Return the recipe of a trial."""
        return cls(settings.pseudo_labels, seed=seed)

    def check(self, study: Study) -> None:
        """Get the other model, where the study names it: one that the search draws is checked by its trials.

        Errors: StudyError, CheckpointError.
        """
        if self._settings.model and self._settings.checkpoint:
            labeller(self._settings)

    def operations(self, cost: Towers, *, views: int) -> tuple[float, float]:
        """Add the other model's look at the images."""
        name = self._settings.model
        return views * cost.pair_training, towers(name).image_forward if name else 0.0

    def attach(self, run: Training) -> None:
        """Label the cleaning images. Errors: StudyError, CheckpointError."""
        other = labeller(self._settings)
        other.net.to(run.context.device, memory_format=torch.channels_last)
        keys, rows_ND = embeddings(run, other)
        with evaluating(other.net), run.autocast():
            classes_CD = class_embeddings(other, run.evaluation_set, device=run.context.device)
        predicted = (rows_ND @ classes_CD.T).argmax(dim=-1)
        self._found = dict(zip(keys, predicted.tolist(), strict=True)), len(classes_CD)

    def labels(self, run: Training, epoch: int) -> tuple[dict[str, int], int]:
        """Return the labels that `attach` made."""
        return self._found


def check_clusters(clusters: int, pairs: int) -> None:
    """Raise StudyError where there are more clusters than cleaning pairs."""
    if clusters > pairs:
        raise StudyError(
            f"{clusters} clusters of {pairs} cleaning pairs",
            where="clean.deep_clustering.clusters",
            expected=f"at most {pairs}",
        )


def labeller(settings: PseudoLabels) -> model.Clip:
    """Return the model that gives pseudo-labels. Errors: StudyError, CheckpointError."""
    field = "clean.pseudo_labels"
    for name in ("model", "checkpoint"):
        if not getattr(settings, name):
            raise StudyError("pseudo_labels needs another model", where=f"{field}.{name}", expected="a name")
    assert settings.model is not None
    assert settings.checkpoint is not None
    return model.pretrained(settings.model, settings.checkpoint, field=field)
