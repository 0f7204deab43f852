"""Recorded curves: what cleaning trials scored epoch by epoch, read from run directories or from one tidy table.

A search can be replayed against them, and sweeps of others come in as such.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raybd import parquet, table_rules, tables
from raybd.errors import DataError
from raybd.ledger import Record, State
from raybd.provenance import digest
from raybd.records import RECORDED
from raybd.space import Value
from raybd.store import Store

NAME = "sweep.parquet"
# What tells curves apart beside the settings of a cleaning trial: poisoned pairs in its cleaning set, and its number.
BESIDE: dict[str, pa.DataType] = {"leaked_poison": pa.int64(), "run": pa.int64()}
KINDS: dict[str, pa.DataType] = {**{name: kind for name, (_, kind) in tables.SETTINGS.items()}, **BESIDE}
_WHOSE = ("trial_id", "objective", "method", "pretrain_id")
_COUNTS = ("n_clean", "correct_clean", "n_triggered", "hit_target")
_NEEDED = ("objective", "method", "epoch", *_COUNTS)


@dataclass(frozen=True)
class Curve:
    """One recorded trial.

    Attributes:
        settings: those that are known, by dotted name, with `leaked_poison` and `run` beside them.
        epochs: by number, what a ledger keeps of an epoch: `counts` for each split, and what else was recorded.
    """

    trial_id: str
    objective: str
    method: str
    pretrain_id: str
    settings: Mapping[str, Value]
    epochs: Mapping[int, Record]

    @property
    def last(self) -> int:
        """The last epoch of training; points without training, which may follow it, do not count."""
        return max(number for number, record in self.epochs.items() if record.get("alpha") is None)


def fingerprint(curves: Iterable[Curve]) -> str:
    """Return a hash of all that the curves say."""
    return digest([asdict(curve) for curve in curves])


def table_of(curves: Sequence[Curve]) -> pa.Table:
    """Return curves that were counted on all images at once as one table, a row for each epoch.

    Columns: trial, pretrain objective, method, each setting that any curve knows, epoch, rates and counts.
    """
    known = [name for name in KINDS if any(name in curve.settings for curve in curves)]
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    schema = pa.schema(
        [(name, text) for name in _WHOSE]
        + [(name, KINDS[name]) for name in known]
        + [("epoch", whole), ("zeroshot_top1", real), ("asr_top1", real)]
        + [(name, whole) for name in _COUNTS]
    )
    rows = [
        {
            **{name: getattr(curve, name) for name in _WHOSE},
            **{name: curve.settings.get(name) for name in known},
            "epoch": number,
            "zeroshot_top1": counted["correct_clean"] / counted["n_clean"],
            "asr_top1": counted["hit_target"] / counted["n_triggered"],
            **{name: counted[name] for name in _COUNTS},
        }
        for curve in curves
        for number, record in sorted(curve.epochs.items())
        for counted in (record["counts"]["all"],)
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def write(store: Store, curves: Sequence[Curve]) -> None:
    """Write curves as `sweep.parquet` into a run directory; see `table_of`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table_of(curves), sink, compression="zstd")
    store.put(NAME, sink.getvalue().to_pybytes())


def read(path: str) -> list[Curve]:
    """Read the curves of a `.parquet` file as `write` makes them, or of the finished trials of a run directory.

    Errors: DataError where there are none, or columns are missing.
    """
    if path.partition("?")[0].endswith(".parquet"):
        found = _from_table(path)
    else:
        store = Store(path)
        if not store.exists("study.json"):
            raise DataError(
                "neither a run directory nor a .parquet file", where=store.uri, fix="give a run, or its sweep.parquet"
            )
        found = _from_run(store)
    if not found:
        raise DataError("holds no finished trial", where=path, fix="let `raybd run` go on, or give another")
    return found


def _from_table(path: str) -> list[Curve]:
    folder, _, name = (path if "://" in path else os.path.realpath(Path(path).expanduser())).rpartition("/")
    kinds = {**KINDS, **dict.fromkeys(_WHOSE, pa.string()), **dict.fromkeys(("epoch", *_COUNTS), pa.int64())}
    table = parquet.read(Store(folder).get(name), where=path, columns=kinds)
    missing = [name for name in _NEEDED if name not in table.column_names]
    if missing:
        raise DataError(f"columns missing: {', '.join(missing)}", where=path, expected="a row for each epoch")
    known = [name for name in KINDS if name in table.column_names]
    for field in table.schema:
        if pa.types.is_string(field.type) != pa.types.is_string(kinds[field.name]):
            raise DataError(f"{field.name} is of type {field.type}", where=path, expected=str(kinds[field.name]))
    try:
        table = table.cast(pa.schema([(name, kinds[name]) for name in table.column_names]))
    except pa.ArrowException as error:
        raise DataError(f"columns of other types: {error}", where=path) from None
    table_rules.check(table, table="curves", where=path)
    by_id: dict[str, Curve] = {}
    for place, row in enumerate(table.to_pylist()):
        settings = {name: row[name] for name in known if row[name] is not None}
        own = row.get("trial_id") or f"{row['objective']}-{digest([row['method'], settings])}"
        whose = (own, row["objective"], row["method"], row.get("pretrain_id") or f"{row['objective']}-recorded")
        curve = by_id.setdefault(own, Curve(*whose, settings, {}))
        epochs = curve.epochs
        assert isinstance(epochs, dict)
        if row["epoch"] in epochs or curve.settings != settings or curve.method != row["method"]:
            raise DataError(
                f"row {place}: epoch {row['epoch']} of trial {own} is there twice, or with other settings", where=path
            )
        counted = {name: row[name] for name in _COUNTS}
        # Of its columns only the number is the epoch's own: `lr` is the setting.
        epochs[row["epoch"]] = epoch_record({"epoch": row["epoch"]}, {"all": {**counted, "correct_triggered": None}})
    return list(by_id.values())


def _beside(name: str, value: object) -> bool:
    return name in BESIDE and isinstance(value, int)


def epoch_record(row: Mapping[str, Any], counts: Mapping[str, Any]) -> Record:
    """Return an epoch as a ledger keeps it; `row` has its number, and what else was recorded of it."""
    found = {name: row.get(name) for name in RECORDED}
    return {**found, "alpha": row.get("alpha"), "epoch": row["epoch"], "counts": dict(counts)}


def _from_run(store: Store) -> list[Curve]:
    epochs: dict[str, dict[int, Record]] = {}
    for row in tables.read(store, "epochs").to_pylist():
        counted = {name: row[name] for name in (*_COUNTS, "correct_triggered")}
        record = epochs.setdefault(row["trial_id"], {}).setdefault(row["epoch"], epoch_record(row, {}))
        record["counts"][row["split"]] = counted
    found = []
    # Timestamps as Python objects would load pandas.
    for row in tables.read(store, "trials").drop_columns(["started", "ended"]).to_pylist():
        trained = [r for r in epochs.get(row["trial_id"], {}).values() if r["alpha"] is None]
        if row["state"] != State.COMPLETE or not trained:
            continue
        known = {name: row[column] for name, (column, _) in tables.SETTINGS.items()}
        known |= {name: value for name, value in tables.searched(row).items() if _beside(name, value)}
        settings = {name: value for name, value in known.items() if value is not None}
        whose = {name: row[name] for name in _WHOSE}
        found.append(Curve(**whose, settings=settings, epochs=epochs[row["trial_id"]]))
    return found
