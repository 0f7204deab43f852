"""Iterators that are worked off by a thread beside, so that what is needed next is there when it is asked for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class _Last:
    """What comes after the last item: nothing, or the error that ended them."""

    error: BaseException | None = None


class _Worker(Generic[T]):
    """Fills a queue until the items end or nobody wants more."""

    def __init__(self, items: Iterable[T], most: int) -> None:
        self._items, self.ready = items, queue.Queue[T | _Last](maxsize=most)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="raybd-ahead", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._put(_Last())
        except BaseException as error:
            self._put(_Last(error))

    def _put(self, item: T | _Last) -> bool:
        """Wait for a place in the queue; False where nobody wants more."""
        while not self._stopped.is_set():
            try:
                self.ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()


def ahead(items: Iterable[T], *, most: int = 2) -> Iterator[T]:
    """Yield what `items` gives, in its order, made by a thread up to `most` items ahead.

    An error of `items` is raised where its item would have come. Closing this ends the thread.
    """
    worker = _Worker(items, most)
    try:
        while not isinstance(item := worker.ready.get(), _Last):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        worker.stop()


def delivered(tensors: Iterable[Tensor], *, device: torch.device) -> Iterator[Tensor]:
    """Yield tensors on a device; for a GPU they are made ahead of time, while it works on those before."""
    if device.type == "cpu":
        yield from tensors
    else:
        for tensor in ahead(tensor.pin_memory() for tensor in tensors):
            yield tensor.to(device, non_blocking=True)
