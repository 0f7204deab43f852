"""Gradient caching: the same step, to rounding, with the activations of a few pairs at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from micro_batches import RESNET, VIT, WEIGHTS, batch, run_of, stepped
from torch import Tensor, nn

from raybd.clean import registry
from raybd.clean.batchnorm import FrozenBatchNorm
from raybd.data.pairs import Batch
from raybd.errors import NonFiniteError
from raybd.study import CleanSettings, Method, Study
from raybd.study.methods import users
from raybd.train.loop import Features, Training

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = 7


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12, msg=name)


def joined(run: Training, given: Batch, size: int) -> Features:
    """Return the rows of a batch, all with their graph, encoded `size` pairs at a time."""
    parts = []
    for start in range(0, PAIRS, size):
        some = slice(start, start + size)
        cut: dict[str, Any] = {name: getattr(given, name)[some] for name in ("images_BCHW", "tokens_BL", "keys")}
        cut |= {name: getattr(given, name)[some] for name in ("image_views_BCHW", "token_views_BL")}
        parts.append(run.features(replace(given, **cut)))
    names = ("image_BD", "text_BD", "image_view_BD", "text_view_BD")
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@pytest.mark.parametrize(("loss", "size"), list(zip(WEIGHTS, (1, 3, 6, 2, 3), strict=True)))
def test_a_step_in_micro_batches_is_the_whole_step(loss: str, size: int) -> None:
    whole, parts = run_of(loss, None), run_of(loss, size)
    expected = stepped(whole, batch(whole, PAIRS))
    assert max(value.abs().max() for name, value in expected.items() if name != "loss") > 1e-3
    assert_alike(expected, stepped(parts, batch(parts, PAIRS)))
    for name, value in whole.clip.net.named_parameters():
        assert parts.clip.net.get_parameter(name).requires_grad == value.requires_grad


def test_no_more_than_a_micro_batch_is_encoded_with_a_graph_and_each_pair_twice() -> None:
    run, seen = run_of("mmcl_ssl", 3), list[tuple[bool, int]]()
    run.clip.net.register_forward_hook(lambda net, given, made: seen.append((torch.is_grad_enabled(), len(given[0]))))
    stepped(run, batch(run, PAIRS))
    assert seen == [(False, 6), (False, 6), (False, 2), (True, 6), (True, 6), (True, 2)]


@pytest.mark.parametrize("model", [VIT, RESNET])
def test_what_a_forward_pass_draws_and_batchnorm_are_those_of_the_micro_batches(model: str) -> None:
    def run_with(micro: int | None) -> Training:
        run = run_of("mmcl_ssl", micro, model=model)
        run.clip.net.ln_final = nn.Sequential(run.clip.net.ln_final, nn.Dropout(0.5))
        run.clip.net.train()
        return run

    parts, whole = run_with(3), run_with(None)
    given = batch(parts, PAIRS)
    torch.manual_seed(3)
    found = stepped(parts, given)
    torch.manual_seed(3)
    after = torch.rand(2)  # a step draws something
    torch.manual_seed(3)
    total = whole.loss_of(joined(whole, given, 3)).total
    total.backward()
    expected = {name: p.grad for name, p in whole.clip.net.named_parameters() if p.grad is not None}
    expected |= dict(whole.clip.net.named_buffers())
    assert_alike({"loss": total.detach(), **expected}, found)
    assert not torch.equal(torch.rand(2), after)


def test_batchnorm_that_is_held_fixed_makes_no_difference() -> None:
    whole, parts = (run_of("mmcl_ssl", micro, model=RESNET, recipe=FrozenBatchNorm()) for micro in (None, 2))
    assert_alike(stepped(whole, batch(whole, PAIRS)), stepped(parts, batch(parts, PAIRS)))


def test_a_loss_that_is_not_finite_changes_no_weight() -> None:
    run = run_of("mmcl", 3)
    with torch.no_grad():
        run.clip.net.text_projection[0, 0] = torch.nan
    before = {name: value.clone() for name, value in run.clip.net.state_dict().items()}
    for _ in range(2):
        stepped(run, batch(run, PAIRS))
    with pytest.raises(NonFiniteError, match="loss is nan at step 0"):
        run.check_guarded()
    assert all(
        torch.equal(value.nan_to_num(7), before[name].nan_to_num(7))
        for name, value in run.clip.net.state_dict().items()
    )
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {0}


@pytest.mark.parametrize("method", Method)
def test_methods_that_heed_micro_batches_are_those_that_a_study_may_give_them_to(method: Method) -> None:
    recipe = registry.recipe(CleanSettings(method=method), seed=1)
    assert recipe.in_parts == (method in users("micro_batch_size"))


def study_of(sections: dict[str, Any]) -> Study:
    return Study.model_validate({"name": "s", "poison": {"num_poisoned": 1}, **sections})


def test_a_study_is_refused_that_gives_micro_batches_to_a_method_without() -> None:
    assert study_of({"clean": {"micro_batch_size": 8}}).clean.micro_batch_size == 8
    with pytest.raises(ValueError, match="has no effect on par"):
        study_of({"clean": {"method": "par", "micro_batch_size": 8}})
    with pytest.raises(ValueError, match="greater than 0"):
        study_of({"pretrain": {"micro_batch_size": 0}})
    own = {"objectives": {"a": {"micro_batch_size": 4}, "b": {}}, "micro_batch_size": 16}
    pretrain = study_of({"pretrain": own}).pretrain
    assert [pretrain.settings(name).micro_batch_size for name in ("a", "b")] == [4, 16]
