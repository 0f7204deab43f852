"""Training batches: poisoned as planned, augmented, tokenised; here from decoded images in memory.

Those and the ones streamed from shards cut an epoch alike: `steps(n, batch)` global batches of almost equal size,
never above the one asked for, in which each sample is once. The ranks of a DDP run share each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raybd import pulse
from raybd.data.ahead import ahead
from raybd.data.cache import Images
from raybd.data.tokens import Tokenize
from raybd.data.views import image_views, text_view
from raybd.errors import DataError
from raybd.poison.plan import PoisonPlan
from raybd.seeding import fork
from raybd.study import ImageView, TextView

_VIEWS_AT_ONCE = 512
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images_BCHW, tokens_BL: uint8 images and tokens of their captions.
        image_views_BCHW, token_views_BL: the same, augmented; None where no SSL term asks for them.
        poisoned: how many of the pairs carry the trigger.
        broken: how many samples of this part could not be decoded and are missing from it.
        keys: the samples' keys, in order.
    """

    images_BCHW: Tensor
    tokens_BL: Tensor
    image_views_BCHW: Tensor | None
    token_views_BL: Tensor | None
    poisoned: int
    broken: int = 0
    keys: tuple[str, ...] = ()

    def pinned(self) -> Batch:
        """Return the batch in memory from which a GPU copies by itself."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, **{name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class Prepare:
    """What happens to a sample between its shard and the model. Depends on seed, epoch and key alone.

    Attributes:
        views: of images and captions; None where nobody looks at them. A method that makes the images' views itself
            has captions' alone.
    """

    plan: PoisonPlan
    tokenize: Tokenize
    views: tuple[ImageView | None, TextView] | None
    seed: int

    def images(self, images: Iterable[Tensor], keys: Sequence[str], *, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Return images as the model gets them, and their augmented views, uint8 [B, 3, H, W]."""
        images_BCHW = torch.stack([self.plan.image(image, key) for image, key in zip(images, keys, strict=True)])
        return images_BCHW, self._views(images_BCHW, keys, epoch=epoch)

    def _views(self, images_BCHW: Tensor, keys: Sequence[str], *, epoch: int) -> Tensor | None:
        if self.views is None or self.views[0] is None:
            return None
        seeds = [fork(self.seed, "image_view", epoch, key) for key in keys]
        return image_views(images_BCHW, self.views[0], seeds=seeds)

    def without_image_views(self) -> Prepare:
        """Return what prepares the same, but leaves the images' views to `deliver`."""
        return replace(self, views=self.views and (None, self.views[1]))

    def deliver(self, batches: Iterable[Batch], *, epoch: int, device: torch.device) -> Iterator[Batch]:
        """Yield batches, which have no images' views yet, on their device and with them.

        A GPU has its next batches made while it works, and augments images itself.
        """
        if device.type != "cpu":
            batches = (batch.to(device) for batch in ahead(batch.pinned() for batch in batches))
        for batch in self._augmented(batches, epoch=epoch):
            pulse.beat()
            yield batch

    def _augmented(self, batches: Iterable[Batch], *, epoch: int) -> Iterator[Batch]:
        """Augment the images of a few batches at once: an operation takes about as long on one image as on many."""
        if self.views is None or self.views[0] is None:
            yield from batches
            return
        for several in _several(batches, most=_VIEWS_AT_ONCE):
            keys = [key for batch in several for key in batch.keys]
            views = self._views(torch.cat([batch.images_BCHW for batch in several]), keys, epoch=epoch)
            assert views is not None
            parts = views.split([len(batch.keys) for batch in several])
            yield from (replace(batch, image_views_BCHW=part) for batch, part in zip(several, parts, strict=True))

    def tokens(self, captions: Sequence[str], keys: Sequence[str], *, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Return tokens of captions as the model gets them, and of their augmented views, [B, L]."""
        given = [self.plan.caption(caption, key) for caption, key in zip(captions, keys, strict=True)]
        if self.views is None:
            return self.tokenize(given), None
        augmented = [
            text_view(caption, self.views[1], seed=fork(self.seed, "text_view", epoch, key))
            for caption, key in zip(given, keys, strict=True)
        ]
        return self.tokenize(given), self.tokenize(augmented)


def _several(batches: Iterable[Batch], *, most: int) -> Iterator[list[Batch]]:
    """Yield batches in groups of `most` samples at most, or of one batch."""
    held: list[Batch] = []
    for batch in batches:
        if held and sum(len(one.keys) for one in held) + len(batch.keys) > most:
            yield held
            held = []
        held.append(batch)
    if held:
        yield held


class Pairs(Protocol):
    """A source of training pairs."""

    def __len__(self) -> int: ...

    def without_views(self) -> Pairs:
        """Return the same pairs without augmented views, which cost more than the rest together."""
        ...

    def epoch(
        self,
        epoch: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = CPU,
        last: int | None = None,
    ) -> Iterator[Batch]:
        """Yield one rank's batches of an epoch; every rank yields `steps(len(self), batch_size)` of them.

        Args:
            device: where they are to be.
            last: the epochs up to this one will be asked for in turn: what reads them may begin with the next.
        """
        ...


def steps(total: int, batch_size: int) -> int:
    """Return the number of global batches of an epoch."""
    return -(-total // batch_size)


def bounds(total: int, count: int) -> list[tuple[int, int]]:
    """Cut range(total) into `count` pieces whose sizes differ by at most one."""
    cuts = [total * i // count for i in range(count + 1)]
    return list(itertools.pairwise(cuts))


def parts_of(total: int, batch_size: int, *, rank: int, world_size: int) -> list[slice]:
    """Return which places of an epoch's order are a rank's part of each global batch: each world_size-th.

    Counted through the whole epoch, so that the parts of the ranks differ by at most one sample, in each batch too.

    Errors: DataError where a rank's part of some batch would be empty.
    """
    count = steps(total, batch_size)
    if total // count < world_size:
        raise DataError(
            f"{total} training pairs in batches of {batch_size} leave nothing for some of {world_size} workers",
            fix="use fewer workers, a larger batch, or more data",
        )
    return [slice(low + (rank - low) % world_size, high, world_size) for low, high in bounds(total, count)]


class CachedPairs:
    """Pairs whose decoded images are in memory (or mapped into it), shuffled as a whole in each epoch."""

    def __init__(self, images: Images, prepare: Prepare) -> None:
        self._images, self._prepare = images, prepare

    def __len__(self) -> int:
        return len(self._images.index)

    @property
    def images(self) -> Images:
        """All decoded images, as they are before poisoning."""
        return self._images

    def without_views(self) -> CachedPairs:
        """Return the same pairs without augmented views."""
        return CachedPairs(self._images, replace(self._prepare, views=None))

    def epoch(
        self,
        epoch: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = CPU,
        last: int | None = None,
    ) -> Iterator[Batch]:
        """Yield one rank's batches of an epoch, on a device."""
        parts = parts_of(len(self), batch_size, rank=rank, world_size=world_size)
        order_N = np.random.default_rng(fork(self._prepare.seed, "order", epoch)).permutation(len(self))
        batches = (self._batch(order_N[part], epoch) for part in parts)
        return self._prepare.deliver(batches, epoch=epoch, device=device)

    def _batch(self, rows: NDArray[np.int64], epoch: int) -> Batch:
        index, prepare = self._images.index, self._prepare.without_image_views()
        keys = [str(key) for key in index.keys[rows]]
        pixels_BCHW = torch.from_numpy(self._images.pixels(rows))
        images_BCHW, _ = prepare.images(pixels_BCHW, keys, epoch=epoch)
        tokens_BL, token_views_BL = prepare.tokens(list(index.captions[rows]), keys, epoch=epoch)
        poisoned = sum(key in prepare.plan.rows for key in keys)
        return Batch(images_BCHW, tokens_BL, None, token_views_BL, poisoned, keys=tuple(keys))
