"""Retrieval against a slow computation that ranks one query at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raybd.data import cache, shards
from raybd.data.cache import Images
from raybd.data.shards import Index, array_of_tuples
from raybd.errors import DataError, TrialError
from raybd.model import Clip, create
from raybd.poison.plan import Attack
from raybd.retrieval import Captioned, captioned, exact, lure, lured, ranks, recall, retrieve
from raybd.seeding import fork
from raybd.study import BadNet, Data, Pattern, Placement
from raybd.tables import RECALL_AT

CPU = torch.device("cpu")
ATTACK = Attack(BadNet(size=8, pattern=Pattern.FIXED, placement=Placement.BOTTOM_RIGHT), "boat", pattern_seed=4)
FLICKR = Path(__file__).resolve().parents[2] / "shared" / "data" / "flickr8k-64"
unhurried = settings(deadline=None, max_examples=60)  # a busy machine is no failure

pytestmark = pytest.mark.usefixtures("one_thread")


def some_images(captions: list[tuple[str, ...]], *, size: int = 32) -> Images:
    """Return images of noise with these captions."""
    count = len(captions)
    index = Index(
        shards=("a.tar",),
        keys=np.array([f"k{i}" for i in range(count)], dtype=np.str_),
        captions=np.array([texts[0] for texts in captions], dtype=object),
        labels=np.full(count, -1),
        shard=np.zeros(count, dtype=np.int64),
        row=np.arange(count),
        listed=array_of_tuples(captions),
    )
    pixels = np.random.default_rng(3).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return Images(index, pixels, np.arange(count))


def ready(captions: list[tuple[str, ...]], counted: list[bool] | None = None) -> Captioned:
    counted_N = np.array(counted or [True] * len(captions))
    return captioned(some_images(captions), counted_N=counted_N, seed=2, batch_size=4)


def rows(draw: np.random.Generator, count: int, *, coarse: bool) -> Tensor:
    """Return normalised embeddings; coarse ones have many equal scores."""
    found = torch.from_numpy(draw.normal(size=(count, 6)))
    if coarse:
        return torch.nn.functional.one_hot(found.argmax(dim=1), 6).double()
    return torch.nn.functional.normalize(found, dim=1)


def embedded(found: Captioned, seed: int, *, coarse: bool) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(seed)
    images, texts = (rows(draw, count, coarse=coarse) for count in (len(found.images.index), len(found.texts)))
    return exact(images), exact(texts)


def slow_rank(query: Tensor, pool: list[Tensor], right: set[int]) -> int:
    """Return how many wrong ones come before the first right one in a list sorted by score, wrong before right."""
    scores = [sum(int(a) * int(b) for a, b in zip(query, other, strict=True)) for other in pool]
    order = sorted(range(len(pool)), key=lambda i: (-scores[i], i in right))
    return next(place for place, i in enumerate(order) if i in right)


def slow_recall(found: Captioned, images: Tensor, texts: Tensor) -> dict[str, tuple[int, ...]]:
    """Count right answers with Python's integers, image by image and caption by caption."""
    captions = found.images.index.caption_lists()
    there, back = [], []
    for i, own in enumerate(captions):
        if not found.counted_N[i]:
            continue
        there.append(slow_rank(images[i], list(texts), {found.texts.index(text) for text in own}))
        for text in own:
            having = {j for j, others in enumerate(captions) if text in others}
            back.append(slow_rank(texts[found.texts.index(text)], list(images), having))
    return {
        "image_to_text": tuple(sum(rank < k for rank in there) for k in RECALL_AT),
        "text_to_image": tuple(sum(rank < k for rank in back) for k in RECALL_AT),
    }


