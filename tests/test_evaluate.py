"""Evaluation and its numbers, against a slow computation of one image at a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from raybd.data.cache import Images
from raybd.data.shards import classes, decode, find_shards, make_index, samples
from raybd.errors import DataError, StudyError
from raybd.evaluate import EvaluationSet, class_embeddings, evaluate, evaluating, make_set
from raybd.metrics import SPLITS, Counts, wilson
from raybd.model import Clip, create, freeze_unused
from raybd.poison.plan import Attack, PoisonPlan, templates
from raybd.seeding import fork
from raybd.study import BadNet, Data, Evaluation, Pattern, Placement

CPU = torch.device("cpu")
TEMPLATES = ("a picture of a {}.", "{} drawn small", "one {}")
TRIGGERS = {
    "fixed": BadNet(size=8, pattern=Pattern.FIXED, placement=Placement.BOTTOM_RIGHT),
    "noise": BadNet(size=12, pattern=Pattern.NOISE, placement=Placement.RANDOM),
}
unhurried = settings(deadline=None)  # a busy machine is no failure

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images() -> Images:
    """60 emoji drawings with their own labels."""
    (url,) = find_shards(Data(), "test/*.tar*", field_name="data.test")
    raw = list(itertools.islice(samples(url), 60))
    index = make_index([url], [(0, sample) for sample in raw], labelled=True)
    return Images(index, np.stack([decode(sample.image, 32) for sample in raw]), np.arange(len(raw)))


@pytest.fixture(scope="module")
def clip(images: Images) -> Clip:
    """A random model whose BatchNorm has seen images: its predictions spread over the classes."""
    made = create("resnet-tiny-32", seed=1)
    made.net.train()
    for part in made.net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        made.net.encode_image(made.normalise(torch.from_numpy(images.pixels(np.arange(60)))))
    return made


def a_set(
    images: Images, *, trigger: str = "fixed", target: int = 5, seed: int = 2, **evaluation: Any
) -> EvaluationSet:
    """Return an evaluation set over all 44 classes of the drawings."""
    return make_set(
        images,
        classes=classes(Data()),
        plan=a_plan(trigger, target=target),
        evaluation=Evaluation(**{"templates": TEMPLATES, "batch_size": 16, **evaluation}),
        seed=seed,
    )


def a_plan(trigger: str, *, target: int = 5) -> PoisonPlan:
    return PoisonPlan({}, (Attack(TRIGGERS[trigger], classes(Data())[target], pattern_seed=4),))


def likely_target(clip: Clip, images: Images) -> int:
    """Return the class that the model gives to some triggered images, so that counting hits counts something."""
    predicted = [slow_class(clip, image) for image in triggered_images(images, "fixed")]
    return max(set(predicted), key=predicted.count)


def slow_classifier(clip: Clip) -> list[torch.Tensor]:
    """Return one vector for each class: prompt embeddings normalised, their mean, normalised again.

    Source: arXiv 2103.00020, section 3.1.4 (prompt ensembling in embedding space).
    """
    found = []
    for name in classes(Data()):
        total = torch.zeros(64)
        for template in TEMPLATES:
            row = clip.net.encode_text(clip.tokenizer([template.replace("{}", name)]))[0]
            total = total + row / math.sqrt(sum(float(x) ** 2 for x in row))
        mean = total / len(TEMPLATES)
        found.append(mean / math.sqrt(sum(float(x) ** 2 for x in mean)))
    return found


_classifiers: dict[int, list[torch.Tensor]] = {}


def slow_class(clip: Clip, image_CHW: torch.Tensor) -> int:
    """Return the class of one image."""
    clip.net.eval()
    with torch.no_grad():
        if id(clip) not in _classifiers:
            _classifiers[id(clip)] = slow_classifier(clip)
        scaled = (image_CHW.double() / 255 - torch.tensor(clip.mean).view(3, 1, 1)) / torch.tensor(clip.std).view(
            3, 1, 1
        )
        row = clip.net.encode_image(scaled.float()[None])[0]
        scores = [float(row @ vector) for vector in _classifiers[id(clip)]]
    clip.net.train()
    return scores.index(max(scores))


def triggered_images(images: Images, trigger: str, *, seed: int = 2) -> list[torch.Tensor]:
    (attack,) = a_plan(trigger).attacks
    return [
        attack.triggered(torch.from_numpy(images.pixels_MCHW[i]), seed=fork(seed, "evaluate", str(key)))
        for i, key in enumerate(images.index.keys)
    ]


def test_the_class_embeddings_are_means_of_normalised_prompts(clip: Clip, images: Images) -> None:
    with torch.no_grad():
        found = class_embeddings(clip, a_set(images), device=CPU)
        expected = torch.stack(slow_classifier(clip))
    assert found.shape == (44, 64)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("trigger", "include_target"), [("fixed", False), ("fixed", True), ("noise", False)])
def test_counts_are_those_of_one_image_at_a_time(
    trigger: str,
    include_target: bool,  # noqa: FBT001
    clip: Clip,
    images: Images,
) -> None:
    target = likely_target(clip, images)
    labels = images.index.labels.copy()
    labels[::3] = [slow_class(clip, torch.from_numpy(images.pixels_MCHW[i])) for i in range(0, 60, 3)]
    labels[1::9] = target
    found = replace(images, index=replace(images.index, labels=labels))
    made = a_set(found, trigger=trigger, target=target, include_target=include_target)
    expected = {split: dict.fromkeys(vars(Counts()), 0) for split in SPLITS}
    for i, hit in enumerate(triggered_images(found, trigger)):
        own = expected["search" if made.in_search_N[i] else "report"]
        own["n_clean"] += 1
        own["correct_clean"] += slow_class(clip, torch.from_numpy(images.pixels_MCHW[i])) == labels[i]
        if labels[i] == target and not include_target:
            continue
        predicted = slow_class(clip, hit)
        own["n_triggered"] += 1
        own["hit_target"] += predicted == target
        own["correct_triggered"] += predicted == labels[i]
    counted = evaluate(clip, made, device=CPU)
    assert {split: vars(counts) for split, counts in counted.items()} == expected
    total = counted["search"] + counted["report"]
    assert (total.n_clean, total.n_triggered) == (60, 60 if include_target else 60 - int((labels == target).sum()))
    # The comparison is of numbers that are neither 0 nor everything.
    assert 0 < total.correct_clean < 60
    assert 0 < total.hit_target < total.n_triggered
    if include_target:
        assert total.correct_triggered > 0


def test_the_order_of_the_images_and_the_size_of_the_batch_do_not_matter(clip: Clip, images: Images) -> None:
    target = likely_target(clip, images)
    expected = evaluate(clip, a_set(images, trigger="noise", target=target), device=CPU)
    mixed = images.take(np.random.default_rng(1).permutation(60))
    for batch_size in (7, 60):
        made = a_set(mixed, trigger="noise", target=target, batch_size=batch_size)
        assert evaluate(clip, made, device=CPU) == expected


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_the_ranks_add_up_to_one_process(world_size: int, clip: Clip, images: Images) -> None:
    made = a_set(images, target=likely_target(clip, images))
    alone = evaluate(clip, made, device=CPU)
    parts = [evaluate(clip, made, device=CPU, rank=rank, world_size=world_size) for rank in range(world_size)]
    for split in SPLITS:
        assert sum((part[split] for part in parts), Counts()) == alone[split]
    # None is idle while another works on.
    shares = [sum(part[split].n_clean for split in SPLITS) for part in parts]
    assert max(shares) - min(shares) <= 1


def test_triggered_images_are_made_once_while_there_is_room(
    clip: Clip, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, asked = a_set(images, target=likely_target(clip, images)), []
    triggered = Attack.triggered
    monkeypatch.setattr(Attack, "triggered", lambda *a, **k: asked.append(1) or triggered(*a, **k))
    first = evaluate(clip, made, device=CPU)
    assert len(asked) == int(made.probes[0].triggered_N.sum())
    assert evaluate(clip, made, device=CPU) == first
    assert len(asked) == int(made.probes[0].triggered_N.sum())
    assert not replace(made, seed=3).triggered, "another set has images of its own"
    monkeypatch.setattr("raybd.evaluate._MOST_TRIGGERED_BYTES", 16 * 3 * 32 * 32)
    small = replace(made)
    assert [evaluate(clip, small, device=CPU) for _ in range(2)] == [first, first]
    assert len(small.triggered) == 1, "one batch has room, the others are made anew"


def test_prompts_are_encoded_again_only_where_the_text_tower_may_differ(images: Images) -> None:
    clip, found, calls = create("resnet-tiny-32", seed=1), a_set(images), []
    clip.net.transformer.register_forward_hook(lambda *_: calls.append(1))

    def embeddings(of: EvaluationSet = found) -> torch.Tensor:
        with evaluating(clip.net):
            return class_embeddings(clip, of, device=CPU)

    embeddings(), embeddings()
    assert len(calls) == 2, "a text tower that is trained differs each time"
    freeze_unused(clip.net, image=True, text=False, bias=False)
    first = embeddings()
    clip.net.visual.head.proj.weight.data.mul_(2)
    clip.net.logit_scale.data.add_(1)
    assert torch.equal(embeddings(), first)
    assert len(calls) == 3
    # Not by torch's own count of changes: weights are also set behind its back.
    clip.net.token_embedding.weight.data.mul_(1.5)
    assert not torch.equal(embeddings(), first)
    assert len(calls) == 4
    embeddings(a_set(images, templates=("{}",)))
    assert len(calls) == 5


class Watched:
    """A net that keeps the images that it is given."""

    def __init__(self, clip: Clip) -> None:
        self.clip, self.seen = clip, []
        self.net = clip.net

    def run(self, made: EvaluationSet, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
        encode = type(self.net).encode_image

        def spy(net: Any, image: torch.Tensor, **how: Any) -> torch.Tensor:
            self.seen.append(image.clone())
            return encode(net, image, **how)

        with monkeypatch.context() as patch:
            patch.setattr(type(self.net), "encode_image", spy)
            evaluate(self.clip, made, device=CPU)
        return torch.cat(self.seen)


@pytest.mark.parametrize("trigger", list(TRIGGERS))
def test_a_triggered_image_is_the_clean_image_that_the_model_sees_and_the_trigger(
    trigger: str, clip: Clip, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = a_set(images, trigger=trigger, include_target=True, batch_size=60)
    seen = Watched(clip).run(made, monkeypatch)
    clean, triggered = seen[:60], seen[60:]
    assert torch.equal(clean, clip.normalise(torch.from_numpy(images.pixels_MCHW)))
    assert torch.equal(triggered, clip.normalise(torch.stack(triggered_images(images, trigger))))
    size = TRIGGERS[trigger].size
    differs = (triggered != clean).any(dim=1)
    for mask in differs:
        rows, columns = mask.nonzero().T
        assert rows.max() - rows.min() < size
        assert columns.max() - columns.min() < size
    assert differs.any(dim=(1, 2)).all()
    assert torch.equal(seen, Watched(clip).run(made, monkeypatch)), "an image has the same trigger in every evaluation"


def test_images_of_the_target_are_triggered_only_where_asked_for(images: Images) -> None:
    labels = images.index.labels
    assert 3 < (labels == 5).sum() < 30
    assert np.array_equal(a_set(images).probes[0].triggered_N, labels != 5)
    assert a_set(images, include_target=True).probes[0].triggered_N.all()


# The halves.


def test_the_halves_cover_everything_once_and_depend_on_key_and_seed_alone(images: Images) -> None:
    def half(found: Images, **more: Any) -> dict[str, bool]:
        made = a_set(found, **more)
        return dict(zip(map(str, found.index.keys), map(bool, made.in_search_N), strict=True))

    whole = half(images)
    assert len(whole) == 60
    assert 15 <= sum(whole.values()) <= 45
    mixed = images.take(np.random.default_rng(0).permutation(60))
    assert half(mixed) == whole
    part = images.take(np.arange(10, 40))
    assert half(part) == {str(key): whole[str(key)] for key in part.index.keys}
    assert half(images, target=8, include_target=True, trigger="noise") == whole
    assert half(images, seed=3) != whole
    # A larger share keeps whom the search saw before.
    larger = half(images, search_share=0.8)
    assert sum(larger.values()) > sum(whole.values())
    assert all(larger[key] for key, searched in whole.items() if searched)


def test_the_halves_are_disjoint_in_the_counts(clip: Clip, images: Images) -> None:
    made = a_set(images)
    counted = evaluate(clip, made, device=CPU)
    assert counted["search"].n_clean == int(made.in_search_N.sum())
    assert counted["report"].n_clean == 60 - counted["search"].n_clean


# What cannot be evaluated.


def test_a_label_without_a_class_is_refused(images: Images) -> None:
    with pytest.raises(DataError, match="label 43 in the test shards, but only 43 classes") as caught:
        make_set(
            images,
            classes=classes(Data())[:43],
            plan=a_plan("fixed"),
            evaluation=Evaluation(templates=TEMPLATES),
            seed=2,
        )
    assert caught.value.where == "data.classes"


@pytest.mark.parametrize("count", [0, 1])
def test_a_half_without_an_image_is_refused(count: int, images: Images) -> None:
    with pytest.raises(DataError, match="half has no image to trigger") as caught:
        a_set(images.take(np.arange(count)))
    assert caught.value.where == "data.test"


def test_a_half_with_none_but_target_images_is_refused(images: Images) -> None:
    made = a_set(images)
    labels = np.where(made.in_search_N, 5, 6)
    found = replace(images, index=replace(images.index, labels=labels))
    with pytest.raises(DataError, match="the search half has no image to trigger: 60 test images in all"):
        a_set(found)
    assert a_set(found, include_target=True).probes[0].triggered_N.all()


def test_templates_that_cannot_be_filled_are_refused(images: Images) -> None:
    with pytest.raises(StudyError, match="no templates of the name 'openai'"):
        a_set(images, templates="openai")
    with pytest.raises(StudyError, match=r"must have exactly one \{\}"):
        a_set(images, templates=("a {} and a {}",))
    assert len(templates("openai_imagenet", field="")) == 80
    assert len(a_set(images, templates="simple").prompts) == 7 * 44


# Numbers.


def test_intervals_are_those_of_the_textbook() -> None:
    """Values printed in R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872, table I (method 3)."""
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(successes, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@unhurried
@given(st.integers(1, 50_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_agree_with_scipy(counts: tuple[int, int]) -> None:
    found = wilson(*counts)
    expected = binomtest(*counts).proportion_ci(confidence_level=0.95, method="wilson")
    assert found == (pytest.approx(expected.low, abs=1e-9), pytest.approx(expected.high, abs=1e-9))
    assert 0.0 <= found[0] <= counts[0] / counts[1] <= found[1] <= 1.0


def test_intervals_at_the_edges() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    for successes, n in ((-1, 5), (6, 5), (1, 0)):
        with pytest.raises(ValueError, match=f"{successes} of {n}: counts with 0 <= successes <= n expected"):
            wilson(successes, n)


def test_counts_add_up_and_give_the_columns_of_the_tables() -> None:
    one = Counts(n_clean=10, correct_clean=4, n_triggered=8, hit_target=6, correct_triggered=1)
    other = Counts(n_clean=30, correct_clean=5, n_triggered=12, hit_target=1, correct_triggered=3)
    total = one + other
    assert total == Counts(n_clean=40, correct_clean=9, n_triggered=20, hit_target=7, correct_triggered=4)
    assert one + Counts() == one
    assert total.columns() == {
        "zeroshot_top1": 9 / 40,
        "asr_top1": 7 / 20,
        "robust_top1": 4 / 20,
        "n_clean": 40,
        "correct_clean": 9,
        "n_triggered": 20,
        "hit_target": 7,
        "correct_triggered": 4,
    }


def test_classes_are_compared_in_float32_whatever_the_encoders_run_in(
    clip: Clip, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 near classes would tie, and ties go to the lowest class number."""
    compared, argmax = [], torch.Tensor.argmax

    def spy(self: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        if self.shape[-1] == 44:
            compared.append(self.dtype)
        return argmax(self, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "argmax", spy)
    evaluate(clip, a_set(images), device=CPU, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert set(compared) == {torch.float32}
