"""Rows of the table `epochs` as columns, for what is measured of a million of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raybd.columns import Codes, combined, encoded, numbers, taken

Row = Mapping[str, Any]
Floats = NDArray[np.float64]
TEXTS = ("study", "study_hash", "trial_id", "pretrain_id", "objective", "method", "split")
_FLOATS = ("loss", "alpha", "zeroshot_top1", "asr_top1")
# The columns of the `epochs` table that measures look at.
COLUMNS = (*TEXTS, "epoch", *_FLOATS)
# The columns of the `trials` table that fronts look at, and that are shown beside their points.
TRIAL_COLUMNS = (
    *("trial_id", "number", "method", "state"),
    *("epochs_planned", "lr", "loss_weights.mmcl", "loss_weights.ssl"),
)


class Points(Sequence[Row]):
    """Rows of the table `epochs`, of the columns that measures look at; also a sequence of rows.

    Args:
        columns: `epoch` and the floats, `mixed` (a point between two models, made without training), and for each
            text its codes: all of one length.
        texts: what the codes of each text stand for.
        index: which rows of the columns these are, in their order; all of them by default.
    """

    def __init__(
        self,
        columns: Mapping[str, NDArray[Any]],
        texts: Mapping[str, Sequence[str | None]],
        index: NDArray[np.int64] | None = None,
    ) -> None:
        self._columns, self.texts, self._index = columns, texts, index
        self._taken: dict[str, NDArray[Any]] = {}

    @staticmethod
    def of(rows: Iterable[Row]) -> Points:
        """Return rows as points; points are what they are."""
        return rows if isinstance(rows, Points) else Points._of_rows(list(rows))

    @staticmethod
    def _of_rows(rows: Sequence[Row]) -> Points:
        columns: dict[str, NDArray[Any]] = {"epoch": np.array([row["epoch"] for row in rows], dtype=np.int64)}
        texts: dict[str, Sequence[str | None]] = {}
        for name in TEXTS:
            known: dict[str | None, int] = {}
            codes = [known.setdefault(row.get(name), len(known)) for row in rows]
            columns[name], texts[name] = np.array(codes, dtype=np.int64), [*known]
        for name in _FLOATS:
            columns[name] = np.array([row.get(name) for row in rows], dtype=np.float64)
        columns["mixed"] = np.array([row.get("alpha") is not None for row in rows], dtype=bool)
        return Points(columns, texts)

    @staticmethod
    def of_table(table: pa.Table) -> Points:
        """Return the table `epochs` as points."""
        columns: dict[str, NDArray[Any]] = {"epoch": numbers(table.column("epoch"))[0]}
        texts: dict[str, Sequence[str | None]] = {}
        for name in TEXTS:
            columns[name], texts[name] = encoded(table.column(name))
        for name in _FLOATS:
            columns[name], there_N = numbers(table.column(name))
            if name == "alpha":
                columns["mixed"] = there_N
        return Points(columns, texts)

    def __len__(self) -> int:
        return len(self._columns["epoch"] if self._index is None else self._index)

    def column(self, name: str) -> NDArray[Any]:
        """Return a column, texts as codes, shape [N]."""
        if self._index is None:
            return self._columns[name]
        if name not in self._taken:
            self._taken[name] = self._columns[name][self._index]
        return self._taken[name]

    def take(self, chosen: NDArray[Any]) -> Points:
        """Return some of these rows, by position or by a mask of shape [N]."""
        index = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return Points(self._columns, self.texts, index if self._index is None else self._index[index])

    def having(self, name: str, text: str) -> NDArray[np.bool_]:
        """Say which rows have this text, shape [N]."""
        values = self.texts[name]
        if text not in values:
            return np.zeros(len(self), dtype=bool)
        return np.asarray(self.column(name) == values.index(text))

    def key(self, *names: str) -> tuple[Codes, int]:
        """Return one number for each row that tells values of these columns apart, and a bound above all of them."""
        columns = [(self.column(name), self._number(name)) for name in names]
        key_N, size = combined(columns)
        return np.broadcast_to(key_N, len(self)), size

    def _number(self, name: str) -> int:
        return len(self.texts[name]) if name in self.texts else int(self.column(name).max(initial=0)) + 1

    def same_points(self, rows: NDArray[np.int64]) -> Points:
        """Return all rows of the same trials and epochs as these, of every split, in their order."""
        trials = np.zeros(len(self.texts["trial_id"]), dtype=bool)
        trials[self.column("trial_id")[rows]] = True
        some = np.flatnonzero(trials[self.column("trial_id")])
        key_N, _ = self.take(np.concatenate([rows, some])).key("trial_id", "epoch")
        wanted, found = np.sort(key_N[: len(rows)]), key_N[len(rows) :]
        # numpy's own `isin` loads what it has for masked arrays, which takes as long as to look through a million rows.
        place = np.minimum(np.searchsorted(wanted, found), max(0, len(wanted) - 1))
        return self.take(some[wanted[place] == found])

    def __getitem__(self, place: Any) -> Any:
        return next(iter(self.take(np.array([range(len(self))[place]])))) if isinstance(place, int) else [*self][place]

    def __iter__(self) -> Iterator[Row]:
        lists: list[list[Any]] = []
        for name in COLUMNS:
            values = self.column(name).tolist()
            if name in self.texts:
                found: Callable[[int], Any] = self.texts[name].__getitem__
                values = [found(code) for code in values]
            elif name == "alpha":
                values = [v if mixed else None for v, mixed in zip(values, self.column("mixed").tolist(), strict=True)]
            lists.append(values)
        return (dict(zip(COLUMNS, row, strict=True)) for row in zip(*lists, strict=True))


class Trials(Sequence[Row]):
    """Rows of the table `trials`, read one by one only where they are asked for.

    Args:
        table: the columns of the table; times are left out.
    """

    def __init__(self, table: pa.Table) -> None:
        # Timestamps as Python objects would load pandas, which takes as long as all the rest.
        self._table = table.drop_columns([name for name in ("started", "ended") if name in table.column_names])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, int):
            return self._table.slice(range(len(self))[place], 1).to_pylist()[0]
        return taken(self._table, np.arange(len(self))[place]).to_pylist()

    def __iter__(self) -> Iterator[Row]:
        return iter(self._table.to_pylist())

    @cached_property
    def _ids(self) -> tuple[Codes, list[str | None]]:
        """The codes of the trials, and their ids."""
        return encoded(self._table.column("trial_id"))

    def standing(self) -> tuple[Codes, Sequence[str | None], NDArray[np.int64], NDArray[np.bool_]]:
        """Return the codes of the trials and their ids, the numbers, -1 for none, and which trials are complete."""
        codes_N, ids = self._ids
        number_N = np.where(*numbers(self._table.column("number"))[::-1], -1)
        state_N, states = encoded(self._table.column("state"))
        complete = np.array([state == "complete" for state in states], dtype=bool)
        return codes_N, ids, number_N, complete[state_N]

    def named(self, ids: Iterable[str]) -> list[Row]:
        """Return the rows of these trials, in their order."""
        codes_N, values = self._ids
        known = set(ids)
        wanted = np.array([value in known for value in values], dtype=bool)
        # Value by value: what takes rows of a table loads more than some hundred of them cost.
        kept = {name: self._table.column(name) for name in self._table.column_names}
        return [
            {name: column[row].as_py() for name, column in kept.items()}
            for row in np.flatnonzero(wanted[codes_N]).tolist()
        ]


def standing(trials: Iterable[Row]) -> tuple[Codes, Sequence[str | None], NDArray[np.int64], NDArray[np.bool_]]:
    """Return what `Trials.standing` does, of rows too; one that has no state is complete."""
    if isinstance(trials, Trials):
        return trials.standing()
    rows = list(trials)
    number_N = np.array([-1 if row["number"] is None else row["number"] for row in rows], dtype=np.int64)
    complete_N = np.array([row.get("state", "complete") == "complete" for row in rows], dtype=bool)
    return np.arange(len(rows)), [row["trial_id"] for row in rows], number_N, complete_N
