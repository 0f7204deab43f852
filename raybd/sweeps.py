"""Sweeps of others, as CSV: every epoch of every cleaning run, read into the tables of a run directory."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from raybd import curves, fronts, provenance, run_record, tables
from raybd.curves import BESIDE, KINDS, Curve
from raybd.errors import DataError
from raybd.ledger import Record, State
from raybd.space import Value
from raybd.store import Store
from raybd.study import Clean, Method

REQUIRED = ("pretrain_objective", "cleaning_loss", "epoch", "zeroshot_top1", "asr_top1", "n_clean", "n_triggered")
# Columns of published sweeps, by what the setting is called here; any setting's own name may head a column too.
ALIASES = {
    "loss_weight_mmcl": "loss_weights.mmcl",
    "loss_weight_ssl": "loss_weights.ssl",
    "poisoned_in_cleaning_set": "leaked_poison",
}
_METHODS = {"mmcl_ssl": Method.CLEANCLIP, **{str(method): method for method in Method}}
_RATES = (("zeroshot_top1", "n_clean", "correct_clean"), ("asr_top1", "n_triggered", "hit_target"))


@dataclass(frozen=True)
class _Row:
    """One line of a sweep. `rates` are as written there, `counted` is what they come from."""

    where: str
    objective: str
    method: str
    settings: Mapping[str, Value]
    epoch: int
    rates: Mapping[str, float]
    counted: Mapping[str, int]

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it another run."""
        return (self.objective, self.method, *sorted(self.settings.items()))


def import_sweep(
    source: str, out: str, *, only: Mapping[str, str] | None = None, baseline: str | None = None
) -> list[Curve]:
    """Read a sweep into a run directory with the tables `trials`, `epochs` and `fronts`, and `sweep.parquet`.

    Rates stand in the tables as in the CSV; counts are rate x number of images, rounded. All images count at once
    (split `all`): nobody halved them.

    Args:
        source: CSV with the columns `REQUIRED` and any settings of a cleaning trial. One row for each epoch.
        out: new run directory, or one that the same import made.
        only: column: value, as written in the CSV; other rows are left out.
        baseline: CSV of a sweep of the same poisoned models, whose epochs 0 stand in where `source` has none.

    Returns: the curves, in the order of the CSV.

    Errors: DataError with file and line, before anything is written.
    """
    columns, rows = _rows(Path(source), only or {})
    found = _curves(rows, before=_baselines(Path(baseline), rows[0]) if baseline else {})
    record: dict[str, Any] = {
        "kind": "imported sweep",
        "study": {"name": Path(source).stem, "pretrain_objectives": sorted({row.objective for row in rows})},
        "source": {"name": Path(source).name, "sha256": _sha256(Path(source)), "columns": columns},
        "only": dict(only or {}),
        "baseline": {"name": Path(baseline).name, "sha256": _sha256(Path(baseline))} if baseline else None,
    }
    record["hash"] = provenance.digest(record)
    _write(Store(out), found, {(row.key, row.epoch): row for row in rows}, record)
    return found


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Reading


