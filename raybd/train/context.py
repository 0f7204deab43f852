"""What a training loop knows of where it runs: rank, device, where its results go, and where it left off."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from raybd.assignment import drop_state, state_name
from raybd.ledger import Kind, Ledger
from raybd.store import Store


@dataclass(frozen=True)
class Progress:
    """Where a run is within an epoch."""

    epoch: int
    epochs: int
    step: int
    steps: int
    samples_per_second: float
    seconds_left: float


class TrainContext(Protocol):
    """The loop's only view of the outside. Every rank calls every method; rank 0 does what is done once."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, epoch: int, record: dict[str, Any], weights: Callable[[], bytes]) -> None:
        """Take a finished epoch: its rows for the tables, and a function that gives its weights."""

    def save_state(self, state: Callable[[], bytes]) -> None:
        """Keep what is needed to go on after the epoch just reported."""

    def load_state(self) -> bytes | None:
        """Return what `save_state` kept last; None at a fresh start."""

    def progress(self, progress: Progress) -> None:
        """Take note of where the run is."""


@dataclass
class LedgerContext:
    """A context that writes into a run directory, with or without Ray.

    Args:
        kind, id: which entry of the ledger this run is.
        keep: says, given the epoch's record, whether its weights are worth keeping now, and where.
        notify: called after each epoch with its number and record, on every rank (Ray's report).
    """

    store: Store
    kind: Kind
    id: str
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    keep: Callable[[int, dict[str, Any]], str | None] = lambda epoch, record: None
    notify: Callable[[int, dict[str, Any]], None] = lambda epoch, record: None
    _last_progress: float = 0.0

    def report(self, epoch: int, record: dict[str, Any], weights: Callable[[], bytes]) -> None:
        """Keep the weights first, then record the epoch: an epoch in the ledger has its weights."""
        if self.rank == 0:
            if name := self.keep(epoch, record):
                self.store.put(name, weights())
            Ledger(self.store).epoch(self.kind, self.id, epoch, record)
        self.notify(epoch, record)

    def save_state(self, state: Callable[[], bytes]) -> None:
        """Write the state of rank 0; every rank starts from it."""
        if self.rank == 0:
            self.store.put(state_name(self.id), state())

    def load_state(self) -> bytes | None:
        """Read the state that was written last."""
        return self.store.get(state_name(self.id)) if self.store.exists(state_name(self.id)) else None

    def drop_state(self) -> None:
        """Remove the state of a run that has ended, and its note of progress."""
        if self.rank == 0:
            drop_state(self.store, self.id)

    def progress(self, progress: Progress) -> None:
        """Write where the run is, at most once a second (every half minute to a bucket)."""
        now = time.monotonic()
        if self.rank == 0 and now - self._last_progress >= (1.0 if self.store.local else 30.0):
            self._last_progress = now
            self.store.put(f"progress/{self.id}.json", json.dumps(asdict(progress)).encode())
