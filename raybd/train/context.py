"""What a training loop knows of where it runs: rank, device, where its results go, and where it left off."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from raybd.assignment import drop_state, state_name
from raybd.ledger import Entry, Kind, Ledger
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

    def report(
        self, epoch: int, record: dict[str, Any], weights: Callable[[], bytes], state: Callable[[], bytes] | None = None
    ) -> None:
        """Take a finished epoch: its numbers, and functions that give its weights and what is needed to go on from it.

        Without `state` nothing can go on from this epoch; it holds the record, which is reported again where this
        did not come to its end. Errors: SupersededError.
        """

    def last_epoch(self) -> int:
        """Return the last epoch that was reported, -1 if none was. Of several ranks the first one's answer holds."""

    def load_state(self) -> bytes | None:
        """Return the state that was kept last; None at a fresh start."""

    def progress(self, progress: Progress) -> None:
        """Take note of where the run is."""


@dataclass
class LedgerContext:
    """A context that writes into a run directory, with or without Ray.

    Args:
        kind, id: which entry of the ledger this run is.
        attempt: its number, where a later attempt may start while this one runs, on a machine that was thought dead.
        keep: says, given the epoch's record, whether its weights are worth keeping now, and where.
        notify: called after each epoch with its number and record, on every rank (Ray's report).
    """

    store: Store
    kind: Kind
    id: str
    attempt: int | None = None
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    keep: Callable[[int, dict[str, Any]], str | None] = lambda epoch, record: None
    notify: Callable[[int, dict[str, Any]], None] = lambda epoch, record: None
    _last_progress: float = 0.0

    def report(
        self, epoch: int, record: dict[str, Any], weights: Callable[[], bytes], state: Callable[[], bytes] | None = None
    ) -> None:
        """Keep weights, then state, then the record: what the ledger has as finished needs nothing to be done again."""
        if self.rank == 0:
            ledger = Ledger(self.store)
            self.require_last()
            # Weights of an epoch that is recorded are those that its numbers were measured on.
            if (name := self.keep(epoch, record)) and ledger.last_epoch(self.kind, self.id) < epoch:
                self.store.put(name, weights())
            if state is not None:
                self.store.put(state_name(self.id), state())
            ledger.epoch(self.kind, self.id, epoch, record)
        self.notify(epoch, record)

    def last_epoch(self) -> int:
        """Return the last epoch that the ledger has, -1 if none."""
        return Ledger(self.store).last_epoch(self.kind, self.id)

    def load_state(self) -> bytes | None:
        """Read the state of rank 0; every rank starts from it."""
        return self.store.get(state_name(self.id)) if self.store.exists(state_name(self.id)) else None

    def end(self, record: dict[str, Any]) -> Entry:
        """Record the end of the run, on rank 0, and remove its state; return its entry. Errors: SupersededError."""
        self.require_last()
        entry = Ledger(self.store).end(self.kind, self.id, record)
        drop_state(self.store, self.id)
        return entry

    def pause(self, record: dict[str, Any]) -> Entry:
        """Record that this attempt ends at a rung, its state kept; return its entry. Errors: SupersededError."""
        self.require_last()
        return Ledger(self.store).pause(self.kind, self.id, record)

    def require_last(self) -> None:
        """Raise SupersededError where this attempt counts no more: nothing of it may be recorded then."""
        if self.attempt is not None:
            Ledger(self.store).require_last(self.kind, self.id, self.attempt)

    def progress(self, progress: Progress) -> None:
        """Write where the run is, at most once a second (every half minute to a bucket)."""
        now = time.monotonic()
        if self.rank == 0 and now - self._last_progress >= (1.0 if self.store.local else 30.0):
            self._last_progress = now
            self.store.put(f"progress/{self.id}.json", json.dumps(asdict(progress)).encode())
