"""Schedule, training loop, resuming, models and checkpoints, without Ray."""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raybd import checkpoint
from raybd.data.cache import Images
from raybd.data.pairs import Batch, CachedPairs, Pairs, Prepare
from raybd.data.shards import decode, find_shards, make_index, samples
from raybd.errors import CheckpointError, DataError, StudyError, TrialError
from raybd.evaluate import EvaluationSet, evaluate, evaluating, make_set
from raybd.ledger import Kind, Ledger
from raybd.model import Clip, check_name, create, image_size, load_weights, names
from raybd.poison.plan import Attack, PoisonPlan
from raybd.store import Store
from raybd.study import (
    BadNet,
    Data,
    Evaluation,
    ImageView,
    LossWeights,
    Precision,
    Schedule,
    TextView,
    TrainSettings,
)
from raybd.train.context import LedgerContext, Progress
from raybd.train.loop import Training, make_optimizer
from raybd.train.schedule import learning_rate

VIT, RESNET = "vit-tiny-32", "resnet-tiny-32"
TRIGGER = BadNet(size=4, pattern="fixed", placement="bottom_right")
PLAN = PoisonPlan({}, (Attack(TRIGGER, "fruit", pattern_seed=1),))
TIMES = ("train_seconds", "evaluate_seconds", "samples_per_second")
unhurried = settings(deadline=None)  # a busy machine is no failure

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images() -> Images:
    """24 emoji drawings of three classes."""
    (url,) = find_shards(Data(), "test/*.tar*", field_name="data.test")
    raw = list(itertools.islice(samples(url), 24))
    index = make_index([url], [(0, sample) for sample in raw], labelled=True)
    index = replace(index, labels=np.arange(len(index)) % 3)
    return Images(index, np.stack([decode(sample.image, 32) for sample in raw]), np.arange(len(raw)))


@pytest.fixture(scope="module")
def evaluation_set(images: Images) -> EvaluationSet:
    evaluation = Evaluation(templates=("a picture of a {}.",))
    return make_set(images, classes=["cat", "heart", "fruit"], plan=PLAN, evaluation=evaluation, seed=3)


def train_settings(**changes: Any) -> TrainSettings:
    """Three epochs of two steps."""
    common = {"epochs": 3, "batch_size": 12, "lr": 1e-3, "warmup_steps": 2, "precision": Precision.FP32}
    return TrainSettings(**{**common, "loss_weights": LossWeights(mmcl=1, ssl=0), **changes})


def pairs_of(images: Images, clip: Clip, *, ssl: bool = False) -> CachedPairs:
    views = (ImageView.CROP_FLIP_COLOUR, TextView.EDA) if ssl else None
    return CachedPairs(images, Prepare(PLAN, clip.tokenizer, views, seed=9))


def context_in(folder: Path, **more: Any) -> LedgerContext:
    """Return the context of a run that starts, or starts again, in a folder."""
    store = Store(str(folder))
    Ledger(store).start(Kind.TRIAL, "run", {})
    return LedgerContext(store=store, kind=Kind.TRIAL, id="run", **more)


class Spied:
    """Pairs that call back before each batch, with its number from 0."""

    def __init__(self, pairs: Pairs, before: Callable[[int], None]) -> None:
        self._pairs, self._before, self._number = pairs, before, itertools.count()

    def __len__(self) -> int:
        return len(self._pairs)

    def epoch(self, epoch: int, **how: Any) -> Iterator[Batch]:
        for batch in self._pairs.epoch(epoch, **how):
            self._before(next(self._number))
            yield batch


def copy_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Fail unless two sets of weights are equal bit for bit, NaN included."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name].nan_to_num(7e9), other[name].nan_to_num(7e9))]
    assert different == []


# The schedule.


def test_warm_up_runs_from_the_first_step_and_the_cosine_ends_at_zero() -> None:
    lrs = [learning_rate(Schedule.COSINE, step, base_lr=0.8, warmup_steps=4, total_steps=12) for step in range(13)]
    assert lrs[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8], rel=1e-15)
    assert lrs[8] == pytest.approx(0.4, rel=1e-12)
    assert lrs[6] == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)), rel=1e-12)
    assert lrs[12] == pytest.approx(0.0, abs=1e-15)
    assert all(a > b for a, b in itertools.pairwise(lrs[4:]))


