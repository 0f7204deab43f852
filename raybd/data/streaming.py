"""Training batches streamed from shards, by loader workers that stay from epoch to epoch and read ahead of them.

Workers are forked from a process that has imported torch, which takes seconds: they share its memory, and the first
batch does not wait for as many imports as there are workers. Filling a buffer takes as long as decoding it, but is
waited for once in a run: while the last samples of an epoch leave the buffer, the first of the next are read into it.
"""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import os
import pickle
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from raybd.data.pairs import CPU, Batch, Prepare, bounds, parts_of
from raybd.data.shards import Index, decode, samples
from raybd.errors import DataError
from raybd.seeding import fork

_CHUNK = 64
_AHEAD_BYTES = 256 << 20  # of decoded images that a rank has ready at most, whatever the batch
_SAFE = "PYTHONSAFEPATH"


@dataclass(frozen=True)
class _Wanted:
    """The samples `start` … `stop` of the orders of shards of epochs, from `epoch` to `last`.

    Attributes:
        views: whether the images' augmented views are made with them.
    """

    epoch: int
    last: int
    start: int
    stop: int
    views: bool


@dataclass(frozen=True)
class _Item:
    """A sample: its row of the index, its image and view, or neither if it is broken."""

    row: int
    image_CHW: Tensor | None
    image_view_CHW: Tensor | None