def _rows(path: Path, only: Mapping[str, str]) -> tuple[list[str], list[_Row]]:
    """Return the column names and the rows of a CSV. Errors: DataError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = _header(reader.fieldnames or [], path, only)
            found = []
            for raw in reader:
                where = f"{path}:{reader.line_num}"
                if None in raw or None in raw.values():
                    raise DataError("not as many fields as the header has", where=where)
                if all(raw[name] == value for name, value in only.items()):
                    found.append(_row(raw, header, where))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"not readable as CSV: {error}", where=str(path)) from None
    if not found:
        rows = " that --only leaves" if only else ""
        raise DataError(f"no row{rows}", where=str(path), expected="a row for each epoch of each run")
    for row in found:
        for _, n, _ in _RATES:
            if row.counted[n] != found[0].counted[n]:
                raise DataError(
                    f"{n} is {row.counted[n]}, and {found[0].counted[n]} at {found[0].where}",
                    where=row.where,
                    expected="one evaluation set: points of two do not make one front",
                    fix="give a CSV for each, or pick one with --only",
                )
    return list(reader.fieldnames or []), found


def _header(names: Sequence[str], path: Path, only: Mapping[str, str]) -> dict[str, str]:
    """Return column: setting, for the columns that hold settings. Errors: DataError."""
    where = f"{path}:1"
    if missing := [name for name in REQUIRED if name not in names]:
        raise DataError(f"columns missing: {', '.join(missing)}", where=where, expected=", ".join(REQUIRED))
    settings = {name: ALIASES.get(name, name) for name in names if name not in REQUIRED}
    if unknown := [name for name, setting in settings.items() if setting not in KINDS]:
        raise DataError(
            f"unknown columns: {', '.join(unknown)}",
            where=where,
            expected=f"settings of a cleaning trial: {', '.join([*ALIASES, *KINDS])}",
            fix="rename them, or leave them out",
        )
    if len(set(settings.values())) < len(settings) or len(set(names)) < len(names):
        raise DataError("a column is there twice", where=where)
    if absent := [name for name in only if name not in names]:
        raise DataError(f"--only names columns that are not there: {', '.join(absent)}", where=where)
    return settings


def _row(raw: Mapping[str, str], header: Mapping[str, str], where: str) -> _Row:
    method = _METHODS.get(raw["cleaning_loss"])
    if method is None:
        raise DataError(
            f"cleaning_loss: {raw['cleaning_loss']!r} is no cleaning known", where=where, expected=", ".join(_METHODS)
        )
    objective = raw["pretrain_objective"]
    if not objective or not objective.replace("_", "").isalnum() or not objective.isascii():
        raise DataError(f"pretrain_objective: {objective!r} must be letters, digits and _", where=where)
    settings = {setting: _setting(name, setting, raw[name], where) for name, setting in header.items() if raw[name]}
    counted = {n: _whole(n, raw[n], where, least=1) for _, n, _ in _RATES}
    rates = {}
    for rate, n, hits in _RATES:
        rates[rate] = value = _number(rate, raw[rate], where)
        if not 0 <= value <= 1:
            raise DataError(
                f"{rate}: {raw[rate]} is no share", where=where, expected="0 … 1", fix="divide percentages by 100"
            )
        counted[hits] = round(value * counted[n])
    epoch = _whole("epoch", raw["epoch"], where, least=0)
    return _Row(where, objective, method.value, settings, epoch, rates, counted)


def _number(name: str, text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{name}: {text!r} is no finite number", where=where)
    return value


def _whole(name: str, text: str, where: str, *, least: int) -> int:
    value = _number(name, text, where)
    if value != int(value) or value < least:
        raise DataError(f"{name}: {text!r} is no whole number of at least {least}", where=where)
    return int(value)


def _setting(name: str, setting: str, text: str, where: str) -> Value:
    kind = KINDS[setting]
    if setting in BESIDE:
        return _whole(name, text, where, least=0)
    value: Value = text
    if kind == pa.int64():
        value = _whole(name, text, where, least=0)
    elif kind == pa.float64():
        value = _number(name, text, where)
    weight = {"loss_weights.mmcl": "loss_weights.ssl", "loss_weights.ssl": "loss_weights.mmcl"}.get(setting)
    try:
        # One weight may be 0 if the other, which stands in another column, is not.
        Clean().settings({setting: value, **({weight: 1.0} if weight else {})})
    except ValidationError as error:
        raise DataError(f"{name} cannot be {text}: {error.errors()[0]['msg']}", where=where) from None
    return value


# Curves


def _curves(rows: Sequence[_Row], *, before: Mapping[str, Mapping[str, int]]) -> list[Curve]:
    """Return the runs as curves. Errors: DataError on epochs that are there twice or missing."""
    runs: dict[tuple[Any, ...], dict[int, _Row]] = {}
    for row in rows:
        epochs = runs.setdefault(row.key, {})
        if row.epoch in epochs:
            raise DataError(
                f"epoch {row.epoch} of this run is at {epochs[row.epoch].where} too",
                where=row.where,
                expected="one row for each epoch of a run",
                fix="number runs of equal settings in a column `run`",
            )
        epochs[row.epoch] = row
    _check_epochs(runs)
    if len(leaked := sorted({row.settings.get("leaked_poison", 0) for row in rows})) > 1:
        raise DataError(
            f"cleaning sets with {', '.join(map(str, leaked))} poisoned pairs, whose fronts are not one",
            where=rows[0].where,
            fix=f"import each for itself: --only poisoned_in_cleaning_set={leaked[-1]}",
        )
    number: dict[str, int] = {}
    found = []
    for epochs in runs.values():
        first = min(epochs.values(), key=lambda row: row.epoch)
        place = number[first.objective] = number.get(first.objective, -1) + 1
        records = {epoch: _record(epoch, row.counted) for epoch, row in sorted(epochs.items())}
        if 0 not in records and first.objective in before:
            records = {0: _record(0, before[first.objective]), **records}
        whose = (f"{first.objective}-{place:04d}", first.objective, first.method, f"{first.objective}-published")
        found.append(Curve(*whose, dict(first.settings), records))
    return found


def _check_epochs(runs: Mapping[tuple[Any, ...], Mapping[int, _Row]]) -> None:
    """Refuse runs with gaps, and epochs 0 that only some runs of a pretrain objective have."""
    complete: dict[str, tuple[bool, _Row]] = {}
    for epochs in runs.values():
        numbers = sorted(epochs)
        first = epochs[numbers[0]]
        if numbers == [0]:
            raise DataError("this run has epoch 0 alone: it was not cleaned", where=first.where)
        trained = [number for number in numbers if number]
        for before, after in itertools.pairwise(trained):
            if after - before != trained[0]:
                raise DataError(
                    f"this run has epoch {before}, then {after}",
                    where=epochs[after].where,
                    expected=f"every epoch, or every so many: {trained[0]}, {2 * trained[0]} and so on",
                )
        has, other = complete.setdefault(first.objective, (0 in epochs, first))
        if has != (0 in epochs):
            raise DataError(
                f"epoch 0, the poisoned model, is missing here and there: this run has {'none' if has else 'it'}, "
                f"the one at {other.where} has {'it' if has else 'none'}",
                where=first.where,
                expected="in every run of a pretrain objective, or in none",
            )


def _record(epoch: int, counted: Mapping[str, int]) -> Record:
    return curves.epoch_record({"epoch": epoch}, {"all": {**counted, "correct_triggered": None}})


def _baselines(path: Path, like: _Row) -> dict[str, Mapping[str, int]]:
    """Return, by pretrain objective, what the first epoch 0 of a sweep counted. Errors: DataError."""
    found: dict[str, Mapping[str, int]] = {}
    for row in _rows(path, {})[1]:
        if row.epoch == 0:
            if any(row.counted[n] != like.counted[n] for _, n, _ in _RATES):
                raise DataError("counted on another number of images", where=row.where, expected=f"as {like.where}")
            found.setdefault(row.objective, row.counted)
    if not found:
        raise DataError("no epoch 0 to take as baseline", where=str(path))
    return found


# Writing


def _write(store: Store, found: Sequence[Curve], rows: Mapping[Any, _Row], record: Mapping[str, Any]) -> None:
    if store.exists("study.json") and run_record.read(store).get("hash") != record["hash"]:
        raise DataError("holds another run", where=store.uri, fix="give another folder, or remove this one")
    same = {"study": record["study"]["name"], "study_hash": record["hash"]}
    epochs, trials = [], []
    for curve in found:
        whose = {name: getattr(curve, name) for name in ("trial_id", "pretrain_id", "objective", "method")}
        key = (curve.objective, curve.method, *sorted(curve.settings.items()))
        for epoch, kept in curve.epochs.items():
            counted = kept["counts"]["all"]
            rates = {rate: counted[hits] / counted[n] for rate, n, hits in _RATES}
            if (key, epoch) in rows:
                rates = dict(rows[key, epoch].rates)
            epochs.append({**same, **whose, "epoch": epoch, "split": "all", **rates, **counted})
        settings = {tables.SETTINGS[name][0]: v for name, v in curve.settings.items() if name in tables.SETTINGS}
        trials.append(
            {
                **same,
                **whose,
                "number": int(curve.trial_id.rsplit("-", 1)[1]),
                **settings,
                "params_json": json.dumps(dict(curve.settings), sort_keys=True),
                "state": State.COMPLETE,
                "epochs_done": curve.last,
            }
        )
    tables.write(store, "epochs", "sweep", epochs)
    tables.write(store, "trials", "sweep", trials)
    # Nobody published the weights.
    members = [{**row, "checkpoint": None} for row in fronts.compute(epochs, trials)]
    tables.write(store, "fronts", "sweep", members)
    curves.write(store, found)
    created = datetime.now(UTC).isoformat()
    content = {**record, "environment": provenance.environment(), "created": created}
    store.put("study.json", json.dumps(content, indent=1).encode())