def test_no_warm_up_starts_at_the_base_and_a_run_shorter_than_its_warm_up_only_rises() -> None:
    assert learning_rate(Schedule.COSINE, 0, base_lr=0.3, warmup_steps=0, total_steps=5) == 0.3
    rising = [learning_rate(Schedule.COSINE, step, base_lr=1.0, warmup_steps=10, total_steps=3) for step in range(3)]
    assert rising == pytest.approx([0.1, 0.2, 0.3])


@unhurried
@given(st.floats(1e-9, 10.0), st.integers(0, 200), st.integers(1, 400), st.integers(0, 500))
@example(0.1, 3, 400, 2)  # 0.1 * 3 / 3 is above 0.1
def test_never_negative_and_never_above_the_base(base: float, warmup: int, total: int, step: int) -> None:
    lr = learning_rate(Schedule.COSINE, step, base_lr=base, warmup_steps=warmup, total_steps=total)
    assert 0.0 <= lr <= base
    if step < min(warmup, total):
        assert lr > 0.0
    if step >= total > warmup:
        assert lr <= 1e-15 * base


@unhurried
@given(st.floats(1e-9, 10.0), st.integers(0, 50), st.integers(1, 200))
def test_par_falls_in_a_line_to_a_tenth_and_then_in_a_cosine_to_zero(base: float, warmup: int, half: int) -> None:
    total = warmup + 2 * half
    lrs = [
        learning_rate(Schedule.PAR, step, base_lr=base, warmup_steps=warmup, total_steps=total)
        for step in range(total + 1)
    ]
    assert lrs[:warmup] == pytest.approx([base * (step + 1) / warmup for step in range(warmup)])
    line = [base + (base / 10 - base) * step / half for step in range(half + 1)]
    assert lrs[warmup : warmup + half + 1] == pytest.approx(line, rel=1e-9)
    # cos² of half the angle is the same curve as (1 + cos) / 2.
    curve = [base / 10 * math.cos(math.pi / 2 * step / half) ** 2 for step in range(half + 1)]
    assert lrs[warmup + half :] == pytest.approx(curve, rel=1e-9, abs=1e-12)


@unhurried
@given(st.integers(0, 20), st.integers(30, 300), st.integers(1, 300))
def test_a_cooldown_has_the_same_prefix_whatever_the_length(warmup: int, total: int, more: int) -> None:
    def lrs(total_steps: int) -> list[float]:
        settings: dict[str, Any] = {"base_lr": 0.5, "warmup_steps": warmup, "total_steps": total_steps}
        return [learning_rate(Schedule.CONSTANT_COOLDOWN, step, **settings) for step in range(total_steps + 1)]

    short, long = lrs(total), lrs(total + more)
    same = math.floor(0.8 * total)
    assert short[: same + 1] == long[: same + 1] == [0.5 * min(1.0, (n + 1) / max(1, warmup)) for n in range(same + 1)]
    # 1 - sqrt of the way: a quarter of the way down it has lost half.
    assert short[same + 1 :] == pytest.approx(
        [0.5 * (1 - math.sqrt((step - 0.8 * total) / (0.2 * total))) for step in range(same + 1, total + 1)], abs=1e-9
    )
    assert short[-1] == pytest.approx(0.0, abs=1e-12)


# The loop.


def test_each_step_has_the_learning_rate_of_the_schedule(
    images: Images, evaluation_set: EvaluationSet, tmp_path: Path
) -> None:
    clip, run = create(VIT, seed=1), train_settings(epochs=2, lr=4e-4, warmup_steps=2)
    context = context_in(tmp_path)
    training = Training(clip, pairs_of(images, clip), run, context, evaluation_set)
    lrs: list[list[float]] = []
    training.optimizer.register_step_pre_hook(lambda o, *_: lrs.append([group["lr"] for group in o.param_groups]))
    training.run()
    expected = [2e-4, 4e-4, 4e-4, 2e-4]  # half, whole, then a cosine over the two steps that are left
    assert lrs == [pytest.approx([lr, lr]) for lr in expected]
    records = Ledger(context.store).entry(Kind.TRIAL, "run").epochs
    assert [records[epoch]["lr"] for epoch in (0, 1, 2)] == [None, pytest.approx(4e-4), pytest.approx(2e-4)]
    assert [records[epoch]["step"] for epoch in (0, 1, 2)] == [0, 2, 4]
    assert [records[epoch]["samples_seen"] for epoch in (0, 1, 2)] == [0, 24, 48]


