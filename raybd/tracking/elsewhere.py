"""What trackers that keep their runs elsewhere have in common: what they have been given, and which runs are open."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from raybd.store import Store
from raybd.tracking import Series
from raybd.tracking.marks import Marks

Run = TypeVar("Run")  # what the tracker knows a run by


class Elsewhere(ABC, Generic[Run]):
    """A tracker that has a run for each series; the run of a series that goes on stays open.

    Args:
        store: run directory; notes in it say what the tracker has.
        name: of the tracker.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._marks = Marks(store, name)
        self._open: dict[str, Run] = {}

    @abstractmethod
    def _run(self, series: Series) -> Run:
        """Return the run of a series, new or of an earlier call."""

    @abstractmethod
    def _log(self, run: Run, series: Series) -> None:
        """Log settings and values."""

    @abstractmethod
    def _end(self, run: Run, *, failed: bool) -> None:
        """Say that a run is over."""

    def last(self, name: str) -> int | None:
        """Return the last step that the tracker has of a series."""
        return self._marks.last(name)

    def goes_on(self, name: str) -> bool:
        """Say whether the tracker has a series that it was not told to be over."""
        return self._marks.goes_on(name)

    def add(self, series: Series) -> None:
        """Log the settings and values of a series."""
        run = self._open.pop(series.name, None) or self._run(series)
        self._log(run, series)
        if series.over:
            self._end(run, failed=series.failed)
        else:
            self._open[series.name] = run
        self._marks.put(series)

    def close(self) -> None:
        """End the runs that are open; a call that goes on with them opens them again."""
        for run in self._open.values():
            self._end(run, failed=False)
        self._open.clear()
