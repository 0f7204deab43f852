"""Training batches: poisoned as planned, augmented, tokenised; from decoded images in memory or streamed from shards.

Both sources cut an epoch alike: `steps(n, batch)` global batches of almost equal size, never above the one asked
for, in which each sample is once. The ranks of a DDP run share each of them.
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
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from raybd import pulse
from raybd.data.ahead import ahead
from raybd.data.cache import Images
from raybd.data.shards import Index, decode, samples
from raybd.data.tokens import Tokenize
from raybd.data.views import image_views, text_view
from raybd.errors import DataError
from raybd.poison.plan import PoisonPlan
from raybd.seeding import fork
from raybd.study import ImageView, TextView

_CHUNK = 64
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
        """Yield batches on their device, with the images' views where they lack them.

        A GPU has its next batches made while it works, and augments images itself.
        """
        if device.type != "cpu":
            batches = (batch.to(device) for batch in ahead(batch.pinned() for batch in batches))
        for batch in self._augmented(batches, epoch=epoch):
            pulse.beat()
            yield batch

    def _augmented(self, batches: Iterable[Batch], *, epoch: int) -> Iterator[Batch]:
        """Augment the images of a few batches at once: an operation takes about as long on one image as on many."""
        for several in _several(batches, most=_VIEWS_AT_ONCE):
            keys = [key for batch in several for key in batch.keys]
            views = None
            if several[0].image_views_BCHW is None:
                views = self._views(torch.cat([batch.images_BCHW for batch in several]), keys, epoch=epoch)
            if views is None:
                yield from several
                continue
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
        self, epoch: int, *, batch_size: int, rank: int = 0, world_size: int = 1, device: torch.device = CPU
    ) -> Iterator[Batch]:
        """Yield one rank's batches of an epoch; every rank yields `steps(len(self), batch_size)` of them.

        Args:
            device: where they are to be.
        """
        ...


def steps(total: int, batch_size: int) -> int:
    """Return the number of global batches of an epoch."""
    return -(-total // batch_size)


def bounds(total: int, count: int) -> list[tuple[int, int]]:
    """Cut range(total) into `count` pieces whose sizes differ by at most one."""
    cuts = [total * i // count for i in range(count + 1)]
    return list(itertools.pairwise(cuts))


def _first(start: int, rank: int, world_size: int) -> int:
    """Return where in a global batch that starts at `start` a rank's part begins; it has each world_size-th sample.

    Counted through the whole epoch, so that the parts of the ranks differ by at most one sample, in each batch too.
    """
    return (rank - start) % world_size


def check_batches(total: int, batch_size: int, world_size: int) -> None:
    """Raise DataError where a rank's part of some batch would be empty."""
    if total // steps(total, batch_size) < world_size:
        raise DataError(
            f"{total} training pairs in batches of {batch_size} leave nothing for some of {world_size} workers",
            fix="use fewer workers, a larger batch, or more data",
        )


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
        self, epoch: int, *, batch_size: int, rank: int = 0, world_size: int = 1, device: torch.device = CPU
    ) -> Iterator[Batch]:
        """Yield one rank's batches of an epoch, on a device."""
        check_batches(len(self), batch_size, world_size)
        order_N = np.random.default_rng(fork(self._prepare.seed, "order", epoch)).permutation(len(self))
        batches = (
            self._batch(order_N[start:stop][_first(start, rank, world_size) :: world_size], epoch)
            for start, stop in bounds(len(self), steps(len(self), batch_size))
        )
        return self._prepare.deliver(batches, epoch=epoch, device=device)

    def _batch(self, rows: NDArray[np.int64], epoch: int) -> Batch:
        index, prepare = self._images.index, self._prepare.without_image_views()
        keys = [str(key) for key in index.keys[rows]]
        pixels_BCHW = torch.from_numpy(self._images.pixels(rows))
        images_BCHW, _ = prepare.images(pixels_BCHW, keys, epoch=epoch)
        tokens_BL, token_views_BL = prepare.tokens(list(index.captions[rows]), keys, epoch=epoch)
        poisoned = sum(key in prepare.plan.rows for key in keys)
        return Batch(images_BCHW, tokens_BL, None, token_views_BL, poisoned, keys=tuple(keys))


@dataclass(frozen=True)
class _Item:
    """A sample on its way from a loader worker: its image and view, or neither if it is broken."""

    key: str
    caption: str
    image_CHW: Tensor | None
    image_view_CHW: Tensor | None