@pytest.mark.parametrize("model", [VIT, RESNET])
def test_weight_decay_spares_biases_norms_and_the_logit_scale(model: str) -> None:
    net = create(model, seed=1).net
    optimizer = make_optimizer(net, train_settings(lr=1e-2, weight_decay=5.0))
    before = copy_of(net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    norms = {
        f"{name}.{own}"
        for name, part in net.named_modules()
        if isinstance(part, nn.LayerNorm | nn.BatchNorm2d)
        for own, _ in part.named_parameters()
    }
    spared = set()
    for name, parameter in net.named_parameters():
        if torch.equal(parameter, before[name]):
            if before[name].abs().max() > 0:
                spared.add(name)
        else:
            torch.testing.assert_close(parameter.detach(), before[name] * 0.95, rtol=1e-6, atol=0)
            assert not name.endswith("bias"), name
            assert name not in norms, name
            assert name != "logit_scale"
    assert "logit_scale" in spared
    assert {name for name in norms if name.endswith("weight")} <= spared
    # Every matrix and convolution is decayed.
    assert all(parameter.ndim < 2 for name, parameter in net.named_parameters() if name in spared)


def test_frozen_parameters_are_left_out() -> None:
    net = create(RESNET, seed=1).net
    frozen = set(net.visual.parameters())
    for parameter in frozen:
        parameter.requires_grad = False
    held = {p for group in make_optimizer(net, train_settings()).param_groups for p in group["params"]}
    assert held == set(net.parameters()) - frozen


def test_the_weight_decay_in_force_is_read_back(images: Images, evaluation_set: EvaluationSet, tmp_path: Path) -> None:
    clip = create(RESNET, seed=1)
    training = Training(
        clip, pairs_of(images, clip), train_settings(weight_decay=20.0), context_in(tmp_path), evaluation_set
    )
    assert training.weight_decay_in_force() == 20.0
    assert [group["weight_decay"] for group in training.optimizer.param_groups] == [20.0, 0.0]
    training.optimizer.param_groups[0]["weight_decay"] = 0.25  # what a loaded optimizer state would do
    assert training.weight_decay_in_force() == 0.25


@pytest.mark.parametrize(("start", "end"), [(4.7, math.log(100)), (-1.0, 0.0)])
def test_the_logit_scale_is_clamped_after_each_step(
    start: float, end: float, images: Images, evaluation_set: EvaluationSet, tmp_path: Path
) -> None:
    clip = create(RESNET, seed=1)
    with torch.no_grad():
        clip.net.logit_scale.fill_(start)
    context = context_in(tmp_path)
    run = train_settings(epochs=1, batch_size=24, lr=1e-6)
    Training(clip, pairs_of(images, clip), run, context, evaluation_set).run()
    assert clip.net.logit_scale.item() == pytest.approx(end, abs=1e-6)
    records = Ledger(context.store).entry(Kind.TRIAL, "run").epochs
    assert records[0]["logit_scale"] == pytest.approx(math.exp(start), rel=1e-6)
    assert records[1]["logit_scale"] == pytest.approx(math.exp(end), rel=1e-5)


def test_a_loss_that_is_not_a_number_stops_before_the_step(
    images: Images, evaluation_set: EvaluationSet, tmp_path: Path
) -> None:
    clip = create(VIT, seed=1)
    kept: dict[str, Tensor] = {}

    def poison(number: int) -> None:
        if number == 3:
            with torch.no_grad():
                clip.net.text_projection[0, 0] = math.nan
            kept.update(copy_of(clip.net))

    context = context_in(tmp_path)
    training = Training(clip, Spied(pairs_of(images, clip), poison), train_settings(), context, evaluation_set)
    with pytest.raises(TrialError, match=r"^loss is nan at step 3 \(epoch 2, lr 0.000854\)") as caught:
        training.run()
    assert "lower the learning rate" in caught.value.fix
    assert_same(copy_of(clip.net), kept)
    assert {int(state["step"]) for state in training.optimizer.state.values()} == {3}
    assert sorted(Ledger(context.store).entry(Kind.TRIAL, "run").epochs) == [0, 1]


def test_a_learning_rate_that_blows_up_stops_before_the_next_step(
    images: Images, evaluation_set: EvaluationSet, tmp_path: Path
) -> None:
    clip = create(RESNET, seed=1)
    kept: dict[str, Tensor] = {}

    def watch(number: int) -> None:
        if number == 1:
            kept.update({name: value for name, value in copy_of(clip.net).items() if name in parameters})

    parameters = {name for name, _ in clip.net.named_parameters()}
    run = train_settings(lr=1e30, warmup_steps=0)
    context = context_in(tmp_path)
    training = Training(clip, Spied(pairs_of(images, clip), watch), run, context, evaluation_set)
    with pytest.raises(TrialError, match=r"at step 1 \(epoch 1, lr 9.33e\+29\)"):
        training.run()
    assert {int(state["step"]) for state in training.optimizer.state.values()} == {1}
    assert_same({name: value for name, value in copy_of(clip.net).items() if name in parameters}, kept)
    assert sorted(Ledger(context.store).entry(Kind.TRIAL, "run").epochs) == [0]


def test_too_many_broken_samples_stop_the_run(images: Images, evaluation_set: EvaluationSet, tmp_path: Path) -> None:
    class Broken(CachedPairs):
        def epoch(self, epoch: int, **how: Any) -> Iterator[Batch]:
            yield from (replace(batch, broken=3) for batch in super().epoch(epoch, **how))

    clip = create(RESNET, seed=1)
    pairs = Broken(images, Prepare(PLAN, clip.tokenizer, None, seed=9))
    run = train_settings(epochs=1, lr=1e-6)

    def training(folder: str, most: float) -> Training:
        return Training(clip, pairs, run, context_in(tmp_path / folder), evaluation_set, max_broken=most)

    training("allowed", 0.2).run()  # 6 of 30 is no more than a fifth
    assert Ledger(Store(str(tmp_path / "allowed"))).entry(Kind.TRIAL, "run").epochs[1]["broken"] == 6
    with pytest.raises(DataError, match="6 of 30 samples of epoch 1 could not be decoded"):
        training("refused", 0.19).run()


# Resuming.


class Killed(BaseException):
    """What an interruption looks like from inside."""


def full_run(
    folder: Path, model: str, images: Images, found: EvaluationSet, *, ssl: bool, **more: Any
) -> tuple[Clip, list[int]]:
    """Run or go on with a run of three epochs; return the model and the epochs that this attempt finished."""
    clip = create(model, seed=1)
    finished: list[int] = []
    stop = more.pop("stop_after", None)

    def notify(epoch: int, record: dict[str, Any]) -> None:
        finished.append(epoch)
        if epoch == stop:
            raise Killed

    context = context_in(folder, notify=notify, keep=lambda epoch, record: f"weights/{epoch}", **more)
    run = train_settings(loss_weights=LossWeights(mmcl=1, ssl=1 if ssl else 0), lr=5e-3)
    Training(clip, pairs_of(images, clip, ssl=ssl), run, context, found).run()
    return clip, finished


def without_times(folder: Path) -> dict[int, dict[str, Any]]:
    epochs = Ledger(Store(str(folder))).entry(Kind.TRIAL, "run").epochs
    return {n: {name: value for name, value in record.items() if name not in TIMES} for n, record in epochs.items()}


@pytest.fixture(scope="module")
def uninterrupted(
    images: Images, evaluation_set: EvaluationSet, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Tensor], dict[int, dict[str, Any]]]]:
    found = {}
    for model, ssl in ((VIT, False), (RESNET, True)):
        folder = tmp_path_factory.mktemp(model)
        clip, finished = full_run(folder, model, images, evaluation_set, ssl=ssl)
        assert finished == [0, 1, 2, 3]
        found[model] = copy_of(clip.net), without_times(folder)
    return found


