"""A training step does not wait for its device; losses that are not finite are found all the same, and first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from micro_batches import RESNET, VIT, batch, run_of
from test_training import (
    Spied,
    assert_same,
    context_in,
    copy_of,
    evaluation_set,
    images,
    pairs_of,
    train_settings,
)
from torch.utils._python_dispatch import TorchDispatchMode

from raybd.clean.adversarial import AdversarialViews
from raybd.clean.batchnorm import BatchNormRefresh, FrozenBatchNorm
from raybd.clean.par import PerturbAndRecover
from raybd.clean.sam import SharpnessAware
from raybd.data.cache import Images
from raybd.data.pairs import Batch
from raybd.errors import DataError, NonFiniteError
from raybd.evaluate import EvaluationSet
from raybd.ledger import Kind, Ledger
from raybd.model import Clip, create
from raybd.study.methods import Abd, FtSam, Par
from raybd.train import loop
from raybd.train.distributed import Group
from raybd.train.loop import Training
from raybd.train.recipe import Recipe

__all__ = ["evaluation_set", "images"]
pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = 6


class Waits(TorchDispatchMode):
    """Counts how often a number is asked for that a device may not have made yet."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


RECIPES: dict[str, tuple[str, int | None, str, Recipe | None]] = {
    "mmcl": ("mmcl", None, VIT, None),
    "mmcl_ssl": ("mmcl_ssl", None, RESNET, None),
    "nt_xent": ("nt_xent", None, VIT, None),
    "siglip": ("siglip", None, VIT, None),
    "micro batches": ("mmcl_ssl", 2, RESNET, None),
    "frozen_batchnorm": ("mmcl", None, RESNET, FrozenBatchNorm()),
    "batchnorm_refresh": ("mmcl", None, RESNET, BatchNormRefresh()),
    "ft_sam": ("mmcl_ssl", None, VIT, SharpnessAware(FtSam())),
    "par": ("mmcl", None, VIT, PerturbAndRecover(Par(), 1)),
    "abd": ("mmcl_ssl", None, VIT, AdversarialViews(Abd(), 1)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_no_step_asks_for_a_number(name: str) -> None:
    loss, micro, model, recipe = RECIPES[name]
    run = run_of(loss, micro, model=model, recipe=recipe)
    if name in ("par", "abd"):
        run.clip.net.float()  # as the images are that these methods make
        run.clip = Clip(**vars(run.clip))
    if isinstance(recipe, PerturbAndRecover):
        recipe._frozen.float()
    given, sums = batch(run, PAIRS), loop._EpochSums()
    with Waits() as seen:
        for _ in range(3):
            run._take_step(sums, given)
        assert seen.count == 0
        assert math.isfinite(float(sums.waiting[0]["loss"]))
        assert seen.count == 1, "what is counted is what is meant"
    run._fetch(sums)
    assert sums.steps == 3
    assert math.isfinite(sums.losses["loss"])


@pytest.mark.parametrize("every", [1, 2, 50])
def test_losses_add_up_to_the_same_bits_however_seldom_they_are_fetched(
    every: int,
    images: Images,
    evaluation_set: EvaluationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "_FETCH_STEPS", every)
    told: list[dict[str, float]] = []

    class Noted(Recipe):
        def step(self, run: Training, batch: Batch) -> Any:
            found = super().step(run, batch)
            told.append({"loss": found.total.item(), "loss_mmcl": found.terms["mmcl"].item()})
            return found

    clip, context = create(VIT, seed=1), context_in(tmp_path)
    settings = train_settings(epochs=2, batch_size=5)
    Training(clip, pairs_of(images, clip), settings, context, evaluation_set, recipe=Noted()).run()
    records = Ledger(context.store).entry(Kind.TRIAL, "run").epochs
    for epoch in (1, 2):
        some = told[5 * epoch - 5 : 5 * epoch]
        for name in some[0]:
            assert records[epoch][name] == sum(losses[name] for losses in some) / 5


@pytest.mark.parametrize(("every", "seen"), [(1, 3), (2, 4), (3, 3), (50, 5)])
def test_the_first_bad_loss_is_told_and_nothing_after_it_counts(
    every: int,
    seen: int,
    images: Images,
    evaluation_set: EvaluationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the five steps of the first epoch the third is bad; those after it are taken until losses are fetched."""
    monkeypatch.setattr(loop, "_FETCH_STEPS", every)
    clip, kept = create(VIT, seed=1), dict[str, torch.Tensor]()
    numbers = itertools.count()

    class Spoilt(Recipe):
        def loss(self, run: Training, batch: Batch) -> Any:
            found = run.loss(batch)
            number = next(numbers)
            if number == 2:
                kept.update(copy_of(run.clip.net))
                return replace(found, total=found.total * math.inf)
            return found

    context = context_in(tmp_path)
    training = Training(
        clip, pairs_of(images, clip), train_settings(batch_size=5), context, evaluation_set, recipe=Spoilt()
    )
    with pytest.raises(NonFiniteError, match=r"^loss is inf at step 2 \(epoch 1, lr 0.001\)"):
        training.run()
    assert next(numbers) == seen
    assert_same(copy_of(clip.net), kept)
    assert {int(state["step"]) for state in training.optimizer.state.values()} == {2}
    assert sorted(Ledger(context.store).entry(Kind.TRIAL, "run").epochs) == [0]


def test_a_bad_loss_is_told_before_what_went_wrong_after_it(
    images: Images,
    evaluation_set: EvaluationSet,
    tmp_path: Path,
) -> None:
    clip = create(VIT, seed=1)

    def spoil(number: int) -> None:
        if number == 1:
            with torch.no_grad():
                clip.net.text_projection[0, 0] = math.nan
        if number == 3:
            raise DataError("shard cannot be read")

    pairs = Spied(pairs_of(images, clip), spoil)
    training = Training(clip, pairs, train_settings(batch_size=5), context_in(tmp_path), evaluation_set)
    with pytest.raises(NonFiniteError, match="loss is nan at step 1") as caught:
        training.run()
    assert isinstance(caught.value.__context__, DataError)


def test_another_error_stays_what_it_is(images: Images, evaluation_set: EvaluationSet, tmp_path: Path) -> None:
    clip = create(VIT, seed=1)

    class Broken(Spied):
        def epoch(self, epoch: int, **how: Any) -> Iterator[Batch]:
            yield next(super().epoch(epoch, **how))
            raise DataError("shard cannot be read")

    pairs = Broken(pairs_of(images, clip), lambda number: None)
    with pytest.raises(DataError, match="shard cannot be read"):
        Training(clip, pairs, train_settings(batch_size=5), context_in(tmp_path), evaluation_set).run()


def test_ranks_tell_each_other_their_sizes_once_for_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        sent: list[torch.dtype] = []
        gather = dist.all_gather_into_tensor

        def noted(into: torch.Tensor, given: torch.Tensor) -> None:
            sent.append(given.dtype)
            gather(into, given)

        monkeypatch.setattr(dist, "all_gather_into_tensor", noted)
        group = Group()
        for _ in range(4):
            rows_BD = torch.rand(5, 3)
            assert torch.equal(group.gather(rows_BD).all_ND, rows_BD)
        assert sent == [torch.int64, *4 * [torch.float32]]
    finally:
        dist.destroy_process_group()
