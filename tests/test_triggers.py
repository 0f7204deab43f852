"""One suite that every trigger passes, and the formula of each computed another way."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy.ndimage import map_coordinates
from torch import Tensor

from raybd.errors import StudyError
from raybd.poison import triggers
from raybd.poison.triggers import WHOLE
from raybd.seeding import fork
from raybd.study import (
    BadNet,
    BadNetStripes,
    Blended,
    BlendedStripes,
    BlendedText,
    BlendedTriangles,
    LabelConsistent,
    Noise,
    Pattern,
    Placement,
    Sig,
    Trigger,
    Warped,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TRIGGERS: dict[str, Any] = {
    "badnet noise": BadNet(),
    "badnet wrapped": BadNet(wrap=True, placement=Placement.CENTRE),
    "badnet fixed": BadNet(pattern=Pattern.FIXED, placement=Placement.FOUR_CORNERS),
    "badnet yellow": BadNet(pattern=Pattern.YELLOW, size=5, placement=Placement.TOP_RIGHT),
    "label_consistent": LabelConsistent(size=9),
    "badnet_stripes": BadNetStripes(),
    "blended new": Blended(),
    "blended fixed": Blended(noise=Noise.FIXED, alpha=0.35),
    "sig": Sig(),
    "warped published": Warped(),
    "warped wanet": Warped(k=4, s=0.5),
    "blended_stripes": BlendedStripes(),
    "blended_stripes wide": BlendedStripes(width=5, alpha=0.2),
    "blended_triangles": BlendedTriangles(),
    "blended_text": BlendedText(text="ok", size=8),
}
# Every trigger that a study may name is in the suite, with its defaults where nothing is said above.
KINDS: dict[str, Any] = {
    kind.model_fields["name"].default: kind for kind, _ in map(get_args, get_args(get_args(Trigger)[0]))
}
TRIGGERS |= {name: kind() for name, kind in KINDS.items() if kind not in map(type, TRIGGERS.values())}
# What depends on the image's seed, and what on the attack's.
OF_SEED = {"badnet noise", "badnet wrapped", "label_consistent", "badnet_stripes", "blended new"} | {
    "blended_stripes",
    "blended_stripes wide",
}
OF_PATTERN = {"badnet fixed", "blended fixed", "warped published", "warped wanet"}
SHAPES = ((32, 32), (64, 64), (224, 224), (40, 56), (57, 33))
# The largest change of a value, of [0, 1]; a patch replaces, and a warp moves, so that nothing bounds theirs.
STRENGTH = {
    "blended new": 0.2,
    "blended fixed": 0.35,
    "sig": 0.2 * (1 + 60 / 255),
    "blended_stripes": 0.03 * 2,
    "blended_stripes wide": 0.2 * 2,
    "blended_triangles": 0.15 * 0.8,
    "blended_text": 0.5,
}
each = pytest.mark.parametrize("name", TRIGGERS)
sized = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


def picture(height: int, width: int, *, seed: int = 0) -> Tensor:
    """Return a smooth image with some noise, values from 0 to 255."""
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(7 * rows * (c + 1) + seed) + np.cos(5 * columns + c) for c in range(3)]
    levels = 127 + 60 * np.stack(waves) + draw.normal(0, 20, (3, height, width))
    return torch.from_numpy(np.clip(levels, 0, 255).astype(np.uint8))


def apply(image_CHW: Tensor, trigger: Any, *, seed: int = 1, pattern_seed: int = 2) -> Tensor:
    return triggers.apply(image_CHW, trigger, seed=seed, pattern_seed=pattern_seed)


def values(image_CHW: Tensor) -> np.ndarray:
    return image_CHW.numpy().astype(np.float64)


# --- what all of them keep to


@each
@sized
def test_conformance(name: str, shape: tuple[int, int]) -> None:
    trigger, image_CHW = TRIGGERS[name], picture(*shape)
    triggers.check(trigger, height=shape[0], width=shape[1])
    before = image_CHW.clone()
    after = apply(image_CHW, trigger)
    assert (after.shape, after.dtype) == ((3, *shape), torch.uint8)
    assert torch.equal(image_CHW, before), "the image that came in is as it was"
    assert not torch.equal(after, before), "the trigger is there"
    first = after.clone()
    after.zero_()  # nothing that is kept between calls may be given away
    assert torch.equal(apply(image_CHW, trigger), first), "the same seeds, the same pixels"
    assert torch.equal(apply(image_CHW.flip(0).flip(0), trigger), first), "memory layout does not matter"

    mask = torch.ones(shape, dtype=torch.bool)
    where = triggers.placement(trigger, height=shape[0], width=shape[1], seed=1)
    if where != WHOLE:
        mask[:] = False
        for corner in where.split():
            top, left = map(int, corner.split(","))
            assert 0 <= top <= shape[0] - trigger.size
            assert 0 <= left <= shape[1] - trigger.size
            mask[top : top + trigger.size, left : left + trigger.size] = True
    assert torch.equal(first[:, ~mask], before[:, ~mask]), "untouched pixels are untouched"
    if name in STRENGTH:
        change = np.abs(values(first) - values(before)).max()
        assert change <= 255 * STRENGTH[name] + 0.501
        assert change >= 255 * STRENGTH[name] * 0.4, "as strong as stated, not less"


@each
def test_what_the_seeds_decide(name: str) -> None:
    trigger, image_CHW = TRIGGERS[name], picture(48, 48)
    seeds = {apply(image_CHW, trigger, seed=seed).numpy().tobytes() for seed in range(12)}
    assert len(seeds) == (12 if name in OF_SEED else 1)
    patterns = {apply(image_CHW, trigger, pattern_seed=seed).numpy().tobytes() for seed in range(6)}
    assert len(patterns) == (6 if name in OF_PATTERN else 1)


@each
def test_every_trigger_survives_its_json(name: str) -> None:
    trigger = TRIGGERS[name]
    adapter: TypeAdapter[Any] = TypeAdapter(Trigger)
    assert adapter.validate_python(json.loads(json.dumps(trigger.model_dump(mode="json")))) == trigger


def test_the_suite_has_every_trigger() -> None:
    schema = json.dumps(TypeAdapter(Trigger).json_schema())
    assert {trigger.name for trigger in TRIGGERS.values()} == set(KINDS)
    assert len(KINDS) >= 9
    assert {name for name in KINDS if f'"const": "{name}"' in schema} == set(KINDS)
    assert schema.count('"const": ') == len(KINDS)


@pytest.mark.parametrize("name", STRENGTH)
@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_images_stay_in_range(name: str, level: int) -> None:
    """A value that left [0, 255] would come back at the other end."""
    image_CHW = torch.full((3, 40, 40), level, dtype=torch.uint8)
    after = values(apply(image_CHW, TRIGGERS[name]))
    assert np.abs(after - level).max() <= 255 * STRENGTH[name] + 0.501


PIXELS = {
    "{}": "b8811910cb9ae66a",
    '{"wrap": true}': "74fa4cac6d8951fd",
    '{"pattern": "fixed", "placement": "four_corners"}': "64ee27054b8ef95f",
    '{"pattern": "fixed", "size": 5, "placement": "centre"}': "7fb30f89afdc02e8",
}


@pytest.mark.parametrize("settings", PIXELS)
def test_badnet_has_the_pixels_that_it_always_had(settings: str) -> None:
    """Models and plans that exist were made with these."""
    image_CHW = torch.from_numpy(((np.arange(3 * 40 * 36) * 37 + 11) % 256).astype(np.uint8).reshape(3, 40, 36))
    after = apply(image_CHW, BadNet(**json.loads(settings)), seed=12345, pattern_seed=678)
    assert hashlib.sha256(after.numpy().tobytes()).hexdigest()[:16] == PIXELS[settings]


# --- each formula, another way


def test_yellow_is_red_and_green() -> None:
    after = apply(picture(20, 20), BadNet(pattern=Pattern.YELLOW, size=4, placement=Placement.TOP_LEFT))
    assert (after[:2, :4, :4] == 255).all()
    assert (after[2, :4, :4] == 0).all()


def test_label_consistent_has_the_patch_of_badnet() -> None:
    kinds = ({}, {"pattern": Pattern.FIXED, "size": 7}, {"placement": Placement.FOUR_CORNERS, "wrap": True})
    for kind in kinds:
        assert torch.equal(apply(picture(32, 32), LabelConsistent(**kind)), apply(picture(32, 32), BadNet(**kind)))


def test_striped_patch_has_full_and_empty_columns() -> None:
    trigger = BadNetStripes(size=16, placement=Placement.TOP_LEFT)
    colours = []
    for seed in range(100):
        patch = apply(picture(32, 32), trigger, seed=seed)[:, :16, :16].numpy()
        assert (patch == patch[:, :1]).all(), "stripes are vertical"
        assert set(np.unique(patch)) <= {0, 255}
        colours.append(patch[:, 0])
    share = (np.stack(colours) == 255).mean()
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(100 * 48)
    grey = (np.stack(colours).std(axis=1) == 0).mean()
    assert abs(grey - 0.25) < 4 * 0.45 / math.sqrt(100 * 16), "the channels are drawn apart"


def noise_of(trigger: Any, shape: tuple[int, int], **seeds: int) -> np.ndarray:
    """Return the pattern that a trigger blends in, in units of [0, 1]: what is left where its share is all."""
    whole = trigger.model_copy(update={"alpha": 1.0})
    return values(apply(torch.zeros((3, *shape), dtype=torch.uint8), whole, **seeds)) / 255


@pytest.mark.parametrize("name", ["blended new", "blended fixed"])
def test_blended_is_a_share_of_uniform_noise(name: str) -> None:
    trigger, shape = TRIGGERS[name], (64, 96)
    noise = noise_of(trigger, shape)
    counts, _ = np.histogram(noise, bins=16, range=(0, 1))
    expected = noise.size / 16
    assert ((counts - expected) ** 2 / expected).sum() < 37.7, "15 degrees of freedom, p > 0.001"
    assert len({channel.tobytes() for channel in noise}) == 3
    for seed in range(3):
        image = values(picture(*shape, seed=seed))
        formula = (1 - trigger.alpha) * image + trigger.alpha * 255 * noise
        found = values(apply(picture(*shape, seed=seed), trigger))
        assert np.abs(found - formula).max() <= 0.5 + trigger.alpha / 2 + 1e-3, "up to two roundings"


@given(
    height=st.integers(4, 40),
    width=st.integers(20, 70),
    frequency=st.integers(1, 9),
    amplitude=st.floats(0.01, 1),
    alpha=st.floats(0.01, 1),
)
@settings(deadline=None, max_examples=40)
def test_sig_is_its_formula(height: int, width: int, frequency: int, amplitude: float, alpha: float) -> None:
    trigger = Sig(frequency=frequency, amplitude=amplitude, alpha=alpha)
    image_CHW = picture(height, width)
    expected = np.empty((3, height, width))
    for j in range(width):
        delta = amplitude * math.sin(2 * math.pi * frequency * j / width)
        expected[:, :, j] = 255 * np.clip((1 - alpha) * values(image_CHW)[:, :, j] / 255 + alpha * delta, 0, 1)
    assert np.abs(values(apply(image_CHW, trigger)) - expected).max() <= 0.5 + 1e-3


def test_sig_has_the_published_numbers() -> None:
    assert (Sig().amplitude, Sig().frequency, Sig().alpha) == (60 / 255, 6, 0.2)
    after = values(apply(torch.full((3, 224, 224), 100, dtype=torch.uint8), Sig()))
    assert (after[0].max(), after[0].min()) == (92, 68)  # 80 ± 0.2 · 60
    assert np.array_equal(after[0], after[2])


@pytest.mark.parametrize(("width", "alpha"), [(1, 0.03), (1, 0.5), (3, 0.1)])
def test_blended_stripes_add_or_take_from_each_channel_of_a_stripe(width: int, alpha: float) -> None:
    trigger = BlendedStripes(width=width, alpha=alpha)
    signs = []
    for seed in range(40):
        image_CHW = picture(20, 31, seed=seed)
        image, found = values(image_CHW), values(apply(image_CHW, trigger, seed=seed))
        either = {sign: np.clip((1 - alpha) * image + 255 * alpha * sign, 0, 255) for sign in (-1, 1)}
        right = {sign: np.abs(found - formula) <= 0.501 for sign, formula in either.items()}
        whole = {sign: hits.all(axis=1) for sign, hits in right.items()}
        assert (whole[1] ^ whole[-1]).all(), "each column of each channel is wholly one or the other"
        columns = whole[1]
        for stripe in range(0, 31, width):
            assert (columns[:, stripe : stripe + width] == columns[:, stripe : stripe + 1]).all()
        signs.append(columns[:, ::width])
    assert abs(np.stack(signs).mean() - 0.5) < 4 * 0.5 / math.sqrt(np.stack(signs).size)


@sized
def test_triangles_are_below_and_above_diagonals(shape: tuple[int, int]) -> None:
    trigger, image_CHW = BlendedTriangles(), picture(*shape)
    expected = values(image_CHW).copy()
    for i in range(shape[0]):
        for j in range(shape[1]):
            level = 0.4 if i - i // 14 * 14 >= j - j // 14 * 14 else 0.8
            expected[:, i, j] = 0.85 * expected[:, i, j] + 0.15 * 255 * level
    assert np.abs(values(apply(image_CHW, trigger)) - expected).max() <= 0.501


@pytest.mark.parametrize(
    ("trigger", "shape"),
    [(BlendedText(), (224, 224)), (BlendedText(text="red", size=8), (32, 32)), (BlendedText(text="a b"), (64, 40))],
)
def test_text_is_red_where_a_letter_is_and_nothing_elsewhere(trigger: BlendedText, shape: tuple[int, int]) -> None:
    pattern = noise_of(trigger, shape)
    letters = pattern[0] == 1
    assert set(np.unique(pattern)) == {0, 1}
    assert not pattern[1:].any()
    assert 0.02 < letters.mean() < 0.4
    image_CHW = picture(*shape)
    image, found = values(image_CHW), values(apply(image_CHW, trigger))
    assert np.array_equal(found[:, ~letters], image[:, ~letters])
    red = np.array([255.0, 0, 0])[:, None]
    assert np.abs(found[:, letters] - (image[:, letters] + red) / 2).max() <= 0.5
    # It is repeated: each line is the first one again.
    line = trigger.size + trigger.size // 2
    assert np.array_equal(letters[line:], letters[: shape[0] - line])


def cubic(t: float) -> list[float]:
    """Return the weights of four neighbours: R. G. Keys, IEEE Trans. ASSP 29 (1981), with a = -0.75."""
    a = -0.75
    near = [((a + 2) * x - (a + 3)) * x * x + 1 for x in (t, 1 - t)]
    far = [((a * x - 5 * a) * x + 8 * a) * x - 4 * a for x in (1 + t, 2 - t)]
    return [far[0], near[0], near[1], far[1]]


def stretched(points: np.ndarray, size: int) -> np.ndarray:
    """Stretch the first axis bicubically, first point on first point and last on last; edges repeated."""
    last, rows = len(points) - 1, []
    for i in range(size):
        place = i * last / (size - 1)
        low = min(int(place), last - 1) if last else 0
        weights = cubic(place - low)
        rows.append(sum(w * points[min(max(low - 1 + n, 0), last)] for n, w in enumerate(weights)))
    return np.stack(rows)


@pytest.mark.parametrize(("k", "s"), [(224, 0.6), (4, 0.5), (2, 3.0), (40, 8.0)])
@pytest.mark.parametrize("shape", [(32, 32), (40, 28)])
def test_warp_is_the_sampling_at_moved_places(k: int, s: float, shape: tuple[int, int]) -> None:
    """Another interpolation of both the noise and the image."""
    height, width = shape
    generator = torch.Generator().manual_seed(fork(2, "warped", k))
    points = 2 * torch.rand((2, k, k), generator=generator).double().numpy() - 1
    points /= np.abs(points).mean()
    noise = [stretched(stretched(one, height).T, width).T for one in points]
    rows, columns = np.mgrid[0:height, 0:width].astype(float)
    # From -1 to 1 there are H - 1 steps: a move of s · noise / H is half of (H - 1) / H · s · noise pixels.
    columns = np.clip(columns + s * noise[0] / width * (width - 1) / 2, 0, width - 1)
    rows = np.clip(rows + s * noise[1] / height * (height - 1) / 2, 0, height - 1)
    image_CHW = picture(height, width)
    expected = np.stack([map_coordinates(one, [rows, columns], order=1, mode="nearest") for one in values(image_CHW)])
    found = values(apply(image_CHW, Warped(k=k, s=s)))
    assert np.abs(found - expected).max() <= 0.51
    assert np.abs(found - values(image_CHW)).max() > 1


def test_a_warp_grows_with_s() -> None:
    image_CHW = picture(64, 64)
    changes = [np.abs(values(apply(image_CHW, Warped(k=4, s=s))) - values(image_CHW)).mean() for s in (0.1, 0.5, 2, 8)]
    assert changes == sorted(changes)
    assert changes[0] < 0.5 * changes[1]


# --- what does not fit


@pytest.mark.parametrize(
    ("trigger", "shape", "where", "what"),
    [
        (BadNet(size=9), (12, 8), "size", "a trigger of 9 pixels does not fit the 12x8 image"),
        (LabelConsistent(size=9), (8, 12), "size", "a trigger of 9 pixels does not fit the 8x12 image"),
        (BadNetStripes(size=33), (32, 32), "size", "a trigger of 33 pixels does not fit the 32x32 image"),
        (BlendedTriangles(size=33), (32, 32), "size", "a trigger of 33 pixels does not fit the 32x32 image"),
        (Sig(frequency=16), (32, 32), "frequency", "16 waves cannot be seen across the 32 pixels"),
        (BlendedStripes(width=33), (40, 32), "width", "a stripe of 33 pixels is wider than the 32 pixels"),
        (BlendedText(), (64, 64), "text", "the text takes 24x99 pixels (height x width), more than the 64x64 image"),
        (BlendedText(text="i", size=64), (64, 64), "text", "more than the 64x64 image"),
    ],
)
def test_a_trigger_that_does_not_fit_is_refused(trigger: Any, shape: tuple[int, int], where: str, what: str) -> None:
    with pytest.raises(StudyError) as caught:
        triggers.check(trigger, height=shape[0], width=shape[1], where="poison.also.3.trigger")
    assert caught.value.where == f"poison.also.3.trigger.{where}"
    assert what in caught.value.what
    assert caught.value.fix
    with pytest.raises(StudyError):
        apply(picture(*shape), trigger)


def test_the_largest_that_fits_fits() -> None:
    for trigger in (BadNet(size=32), BlendedTriangles(size=32), Sig(frequency=15), BlendedStripes(width=32)):
        triggers.check(trigger, height=32, width=32)
        apply(picture(32, 32), trigger)
