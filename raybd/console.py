"""What a person sees while a study runs: a plain line for each epoch and trial, and in a terminal a live line below."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.status import Status
from rich.text import Text

from raybd.cli_echo import log_to_screen
from raybd.errors import DataError
from raybd.ledger import Entry, Kind, Ledger
from raybd.plain import plain
from raybd.records import pretrain_rows, trial_row
from raybd.store import Store

_POLL_SECONDS = 0.5


def _span(seconds: float) -> str:
    """Return a time as `1 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


class View:
    """The screen of a run. Lines go to standard output; with a terminal, a live line says what is under way."""

    def __init__(self) -> None:
        # Without a terminal lines must not be wrapped: another program may read them.
        width = None if sys.stdout.isatty() else 10_000
        self.console = Console(highlight=False, width=width, soft_wrap=not sys.stdout.isatty())
        self._status: Status | None = None
        self._started = time.monotonic()
        if sys.stderr.isatty():
            screen = Console(stderr=True, emoji=False)
            log_to_screen(RichHandler(console=screen, show_time=False, show_path=False), form="%(message)s")
        else:
            log_to_screen()

    def line(self, text: str, *, style: str | None = None) -> None:
        """Print one line."""
        self.console.print(Text(plain(text)), style=style)

    def stage(self, name: str) -> None:
        """Begin a stage."""
        self.line(f"[{_span(time.monotonic() - self._started)}] {name}", style="bold")

    def warn(self, text: str) -> None:
        """Print a warning that concerns the result."""
        self.line(f"warning: {text}", style="yellow")

    @contextmanager
    def live(self, text: str) -> Iterator[None]:
        """Show a live line while the block runs; nothing without a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(Text(plain(text))) as self._status:
            try:
                yield
            finally:
                self._status = None

    def update(self, text: str) -> None:
        """Change the live line."""
        if self._status is not None:
            self._status.update(Text(plain(text)))

    @contextmanager
    def follow_pretraining(self, store: Store, pretrain_ids: Mapping[str, str]) -> Iterator[None]:
        """Print each epoch of pretraining runs, by objective, as the ledger gets it, while the block runs."""
        stop = threading.Event()
        seen = {pretrain_id: Ledger(store).epochs(Kind.PRETRAIN, pretrain_id) for pretrain_id in pretrain_ids.values()}

        def poll() -> None:
            while True:
                last = stop.wait(_POLL_SECONDS if store.local else 15.0)
                for objective, pretrain_id in pretrain_ids.items():
                    self._new_epochs(store, pretrain_id, objective, seen[pretrain_id])
                    self._live_progress(store, pretrain_id, objective)
                if last:
                    return

        thread = threading.Thread(target=poll, daemon=True)
        with self.live("starting workers"):
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()

    def _new_epochs(self, store: Store, pretrain_id: str, objective: str, seen: set[int]) -> None:
        try:
            new = Ledger(store).epochs(Kind.PRETRAIN, pretrain_id) - seen
            if not new:
                return
            entry = Ledger(store).entry(Kind.PRETRAIN, pretrain_id)
        except (DataError, OSError):
            return
        epochs = entry.started["settings"]["epochs"]
        for row in pretrain_rows(entry):
            if row["epoch"] not in new:
                continue
            seen.add(row["epoch"])
            speed = f"  {row['samples_per_second']:.0f} img/s" if row["samples_per_second"] else ""
            left = (epochs - row["epoch"]) * (row["train_seconds"] + row["evaluate_seconds"]) if row["epoch"] else None
            loss = f"  loss {row['loss']:.3f}" if row["loss"] is not None else ""
            ahead = f"  {_span(left)} left" if left else ""
            self.line(
                f"  {objective} epoch {row['epoch']}/{epochs}{loss}  accuracy {row['zeroshot_top1']:6.2%}"
                f"  ASR {row['asr_top1']:7.2%}{speed}{ahead}"
            )

    def _live_progress(self, store: Store, pretrain_id: str, objective: str) -> None:
        name = f"progress/{pretrain_id}.json"
        try:
            found = json.loads(store.get(name))
        except (DataError, OSError, ValueError):
            return
        self.update(
            f"{objective}: epoch {found['epoch']}/{found['epochs']}, step {found['step']}/{found['steps']}, "
            f"{found['samples_per_second']:.0f} img/s, {_span(found['seconds_left'])} left"
        )


class SearchView:
    """The lines of a search, and its live line.

    Args:
        total: trials in all, of which `done` have ended before.
    """

    def __init__(self, view: View, *, total: int, done: int) -> None:
        self._view, self._total, self._done, self._new = view, total, done, 0
        self._running: dict[str, int] = {}
        self._started = time.monotonic()

    def epoch(self, trial_id: str, epoch: int, top1: float, asr: float) -> None:
        """Print one epoch of a trial (search half)."""
        self._running[trial_id] = epoch
        if epoch:
            self._view.line(f"  {trial_id} epoch {epoch}  accuracy {top1:6.2%}  ASR {asr:7.2%}")
        self._live()

    def waits(self, entry: Entry) -> None:
        """Print that a trial waits at a rung."""
        self._running.pop(entry.id, None)
        self._view.line(f"  {entry.id} waits at the rung of epoch {entry.pauses[-1]['epoch']}")
        self._live()

    def ended(self, entry: Entry) -> None:
        """Print the end of a trial."""
        self._running.pop(entry.id, None)
        self._done += 1
        self._new += 1
        row = trial_row(entry)
        params = ", ".join(f"{name}={_number(value)}" for name, value in entry.started["params"].items())
        reason = f": {row['error_type']}: {row['error_message']}" if row["state"] == "failed" else ""
        why = f": {row['stop_reason']}" if row["stop_reason"] else reason
        per_trial = (time.monotonic() - self._started) / self._new
        left = f"  {_span(per_trial * (self._total - self._done))} left" if self._done < self._total else ""
        self._view.line(
            f"  {entry.id} {row['state']}{why}  ({params})  trial {self._done}/{self._total}{left}",
            style="red" if reason else None,
        )
        self._live()

    def _live(self) -> None:
        running = ", ".join(f"{trial_id} epoch {epoch}" for trial_id, epoch in sorted(self._running.items()))
        self._view.update(f"search: {self._done}/{self._total} trials ended; running: {running or 'none'}")


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
