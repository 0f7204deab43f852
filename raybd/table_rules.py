"""What rows of tables can be: a table may come from anyone, and what reads it relies on these rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raybd import columns
from raybd.errors import DataError

_WHOSE = ("pretrain_id", "objective")
_POINT = ("trial_id", "method", "epoch", "split", "zeroshot_top1", "asr_top1")
# What tells a row of the table `epochs` from others.
POINT = ("trial_id", "epoch", "objective", "pretrain_id", "method", "split")
# What a row cannot be without.
REQUIRED: dict[str, tuple[str, ...]] = {
    "poison_plan": ("key", "trigger", "target_class", "caption_before", "caption_after"),
    "pretrain_epochs": (*_WHOSE, "epoch"),
    "attacks": (*_WHOSE, "epoch", "split", "role", "trigger", "target_class", "n_triggered", "hit_target", "asr_top1"),
    "trials": (*_WHOSE, "trial_id", "method", "state"),
    "epochs": (*_WHOSE, *_POINT),
    "fronts": (*_WHOSE, *_POINT, "kind", "hv_contribution", "hypervolume"),
    "curves": ("objective", "method", "epoch", "n_clean", "correct_clean", "n_triggered", "hit_target"),
    "evaluations": (*_WHOSE, "epoch", "checkpoint", "task", "data", "split"),
}
_ONE_OF = {
    "split": ("search", "report", "all"),
    "state": ("running", "complete", "stopped", "failed"),
    "kind": ("any_epoch", "final"),
}
_PARTS = (
    ("correct_clean", "n_clean"),
    ("hit_target", "n_triggered"),
    ("correct_triggered", "n_triggered"),
)
_WEIGHTS = {"search": 1, "report": 4, "all": 16}
_OBJECTS = ("params_json",)
_WORD = r'"[A-Za-z0-9_. -]*"'
_ENTRY = rf"{_WORD}: (-?(0|[1-9][0-9]{{0,15}})(\.[0-9]{{1,20}})?(e[-+]?[0-9]{{1,3}})?|{_WORD}|null|true|false)"
_FLAT_OBJECT = rf"\A\{{({_ENTRY}(, {_ENTRY})*)?\}}\z"
_LEAST = {"n_clean": 1, "n_triggered": 1}
_MOST = {"epoch": 1_000_000}
_LARGEST = 10**15  # and more of anything nobody has counted
_UNKNOWN = ("baseline_top1", "baseline_asr")  # NaN where the poisoned model was not measured
_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)


def check(rows: pa.Table, *, table: str, where: str) -> None:
    """Refuse rows that cannot be: shares beyond 0 … 1, negative counts, nulls where something must be.

    Errors: DataError that names the first such row, from 0, and its column.
    """
    for name, bad_N, expected in _faults(rows, table):
        if bad_N.any():
            place = int(bad_N.argmax())
            raise DataError(
                f"row {place}: {name} is {_shown(rows.column(name)[place])}", where=where, expected=expected
            )
    for name in set(_OBJECTS) & set(rows.schema.names):
        texts = rows.column(name).unique()
        texts = texts.dictionary if pa.types.is_dictionary(texts.type) else texts
        for text in _not_flat(texts).to_pylist():
            if text is not None:
                json_object(text, name=name, where=where)


def _not_flat(texts: pa.Array) -> pa.Array:
    """Return texts without flat objects of numbers and plain words, as raybd writes them: no parser need look at them.

    What computes with Arrow's columns takes long to load, so no other rule uses it.
    """
    import pyarrow.compute as pc

    return texts.filter(pc.invert(pc.match_substring_regex(texts, _FLAT_OBJECT)))


def _faults(rows: pa.Table, table: str) -> Iterator[tuple[str, NDArray[np.bool_], str]]:
    """Yield columns with the rows, as a mask, in which they cannot be so, and what was expected."""
    for name in REQUIRED[table]:
        if rows.column(name).null_count:
            yield name, ~columns.present(rows.column(name)), "a value"
    for field in rows.schema:
        column = rows.column(field.name)
        if field.name in _ONE_OF:
            known = _ONE_OF[field.name]
            codes_N, values = columns.encoded(column)
            yield field.name, np.array([value not in known for value in values])[codes_N], ", ".join(known)
        elif pa.types.is_integer(field.type) and field.name != "seed":
            least, most = _LEAST.get(field.name, 0), _MOST.get(field.name, _LARGEST)
            yield field.name, _outside(column, least, most), f"{least} … {most}"
        elif pa.types.is_timestamp(field.type):
            yield field.name, _outside(column, _microseconds(_EARLIEST), _microseconds(_LATEST)), "a time"
        elif _is_share(field):
            share_N, there_N = columns.numbers(column)
            if field.name not in _UNKNOWN:
                yield field.name, there_N & np.isnan(share_N), "a share, 0 … 1"
            yield field.name, _outside(column, 0.0, 1.0), "a share, 0 … 1"
        elif pa.types.is_floating(field.type):
            yield field.name, np.isinf(columns.numbers(column)[0]), "a finite number"
    for part, whole in _PARTS:
        if part in rows.schema.names and whole in rows.schema.names:
            (part_N, one_N), (whole_N, other_N) = (columns.numbers(rows.column(name)) for name in (part, whole))
            yield part, one_N & other_N & (part_N > whole_N), f"at most {whole}"


def _outside(column: pa.ChunkedArray, low: float, high: float) -> NDArray[np.bool_]:
    """Say which values are not within bounds; nulls and NaN are."""
    found_N, there_N = columns.numbers(column)
    return there_N & ((found_N < low) | (found_N > high))


def _microseconds(time: datetime) -> int:
    return int(time.timestamp()) * 1_000_000


def _is_share(field: pa.Field) -> bool:
    """Say whether a column holds shares; `…_at_5_hits` and the like are counts."""
    ending = field.name.endswith("_top1") or "_at_" in field.name
    return pa.types.is_floating(field.type) and (ending or field.name in ("leaked_share", "baseline_asr"))


def json_object(text: str, *, name: str, where: str) -> dict[str, Any]:
    """Return what a text of a table holds as JSON.

    Args:
        name: of its column.

    Errors: DataError where that is no JSON, no object, nested too deep, or has a number of too many digits.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{name} is {text[:80]!r}", where=where, expected="a JSON object")
    return found


