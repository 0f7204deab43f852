"""TensorBoard, MLflow and Weights & Biases: copies of a run's numbers to look at, made beside the search.

Ledger and tables are what counts. What a tracker lacks, of trials that ended or of a call that was killed, the next
call gives it; where one fails, that is a warning, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

from raybd import failures, signals
from raybd.errors import ClusterError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.records import epoch_rows, pretrain_rows
from raybd.space import Value
from raybd.store import Store
from raybd.study import Recording, Study, TrackerName
from raybd.terms import TERMS

log = logging.getLogger(__name__)

_CLOSING_SECONDS = 60.0
_FAILED_SECONDS = 5.0  # of a call that failed
_RATES = ("zeroshot_top1", "asr_top1", "robust_top1")
_TRAINING = ("loss", *(f"loss_{term}" for term in TERMS), "lr", "logit_scale", "samples_per_second")


@dataclass(frozen=True)
class Measured:
    """Values at one step.

    Attributes:
        step: an epoch, or a number of trials.
        time: seconds since 1970.
        values: by name; all finite.
    """

    step: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Series:
    """Points that belong together, and what they are of.

    Attributes:
        name: `trials/ID`, `pretrain/OBJECTIVE` or `search/OBJECTIVE`.
        group: the pretrain objective.
        settings: of a trial, those that were searched, and its method.
        points: by rising step.
        over: whether no points follow.
        failed: whether it ended as failed.
    """

    name: str
    group: str
    settings: Mapping[str, Value]
    points: Sequence[Measured]
    over: bool = False
    failed: bool = False


class Tracker(Protocol):
    """What takes series."""

    def last(self, name: str) -> int | None:
        """Return the last step that it has of a series, whichever call gave it; None if it has none."""

    def goes_on(self, name: str) -> bool:
        """Say whether it has a series that it was not told to be over."""

    def add(self, series: Series) -> None:
        """Take points that follow those it has; none where all that is new is that the series is over."""

    def close(self) -> None:
        """Finish what is under way."""


def require(record: Recording) -> None:
    """Raise ClusterError where a tracker that a study asks for is not installed, or could not be used."""
    for name in record.trackers:
        if importlib.util.find_spec(name) is None:
            raise ClusterError(
                f"{name} is not installed",
                where="record.trackers",
                fix=f'pip install "raybd[{name}]" (or {name} alone), or leave it out of record.trackers',
            )
        if name is TrackerName.WANDB:
            from raybd.tracking import wandb

            wandb.require_key()


def open_trackers(store: Store, study: Study) -> dict[str, Callable[[], Tracker]]:
    """Return how to open each tracker that a study asks for, by name. What they import may take long."""

    def tensorboard() -> Tracker:
        from raybd.tracking.tensorboard import TensorBoard

        return TensorBoard(store)

    def mlflow() -> Tracker:
        from raybd.tracking.mlflow import MLflow

        return MLflow(store, study.name)

    def wandb() -> Tracker:
        from raybd.tracking.wandb import WeightsAndBiases

        return WeightsAndBiases(store, study.name)

    known = {TrackerName.MLFLOW: mlflow, TrackerName.WANDB: wandb}
    found: dict[str, Callable[[], Tracker]] = {"tensorboard": tensorboard} if study.record.tensorboard else {}
    return found | {str(name): known[name] for name in study.record.trackers}


def of_pretraining(entry: Entry) -> Series:
    """Return a pretraining run as a series over its epochs, both halves of the evaluation set together."""
    points = _points(entry, {row["epoch"]: _values(row, _RATES) for row in pretrain_rows(entry)})
    objective = entry.started["objective"]
    return Series(f"pretrain/{objective}", objective, {}, points, over=entry.ended is not None)


def of_trial(entry: Entry) -> Series:
    """Return a trial that ended as a series over its epochs, accuracy and ASR of each half of the evaluation set."""
    values: dict[int, dict[str, float]] = {}
    for row in epoch_rows(entry):
        rates = _values(row, _RATES)
        values.setdefault(row["epoch"], {}).update({f"{name}/{row['split']}": rates[name] for name in rates})
    started, ended = entry.started, entry.ended or {}
    return Series(
        f"trials/{entry.id}",
        started["objective"],
        {**started["params"], "method": started["method"]},
        _points(entry, values),
        over=True,
        failed=ended.get("state") == State.FAILED,
    )


def of_search(objective: str, points: Iterable[Measured]) -> Series:
    """Return how a search gets on as a series over the trials that ended."""
    return Series(f"search/{objective}", objective, {}, tuple(points))


def _points(entry: Entry, values: Mapping[int, Mapping[str, float]]) -> tuple[Measured, ...]:
    """Return the points of a training run; its times are those that it trained and evaluated, from its start on."""
    time, found = datetime.fromisoformat(entry.started["started"]).timestamp(), []
    for epoch, record in sorted(entry.epochs.items()):
        time += (record["train_seconds"] or 0.0) + (record["evaluate_seconds"] or 0.0)
        found.append(Measured(epoch, time, {**values[epoch], **_values(record, _TRAINING)}))
    return tuple(found)


def _values(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    found = {name: row.get(name) for name in names}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


class Tracking:
    """Gives trackers what they lack, in a thread of its own: whoever calls waits for nothing. Left, it closes.

    Args:
        store: run directory.
        trackers: how to open each, by name.
    """

    def __init__(self, store: Store, trackers: Mapping[str, Callable[[], Tracker]]) -> None:
        self._ledger, self._waiting = Ledger(store), dict(trackers)
        self._open: dict[str, Tracker] = {}
        self._jobs: queue.SimpleQueue[Callable[[], Iterable[Series]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, *series: Series) -> None:
        """Give trackers what they lack of some series."""
        self._do(lambda: series)

    # Of entries only ids wait in the queue: trackers may be slower than the search.

    def ended(self, id: str) -> None:
        """Give trackers a trial that ended."""
        self._do(lambda: [of_trial(self._ledger.entry(Kind.TRIAL, id))])

    def pretrained(self, id: str) -> None:
        """Give trackers the epochs of a pretraining run, which may be under way."""
        self._do(lambda: [of_pretraining(self._ledger.entry(Kind.PRETRAIN, id))])

    def catch_up(self) -> None:
        """Give trackers what earlier calls left out: pretraining runs, and trials that ended."""

        def lacking() -> Iterable[Series]:
            yield from (of_pretraining(entry) for entry in self._ledger.entries(Kind.PRETRAIN))
            for id in self._ledger.ids(Kind.TRIAL):
                if self._is_lacking(f"trials/{id}"):
                    entry = self._ledger.entry(Kind.TRIAL, id)
                    if entry.ended is not None:
                        yield of_trial(entry)

        self._do(lacking)

    def _is_lacking(self, name: str) -> bool:
        """Say whether a tracker has nothing of a series."""
        lacking: list[bool] = []
        for own, tracker in list(self._open.items()):
            self._try(own, lambda tracker=tracker: lacking.append(tracker.last(name) is None))  # type: ignore[misc]
        return any(lacking)

    def close(self, *, seconds: float = _CLOSING_SECONDS) -> None:
        """Wait for what is under way, not for ever.

        Args:
            seconds: for which to wait; 0 says nothing of what is not done.
        """
        if self._thread is None:
            return
        self._jobs.put(None)
        self._thread.join(seconds)
        if seconds and self._thread.is_alive():
            late = ", ".join(dict.fromkeys([*self._waiting, *self._open]))
            log.warning("%s took too long: the next call gives them the rest", late)

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close; where the call ends otherwise than well, without much ado."""
        if kind is None:
            self.close()
        else:
            interrupted = issubclass(kind, KeyboardInterrupt) or signals.received()
            self.close(seconds=0.0 if interrupted else _FAILED_SECONDS)

    def _do(self, job: Callable[[], Iterable[Series]]) -> None:
        if not self._waiting and not self._open:
            return
        self._jobs.put(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="raybd trackers", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        for name, opened in list(self._waiting.items()):
            self._try(name, lambda name=name, opened=opened: self._open.update({name: opened()}))  # type: ignore[misc]
            del self._waiting[name]
        while (job := self._jobs.get()) is not None:
            try:
                for series in job():
                    for name, tracker in list(self._open.items()):
                        self._try(name, lambda tracker=tracker, series=series: _give(tracker, series))  # type: ignore[misc]
            except Exception as error:  # the ledger is at fault: the search says so itself
                log.warning("trackers lack a part of the run: %s", failures.message_of(error))
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        """Do something with a tracker; where it fails, it gets no more in this call."""
        try:
            act()
        except Exception as error:
            self._open.pop(name, None)
            log.warning("%s gets no more in this call: %s", name, failures.message_of(error))


def _give(tracker: Tracker, series: Series) -> None:
    """Give a tracker what it lacks of a series."""
    last = tracker.last(series.name)
    points = [point for point in series.points if last is None or point.step > last]
    if points or (series.over and (last is None or tracker.goes_on(series.name))):
        tracker.add(replace(series, points=points))