@pytest.mark.parametrize(
    ("model", "ssl", "stop", "again"),
    [(VIT, False, 2, [3]), (RESNET, True, 0, [1, 2, 3]), (RESNET, True, 3, [])],
)
def test_an_interrupted_run_gives_the_same_bits(
    model: str,
    ssl: bool,  # noqa: FBT001
    stop: int,
    again: list[int],
    images: Images,
    evaluation_set: EvaluationSet,
    tmp_path: Path,
    uninterrupted: dict[str, tuple[dict[str, Tensor], dict[int, dict[str, Any]]]],
) -> None:
    """An epoch that was recorded when the process died is not done again, not the last one either."""
    weights, records = uninterrupted[model]
    with pytest.raises(Killed):
        full_run(tmp_path, model, images, evaluation_set, ssl=ssl, stop_after=stop)
    clip, finished = full_run(tmp_path, model, images, evaluation_set, ssl=ssl)
    assert finished == again
    if again:
        assert_same(copy_of(clip.net), weights)
    assert without_times(tmp_path) == records
    store = Store(str(tmp_path))
    assert [name.rsplit("/", 1)[1] for name in store.names("ledger") if "epoch-" in name] == [
        f"epoch-{epoch:04d}.json" for epoch in range(4)
    ]
    assert Ledger(store).entry(Kind.TRIAL, "run").attempts == 2
    assert_same(checkpoint.from_bytes(store.get("weights/3"), where="kept"), weights)
    assert checkpoint.metadata_of(store.get("weights/3")) == {"epoch": 3, "model": model}