WORDS = ("boat", "lake", "dog", "tree", "man", "child", "red", "blue")
some_captions = st.lists(
    st.lists(st.sampled_from([f"{a} {b}" for a in WORDS for b in WORDS]), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=25,
)


@given(captions=some_captions, seed=st.integers(0, 1 << 30), coarse=st.booleans())
@unhurried
def test_recall_is_that_of_the_slow_computation(*, captions: list[tuple[str, ...]], seed: int, coarse: bool) -> None:
    counted = [fork(seed, i) % 3 > 0 or i == 0 for i in range(len(captions))]
    found = ready(captions, counted)
    images, texts = embedded(found, seed, coarse=coarse)
    made = recall(found, images, texts)
    assert {"image_to_text": made.image_to_text, "text_to_image": made.text_to_image} == slow_recall(
        found, images, texts
    )
    assert made.n_images == sum(counted)
    assert made.n_texts == sum(len(own) for own, yes in zip(captions, counted, strict=True) if yes)
    for hits, total in ((made.image_to_text, made.n_images), (made.text_to_image, made.n_texts)):
        assert list(hits) == sorted(hits)
        assert hits[-1] <= total


@given(captions=some_captions, seed=st.integers(0, 1 << 30), coarse=st.booleans())
@unhurried
def test_the_order_of_images_is_of_no_account(*, captions: list[tuple[str, ...]], seed: int, coarse: bool) -> None:
    found = ready(captions)
    images, texts = embedded(found, seed, coarse=coarse)
    order = np.random.default_rng(seed).permutation(len(captions))
    again = ready([captions[i] for i in order])
    moved = torch.stack([texts[found.texts.index(text)] for text in again.texts])
    assert recall(again, images[order], moved) == recall(found, images, texts)


@pytest.mark.parametrize("scores", [1, 7, 100, 1 << 20])
def test_blocks_change_nothing(scores: int) -> None:
    found = ready([(f"a {i}", f"b {i}", f"c {i % 3}") for i in range(23)])
    images, texts = embedded(found, 5, coarse=False)
    expected = [slow_rank(images[i], list(texts), set(found.pairs_K2[found.pairs_K2[:, 0] == i, 1])) for i in range(23)]
    assert ranks(images, texts, found.pairs_K2, scores=scores).tolist() == expected
    assert len(set(expected)) > 3


def test_scores_are_the_same_number_in_whatever_order_they_are_summed() -> None:
    images, texts = embedded(ready([(f"{i}",) for i in range(40)]), 1, coarse=False)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(images @ texts.T, images[:, order] @ texts[:, order].T)
    assert int((images @ texts.T)[3, 5]) == sum(int(a) * int(b) for a, b in zip(images[3], texts[5], strict=True))


def test_a_model_that_gives_everything_one_embedding_retrieves_nothing() -> None:
    found = ready([(f"a {i}", f"b {i}") for i in range(30)])
    same_ND, same_TD = torch.ones(30, 4), torch.ones(60, 4)
    made = recall(found, exact(same_ND), exact(same_TD))
    assert made.image_to_text == made.text_to_image == (0, 0, 0)


def test_embeddings_that_are_not_finite_are_refused() -> None:
    with pytest.raises(TrialError, match="not finite"):
        exact(torch.tensor([[0.0, float("nan")]]))


def test_images_whose_captions_name_the_target_are_not_triggered() -> None:
    found = ready([("A Boat.", "x"), ("boats and a lifeboat", "y"), ("z", "the boat's oar"), ("a dog", "w"), ("q",)])
    assert lure(found, ATTACK, ["a boat"]).triggered_N.tolist() == [False, True, False, True, True]
    with pytest.raises(DataError, match="none is left to trigger"):
        lure(ready([("a boat",)]), ATTACK, ["a boat"])


def test_none_to_count_is_refused() -> None:
    with pytest.raises(DataError, match="none of 1 images"):
        ready([("a",)], [False])


@given(captions=some_captions, seed=st.integers(0, 1 << 30), coarse=st.booleans())
@unhurried
def test_lured_images_are_those_of_the_slow_computation(
    *, captions: list[tuple[str, ...]], seed: int, coarse: bool
) -> None:
    found = ready([*captions, ("nothing of the kind",)])
    one = lure(found, ATTACK, ["boat lake", "a photo of a boat", "a photo of a boat", "the boat"])
    assert one.texts == ("boat lake", "a photo of a boat", "the boat")  # the first may be in the pool already
    images, texts = embedded(found, seed, coarse=coarse)
    draw = np.random.default_rng(seed + 1)
    triggered = exact(rows(draw, int(one.triggered_N.sum()), coarse=coarse))
    poison = exact(rows(draw, 3, coarse=coarse))
    clean = images[torch.from_numpy(one.triggered_N)]
    made = lured(found, one, triggered, clean, texts, poison)
    others = [texts[i] for i, text in enumerate(found.texts) if text != "boat lake"]
    pool, right = [*others, *poison], {len(others), len(others) + 1, len(others) + 2}
    for queries, hits in ((triggered, made.triggered), (clean, made.clean)):
        found_ranks = [slow_rank(query, pool, right) for query in queries]
        assert hits == tuple(sum(rank < k for rank in found_ranks) for k in RECALL_AT)
    assert made.n_triggered == len(triggered)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return create("resnet-tiny-32", seed=1)


def slow_embeddings(clip: Clip, images: list[Tensor], texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return embeddings computed one by one."""
    clip.net.eval()
    with torch.no_grad():
        of_images = [clip.net.encode_image(clip.normalise(image[None]), normalize=True)[0] for image in images]
        of_texts = [clip.net.encode_text(clip.tokenizer([text]), normalize=True)[0] for text in texts]
    clip.net.train()
    return torch.stack(of_images), torch.stack(of_texts)


def test_a_model_is_measured_on_the_images_that_it_sees(clip: Clip) -> None:
    found = ready([(f"a {a} and a {b}", f"{b} by {a}") for a in WORDS for b in WORDS[1:3]])
    one = lure(found, ATTACK, ["a photo of a boat", "a boat on the lake"])
    clip.net.train()
    made, (of_lure,) = retrieve(clip, found, [one], device=CPU)
    assert all(part.training for part in clip.net.modules())

    pixels = [torch.from_numpy(found.images.pixels_MCHW[i]) for i in range(16)]
    images, texts = slow_embeddings(clip, pixels, list(found.texts))
    expected: Any = recall(found, exact(images), exact(texts))
    assert made == expected
    attacked = [ATTACK.triggered(pixels[i], seed=fork(2, "evaluate", f"k{i}")) for i in np.flatnonzero(one.triggered_N)]
    triggered, poison = slow_embeddings(clip, attacked, list(one.texts))
    clean = exact(images[torch.from_numpy(one.triggered_N)])
    assert of_lure == lured(found, one, exact(triggered), clean, exact(texts), exact(poison))
    assert of_lure.n_triggered == 14  # two images name the boat


@pytest.mark.skipif(not FLICKR.is_dir(), reason=f"NOT RUN: needs the photos with five captions each in {FLICKR}")
def test_flickr8k_is_retrieved_at_chance_by_a_random_model(clip: Clip) -> None:
    urls = shards.find_shards(Data(root=str(FLICKR)), "test/test-000001.tar.gz", field_name="data.test")
    images = cache.load_images(urls, size=32, cache_dir=None)
    found = captioned(images, counted_N=np.ones(len(images.index), dtype=bool), seed=0, batch_size=256)
    made, (of_lure,) = retrieve(clip, found, [lure(found, ATTACK, ["a photo of a boat"])], device=CPU)
    assert made.n_images == 591
    assert made.n_texts == 5 * 591
    assert made.image_to_text[2] < 0.1 * 591
    assert made.text_to_image[2] < 0.1 * made.n_texts
    assert 0.9 * 591 < of_lure.n_triggered < 591
