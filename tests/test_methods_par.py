"""PAR against its formula, and the draws that perturb its images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import (
    PLAN,
    RESNET,
    VIT,
    context_in,
    copy_of,
    evaluation_set,  # noqa: F401
    images,  # noqa: F401
    pairs_of,
    train_settings,
)
from torch import Tensor

from raybd.clean.draws import _hash, normal, uniform
from raybd.clean.par import PerturbAndRecover, capped_distance, par_loss, perturbed
from raybd.data.cache import Images
from raybd.evaluate import EvaluationSet
from raybd.model import create
from raybd.study import Precision
from raybd.study.methods import Par
from raybd.train.loop import Training
from raybd.train.recipe import Recipe

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# Draws.


def test_the_hash_is_splitmix64() -> None:
    """The first outputs that the reference implementation gives for the seed 1234567 (prng.di.unimi.it)."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = [(1234567 + (i + 1) * 0x9E3779B97F4A7C15) % 2**64 for i in range(5)]
    signed = torch.tensor([state - 2**64 if state >= 2**63 else state for state in states])
    assert [value % 2**64 for value in _hash(signed).tolist()] == expected
    found = uniform([1234567], 5, device=CPU)[0]
    assert found.tolist() == [(value >> 40) / 2**24 for value in expected]


def test_draws_are_uniform_and_normal_and_of_each_sample_alone() -> None:
    seeds = list(range(40))
    flat, bell = uniform(seeds, 50, 50, device=CPU), normal(seeds, 50, 50, device=CPU)
    assert flat.min() >= 0 and flat.max() < 1  # noqa: PT018
    assert scipy.stats.kstest(flat.flatten().numpy(), "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(bell.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(float(np.corrcoef(flat.flatten(1).numpy())[np.triu_indices(40, 1)].mean())) < 0.005
    assert torch.equal(normal([7, 3], 50, 50, device=CPU), bell[[7, 3]])


# The loss.


def unit_rows(count: int, width: int, *, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def reference(x: Tensor, t: Tensor, x0: Tensor, t0: Tensor, scale: float, threshold: float) -> float:
    """The formula, term by term, in Python numbers."""

    def cross_entropy(rows: np.ndarray, others: np.ndarray) -> float:
        found = []
        for i, row in enumerate(rows):
            logits = [scale * float(row @ other) for other in others]
            found.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[i])
        return sum(found) / len(found)

    def term(rows: np.ndarray, frozen: np.ndarray) -> float:
        mean = sum(float(((a - b) ** 2).sum()) for a, b in zip(rows, frozen, strict=True)) / len(rows)
        return mean if mean <= threshold else threshold

    a, b, a0, b0 = (rows.detach().numpy() for rows in (x, t, x0, t0))
    return (cross_entropy(a, b) + cross_entropy(b, a)) / 2 - (term(a, a0) + term(b, b0)) / 2


@pytest.mark.parametrize("threshold", [1.0, 2.0, 3.0])
def test_the_loss_is_the_formula(threshold: float) -> None:
    x, t, x0, t0 = (unit_rows(6, 5, seed=seed) for seed in range(4))
    x0 = F.normalize(x + 0.4 * x0)  # the image tower has hardly moved, the text tower is at about 2
    found = par_loss(x, t, x0, t0, torch.tensor(4.0, dtype=torch.float64), threshold=threshold)
    assert found.total.item() == pytest.approx(reference(x, t, x0, t0, 4.0, threshold), rel=1e-12)


def test_beyond_the_threshold_only_the_contrastive_loss_has_a_gradient() -> None:
    rows, frozen = unit_rows(6, 5, seed=1), unit_rows(6, 5, seed=2)
    distance = float((rows - frozen).square().sum(1).mean())
    for threshold, inside in ((distance * 1.01, True), (distance, True), (distance * 0.99, False)):
        rows.requires_grad_()
        found = capped_distance(rows, frozen, threshold=threshold)
        assert found.item() == pytest.approx(distance if inside else threshold)
        (gradient,) = torch.autograd.grad(found, rows)
        expected = 2 * (rows - frozen) / len(rows) if inside else torch.zeros_like(rows)
        torch.testing.assert_close(gradient, expected.detach())


# The images.


def test_nothing_to_do_leaves_images_as_they_are() -> None:
    given = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(perturbed(given, noise=0.0, erase=0.0, seeds=range(5)), given)


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 2), st.floats(0, 1), st.permutations(range(6)))
def test_pixels_stay_in_range_and_samples_apart(noise: float, erase: float, order: list[int]) -> None:
    given_images = torch.rand(6, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    found = perturbed(given_images, noise=noise, erase=erase, seeds=range(6))
    assert found.min() >= 0 and found.max() <= 1  # noqa: PT018
    again = perturbed(given_images[order], noise=noise, erase=erase, seeds=order)
    assert torch.equal(again, found[order])


def test_half_of_the_images_get_noise_of_the_stated_strength() -> None:
    found = perturbed(torch.full((400, 3, 16, 16), 0.5), noise=0.05, erase=0.0, seeds=range(400))
    noisy = (found != 0.5).flatten(1).any(1)
    assert 160 < int(noisy.sum()) < 240
    assert float((found[noisy] - 0.5).std()) == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("size", [32, 224])
def test_one_black_rectangle_is_erased(size: int) -> None:
    found = perturbed(torch.ones(40, 3, size, size), noise=0.0, erase=1.0, seeds=range(40))
    places = set()
    for image in found:
        black = image[0] == 0
        assert torch.equal(image, (~black).float().expand(3, -1, -1))
        rows, columns = black.any(1).nonzero().flatten(), black.any(0).nonzero().flatten()
        assert bool(black[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())
        tall, wide = len(rows), len(columns)
        assert (tall, wide) == (int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1)
        # Sides are rounded to pixels, and cut to the image.
        assert 0.01 < tall * wide / size**2 < 0.36
        places.add((int(rows[0]), int(columns[0])))
    assert len(places) > 25
    third = perturbed(torch.ones(600, 3, 8, 8), noise=0.0, erase=0.3, seeds=range(600))
    assert 130 < int((third == 0).flatten(1).any(1).sum()) < 230


# The method.


def trained(recipe: Recipe, folder: Path, images: Images, found: EvaluationSet, **changes: object) -> Training:  # noqa: F811
    clip = create(str(changes.pop("model", VIT)), seed=1)
    run = Training(clip, pairs_of(images, clip), train_settings(**changes), context_in(folder), found, recipe=recipe)
    run.run()
    return run


def test_the_model_leaves_the_frozen_one_further_than_by_plain_finetuning(
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    before = create(VIT, seed=1).net
    pixels = create(VIT, seed=1).normalise(
        torch.stack([PLAN.image(torch.from_numpy(image), "none") for image in images.pixels(np.arange(24))])
    )

    def moved(run: Training) -> float:
        with torch.no_grad():
            new, old = (net.eval().encode_image(pixels, normalize=True) for net in (run.clip.net, before))
        return float((new - old).square().sum(1).mean())

    recipe = PerturbAndRecover(Par(noise=0.0, erase=0.0), 5)
    distances = {}
    for name, one in (("plain", Recipe()), ("par", recipe)):
        distances[name] = moved(trained(one, tmp_path / name, images, evaluation_set, lr=1e-3, epochs=5))
    assert distances["par"] > 1.5 * distances["plain"]
    # The copy is still the model as it came.
    frozen = recipe._frozen.state_dict()
    assert all(torch.equal(value, frozen[name]) for name, value in copy_of(before).items())


@pytest.mark.parametrize("model", [VIT, RESNET])
def test_at_first_nothing_has_moved(
    model: str,
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The frozen copy sees the very images that the model sees; in train mode BatchNorm alone tells them apart."""
    clip = create(model, seed=1)
    recipe = PerturbAndRecover(Par(noise=0.2, erase=0.5), 5)
    run = Training(clip, pairs_of(images, clip), train_settings(), context_in(tmp_path), evaluation_set, recipe=recipe)
    batch = next(run.pairs.epoch(1, batch_size=12))
    clip.net.eval()
    found = recipe.loss(run, batch)
    assert found.total.item() == pytest.approx(found.terms["mmcl"].item(), abs=1e-6)
    clip.net.train()
    assert (recipe.loss(run, batch).total < found.terms["mmcl"] - 1e-3) == (model == RESNET)
    assert not recipe._frozen.training


def test_bf16(images: Images, evaluation_set: EvaluationSet, tmp_path: Path) -> None:  # noqa: F811
    trained(PerturbAndRecover(Par(), 5), tmp_path, images, evaluation_set, precision=Precision.BF16, epochs=1)
