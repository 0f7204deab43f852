"""What a person sees while a study runs: plain lines, and in a terminal a live view of what is under way below them."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.status import Status
from rich.text import Text

from raybd.assignment import seconds_before
from raybd.cli_echo import log_to_screen
from raybd.errors import DataError
from raybd.failures import message_of
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.plain import plain
from raybd.records import pretrain_rows, trial_row
from raybd.report import progress
from raybd.report.progress import Progress, SearchState
from raybd.report.words import span
from raybd.store import Store

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_LOOK_SECONDS = 1.0  # the live view of a search changes no more often


class View:
    """The screen of a run. Lines go to standard output; with a terminal, a live line says what is under way."""

    def __init__(self) -> None:
        # Without a terminal lines must not be wrapped: another program may read them.
        width = None if sys.stdout.isatty() else 10_000
        self.console = Console(highlight=False, width=width, soft_wrap=not sys.stdout.isatty())
        self._status: Status | None = None
        self._started = time.monotonic()
        if sys.stderr.isatty():
            # Where both are the same screen, warnings must not run into the live view.
            screen = self.console if sys.stdout.isatty() else Console(stderr=True, emoji=False)
            log_to_screen(RichHandler(console=screen, show_time=False, show_path=False), form="%(message)s")
        else:
            log_to_screen()

    def line(self, text: str, *, style: str | None = None) -> None:
        """Print one line."""
        self.console.print(Text(plain(text)), style=style)

    def stage(self, name: str) -> None:
        """Begin a stage."""
        self.line(f"[{span(time.monotonic() - self._started)}] {name}", style="bold")

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

    @contextmanager
    def shown(self, draw: Callable[[int, int], list[str]]) -> Iterator[None]:
        """Show a live view while the block runs; nothing without a terminal.

        Args:
            draw: returns its lines, for a screen of so many columns and rows. Called at most once a second.
        """
        if not self.console.is_interactive:
            yield
            return
        picture = _Picture(self.console, draw)
        with Live(
            console=self.console,
            get_renderable=picture,
            refresh_per_second=1 / _LOOK_SECONDS,
            transient=True,
            # What is sent to a file is no part of this screen.
            redirect_stderr=sys.stderr.isatty(),
        ):
            yield

    def update(self, text: str) -> None:
        """Change the live line."""
        if self._status is not None:
            self._status.update(Text(plain(text)))

    @contextmanager
    def follow_pretraining(
        self, store: Store, pretrain_ids: Mapping[str, str], notify: Callable[[str], None]
    ) -> Iterator[None]:
        """Print each epoch of pretraining runs, by objective, as the ledger gets it, while the block runs.

        Args:
            notify: called with the id of a run that has new epochs.
        """
        stop = threading.Event()
        seen = {pretrain_id: Ledger(store).epochs(Kind.PRETRAIN, pretrain_id) for pretrain_id in pretrain_ids.values()}

        def poll() -> None:
            while True:
                last = stop.wait(_POLL_SECONDS if store.local else 15.0)
                for objective, pretrain_id in pretrain_ids.items():
                    self._new_epochs(store, pretrain_id, objective, seen[pretrain_id], notify)
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

    def _new_epochs(
        self, store: Store, pretrain_id: str, objective: str, seen: set[int], notify: Callable[[str], None]
    ) -> None:
        try:
            new = Ledger(store).epochs(Kind.PRETRAIN, pretrain_id) - seen
            if not new:
                return
            entry = Ledger(store).entry(Kind.PRETRAIN, pretrain_id)
        except (DataError, OSError):
            return
        notify(pretrain_id)
        epochs = entry.started["settings"]["epochs"]
        for row in pretrain_rows(entry):
            if row["epoch"] not in new:
                continue
            seen.add(row["epoch"])
            speed = f"  {row['samples_per_second']:.0f} img/s" if row["samples_per_second"] else ""
            left = (epochs - row["epoch"]) * (row["train_seconds"] + row["evaluate_seconds"]) if row["epoch"] else None
            loss = f"  loss {row['loss']:.3f}" if row["loss"] is not None else ""
            ahead = f"  {span(left)} left" if left else ""
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
            f"{found['samples_per_second']:.0f} img/s, {span(found['seconds_left'])} left"
        )


class _Picture:
    """The live view as rich asks for it: with each line above it, and once a second."""

    def __init__(self, console: Console, draw: Callable[[int, int], list[str]]) -> None:
        self._console, self._draw = console, draw
        self._drawn, self._size, self._text = -_LOOK_SECONDS, (0, 0), Text()

    def __call__(self) -> Text:
        now, (width, height) = time.monotonic(), self._console.size
        if now - self._drawn >= _LOOK_SECONDS or (width, height) != self._size:
            # Some rows stay free for the lines above.
            self._drawn, self._size = now, (width, height)
            try:
                lines = self._draw(width, max(2, height - 3))
            except Exception as error:
                # The search itself asks for it, with each line that it prints: no picture is worth its end.
                log.debug("the live view stays as it was: %s", message_of(error))
            else:
                self._text = Text("\n".join(lines), no_wrap=True, overflow="crop")
        return self._text


class SearchView:
    """The lines of a search, and its live view.

    Args:
        progress: how far the search is; kept up to date here.
    """

    def __init__(self, view: View, progress: Progress) -> None:
        self._view, self._progress, self._new = view, progress, 0
        self._began = time.monotonic()
        self._lock = threading.Lock()  # the live view is drawn by a thread of its own

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the live view while the block runs; nothing without a terminal."""
        with self._view.shown(self.draw):
            yield

    def draw(self, width: int, height: int) -> list[str]:
        """Return the lines of the live view."""
        with self._lock:
            self._progress.seconds = time.monotonic() - self._began
            unicode = self._view.console.encoding.startswith("utf")
            return progress.screen(self._progress, width=width, height=height, unicode=unicode)

    def epoch(self, trial_id: str, epoch: int, top1: float, asr: float) -> None:
        """Take note of one epoch of a trial (search half); without a live view, print it."""
        with self._lock:
            self._progress.waiting.discard(trial_id)
            self._progress.running[trial_id] = epoch
        if epoch and not self._view.console.is_interactive:
            self._view.line(f"  {trial_id} epoch {epoch}  accuracy {top1:6.2%}  ASR {asr:7.2%}")

    def waits(self, entry: Entry) -> None:
        """Print that a trial waits at a rung."""
        with self._lock:
            self._progress.running.pop(entry.id, None)
            self._progress.waiting.add(entry.id)
            self._progress.meter.add(trial_row(entry), waited=seconds_before(entry))
        self._view.line(f"  {entry.id} waits at the rung of epoch {entry.pauses[-1]['epoch']}")

    def ended(self, entry: Entry, search: SearchState | None) -> None:
        """Print the end of a trial.

        Args:
            search: where the search of its pretrain objective stands now; None where no trial has a point.
        """
        row, now = trial_row(entry), self._progress
        with self._lock:
            now.running.pop(entry.id, None)
            now.waiting.discard(entry.id)
            now.states[row["state"]] = now.states.get(row["state"], 0) + 1
            now.meter.add(row)
            self._new += 1
            now.seconds_left = (time.monotonic() - self._began) / self._new * (now.total - now.ended)
            if row["state"] == State.FAILED:
                now.failed.append((entry.id, row["error_type"], row["error_message"]))
            if search is not None:
                now.searches[row["objective"]] = search
        params = ", ".join(f"{name}={_number(value)}" for name, value in entry.started["params"].items())
        reason = f": {row['error_type']}: {row['error_message']}" if row["state"] == State.FAILED else ""
        why = f": {row['stop_reason']}" if row["stop_reason"] else reason
        left = f"  {span(now.seconds_left)} left" if now.ended < now.total else ""
        # A live view has it below.
        best = "" if search is None or self._view.console.is_interactive else f"  {progress.best_words(search)}"
        self._view.line(
            f"  {entry.id} {row['state']}{why}  ({params})  trial {now.ended}/{now.total}{left}{best}",
            style="red" if reason else None,
        )


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
