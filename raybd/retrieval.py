"""Image-text retrieval: recall both ways, and how often a trigger calls up the poison's captions, as counts.

N images, T distinct texts, D embedding width, Q queries, P texts or images in the pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raybd.data.cache import Images
from raybd.errors import DataError, TrialError
from raybd.evaluate import evaluating
from raybd.model import Clip
from raybd.poison.plan import Attack, naming
from raybd.seeding import fork
from raybd.tables import RECALL_AT

# Scores held at a time: 64 MB, whatever the size of the pool.
_SCORES = 1 << 23
_TEXTS = 1024
Pairs = NDArray[np.int64]


@dataclass(frozen=True)
class Captioned:
    """Images with one or several captions each.

    Attributes:
        texts: the T distinct captions, in the order in which they come first.
        pairs_K2: (image, text) of each caption, by image.
        counted_N: images whose recall is counted; the others are in the pool only.
    """

    images: Images
    texts: tuple[str, ...]
    pairs_K2: Pairs
    counted_N: NDArray[np.bool_]
    seed: int
    batch_size: int


@dataclass(frozen=True)
class Lure:
    """An attack on retrieval: its trigger, and the poison's captions that it should call up.

    Attributes:
        triggered_N: counted images none of whose captions names the target, as whole words.
    """

    attack: Attack
    texts: tuple[str, ...]
    triggered_N: NDArray[np.bool_]


@dataclass(frozen=True)
class Recall:
    """Right answers among the first 1, 5 and 10 (`RECALL_AT`).

    Attributes:
        image_to_text: of `n_images` images, those with one of their captions among the first k texts.
        text_to_image: of `n_texts` captions, those with their image among the first k images.
    """

    n_images: int
    n_texts: int
    image_to_text: tuple[int, ...]
    text_to_image: tuple[int, ...]


@dataclass(frozen=True)
class Lured:
    """Of `n_triggered` images, those with a caption of the poison among the first k: triggered, and clean (control)."""

    n_triggered: int
    triggered: tuple[int, ...]
    clean: tuple[int, ...]


def captioned(images: Images, *, counted_N: NDArray[np.bool_], seed: int, batch_size: int) -> Captioned:
    """Make the captions of images ready for retrieval. Errors: DataError where no image is counted."""
    if not counted_N.any():
        raise DataError(f"none of {len(counted_N)} images to retrieve", where="data.test", fix="give more images")
    numbers: dict[str, int] = {}
    pairs = [
        (image, numbers.setdefault(text, len(numbers)))
        for image, texts in enumerate(images.index.caption_lists())
        for text in texts
    ]
    return Captioned(images, tuple(numbers), np.array(pairs, dtype=np.int64), counted_N, seed, batch_size)


def lure(found: Captioned, attack: Attack, texts: Sequence[str]) -> Lure:
    """Make an attack on retrieval. Errors: DataError where the captions of every image name the target."""
    names = naming(attack.target_class)
    naming_T = np.array([names(text) for text in found.texts], dtype=bool)
    triggered_N = found.counted_N.copy()
    triggered_N[found.pairs_K2[naming_T[found.pairs_K2[:, 1]], 0]] = False
    if not triggered_N.any():
        raise DataError(
            f"every image has a caption that names {attack.target_class!r}: none is left to trigger", where="data.test"
        )
    return Lure(attack, tuple(dict.fromkeys(texts)), triggered_N)


def exact(embeddings_QD: Tensor) -> Tensor:
    """Return normalised embeddings as whole numbers of 2^-25, float64 on the CPU.

    Their products and sums of products then fit the 53 bits of a float64: a score is the same number in whatever
    order it is summed, in blocks or not, on any machine, and equal embeddings tie.

    Errors: TrialError where an embedding is not finite.
    """
    found = embeddings_QD.detach().cpu().double()
    if not torch.isfinite(found).all():
        raise TrialError("the model gives embeddings that are not finite", fix="this model cannot be evaluated")
    return (found * 2.0**25).round()


def ranks(queries_QD: Tensor, pool_PD: Tensor, right_K2: Pairs, *, scores: int = _SCORES) -> NDArray[np.int64]:
    """Return for each query how many wrong entries of the pool score at least as high as its best right one, [Q].

    So ties count against the model, and the order of queries and pool is of no account.

    Args:
        queries_QD, pool_PD: as `exact` gives them.
        right_K2: (query, right entry of the pool), by query; each query has one at least.
        scores: how many scores are held at a time.
    """
    total, size = len(queries_QD), len(pool_PD)
    found = np.empty(total, dtype=np.int64)
    block = max(1, scores // max(1, size))
    for start in range(0, total, block):
        stop = min(start + block, total)
        low, high = np.searchsorted(right_K2[:, 0], (start, stop))
        own = torch.from_numpy(right_K2[low:high])
        right_BP = torch.zeros(stop - start, size, dtype=torch.bool)
        right_BP[own[:, 0] - start, own[:, 1]] = True
        scores_BP = queries_QD[start:stop] @ pool_PD.T
        best_B1 = scores_BP.masked_fill(~right_BP, -torch.inf).amax(dim=1, keepdim=True)
        found[start:stop] = ((scores_BP >= best_B1) & ~right_BP).sum(dim=1).numpy()
    return found


def hits(ranks_Q: NDArray[np.int64], *, times: NDArray[np.int64] | int = 1) -> tuple[int, ...]:
    """Return how many queries are right within the first 1, 5 and 10, each counted `times`."""
    return tuple(int(((ranks_Q < k) * times).sum()) for k in RECALL_AT)


def recall(found: Captioned, images_ND: Tensor, texts_TD: Tensor) -> Recall:
    """Count the right answers for exact embeddings of all images and all texts.

    Image to text: one of its captions among the first k of all texts. Text to image: each caption of a counted image
    is a query of its own.
    Differs: a text that several images have is one text and right for each of them; ties count against the model.
    """
    pairs = found.pairs_K2
    counted = np.flatnonzero(found.counted_N)
    place = np.cumsum(found.counted_N) - 1
    own = pairs[found.counted_N[pairs[:, 0]]]
    by_image = np.stack([place[own[:, 0]], own[:, 1]], axis=1)
    times_T = np.bincount(own[:, 1], minlength=len(found.texts))
    asked = np.flatnonzero(times_T)
    place_T = np.cumsum(times_T > 0) - 1
    back = pairs[times_T[pairs[:, 1]] > 0]
    by_text = np.stack([place_T[back[:, 1]], back[:, 0]], axis=1)
    by_text = by_text[np.argsort(by_text[:, 0], kind="stable")]
    return Recall(
        n_images=len(counted),
        n_texts=int(times_T.sum()),
        image_to_text=hits(ranks(images_ND[counted], texts_TD, by_image)),
        text_to_image=hits(ranks(texts_TD[asked], images_ND, by_text), times=times_T[asked]),
    )


def lured(
    found: Captioned, one: Lure, triggered_MD: Tensor, clean_MD: Tensor, texts_TD: Tensor, poison_LD: Tensor
) -> Lured:
    """Count the images that call up a caption of the poison, for exact embeddings.

    The poison's captions join the pool of all texts; one of them among an image's first k is a hit. Ties count
    against the attack. After arXiv 2106.09667, which poisons towards one class and looks at how its images are named.
    Differs: the measure on retrieval, with clean images as control, is ours.
    """
    kept = np.array([text not in one.texts for text in found.texts], dtype=bool)
    pool_PD = torch.cat([texts_TD[torch.from_numpy(kept)], poison_LD])
    own = np.arange(len(pool_PD) - len(poison_LD), len(pool_PD))
    count = int(one.triggered_N.sum())
    right_K2 = np.stack([np.repeat(np.arange(count), len(own)), np.tile(own, count)], axis=1)
    both = [hits(ranks(queries_MD, pool_PD, right_K2)) for queries_MD in (triggered_MD, clean_MD)]
    return Lured(count, triggered=both[0], clean=both[1])


def retrieve(
    clip: Clip, found: Captioned, lures: Sequence[Lure], *, device: torch.device
) -> tuple[Recall, list[Lured]]:
    """Measure a model's retrieval and each attack on it. The mode of every module is as it was afterwards.

    A trigger is put on the image that the model sees, and is the one that zero-shot evaluation puts there.

    Errors: TrialError where the model's embeddings are not finite.
    """
    with evaluating(clip.net), torch.autocast(device.type, enabled=False):
        texts_TD = _texts(clip, found.texts, device)
        images_ND = _images(clip, found, np.arange(len(found.images.index)), None, device)
        of_lures = []
        for one in lures:
            rows = np.flatnonzero(one.triggered_N)
            triggered_MD = _images(clip, found, rows, one.attack, device)
            of_lures.append(lured(found, one, triggered_MD, images_ND[rows], texts_TD, _texts(clip, one.texts, device)))
        return recall(found, images_ND, texts_TD), of_lures


def _texts(clip: Clip, texts: Sequence[str], device: torch.device) -> Tensor:
    parts = [list(texts[start : start + _TEXTS]) for start in range(0, len(texts), _TEXTS)]
    return exact(torch.cat([clip.net.encode_text(clip.tokenize(part).to(device), normalize=True) for part in parts]))


def _images(
    clip: Clip, found: Captioned, rows: NDArray[np.int64], attack: Attack | None, device: torch.device
) -> Tensor:
    return exact(torch.cat(list(_embedded(clip, found, rows, attack, device))))


def _embedded(
    clip: Clip, found: Captioned, rows: NDArray[np.int64], attack: Attack | None, device: torch.device
) -> Iterator[Tensor]:
    """Yield embeddings of images batch by batch, with a trigger where one is given."""
    for start in range(0, len(rows), found.batch_size):
        batch = rows[start : start + found.batch_size]
        images_BCHW = torch.from_numpy(found.images.pixels(batch))
        if attack is not None:
            seeds = [fork(found.seed, "evaluate", str(key)) for key in found.images.index.keys[batch]]
            images_BCHW = torch.stack(
                [attack.triggered(image, seed=seed) for image, seed in zip(images_BCHW, seeds, strict=True)]
            )
        pixels = clip.normalise(images_BCHW.to(device)).contiguous(memory_format=torch.channels_last)
        yield clip.net.encode_image(pixels, normalize=True).float().cpu()