def test_a_run_killed_within_an_epoch_goes_on_from_the_last_one(
    images: Images,
    evaluation_set: EvaluationSet,
    tmp_path: Path,
    uninterrupted: dict[str, tuple[dict[str, Tensor], dict[int, dict[str, Any]]]],
) -> None:
    class Dying(LedgerContext):
        def progress(self, progress: Progress) -> None:
            if (progress.epoch, progress.step) == (3, 1):
                raise Killed

    clip = create(RESNET, seed=1)
    context = Dying(store=context_in(tmp_path).store, kind=Kind.TRIAL, id="run")
    run = train_settings(loss_weights=LossWeights(mmcl=1, ssl=1), lr=5e-3)
    with pytest.raises(Killed):
        Training(clip, pairs_of(images, clip, ssl=True), run, context, evaluation_set).run()
    clip, finished = full_run(tmp_path, RESNET, images, evaluation_set, ssl=True)
    assert finished == [3]
    weights, records = uninterrupted[RESNET]
    assert_same(copy_of(clip.net), weights)
    assert without_times(tmp_path) == records


def test_the_state_of_another_model_is_refused(images: Images, evaluation_set: EvaluationSet, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        full_run(tmp_path, VIT, images, evaluation_set, ssl=False, stop_after=1)
    with pytest.raises(CheckpointError, match="state of another model"):
        full_run(tmp_path, RESNET, images, evaluation_set, ssl=False)


def test_the_state_of_another_version_is_refused(images: Images, evaluation_set: EvaluationSet, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        full_run(tmp_path, RESNET, images, evaluation_set, ssl=False, stop_after=1)
    store = context_in(tmp_path).store
    state = store.get("state/run.safetensors")
    place = {name: value for name, value in checkpoint.metadata_of(state).items() if name != "record"}
    store.put("state/run.safetensors", checkpoint.to_bytes(checkpoint.from_bytes(state, where=""), place))
    with pytest.raises(CheckpointError, match="another version of raybd: it lacks record"):
        full_run(tmp_path, RESNET, images, evaluation_set, ssl=False)


def test_the_state_of_a_run_that_ended_is_gone(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    assert (context.load_state(), context.last_epoch()) == (None, -1)
    context.report(0, {}, lambda: b"weights", lambda: b"bytes")
    assert (context.load_state(), context.last_epoch()) == (b"bytes", 0)
    context.progress(Progress(epoch=1, epochs=2, step=1, steps=2, samples_per_second=1.0, seconds_left=1.0))
    assert context.store.exists("progress/run.json")
    assert context.end({"state": "complete"}).ended == {"state": "complete"}
    assert context.load_state() is None
    assert not context.store.exists("progress/run.json")


# Modes.


def test_evaluation_puts_every_module_back_into_its_mode(images: Images, evaluation_set: EvaluationSet) -> None:
    clip = create(RESNET, seed=1)
    clip.net.train()
    trunk = clip.net.visual.trunk
    trunk.bn1.eval()  # a frozen BatchNorm in a net that trains
    modes = {name: part.training for name, part in clip.net.named_modules()}
    assert (modes["visual.trunk.bn1"], modes["visual.trunk"]) == (False, True)
    before = copy_of(clip.net)
    evaluate(clip, evaluation_set, device=torch.device("cpu"))
    assert {name: part.training for name, part in clip.net.named_modules()} == modes
    assert_same(copy_of(clip.net), before)  # BatchNorm did not look at the evaluation images


def test_modes_come_back_after_an_error_too() -> None:
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3))
    net[1].eval()
    seen: list[bool] = []

    def fail() -> None:
        with evaluating(net):
            seen.extend([net[0].training, torch.is_inference_mode_enabled()])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [False, True]
    assert (net.training, net[0].training, net[1].training) == (True, True, False)
    assert not torch.is_inference_mode_enabled()


# Models.


def test_an_unknown_model_gets_a_suggestion() -> None:
    with pytest.raises(StudyError, match="no model of the name 'resnet-tiny-23'") as caught:
        check_name("resnet-tiny-23")
    assert caught.value.where == "model.name"
    assert "did you mean" in caught.value.fix
    assert RESNET in caught.value.fix
    with pytest.raises(StudyError, match="no model of the name"):
        create("RN5O", seed=0)
    assert {VIT, RESNET, "RN50", "ViT-B-32"} <= set(names())


def test_image_sizes_are_known_without_building() -> None:
    assert [image_size(name) for name in (VIT, RESNET, "RN50", "RN50x4")] == [32, 32, 224, 288]


@pytest.mark.parametrize("model", [VIT, RESNET])
def test_weights_depend_on_the_seed_alone_and_no_other_draw_is_disturbed(model: str) -> None:
    torch.manual_seed(1)
    one = create(model, seed=5)
    torch.manual_seed(2)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    other, third = create(model, seed=5), create(model, seed=6)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert_same(copy_of(one.net), copy_of(other.net))
    assert not torch.equal(one.net.text_projection, third.net.text_projection)


@pytest.mark.parametrize(("model", "tower"), [(VIT, 0.6e6), (RESNET, 0.3e6)])
def test_the_small_models_give_normalised_rows(model: str, tower: float) -> None:
    clip = create(model, seed=0)
    tokens_BL = clip.tokenize(["a cat", "a dog", "a very " + "very " * 40 + "long caption"])
    assert tokens_BL.shape == (3, 20)
    assert tokens_BL.dtype == torch.int64
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip.net.eval()
    with torch.no_grad():
        image_BD, text_BD, scale = clip.net(clip.normalise(pixels), tokens_BL)
    assert image_BD.shape == text_BD.shape == (3, 64)
    for rows in (image_BD, text_BD):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-5)
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert clip.image_size == 32
    assert sum(p.numel() for p in clip.net.visual.parameters()) == pytest.approx(tower, rel=0.35)


