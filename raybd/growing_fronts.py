"""The fronts of a run that grows, trial by trial, without another look at every point that there has been."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from raybd import fronts
from raybd.points import COLUMNS, Row


class GrowingFronts:
    """What `fronts.compute` returns of all points added so far, at the cost of those that may still be on a front.

    A point that another one beats stays beaten whatever is added, so it is forgotten: what is kept grows with the
    fronts, not with the trials.
    """

    def __init__(self) -> None:
        self._trials: dict[str, Row] = {}
        self._epochs: dict[str, list[Row]] = {}

    def add(self, epochs: Iterable[Row], trial: Row) -> None:
        """Add a trial, or put it in the place of what was known of it: with the same points, and later ones.

        Args:
            epochs: all rows of the `epochs` table that it has.
            trial: its row of the `trials` table.
        """
        own: list[Row] = [{name: row.get(name) for name in COLUMNS} for row in epochs]
        self._trials[trial["trial_id"]], self._epochs[trial["trial_id"]] = trial, own

    def compute(self) -> list[dict[str, Any]]:
        """Return the rows of the `fronts` table; see `fronts.compute`."""
        found = fronts.compute([row for rows in self._epochs.values() for row in rows], self._trials.values())
        self._forget(found)
        return found

    def _forget(self, found: Iterable[Row]) -> None:
        """Drop the points that are on no front, but those that say what a trial's last epoch and the baseline are."""
        needed: dict[str, set[int]] = defaultdict(set)
        for row in found:
            needed[row["trial_id"]].add(row["epoch"])
        for row in self._baselines():
            needed[row["trial_id"]].add(row["epoch"])
        for trial_id in self._epochs.keys() - needed.keys():
            del self._epochs[trial_id], self._trials[trial_id]
        for trial_id, rows in self._epochs.items():
            needed[trial_id].add(max((row["epoch"] for row in rows if row["alpha"] is None), default=0))
            self._epochs[trial_id] = [row for row in rows if row["epoch"] in needed[trial_id]]

    def _baselines(self) -> Iterable[Row]:
        """Return a row of each model before cleaning, on each half, that has what `fronts.baseline` returns."""
        best: dict[tuple[str, str, str], Row] = {}
        for rows in self._epochs.values():
            for row in rows:
                if row["epoch"] == 0:
                    key = (row["objective"], row["pretrain_id"], row["split"])
                    best[key] = max(best.get(key, row), row, key=_strength)
        return best.values()


def _strength(row: Row) -> tuple[float, float]:
    return row["zeroshot_top1"], row["asr_top1"]