@dataclass(frozen=True)
class _Chunk:
    """Samples on their way from a loader worker, in few tensors: each is handed over by a file descriptor of its own.

    Attributes:
        rows: of the index.
        whole: which of them are not broken; the tensors are of those.
    """

    rows: list[int]
    whole: list[bool]
    images_BCHW: Tensor | None = None
    image_views_BCHW: Tensor | None = None

    def items(self) -> Iterator[_Item]:
        """Yield the samples."""
        nothing = itertools.repeat(None)
        images = nothing if self.images_BCHW is None else iter(self.images_BCHW)
        views = nothing if self.image_views_BCHW is None else iter(self.image_views_BCHW)
        for row, whole in zip(self.rows, self.whole, strict=True):
            yield _Item(row, next(images), next(views)) if whole else _Item(row, None, None)


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
        self._reader: tuple[_Wanted, Iterator[_Item]] | None = None  # what has begun to read the next epoch

    def __len__(self) -> int:
        return len(self._index)

    def without_views(self) -> StreamedPairs:
        """Return the same pairs without augmented views."""
        plain = replace(self._prepare, views=None)
        return StreamedPairs(self._index, plain, size=self._size, workers=self._workers, shuffle_buffer=self._buffer)

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
        sizes = [len(range(one, len(self), world_size)) for one in range(rank + 1)]
        # On a CPU the loader's workers augment, beside the model; a GPU does so itself.
        prepare = self._prepare.without_image_views() if device.type == "cpu" else self._prepare
        wanted = _Wanted(epoch, max(epoch, last or epoch), sum(sizes[:-1]), sum(sizes), views=device.type == "cpu")
        counts = [len(range(part.start, part.stop, part.step)) for part in parts]
        batches = self._batches(wanted, counts)
        return prepare.deliver(batches, epoch=epoch, device=device)

    def _batches(self, wanted: _Wanted, counts: list[int]) -> Iterator[Batch]:
        begun, self._reader = self._reader, None  # an epoch that is left before its end leaves nothing that goes on
        if begun is not None and begun[0] == wanted:
            items = begun[1]
        else:
            del begun  # and its workers with it
            items = self._read(wanted, ahead=max(counts))
        for count in counts:
            yield self._batch(list(itertools.islice(items, count)), wanted.epoch)
        if wanted.epoch < wanted.last:
            self._reader = replace(wanted, epoch=wanted.epoch + 1), items

    def _read(self, wanted: _Wanted, *, ahead: int) -> Iterator[_Item]:
        prepare = self._prepare if wanted.views else self._prepare.without_image_views()
        stream = _Stream(self._index, prepare, self._size, self._buffer, wanted)
        bytes_each = 3 * self._size**2 * (2 if prepare.views and prepare.views[0] else 1)
        return _items(stream, workers=self._workers, ahead=min(ahead, _AHEAD_BYTES // bytes_each))

    def _batch(self, items: list[_Item], epoch: int) -> Batch:
        whole = [item for item in items if item.image_CHW is not None]
        if not whole:
            key = self._index.keys[items[0].row]
            raise DataError(f"all {len(items)} samples of a batch are broken, {key} among them", fix="mend the shards")
        keys = [str(self._index.keys[item.row]) for item in whole]
        captions = [str(self._index.captions[item.row]) for item in whole]
        tokens_BL, token_views_BL = self._prepare.tokens(captions, keys, epoch=epoch)
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


def _items(stream: _Stream, *, workers: int, ahead: int) -> Iterator[_Item]:
    """Yield what loader workers read, epoch after epoch; they end with it, or with this process.

    Args:
        ahead: samples that all workers together have ready, beside the chunk under way: those of a batch, which are
            then there when the step before it is done. Two chunks of each worker at least.
    """
    with tempfile.TemporaryFile() as file:
        loader: DataLoader[_Chunk] = DataLoader(
            _Parcel(stream, file) if workers else stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=max(2, 1 + -(-ahead // (_CHUNK * workers))) if workers else None,
            multiprocessing_context=_context() if workers else None,
            worker_init_fn=_end_with_the_trainer,
        )
        for chunk in loader:
            yield from chunk.items()


def _context() -> BaseContext:
    """Return how workers are started: never as a fork of this process, which may hold a GPU."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context, before = multiprocessing.get_context("forkserver"), os.environ.get(_SAFE)
    context.set_forkserver_preload([__name__])
    # It is started by `python -c`, which would look for raybd and torch in the working directory first.
    os.environ[_SAFE] = "1"
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop(_SAFE) if before is None else os.environ.update({_SAFE: before})
    return context


def _end_with_the_trainer(_: int) -> None:
    """End this worker as soon as the trainer is gone: torch looks whether the process that forked it is there."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Stream(IterableDataset[_Chunk]):
    """What is wanted, split among the loader's workers.

    All of them give as many chunks of an epoch, some of which may be empty: the loader takes one of each in turn, and
    so never takes one of the next epoch before the last of this one.
    """

    def __init__(self, index: Index, prepare: Prepare, size: int, buffer: int, wanted: _Wanted) -> None:
        self._index, self._prepare, self._size, self._buffer = index, prepare, size, buffer
        self._wanted = wanted

    def __getstate__(self) -> dict[str, Any]:
        """Leave captions and their tokens to the trainer."""
        index = replace(self._index, captions=np.empty(0, dtype=object), listed=None, skipped=())
        return {**vars(self), "_index": index, "_prepare": replace(self._prepare, tokenize=_no_tokens)}

    def __iter__(self) -> Iterator[_Chunk]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)
        wanted = self._wanted
        parts = bounds(wanted.stop - wanted.start, count)
        low, high = (wanted.start + end for end in parts[number])
        most = max(stop - start for start, stop in parts)
        found = _Ahead(self._read(wanted.epoch, low, high))
        for epoch in range(wanted.epoch, wanted.last + 1):
            following = _Ahead(self._read(epoch + 1, low, high) if epoch < wanted.last else iter(()))
            mixed = self._mixed(found, following, number, epoch)
            for _ in range(-(-most // _CHUNK)):
                yield self._chunk(list(itertools.islice(mixed, _CHUNK)), epoch)
            found = following

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the rows of the index in an epoch's order of shards."""
        draw = np.random.default_rng(fork(self._prepare.seed, "shards", epoch))
        place = np.empty(len(self._index.shards), dtype=np.int64)
        place[draw.permutation(len(place))] = np.arange(len(place))
        return np.lexsort((self._index.row, place[self._index.shard]))

    def _read(self, epoch: int, low: int, high: int) -> Iterator[_Pair]:
        """Yield a part of an epoch's order, shard by shard."""
        by_shard: dict[int, dict[int, int]] = {}
        for row in self._order(epoch)[low:high].tolist():
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

    def _mixed(self, found: _Ahead, following: _Ahead, number: int, epoch: int) -> Iterator[_Pair]:
        """Shuffle a stream within a buffer; as it empties, samples of the following one take the places."""
        draw = np.random.default_rng(fork(self._prepare.seed, "mix", epoch, self._wanted.start, number))
        held: list[_Pair] = []
        for pair in found:
            held.append(pair)
            if len(held) >= self._buffer:
                i = int(draw.integers(len(held)))
                held[i], held[-1] = held[-1], held[i]
                yield held.pop()
        left = [held[int(i)] for i in reversed(draw.permutation(len(held)))]
        held.clear()
        while left:
            pair = left.pop()
            following.take(most=self._buffer - 1)
            yield pair

    def _chunk(self, pairs: list[_Pair], epoch: int) -> _Chunk:
        images = [image for _, image in pairs if image is not None]
        rows, whole = [row for row, _ in pairs], [image is not None for _, image in pairs]
        if not images:
            return _Chunk(rows, whole)
        keys = [str(self._index.keys[row]) for row, image in pairs if image is not None]
        return _Chunk(rows, whole, *self._prepare.images(images, keys, epoch=epoch))


_Pair = tuple[int, Tensor | None]  # row of the index, and the decoded image or None where it is broken


class _Ahead:
    """A stream whose first samples may be taken before its turn; an error still comes where it would have come."""

    def __init__(self, found: Iterator[_Pair]) -> None:
        self._found, self._taken = found, deque[_Pair]()
        self._error: Exception | None = None

    def take(self, *, most: int) -> None:
        """Take one sample more, if there is one, and no more than `most` altogether."""
        if len(self._taken) < most and self._error is None:
            try:
                self._taken.extend(itertools.islice(self._found, 1))
            except Exception as error:
                self._error = error

    def __iter__(self) -> Iterator[_Pair]:
        while self._taken:
            yield self._taken.popleft()
        if self._error is not None:
            raise self._error
        yield from self._found


class _Parcel(IterableDataset[_Chunk]):
    """A stream as it is given to workers: in a file without a name, that all of them find there at once.

    Who starts a process waits until it has read what it is given, and it reads after it has imported what that needs:
    workers given a large index by value would be started one after the other.
    """

    def __init__(self, stream: _Stream, file: Any) -> None:
        self._file = file
        pickle.dump(stream, file, protocol=pickle.HIGHEST_PROTOCOL)
        file.flush()

    def __getstate__(self) -> dict[str, Any]:
        """Give a process that is being started a descriptor of the file."""
        return {"_file": DupFd(self._file.fileno())}

    def __iter__(self) -> Iterator[_Chunk]:
        with mmap.mmap(self._file.detach(), 0, access=mmap.ACCESS_READ) as content:
            stream: _Stream = pickle.loads(content)
        yield from stream


def _no_tokens(captions: list[str]) -> Tensor:
    raise NotImplementedError("loader workers make no tokens")
