"""FT-SAM against its formula, and a step against one made by hand from two models."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
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

from raybd.clean.sam import SharpnessAware, ascent
from raybd.data.cache import Images
from raybd.errors import TrialError
from raybd.evaluate import EvaluationSet
from raybd.model import create
from raybd.study import Precision
from raybd.study.methods import FtSam
from raybd.train.loop import Training, make_optimizer
from raybd.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
numbers = st.lists(st.floats(-3, 3).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=4, max_size=4)


@settings(deadline=None)
@given(numbers, numbers, st.floats(0.05, 3))
def test_the_ascent_is_the_formula(w: list[float], g: list[float], rho: float) -> None:
    weights, gradients = torch.tensor(w, dtype=torch.float64), torch.tensor(g, dtype=torch.float64)
    parts = ascent([weights[:1], weights[1:]], [gradients[:1], gradients[1:]], rho=rho)
    norm = math.sqrt(sum((abs(a) * b) ** 2 for a, b in zip(w, g, strict=True)))
    expected = [rho * b * a * a / norm if norm else 0.0 for a, b in zip(w, g, strict=True)]
    assert torch.cat(parts).tolist() == pytest.approx(expected, rel=1e-12)
    if norm:
        # Its length, each weight measured in units of itself, is rho: what ASAM bounds.
        relative = [e / abs(a) for e, a in zip(expected, w, strict=True) if a]
        assert math.hypot(*relative) == pytest.approx(rho)


def run_of(
    model: str,
    folder: Path,
    images: Images,  # noqa: F811
    found: EvaluationSet,
    recipe: Recipe,
    **changes: object,
) -> Training:
    clip = create(model, seed=1)
    run = Training(clip, pairs_of(images, clip), train_settings(**changes), context_in(folder), found, recipe=recipe)
    clip.net.train()
    return run


def test_a_step_is_the_one_made_by_hand(
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    rho = 0.7
    run = run_of(VIT, tmp_path, images, evaluation_set, SharpnessAware(FtSam(rho=rho)))
    own, other = copy.deepcopy(run.clip.net), copy.deepcopy(run.clip.net)
    optimizer = make_optimizer(own, run.settings)
    for batch in run.pairs.epoch(1, batch_size=12):
        tokens, pixels = batch.tokens_BL, run.clip.normalise(batch.images_BCHW)

        def gradients(net: torch.nn.Module) -> list[torch.Tensor]:
            x, t, scale = net(pixels, tokens)  # noqa: B023
            logits, target = scale * x @ t.T, torch.arange(len(x))
            cross_entropy = torch.nn.functional.cross_entropy
            loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
            return list(torch.autograd.grad(loss, list(net.parameters())))

        found = gradients(own)
        norm = torch.cat([(w.abs() * g).flatten() for w, g in zip(own.parameters(), found, strict=True)]).norm()
        with torch.no_grad():
            for w, g, moved in zip(own.parameters(), found, other.parameters(), strict=True):
                moved.copy_(w + rho * g * w**2 / norm)
        by_hand = gradients(other)
        run.recipe.step(run, batch)
        for w, expected, stepped in zip(own.parameters(), by_hand, run.clip.net.parameters(), strict=True):
            assert stepped.grad is not None
            torch.testing.assert_close(
                stepped.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-7
            )
            w.grad = stepped.grad.clone()
        # From w itself, not from where the gradient was taken.
        optimizer.step()
        assert_same(copy_of(run.clip.net), copy_of(own))
        plain = torch.cat([g.flatten() for g in found])
        assert torch.nn.functional.cosine_similarity(plain, torch.cat([g.flatten() for g in by_hand]), dim=0) < 0.99


def test_batchnorm_counts_each_batch_once_and_at_the_weights_themselves(
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    stepped = {}
    for name, recipe in (("plain", Recipe()), ("sam", SharpnessAware(FtSam(rho=2.0)))):
        run = run_of(RESNET, tmp_path / name, images, evaluation_set, recipe)
        loss = recipe.step(run, next(run.pairs.epoch(1, batch_size=12)))
        stepped[name] = (dict(run.clip.net.named_buffers()), loss.total.item(), copy_of(run.clip.net))
        assert all(part.track_running_stats for part in run.clip.net.modules() if hasattr(part, "track_running_stats"))
    (plain, loss, weights), (sam, sam_loss, sam_weights) = stepped["plain"], stepped["sam"]
    assert_same(plain, sam)
    assert {int(value) for name, value in sam.items() if name.endswith("num_batches_tracked")} == {1}
    assert loss == sam_loss
    assert not torch.equal(weights["visual.trunk.conv1.weight"], sam_weights["visual.trunk.conv1.weight"])


def test_a_second_pass_that_is_not_finite_leaves_the_weights_alone(
    images: Images,  # noqa: F811
    evaluation_set: EvaluationSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = run_of(VIT, tmp_path, images, evaluation_set, SharpnessAware(FtSam(rho=1e30)))
    before = copy_of(run.clip.net)
    loss = run.recipe.step(run, next(run.pairs.epoch(1, batch_size=12)))
    assert loss.total.isfinite()
    with pytest.raises(TrialError, match="loss is "):
        run.check_guarded()
    assert_same(copy_of(run.clip.net), before)
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {0}


def test_bf16(images: Images, evaluation_set: EvaluationSet, tmp_path: Path) -> None:  # noqa: F811
    recipe = SharpnessAware(FtSam())
    run_of(RESNET, tmp_path, images, evaluation_set, recipe, precision=Precision.BF16, epochs=1).run()