class StreamedPairs:
    """Pairs read from shards in a new order each epoch, mixed in a buffer; nothing is kept.

    Args:
        index: of all samples; it fixes who reads what, so that the parts of the ranks differ by at most one sample.
        size: side of the square images, pixels.
        workers: decoding processes of each rank; 0 decodes in this one.
        shuffle_buffer: samples that each of them mixes.
    """

    def __init__(self, index: Index, prepare: Prepare, *, size: int, workers: int, shuffle_buffer: int) -> None:
        self._index, self._prepare, self._size = index, prepare, size
        self._workers, self._buffer = workers, shuffle_buffer

    def __len__(self) -> int:
        return len(self._index)

    def without_views(self) -> StreamedPairs:
        """Return the same pairs without augmented views."""
        plain = replace(self._prepare, views=None)
        return StreamedPairs(self._index, plain, size=self._size, workers=self._workers, shuffle_buffer=self._buffer)

    def epoch(
        self, epoch: int, *, batch_size: int, rank: int = 0, world_size: int = 1, device: torch.device = CPU
    ) -> Iterator[Batch]:
        """Yield one rank's batches of an epoch, on a device."""
        check_batches(len(self), batch_size, world_size)
        batches = self._batches(epoch, batch_size, rank, world_size, device)
        return self._prepare.deliver(batches, epoch=epoch, device=device)

    def _batches(
        self, epoch: int, batch_size: int, rank: int, world_size: int, device: torch.device
    ) -> Iterator[Batch]:
        sizes = [len(range(one, len(self), world_size)) for one in range(rank + 1)]
        start, stop = sum(sizes[:-1]), sum(sizes)
        # On a CPU the loader's workers augment, beside the model; a GPU does so itself.
        prepare = self._prepare if device.type == "cpu" else self._prepare.without_image_views()
        stream = _Stream(self._index, prepare, self._size, self._buffer, epoch, start, stop)
        loader: DataLoader[list[_Item]] = DataLoader(
            stream,
            batch_size=None,
            num_workers=self._workers,
            multiprocessing_context="spawn" if self._workers else None,
        )
        items = (item for chunk in loader for item in chunk)
        for low, high in bounds(len(self), steps(len(self), batch_size)):
            count = len(range(low + _first(low, rank, world_size), high, world_size))
            yield self._batch([next(items) for _ in range(count)], epoch)

    def _batch(self, items: list[_Item], epoch: int) -> Batch:
        whole = [item for item in items if item.image_CHW is not None]
        if not whole:
            raise DataError(
                f"all {len(items)} samples of a batch are broken, {items[0].key} among them", fix="mend the shards"
            )
        keys = [item.key for item in whole]
        tokens_BL, token_views_BL = self._prepare.tokens([item.caption for item in whole], keys, epoch=epoch)
        views = [item.image_view_CHW for item in whole if item.image_view_CHW is not None]
        return Batch(
            images_BCHW=torch.stack([item.image_CHW for item in whole if item.image_CHW is not None]),
            tokens_BL=tokens_BL,
            image_views_BCHW=torch.stack(views) if views else None,
            token_views_BL=token_views_BL,
            poisoned=sum(key in self._prepare.plan.rows for key in keys),
            broken=len(items) - len(whole),
            keys=tuple(keys),
        )


class _Stream(IterableDataset[list[_Item]]):
    """The samples start … stop of an epoch's order of shards, split among the loader's workers."""

    def __init__(
        self, index: Index, prepare: Prepare, size: int, buffer: int, epoch: int, start: int, stop: int
    ) -> None:
        self._index, self._prepare, self._size, self._buffer = index, prepare, size, buffer
        self._epoch, self._start, self._stop = epoch, start, stop

    def __iter__(self) -> Iterator[list[_Item]]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)
        low, high = bounds(self._stop - self._start, count)[number]
        rows = self._order()[self._start + low : self._start + high]
        chunk: list[tuple[int, Tensor | None]] = []
        for pair in self._mixed(self._read(rows), number):
            chunk.append(pair)
            if len(chunk) == _CHUNK:
                yield self._items(chunk)
                chunk = []
        if chunk:
            yield self._items(chunk)

    def _order(self) -> NDArray[np.int64]:
        """Return the rows of the index in this epoch's order of shards."""
        draw = np.random.default_rng(fork(self._prepare.seed, "shards", self._epoch))
        place = np.empty(len(self._index.shards), dtype=np.int64)
        place[draw.permutation(len(place))] = np.arange(len(place))
        return np.lexsort((self._index.row, place[self._index.shard]))

    def _read(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, Tensor | None]]:
        """Yield (row of the index, decoded image or None where it is broken), shard by shard."""
        by_shard: dict[int, dict[int, int]] = {}
        for row in rows.tolist():
            by_shard.setdefault(int(self._index.shard[row]), {})[int(self._index.row[row])] = row
        for number, wanted in by_shard.items():
            for sample in samples(self._index.shards[number]):
                row = wanted.get(sample.row, -1)
                if row >= 0 and sample.key == self._index.keys[row]:
                    del wanted[sample.row]
                    try:
                        yield row, torch.from_numpy(decode(sample.image, self._size))
                    except ValueError:
                        yield row, None
                if not wanted:
                    break
            if wanted:
                raise DataError("shard has changed since it was indexed", where=self._index.shards[number])

    def _mixed(self, found: Iterator[tuple[int, Tensor | None]], number: int) -> Iterator[tuple[int, Tensor | None]]:
        """Shuffle a stream within a buffer."""
        draw = np.random.default_rng(fork(self._prepare.seed, "mix", self._epoch, self._start, number))
        held: list[tuple[int, Tensor | None]] = []
        for pair in found:
            held.append(pair)
            if len(held) >= self._buffer:
                i = int(draw.integers(len(held)))
                held[i], held[-1] = held[-1], held[i]
                yield held.pop()
        for i in draw.permutation(len(held)):
            yield held[int(i)]

    def _items(self, chunk: list[tuple[int, Tensor | None]]) -> list[_Item]:
        whole = [(row, image) for row, image in chunk if image is not None]
        keys = [str(self._index.keys[row]) for row, _ in whole]
        ready: dict[int, tuple[Tensor, Tensor | None]] = {}
        if whole:
            images, views = self._prepare.images([image for _, image in whole], keys, epoch=self._epoch)
            for i, (row, _) in enumerate(whole):
                # Copies: a slice of the stacked batch would carry the whole of it to the trainer.
                ready[row] = (images[i].clone(), views[i].clone() if views is not None else None)
        return [
            _Item(str(self._index.keys[row]), str(self._index.captions[row]), *ready.get(row, (None, None)))
            for row, _ in chunk
        ]
