"""Spherical k-means, and the methods whose linear head learns classes that no caption gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import (
    PLAN,
    RESNET,
    VIT,
    assert_same,
    context_in,
    copy_of,
    evaluation_set,  # noqa: F401
    images,  # noqa: F401
    train_settings,
)
from torch import Tensor

from raybd import checkpoint, study_file
from raybd.clean.clustering import Clustered, PseudoLabelled, embeddings, labeller
from raybd.clean.kmeans import spherical_kmeans
from raybd.data.cache import Images
from raybd.data.pairs import CachedPairs, Prepare
from raybd.errors import CheckpointError, StudyError
from raybd.evaluate import EvaluationSet
from raybd.model import create
from raybd.poison.plan import PoisonPlan
from raybd.seeding import fork
from raybd.study import ImageView, LossWeights, Precision, TextView
from raybd.study.methods import DeepClustering, PseudoLabels
from raybd.train.loop import Training
from raybd.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def unit_rows(count: int, width: int, *, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


# k-means.


def by_hand(points: np.ndarray, centroids: np.ndarray, rounds: int) -> tuple[np.ndarray, list[int]]:
    """Spherical k-means from given centroids, point by point; no cluster may become empty."""
    labels: list[int] = []
    for _ in range(rounds + 1):
        labels = [int(np.argmax([float(point @ centroid) for centroid in centroids])) for point in points]
        final = centroids
        sums = [sum(p for p, label in zip(points, labels, strict=True) if label == k) for k in range(len(centroids))]
        centroids = np.stack([found / np.linalg.norm(found) for found in sums])
    return final, labels


def test_it_is_lloyds_algorithm_on_the_sphere() -> None:
    points = unit_rows(60, 4, seed=1)
    start = spherical_kmeans(points, 4, iterations=0, seed=3)
    assert all((points == centroid).all(1).any() for centroid in start.centroids_KD)
    for rounds in (1, 2, 5):
        found = spherical_kmeans(points, 4, iterations=rounds, seed=3)
        centroids, labels = by_hand(points.double().numpy(), start.centroids_KD.double().numpy(), rounds)
        assert found.labels_N.tolist() == labels
        np.testing.assert_allclose(found.centroids_KD.numpy(), centroids, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(2, 6), st.integers(1, 15), st.integers(0, 999))
def test_the_objective_never_falls(count: int, clusters: int, width: int, iterations: int, seed: int) -> None:
    """Also where points coincide, so that clusters are empty from the start."""
    points = unit_rows(count, width, seed=seed)
    points[: count // 2] = points[0]
    clusters = min(clusters, count)
    found = spherical_kmeans(points, clusters, iterations=iterations, seed=seed)
    assert all(b >= a - 1e-6 for a, b in zip(found.similarity, found.similarity[1:], strict=False))
    assert found.similarity[-1] <= 1 + 1e-6
    torch.testing.assert_close(found.centroids_KD.norm(dim=1), torch.ones(clusters))
    assert torch.equal(found.labels_N, (points @ found.centroids_KD.T).argmax(1))
    again = spherical_kmeans(points, clusters, iterations=iterations, seed=seed)
    assert torch.equal(again.labels_N, found.labels_N)
    assert torch.equal(again.centroids_KD, found.centroids_KD)


def test_groups_that_are_there_are_found_and_an_empty_cluster_starts_again() -> None:
    middles = torch.eye(5)
    points = F.normalize(middles.repeat_interleave(20, 0) + 0.05 * torch.randn(100, 5, generator=torch.manual_seed(0)))
    # Three of five starting points may come from one group; empty clusters move to what lies far from the others.
    points[:20] = points[0]
    group = torch.arange(5).repeat_interleave(20)
    for seed in range(30):
        start = spherical_kmeans(points, 5, iterations=0, seed=seed)
        if len(start.labels_N.unique()) < 5:
            break
    found = spherical_kmeans(points, 5, iterations=20, seed=seed)
    assert len(start.labels_N.unique()) < 5
    assert len(found.labels_N.unique()) == 5
    assert len(set(zip(group.tolist(), found.labels_N.tolist(), strict=True))) == 5


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points = unit_rows(50, 4, seed=1)
    whole = spherical_kmeans(points, 6, iterations=9, seed=3)
    monkeypatch.setattr("raybd.clean.kmeans._CHUNK", 7)
    parts = spherical_kmeans(points, 6, iterations=9, seed=3)
    assert torch.equal(parts.labels_N, whole.labels_N)
    torch.testing.assert_close(parts.centroids_KD, whole.centroids_KD)


def test_more_clusters_than_points_are_an_error() -> None:
    with pytest.raises(ValueError, match="7 clusters of 6 points"):
        spherical_kmeans(unit_rows(6, 3, seed=0), 7, iterations=1, seed=0)


# The methods.


def run_of(
    folder: Path,
    images: Images,  # noqa: F811
    found: EvaluationSet,
    recipe: Recipe,
    *,
    model: str = RESNET,
    plan: PoisonPlan | None = None,
    **changes: Any,
) -> Training:
    clip = create(model, seed=1)
    pairs = CachedPairs(images, Prepare(PLAN if plan is None else plan, clip.tokenizer, None, seed=9))
    return Training(clip, pairs, train_settings(**changes), context_in(folder), found, recipe=recipe)


def clustered(**changes: Any) -> Clustered:
    return Clustered(DeepClustering(**{"clusters": 4, "iterations": 5, "weight": 2.0, **changes}), seed=5)


def test_embeddings_are_of_the_images_that_training_gets_in_eval_mode(
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    class Marked(PoisonPlan):
        def image(self, image_CHW: Tensor, key: str) -> Tensor:
            return 255 - image_CHW if key == marked else image_CHW

    marked = str(images.index.keys[3])
    plan = Marked(**vars(PLAN))
    run = run_of(tmp_path, images, evaluation_set, clustered(), plan=plan)
    run.clip.net.train()
    before = copy_of(run.clip.net)
    keys, rows = embeddings(run, run.clip)
    assert_same(copy_of(run.clip.net), before)
    assert run.clip.net.training
    assert not rows.is_inference()
    pixels = torch.from_numpy(images.pixels(np.arange(24)))
    pixels[3] = 255 - pixels[3]
    with torch.no_grad():
        expected = run.clip.net.eval().encode_image(run.clip.normalise(pixels), normalize=True)
    place = {str(key): i for i, key in enumerate(images.index.keys)}
    torch.testing.assert_close(rows, expected[[place[key] for key in keys]], rtol=1e-4, atol=1e-5)
    assert sorted(keys) == sorted(place)


def test_each_epoch_has_new_clusters_and_a_new_head(
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = clustered()
    run = run_of(tmp_path, images, evaluation_set, recipe, model=VIT)
    heads = []
    for epoch in (1, 2, 1):
        recipe.begin_epoch(run, epoch)
        keys, rows = embeddings(run, run.clip)
        expected = spherical_kmeans(rows, 4, iterations=5, seed=fork(5, "clusters", epoch))
        assert [recipe._labels[key] for key in keys] == expected.labels_N.tolist()
        heads.append(recipe._head.weight.detach().clone())
    assert torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], heads[1])
    assert heads[0].shape == (4, rows.shape[1])
    assert heads[0].abs().max() <= rows.shape[1] ** -0.5


def test_the_loss_adds_the_heads_and_the_step_moves_both(
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = clustered(weight=2.0)
    run = run_of(tmp_path, images, evaluation_set, recipe, model=VIT)
    run._set_lr()
    recipe.begin_epoch(run, 1)
    batch = next(run.pairs.epoch(1, batch_size=12))
    x, t, scale = run.clip.net(run.clip.normalise(batch.images_BCHW), batch.tokens_BL)
    logits, target = scale * x @ t.T, torch.arange(12)
    plain = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    head = recipe._head
    own = x @ head.weight.T + head.bias
    labels = torch.tensor([recipe._labels[key] for key in batch.keys])
    extra = -own.log_softmax(1)[torch.arange(12), labels].mean()
    loss = recipe.loss(run, batch)
    assert loss.total.item() == pytest.approx(plain.item() + 2 * extra.item(), rel=1e-5)

    before, weights = head.weight.detach().clone(), copy_of(run.clip.net)
    recipe.step(run, batch)
    lr = run.optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(5e-4)  # in the warm-up
    moved = (head.weight.detach() - before * (1 - lr * run.settings.weight_decay)).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-2, atol=0)  # Adam's first step
    assert copy_of(run.clip.net).keys() == weights.keys()
    assert not any("head" in name for name in run._names.values())
    (gradient,) = torch.autograd.grad(
        F.cross_entropy(head(run.features(batch).image_BD), labels),
        run.clip.net.visual.parameters().__next__(),
        allow_unused=True,
    )
    assert gradient is not None


@pytest.mark.parametrize("ssl", [0.0, 1.0])
def test_bf16(ssl: float, images: Images, evaluation_set: EvaluationSet, tmp_path: Path) -> None:  # noqa: F811
    """The cross-entropy is of the originals, whether or not views go through the model with them."""
    recipe, clip = clustered(), create(RESNET, seed=1)
    views = (ImageView.CROP_FLIP_COLOUR, TextView.EDA) if ssl else None
    pairs = CachedPairs(images, Prepare(PLAN, clip.tokenizer, views, seed=9))
    run = train_settings(precision=Precision.BF16, epochs=1, loss_weights=LossWeights(mmcl=1, ssl=ssl))
    Training(clip, pairs, run, context_in(tmp_path), evaluation_set, recipe=recipe).run()


def test_more_clusters_than_pairs_are_refused_before_any_work(
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    with pytest.raises(StudyError, match="25 clusters of 24 cleaning pairs"):
        run_of(tmp_path, images, evaluation_set, clustered(clusters=25))


# Pseudo-labels.


@pytest.fixture
def other(tmp_path: Path) -> PseudoLabels:
    """Weights of another model, in a file."""
    file = tmp_path / "other.safetensors"
    file.write_bytes(checkpoint.to_bytes(create(VIT, seed=25).net.state_dict()))
    return PseudoLabels(model=VIT, checkpoint=str(file), weight=2.0)


def test_labels_are_what_the_other_model_takes_the_images_for(
    other: PseudoLabels,
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    several = replace(evaluation_set, prompts=("a cat", "cat!", "a heart", "heart!", "a fruit", "fruit!"))
    recipe = PseudoLabelled(other, seed=5)
    run = run_of(tmp_path, images, several, recipe)
    clip = create(VIT, seed=25)
    with torch.no_grad():
        net = clip.net.eval()
        texts = F.normalize(net.encode_text(clip.tokenize(list(several.prompts))), dim=1)
        classes = [F.normalize(texts[2 * i] + texts[2 * i + 1], dim=0) for i in range(3)]
        rows = net.encode_image(clip.normalise(torch.from_numpy(images.pixels(np.arange(24)))))
    expected = [max(range(3), key=lambda c: float(row @ classes[c])) for row in rows]
    found, count = recipe.labels(run, 1)
    assert count == 3
    assert [found[str(key)] for key in images.index.keys] == expected
    assert len(set(expected)) > 1
    run.run()
    assert recipe._head.out_features == 3


def test_images_are_brought_to_the_size_of_the_other_model(
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = run_of(tmp_path, images, evaluation_set, Recipe())
    clip = create(RESNET, seed=3)  # fully convolutional: it takes any size
    larger = replace(clip, image_size=64)
    _, rows = embeddings(run, larger)
    assert rows.shape[0] == 24
    _, plain = embeddings(run, clip)
    assert not torch.allclose(rows, plain)


def test_the_other_model_must_be_there(tmp_path: Path, other: PseudoLabels) -> None:
    assert other.checkpoint is not None
    assert_same(copy_of(labeller(other).net), copy_of(create(VIT, seed=25).net))
    with pytest.raises(StudyError, match="needs another model"):
        labeller(PseudoLabels(model=VIT))
    with pytest.raises(StudyError, match="no model of the name") as caught:
        labeller(PseudoLabels(model="RN51", checkpoint=other.checkpoint))
    assert caught.value.where == "clean.pseudo_labels.model"
    with pytest.raises(StudyError, match="open_clip has no weights of that tag") as caught:
        labeller(PseudoLabels(model="RN50", checkpoint="nowhere.pt"))
    assert caught.value.where == "clean.pseudo_labels.checkpoint"
    assert "openai" in caught.value.expected
    with pytest.raises(CheckpointError, match="weights of another model"):
        labeller(PseudoLabels(model=RESNET, checkpoint=other.checkpoint))


# Studies.

STUDY = "name: s\npoison: {poison_rate: 0.1}\nclean:\n  num_samples: 900\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("  method: pseudo_labels\n", "clean.pseudo_labels.model: missing: pseudo_labels needs another model"),
        (
            "  pseudo_labels: {model: RN50}\nsearch: {space: {method: {choices: [mmcl, pseudo_labels]}}}\n",
            "clean.pseudo_labels.checkpoint: missing",
        ),
        ("  method: deep_clustering\n", "clean.deep_clustering.clusters: 1000 clusters of 900 cleaning pairs"),
        (
            "  method: deep_clustering\nsearch: {space: {deep_clustering.clusters: {low: 10, high: 901}}}\n",
            "901 clusters of 900 cleaning pairs",
        ),
    ],
)
def test_studies_that_lack_what_the_method_needs_are_refused(text: str, reason: str) -> None:
    with pytest.raises(StudyError, match=reason):
        study_file.parse(STUDY + text, source="s.yaml")


def test_studies_that_have_it_are_taken(other: PseudoLabels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study_file.parse(STUDY + "  method: deep_clustering\n  deep_clustering: {clusters: 900}\n", source="s.yaml")
    clusters = "deep_clustering.clusters: {low: 10, high: 900, when: {method: deep_clustering}}"
    searched = f"search: {{space: {{method: {{choices: [mmcl, deep_clustering]}}, {clusters}}}}}\n"
    study_file.parse(STUDY + searched, source="s.yaml")
    monkeypatch.chdir(tmp_path)
    given = f"  method: pseudo_labels\n  pseudo_labels: {{model: {VIT}, checkpoint: other.safetensors}}\n"
    study = study_file.parse(STUDY + given, source="s.yaml")
    assert study_file.anchored(study).clean.pseudo_labels.checkpoint == other.checkpoint
    tagged = study_file.parse(STUDY + given.replace("other.safetensors", "openai"), source="s.yaml")
    assert study_file.anchored(tagged).clean.pseudo_labels.checkpoint == "openai"
