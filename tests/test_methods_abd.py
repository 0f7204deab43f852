"""Adversarial views: the attack against closed forms, and what it must leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import (
    RESNET,
    VIT,
    assert_same,
    context_in,
    copy_of,
    evaluation_set,  # noqa: F401
    images,  # noqa: F401
    pairs_of,
    train_settings,
)
from torch import Tensor

from raybd import study_file
from raybd.clean.adversarial import AdversarialViews, pgd
from raybd.data.cache import Images
from raybd.data.pairs import Batch
from raybd.errors import StudyError
from raybd.evaluate import EvaluationSet
from raybd.model import create
from raybd.objectives import Loss
from raybd.study import LossWeights, Precision
from raybd.study.methods import Abd
from raybd.train.inputs import Inputs
from raybd.train.loop import Training

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = LossWeights(mmcl=1, ssl=1)


def some(count: int, *, seed: int) -> Tensor:
    return torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_a_linear_loss_is_raised_to_its_largest_value() -> None:
    x, c = some(4, seed=1), some(4, seed=2) - 0.5
    found = pgd(x, lambda y: (c * y).sum(), epsilon=0.1, steps=5, step_size=0.05, seeds=range(4))
    torch.testing.assert_close(found, (x + 0.1 * c.sign()).clamp(0, 1))


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-3, 2), st.integers(1, 4), st.floats(1e-3, 2), st.permutations(range(5)))
def test_views_stay_within_epsilon_and_in_range_whatever_their_batch(
    epsilon: float, steps: int, step_size: float, order: list[int]
) -> None:
    x = some(5, seed=1)
    x[0], x[1] = 0.0, 1.0
    how: dict[str, Any] = {"epsilon": epsilon, "steps": steps, "step_size": step_size}
    found = pgd(x, lambda y: (y - 0.3).square().sum(), seeds=range(5), **how)
    assert found.min() >= 0 and found.max() <= 1  # noqa: PT018
    assert (found - x).abs().max() <= epsilon + 1e-6
    assert not found.requires_grad
    assert torch.equal(pgd(x[order], lambda y: (y - 0.3).square().sum(), seeds=order, **how), found[order])


def test_the_start_is_random_within_the_ball() -> None:
    x = torch.full((300, 3, 6, 6), 0.5)
    found = pgd(x, lambda y: 0 * y.sum(), epsilon=0.2, steps=1, step_size=0.1, seeds=range(300)) - x
    assert found.abs().max() <= 0.2 + 1e-6
    assert found.mean().item() == pytest.approx(0, abs=0.003)
    assert found.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.01)


def run_of(
    model: str,
    folder: Path,
    images: Images,  # noqa: F811
    found: EvaluationSet,
    abd: Abd,
    **changes: Any,
) -> Training:
    clip = create(model, seed=1)
    run = Training(
        clip,
        pairs_of(images, clip, ssl=True),
        train_settings(loss_weights=BOTH, **changes),
        context_in(folder),
        found,
        recipe=AdversarialViews(abd, 5),
    )
    clip.net.train()
    return run


def contrastive(run: Training, images_BCHW: Tensor, tokens_BL: Tensor) -> Tensor:
    """The loss that the adversary raises, for images in [0, 1], written out."""
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (run.clip.mean, run.clip.std))
    x, t, scale = run.clip.net.eval()((images_BCHW - mean) / std, tokens_BL)
    logits, target = scale * x @ t.T, torch.arange(len(x))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@pytest.mark.parametrize("model", [VIT, RESNET])
def test_the_attack_raises_the_loss_and_touches_nothing(
    model: str,
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = run_of(model, tmp_path, images, evaluation_set, Abd(epsilon=8 / 255, steps=3, step_size=4 / 255))
    batch = next(run.pairs.epoch(1, batch_size=12))
    before, modes = copy_of(run.clip.net), [part.training for part in run.clip.net.modules()]
    run.clip.net.logit_scale.grad = torch.tensor(7.0)
    views = run.recipe.views(run, batch)  # type: ignore[attr-defined]
    assert_same(copy_of(run.clip.net), before)
    assert [part.training for part in run.clip.net.modules()] == modes
    grads = {name: p.grad for name, p in run.clip.net.named_parameters() if p.grad is not None}
    assert grads == {"logit_scale": torch.tensor(7.0)}
    assert all(parameter.requires_grad for parameter in run.clip.net.parameters())

    clean = batch.images_BCHW.float() / 255
    noise = 8 / 255 * (2 * torch.rand(clean.shape, generator=torch.Generator().manual_seed(3)) - 1)
    with torch.no_grad():
        losses = [
            contrastive(run, found, batch.tokens_BL).item() for found in (clean, (clean + noise).clamp(0, 1), views)
        ]
    assert losses[2] > max(losses[:2]) + 0.1
    assert (views - clean).abs().max() <= 8 / 255 + 1e-6


def test_one_step_is_the_sign_of_the_gradient(
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    """With steps larger than the ball, the start hardly matters: the view is a corner of the ball, by the gradient."""
    run = run_of(VIT, tmp_path, images, evaluation_set, Abd(epsilon=1e-4, steps=1, step_size=1.0))
    batch = next(run.pairs.epoch(1, batch_size=12))
    views = run.recipe.views(run, batch)  # type: ignore[attr-defined]
    x = (batch.images_BCHW.float() / 255).requires_grad_()
    contrastive(run, x, batch.tokens_BL).backward()
    assert x.grad is not None
    expected = (x + 1e-4 * x.grad.sign()).clamp(0, 1).detach()
    assert (views - expected).abs().lt(1e-6).float().mean() > 0.99


def test_the_views_of_images_are_replaced_and_nothing_else(
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_of(RESNET, tmp_path, images, evaluation_set, Abd(steps=1))
    batch, seen = next(run.pairs.epoch(1, batch_size=12)), []
    plain, views = run.loss, run.recipe.views(run, batch)  # type: ignore[attr-defined]

    def watched(given_batch: Batch) -> Loss:
        seen.append(given_batch)
        return plain(given_batch)

    monkeypatch.setattr(run, "loss", watched)
    loss = run.recipe.loss(run, batch)
    (found,) = seen
    assert torch.equal(found.images_BCHW, batch.images_BCHW)
    assert found.tokens_BL is batch.tokens_BL
    assert found.token_views_BL is batch.token_views_BL
    torch.testing.assert_close(found.image_views_BCHW, 255 * views)
    assert loss.total.item() == pytest.approx(plain(found).total.item(), rel=1e-6)
    assert loss.total.item() != pytest.approx(plain(batch).total.item(), rel=1e-3)


def test_no_other_view_of_an_image_is_made_for_it() -> None:
    text = "name: s\npoison: {poison_rate: 0.1}\nclean: {num_samples: 50, method: %s}\n"
    made = {}
    for method in ("abd", "cleanclip"):
        study = study_file.parse(text % method, source="s.yaml")
        inputs, clip = Inputs(study), create(RESNET, seed=1)
        pairs = inputs.cleaning_pairs(study.clean.settings({}), clip, seed=1)
        made[method] = next(pairs.epoch(1, batch_size=10))
    assert made["abd"].image_views_BCHW is None
    assert made["cleanclip"].image_views_BCHW is not None
    assert torch.equal(made["abd"].images_BCHW, made["cleanclip"].images_BCHW)
    assert made["abd"].token_views_BL is not None
    assert torch.equal(made["abd"].token_views_BL, made["cleanclip"].token_views_BL)
    with pytest.raises(StudyError, match=r"clean\.image_view: has no effect on abd"):
        study_file.parse(text % "abd, image_view: crop_flip_colour", source="s.yaml")


def test_bf16(images: Images, evaluation_set: EvaluationSet, tmp_path: Path) -> None:  # noqa: F811
    run_of(RESNET, tmp_path, images, evaluation_set, Abd(), precision=Precision.BF16, epochs=1).run()