def _shown(value: pa.Scalar) -> str:
    try:
        return repr(value.as_py())[:100]
    except (ValueError, OverflowError):  # a time beyond those of Python
        return str(value.value)


def check_points(rows: pa.Table, *, where: str) -> None:
    """Refuse epochs that are there twice, or on one half of the evaluation set alone.

    Args:
        rows: of the table `epochs`, all parts.

    Errors: DataError that names the trial and the epoch.
    """
    texts = {name: columns.coded(rows.column(name)) for name in POINT[:-1] if name != "epoch"}
    epoch_N, _ = columns.numbers(rows.column("epoch"))
    keys = [(codes_N, len(values) + 1) for codes_N, values in texts.values()]
    key_N, _ = columns.combined([*keys, (epoch_N, _MOST["epoch"] + 1)])
    split_N, splits = columns.encoded(rows.column("split"))
    # What adds up to 5 with two rows, or to 16 with one, can only be what is expected.
    weight_N = np.array([_WEIGHTS.get(str(split), 0) for split in splits])[split_N]
    order = columns.ordered(key_N)
    if order is not None:
        key_N, weight_N = key_N[order], weight_N[order]
    starts = np.flatnonzero(np.concatenate([key_N[:1] >= 0, key_N[1:] != key_N[:-1]]))
    counts, sums = np.diff(np.append(starts, len(key_N))), np.add.reduceat(weight_N, starts)
    wrong = ~((counts == 2) & (sums == 5) | (counts == 1) & (sums == 16))
    if not wrong.any():
        return
    found: dict[tuple[Any, ...], list[str]] = {}
    places = np.flatnonzero(wrong.repeat(counts)) if order is None else np.sort(order[wrong.repeat(counts)])
    for row in columns.taken(rows.select(POINT), places).to_pylist():
        found.setdefault(tuple(row[name] for name in POINT[:-1]), []).append(row["split"])
    trial, epoch, *_ = next(iter(found))
    raise DataError(
        f"epoch {epoch} of trial {trial} has the splits {', '.join(next(iter(found.values())))}",
        where=where,
        expected="search and report once each, or all",
    )
