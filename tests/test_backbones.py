"""Backbones: each builds, costs what it is said to, and is trained in both towers by the loop's own optimizer."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raybd.errors import StudyError
from raybd.model import create, forward_flops, training_flops

SMALL = ("resnet-tiny-32", "vit-tiny-32")

pytestmark = pytest.mark.usefixtures("one_thread")


# Giga-operations of one image and one caption: mlfoundations/open_clip@3b37473 docs/model_profile.csv.
@pytest.mark.parametrize(("name", "giga"), [("RN50", 18.18), ("ViT-B-32", 14.78), ("RN101", 25.5), ("ViT-B-16", 41.09)])
def test_the_cost_of_a_forward_pass_is_the_published_one(name: str, giga: float) -> None:
    assert forward_flops(name) == pytest.approx(giga * 1e9, rel=5e-4)
    assert 2.9 < training_flops(name) / forward_flops(name) < 3.0  # the first layer's input needs no gradient
    assert training_flops(name, images=5) == 5 * training_flops(name)


@pytest.mark.parametrize("name", SMALL)
def test_the_cost_of_the_small_models_is_what_a_real_pass_takes(name: str) -> None:
    net = create(name, seed=0).net
    with FlopCounterMode(display=False) as counter:
        image_rows, text_rows, _ = net(torch.zeros(3, 3, 32, 32), torch.zeros(3, 20, dtype=torch.long))
        forward = counter.get_total_flops()
        (image_rows.sum() + text_rows.sum()).backward()
    assert forward_flops(name, images=3) == forward
    # Fused attention computes its scores again in the backward pass.
    assert training_flops(name, images=3) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_cost_of_an_unknown_model_is_refused() -> None:
    for flops in (forward_flops, training_flops):
        with pytest.raises(StudyError, match="no model of the name 'RN5O'"):
            flops("RN5O")