def test_normalising_is_as_the_model_was_made_for() -> None:
    clip = replace(create(RESNET, seed=0), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    pixels = torch.zeros(1, 3, 1, 2, dtype=torch.uint8)
    pixels[..., 1] = 255
    assert clip.normalise(pixels).tolist() == [[[[-1.0, 1.0]], [[-1.0, 3.0]], [[0.0, 1.0]]]]


def test_weights_that_do_not_fit_are_named() -> None:
    clip = create(RESNET, seed=0)
    before = copy_of(clip.net)
    wrong = {**before, "extra.weight": torch.zeros(1), "text_projection": torch.zeros(3, 2)}
    del wrong["ln_final.bias"]
    with pytest.raises(CheckpointError) as caught:
        load_weights(clip, wrong, where="weights.safetensors")
    text = str(caught.value)
    assert text.startswith("weights.safetensors: weights of another model")
    assert "ln_final.bias is missing" in text
    assert "text_projection is (3, 2), not (64, 64)" in text
    assert "extra.weight is not known" in text
    assert "(1 missing, 1 of another kind, 1 unknown)" in text
    assert_same(copy_of(clip.net), before)
    other = copy_of(create(RESNET, seed=1).net)
    load_weights(clip, other, where="weights.safetensors")
    assert_same(copy_of(clip.net), other)


# Checkpoints.


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {
        "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "turned": torch.arange(6.0).view(2, 3).T,
        "number": torch.tensor(7, dtype=torch.int64),
        "grad": nn.Parameter(torch.tensor([math.pi, -0.0, math.inf])),
        "channels": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    content = checkpoint.to_bytes(tensors, {"epoch": 3, "model": VIT, "nested": {"lr": 1e-3}})
    found = checkpoint.from_bytes(content, where="here")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value.detach())
    assert checkpoint.metadata_of(content) == {"epoch": 3, "model": VIT, "nested": {"lr": 1e-3}}
    assert checkpoint.metadata_of(checkpoint.to_bytes(tensors)) == {}
    (tmp_path / "w.safetensors").write_bytes(content)
    assert torch.equal(checkpoint.read(str(tmp_path / "w.safetensors"))["half"], tensors["half"])


@pytest.mark.parametrize("length", [0, 5, 8, 40, -1])
def test_a_truncated_file_is_refused(length: int, tmp_path: Path) -> None:
    content = checkpoint.to_bytes({"w": torch.ones(50)}, {"epoch": 1})[:length]
    with pytest.raises(CheckpointError, match=r"^state: not a whole safetensors file") as caught:
        checkpoint.from_bytes(content, where="state")
    assert caught.value.where == "state"
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(str(path))
    assert caught.value.where == str(path)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_weights_in_a_pytorch_file_are_found(prefix: str, wrapped: bool, tmp_path: Path) -> None:  # noqa: FBT001
    weights = {f"{prefix}visual.module.w": torch.randn(2, 2), f"{prefix}logit_scale": torch.tensor(1.0)}
    torch.save({"epoch": 3, "state_dict": weights} if wrapped else weights, tmp_path / "theirs.pt")
    found = checkpoint.read(str(tmp_path / "theirs.pt"))
    assert set(found) == {"visual.module.w", "logit_scale"}  # only a prefix is dropped
    assert torch.equal(found["visual.module.w"], weights[f"{prefix}visual.module.w"])


class Malicious:
    """Opens a file for writing when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return (io.open, (str(self._path), "w"))


def test_a_file_that_runs_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    mark, file = tmp_path / "was-here", tmp_path / "evil.pt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "extra": Malicious(mark)}, file)
    with pytest.raises(CheckpointError, match="cannot be read as plain weights") as caught:
        checkpoint.read(str(file))
    assert "a file that needs code to be run is refused" in caught.value.expected
    assert not mark.exists()
    # The payload does work, on a reader that trusts it.
    torch.load(file, weights_only=False)["extra"].close()
    assert mark.exists()


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.read(str(tmp_path / "nowhere.pt"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read as plain weights"):
        checkpoint.read(str(tmp_path / "text.pt"))
    for content in ({"epoch": 3}, [torch.ones(1)], {"state_dict": {"w": 1}}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="holds no weights"):
            checkpoint.read(str(tmp_path / "other.pt"))


def _conv() -> nn.Module:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 1))
    net.register_parameter("logit_scale", nn.Parameter(torch.tensor(1.0)))
    return net.to(memory_format=torch.channels_last)


def _steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        x = torch.randn(2, 3, 4, 4, generator=generator)
        optimizer.zero_grad()
        (net.logit_scale * net[2](net[1](net[0](x)))).square().sum().backward()
        optimizer.step()


def test_the_state_of_an_optimizer_comes_back() -> None:
    """A convolution in channels_last has its moments in that layout: the fused step pairs them as they lie."""
    first = _conv()
    optimizer = make_optimizer(first, train_settings(lr=1e-2))
    _steps(first, optimizer, 3)
    names_of = {parameter: name for name, parameter in first.named_parameters()}
    found = checkpoint.optimizer_tensors(optimizer, names_of)
    entries = ("step", "exp_avg", "exp_avg_sq")
    assert set(found) == {f"optimizer.{name}.{entry}" for name in names_of.values() for entry in entries}
    content = checkpoint.to_bytes({**found, "model.0.bias": torch.zeros(1)})

    second = _conv()
    second.load_state_dict(first.state_dict())
    again = make_optimizer(second, train_settings(lr=3e-3, weight_decay=0.7))
    names_of = {parameter: name for name, parameter in second.named_parameters()}
    checkpoint.restore_optimizer(again, checkpoint.from_bytes(content, where="state"), names_of)
    assert [group["lr"] for group in again.param_groups] == [3e-3, 3e-3]
    assert [group["weight_decay"] for group in again.param_groups] == [0.7, 0.0]
    for old, new in zip(first.parameters(), second.parameters(), strict=True):
        for entry in entries:
            assert torch.equal(again.state[new][entry], optimizer.state[old][entry])
        assert again.state[new]["exp_avg"].stride() == new.stride()
        assert again.state[new]["step"].item() == 3
    for group, own in zip(again.param_groups, optimizer.param_groups, strict=True):
        group.update(lr=own["lr"], weight_decay=own["weight_decay"])
    _steps(first, optimizer, 2)
    _steps(second, again, 2)
    assert_same(copy_of(first), copy_of(second))
