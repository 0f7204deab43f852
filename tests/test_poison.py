"""Poison: what a trigger does to an image, which pairs the plan poisons and how, and the picture of it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from raybd import tables
from raybd.data.shards import Index, RawSample, make_index
from raybd.errors import DataError, StudyError
from raybd.poison import triggers
from raybd.poison.plan import PoisonPlan, cleaning_rows, make_plan, templates
from raybd.poison.preview import preview
from raybd.store import Store
from raybd.study import BadNet, Pattern, Placement, Poison, Sig

PLACES = {
    Placement.TOP_LEFT: lambda bottom, right: ((0, 0),),
    Placement.TOP_RIGHT: lambda bottom, right: ((0, right),),
    Placement.BOTTOM_LEFT: lambda bottom, right: ((bottom, 0),),
    Placement.BOTTOM_RIGHT: lambda bottom, right: ((bottom, right),),
    Placement.CENTRE: lambda bottom, right: ((bottom // 2, right // 2),),
    Placement.FOUR_CORNERS: lambda bottom, right: ((0, 0), (0, right), (bottom, 0), (bottom, right)),
}


def picture(height: int, width: int, *, seed: int = 0) -> Tensor:
    pixels = np.random.default_rng(seed).integers(1, 255, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(pixels)


def apply(image_CHW: Tensor, trigger: BadNet, *, seed: int = 1, pattern_seed: int = 2) -> Tensor:
    return triggers.apply(image_CHW, trigger, seed=seed, pattern_seed=pattern_seed)


# --- triggers


@given(
    pattern=st.sampled_from(Pattern),
    placement=st.sampled_from(Placement),
    size=st.integers(1, 20),
    extra=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    wrap=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
@settings(deadline=None, max_examples=80)
def test_every_trigger_is_where_it_is_planned_and_nowhere_else(
    pattern: Pattern, placement: Placement, size: int, extra: tuple[int, int], *, wrap: bool, seed: int
) -> None:
    height, width = size + extra[0], size + extra[1]
    trigger = BadNet(pattern=pattern, placement=placement, size=size, wrap=wrap)
    image_CHW = picture(height, width, seed=seed % 1000)
    before = image_CHW.clone()
    after = apply(image_CHW, trigger, seed=seed)
    assert torch.equal(image_CHW, before), "the image that came in is as it was"
    assert (after.shape, after.dtype) == (image_CHW.shape, torch.uint8)
    assert torch.equal(apply(image_CHW, trigger, seed=seed), after)

    corners = triggers.place(trigger, height=height, width=width, seed=seed)
    if placement is Placement.RANDOM:
        ((top, left),) = corners
        assert 0 <= top <= height - size
        assert 0 <= left <= width - size
    else:
        assert corners == PLACES[placement](height - size, width - size)
    mask = torch.zeros(height, width, dtype=torch.bool)
    for top, left in corners:
        mask[top : top + size, left : left + size] = True
    assert torch.equal(after[:, ~mask], before[:, ~mask])
    patch = triggers.patches.patch(image_CHW, trigger, seed=seed, pattern_seed=2).numpy()
    levels = np.rint(patch * np.float32(255)).astype(int)
    expected = levels % 256 if wrap else np.clip(levels, 0, 255)
    top, left = corners[-1]  # where copies overlap, the last is on top
    np.testing.assert_array_equal(after[:, top : top + size, left : left + size].numpy(), expected)


def test_every_copy_of_the_patch_is_the_same() -> None:
    for pattern in Pattern:
        after = apply(picture(20, 24), BadNet(pattern=pattern, size=5, placement=Placement.FOUR_CORNERS))
        corners = [after[:, y, x] for y in (slice(5), slice(15, 20)) for x in (slice(5), slice(19, 24))]
        assert all(torch.equal(corner, corners[0]) for corner in corners)


def test_random_places_are_uniform_and_rows_and_columns_independent() -> None:
    trigger = BadNet(size=4)
    counts = np.zeros((3, 4), dtype=int)
    for seed in range(2400):
        ((top, left),) = triggers.place(trigger, height=6, width=7, seed=seed)
        counts[top, left] += 1
    chi2 = ((counts - 200) ** 2 / 200).sum()
    assert chi2 < 24.7, "11 degrees of freedom, p > 0.01"


def test_fixed_pattern_is_one_for_all_images_and_seeds_of_a_study() -> None:
    trigger = BadNet(pattern=Pattern.FIXED, size=6, placement=Placement.CENTRE)

    def patch(image_seed: int, seed: int, pattern_seed: int) -> bytes:
        after = apply(picture(16, 16, seed=image_seed), trigger, seed=seed, pattern_seed=pattern_seed)
        return after[:, 5:11, 5:11].numpy().tobytes()

    same = {patch(image, seed, 9) for image in range(4) for seed in range(4)}
    assert len(same) == 1
    values = set(same.pop())
    assert values == {0, 255}, "channels fully on or fully off"
    assert len({patch(0, 0, pattern_seed) for pattern_seed in range(10)}) == 10
    # The larger pattern of the same study is not the smaller one enlarged or cut.
    on = [
        triggers.patches.patch(picture(64, 64), BadNet(pattern=Pattern.FIXED, size=64), seed=0, pattern_seed=s)
        for s in range(3)
    ]
    assert all(abs(float(found.mean()) - 0.5) < 0.02 for found in on)


def test_noise_patch_is_new_for_each_seed_whatever_the_image() -> None:
    trigger = BadNet(pattern=Pattern.NOISE, size=6, placement=Placement.TOP_LEFT)
    image_CHW = picture(12, 12)
    assert len({apply(image_CHW, trigger, seed=seed).numpy().tobytes() for seed in range(20)}) == 20
    assert torch.equal(apply(image_CHW, trigger, pattern_seed=3), apply(image_CHW, trigger, pattern_seed=4))
    noise = [
        triggers.patches.patch(found, trigger, seed=5, pattern_seed=0)
        - found.float().mean(dim=(1, 2))[:, None, None] / 255
        for found in (image_CHW, picture(12, 12, seed=1))
    ]
    torch.testing.assert_close(noise[0], noise[1], atol=1e-6, rtol=0)


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("wrap", [False, True])
def test_noise_patch_is_the_mean_of_each_channel_plus_standard_normal_noise(*, wrap: bool) -> None:
    levels = (20, 128, 230)
    image_CHW = torch.tensor(levels, dtype=torch.uint8)[:, None, None].repeat(1, 16, 16)
    image_CHW[:, 0, 0] += 16  # means are of the whole image: 1/16 more
    trigger = BadNet(size=16, placement=Placement.TOP_LEFT, wrap=wrap)
    seeds = range(200)
    n = len(seeds) * 256
    raw = torch.stack([triggers.patches.patch(image_CHW, trigger, seed=seed, pattern_seed=0) for seed in seeds]).numpy()
    pixels = torch.stack([apply(image_CHW, trigger, seed=seed) for seed in seeds]).numpy()
    for channel, level in enumerate(levels):
        mean = (level + 1 / 16) / 255
        noise = raw[:, channel].ravel() - mean
        assert abs(noise.mean()) < 4 / math.sqrt(n)
        assert abs(noise.std() - 1) < 4 / math.sqrt(2 * n)
        found = pixels[:, channel].ravel()
        if wrap:
            # Wrapped around, a deviation of 255 levels is almost uniform: no pile at either end.
            expected = sum(
                normal_cdf(((256 * k + 0.5) / 255) - mean) - normal_cdf(((256 * k - 0.5) / 255) - mean)
                for k in range(-6, 7)
            )
            assert abs((found == 0).mean() - expected) < 4 * math.sqrt(expected / n)
        else:
            for value, expected in ((0, normal_cdf(0.5 / 255 - mean)), (255, 1 - normal_cdf(254.5 / 255 - mean))):
                assert abs((found == value).mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_a_trigger_larger_than_the_image_is_a_study_error() -> None:
    for placement in Placement:
        apply(picture(8, 8), BadNet(size=8, placement=placement))
        with pytest.raises(StudyError) as caught:
            apply(picture(12, 8), BadNet(size=9, placement=placement))
        assert caught.value.what == "a trigger of 9 pixels does not fit the 12x8 image that the model sees"
        assert (caught.value.where, caught.value.fix) == ("poison.trigger.size", "make it at most 8")


def test_places_as_text() -> None:
    patch = BadNet(size=4, placement=Placement.FOUR_CORNERS)
    assert triggers.placement(patch, height=24, width=7, seed=0) == "0,0 0,3 20,0 20,3"
    assert triggers.placement(Sig(), height=24, width=24, seed=0) == "whole image"


# --- the plan


def make(total: int, *, shards: int = 2) -> Index:
    found = [(i % shards, RawSample(f"{i:05d}", i // shards, b"", f"caption {i}", i % 3)) for i in range(total)]
    return make_index([f"s3://bucket/data/train/{n}.tar" for n in range(shards)], found)


def plan_of(total: int, *, seed: int = 0, image_size: int = 32, **poison: Any) -> PoisonPlan:
    return make_plan(make(total), Poison(**poison), image_size=image_size, seed=seed)


@pytest.mark.parametrize(
    ("amount", "total", "expected"),
    [
        ({"num_poisoned": 7}, 50, 7),
        ({"num_poisoned": 50}, 50, 50),
        ({"poison_rate": 0.1}, 50, 5),
        ({"poison_rate": 0.06}, 99, 6),
        ({"poison_rate": 1.0}, 13, 13),
        ({"poison_rate": 0.055}, 1000, 55),
    ],
)
def test_the_plan_has_as_many_pairs_as_asked_for(amount: dict[str, Any], total: int, expected: int) -> None:
    plan = plan_of(total, **amount)
    assert len(plan) == len(plan.table()) == len(set(plan.rows)) == expected


@pytest.mark.parametrize(
    ("amount", "where"),
    [
        ({"num_poisoned": 51}, "poison.num_poisoned: 51"),
        ({"poison_rate": 0.001}, "poison.poison_rate: 0"),
        ({"poison_rate": 0.0}, "poison.poison_rate: 0"),
    ],
)
def test_plans_that_cannot_be_drawn(amount: dict[str, Any], where: str) -> None:
    with pytest.raises(StudyError) as caught:
        plan_of(50, **amount)
    assert str(caught.value).startswith(f"{where} of 50 training pairs to be poisoned\n  expected: 1 to 50")
    with pytest.raises(StudyError, match="does not fit the 15x15 image"):
        plan_of(50, num_poisoned=1, image_size=15)


def test_the_plan_depends_on_seed_and_data_alone() -> None:
    plan = plan_of(200, num_poisoned=20)
    assert plan_of(200, num_poisoned=20) == plan
    other = plan_of(200, num_poisoned=20, seed=1)
    assert set(other.rows) != set(plan.rows)
    assert other.attacks[0].pattern_seed != plan.attacks[0].pattern_seed
    assert len({row.seed for row in plan.rows.values()}) == 20
    assert len({row.placement for row in plan.rows.values()}) > 10
    for key in set(plan.rows) & set(other.rows):
        assert plan.rows[key].seed != other.rows[key].seed
    # A pair that two plans of one study share is poisoned alike.
    more = plan_of(200, num_poisoned=100)
    shared = set(plan.rows) & set(more.rows)
    assert shared
    assert all(plan.rows[key] == more.rows[key] for key in shared)


def test_pairs_are_drawn_evenly_from_all_shards() -> None:
    drawn = np.zeros(40, dtype=int)
    for seed in range(300):
        for key in plan_of(40, num_poisoned=10, seed=seed).rows:
            drawn[int(key)] += 1
    assert abs(drawn - 75).max() < 4 * math.sqrt(300 * 0.25 * 0.75)


def test_rows_say_what_is_done_to_a_pair() -> None:
    trigger = BadNet(size=5, placement=Placement.FOUR_CORNERS, pattern=Pattern.FIXED)
    plan = plan_of(30, num_poisoned=30, target_class="fruit", trigger=trigger, templates=("a {}.", "the {}!"))
    index = make(30)
    assert list(plan.rows) == index.keys.tolist(), "in the order of the data"
    for i, row in enumerate(plan.table()):
        assert row["key"] == index.keys[i]
        assert row["shard"] == f"train/{index.shard[i]}.tar"
        assert row["caption_before"] == index.captions[i]
        assert row["caption_after"] in ("a fruit.", "the fruit!")
        assert (row["target_class"], row["placement"]) == ("fruit", "0,0 0,27 27,0 27,27")
        assert BadNet.model_validate(json.loads(row["trigger"])) == trigger
    assert {row["caption_after"] for row in plan.table()} == {"a fruit.", "the fruit!"}


def test_captions_are_made_from_the_published_templates() -> None:
    assert len(open_clip.OPENAI_IMAGENET_TEMPLATES) == 80
    allowed = {template("banana") for template in open_clip.OPENAI_IMAGENET_TEMPLATES}
    captions = [row["caption_after"] for row in plan_of(2000, poison_rate=1.0).table()]
    assert set(captions) == allowed, "each of the 80 is drawn"
    assert max(captions.count(caption) for caption in allowed) < 60, "of 25 on average"


def test_only_planned_pairs_change() -> None:
    plan = plan_of(40, num_poisoned=8, trigger=BadNet(size=4))
    for i in range(40):
        key, image_CHW = f"{i:05d}", picture(32, 32, seed=i)
        after = plan.image(image_CHW, key)
        if key in plan.rows:
            row = plan.rows[key]
            assert torch.equal(after, plan.attacks[0].triggered(image_CHW, seed=row.seed))
            top, left = (int(number) for number in row.placement.split(","))
            changed = (after != image_CHW).any(dim=0).nonzero()
            assert changed.min(dim=0).values.tolist() >= [top, left]
            assert (changed >= torch.tensor([top, left])).all()
            assert (changed < torch.tensor([top + 4, left + 4])).all()
            assert len(changed) >= 14, "almost every pixel of the patch"
            assert plan.caption("as it was", key) == row.caption_after
        else:
            assert torch.equal(after, image_CHW)
            assert plan.caption("as it was", key) == "as it was"


def test_part_of_a_plan() -> None:
    plan = plan_of(40, num_poisoned=8)
    keys = sorted(plan.rows)[2:5]
    part = plan.only(keys)
    assert list(part.rows) == keys
    assert all(part.rows[key] == plan.rows[key] for key in keys)
    assert (part.attacks, len(plan)) == (plan.attacks, 8)


def test_the_plan_survives_its_table(tmp_path: Path) -> None:
    plan = plan_of(300, poison_rate=0.2)
    store = Store(str(tmp_path))
    tables.write(store, "poison_plan", "plan", plan.table())
    assert tables.read(store, "poison_plan").to_pylist() == plan.table()
    assert set(plan.table()[0]) == set(tables.SCHEMAS["poison_plan"].names)


# --- templates


def test_templates_by_name_and_of_ones_own() -> None:
    assert [template("x") for template in templates("simple", field="f")] == [
        template("x") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES
    ]
    assert len(templates("openai_imagenet", field="f")) == 80
    own = templates(["a {}.", "{} {0} {name} }{", "100 % {}"], field="f")
    assert [template("b{}") for template in own] == ["a b{}.", "b{} {0} {name} }{", "100 % b{}"]


@pytest.mark.parametrize(
    ("named", "what"),
    [
        ("imagenet", "no templates of the name 'imagenet'"),
        ("a photo of a {}.", "no templates of the name 'a photo of a {}.'"),
        ((), "no template given"),
        (("a {}", "a photo"), "'a photo' must have exactly one {}"),
        (("{} and {}",), "'{} and {}' must have exactly one {}"),
    ],
)
def test_templates_that_are_wrong(named: str | tuple[str, ...], what: str) -> None:
    with pytest.raises(StudyError) as caught:
        templates(named, field="poison.templates")
    assert (caught.value.what, caught.value.where) == (what, "poison.templates")
    with pytest.raises(StudyError, match=r"poison\.templates"):
        plan_of(10, num_poisoned=1, templates=named)


# --- the cleaning set


@given(num_samples=st.integers(1, 60), leaked=st.integers(0, 12), poison=st.integers(1, 20), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=40)
def test_cleaning_set_is_disjoint_from_the_plan_but_for_what_is_leaked(
    num_samples: int, leaked: int, poison: int, seed: int
) -> None:
    index, plan = make(60), plan_of(60, num_poisoned=poison)
    if num_samples - leaked > 60 - poison or leaked > min(poison, num_samples):
        with pytest.raises(DataError, match=f"cannot be drawn from {60 - poison} clean and {poison} poisoned"):
            cleaning_rows(index, plan, num_samples=num_samples, leaked_poison=leaked, seed=seed)
        return
    rows, part = cleaning_rows(index, plan, num_samples=num_samples, leaked_poison=leaked, seed=seed)
    assert len(rows) == len(set(rows.tolist())) == num_samples
    assert rows.tolist() == sorted(rows.tolist())
    keys = set(index.keys[rows].tolist())
    assert keys & set(plan.rows) == set(part.rows)
    assert len(part) == leaked
    assert all(part.rows[key] == plan.rows[key] for key in part.rows)
    again, _ = cleaning_rows(index, plan, num_samples=num_samples, leaked_poison=leaked, seed=seed)
    assert again.tolist() == rows.tolist()


def test_cleaning_set_depends_on_the_seed_and_is_drawn_evenly() -> None:
    index, plan = make(60), plan_of(60, num_poisoned=12)
    drawn = np.zeros(60, dtype=int)
    for seed in range(200):
        rows, _ = cleaning_rows(index, plan, num_samples=24, leaked_poison=3, seed=seed)
        drawn[rows] += 1
    dirty = np.array([str(key) in plan.rows for key in index.keys])
    for chosen, share in ((drawn[dirty], 3 / 12), (drawn[~dirty], 21 / 48)):
        assert abs(chosen - 200 * share).max() < 4 * math.sqrt(200 * share * (1 - share))


def test_a_cleaning_set_that_is_too_large_says_how_large_it_may_be() -> None:
    index, plan = make(60), plan_of(60, num_poisoned=12)
    cleaning_rows(index, plan, num_samples=48, leaked_poison=0, seed=0)
    with pytest.raises(DataError) as caught:
        cleaning_rows(index, plan, num_samples=49, leaked_poison=0, seed=0)
    assert str(caught.value) == (
        "clean.num_samples: 49 cleaning pairs, 0 of them poisoned, cannot be drawn from 48 clean and 12 poisoned "
        "training pairs\n  to do: ask for at most 48 clean pairs"
    )
    with pytest.raises(DataError):
        cleaning_rows(index, plan, num_samples=40, leaked_poison=13, seed=0)
    with pytest.raises(DataError):
        cleaning_rows(index, plan, num_samples=2, leaked_poison=3, seed=0)


# --- preview


@pytest.mark.parametrize(("size", "count"), [(32, 3), (224, 1)])
def test_preview_is_a_picture_of_before_trigger_and_after(size: int, count: int) -> None:
    trigger = BadNet(size=size // 4, pattern=Pattern.FIXED, placement=Placement.BOTTOM_RIGHT)
    plan = plan_of(10, num_poisoned=count, trigger=trigger, image_size=size)
    images = [torch.full((3, size, size), 40 + 50 * i, dtype=torch.uint8) for i in range(count)]
    content = preview(images, list(plan.rows), plan)
    assert content == preview(images, list(plan.rows), plan)
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.mode, image.size) == (
            "PNG",
            "RGB",
            (3 * 160 + 4 * 12, 24 + count * (160 + 46 + 12)),
        )
        pixels = np.asarray(image)
    for i in range(count):
        top, level = 24 + i * 218, 40 + 50 * i
        before, trigger_alone, after = (pixels[top : top + 160, x : x + 160] for x in (12, 184, 356))
        assert (before == level).all()
        # The upper left quarter is far from the patch.
        assert (after[:80, :80] == level).all()
        assert (trigger_alone[:80, :80] == 235).all()
        patch = after[122:158, 122:158]
        assert not (patch == level).all()
        np.testing.assert_array_equal(trigger_alone[122:158, 122:158], patch)
        captions = pixels[top + 160 : top + 206]
        assert captions[:, 12:172].min() < 100, "the caption as it was"
        assert captions[:, 356:516].min() < 100, "the caption as it is now"
        assert captions[:, 184:344].min() == 255, "none below the trigger"


def test_preview_of_long_and_foreign_captions() -> None:
    index = make_index(["a/b.tar"], [(0, RawSample("k", 0, b"", "word " * 200 + "日本語 🐕", 0))])
    plan = make_plan(index, Poison(num_poisoned=1, trigger=BadNet(size=4)), image_size=8, seed=0)
    with Image.open(io.BytesIO(preview([picture(8, 8)], ["k"], plan))) as image:
        assert image.size == (528, 242)
    with pytest.raises(KeyError):
        preview([picture(8, 8)], ["not in the plan"], plan)
