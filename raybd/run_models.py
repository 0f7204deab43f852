"""The models of a run directory: the poisoned ones, and cleaned ones by trial and epoch. Needs no torch."""

from __future__ import annotations

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raybd import run_record, tables
from raybd.errors import CheckpointError, DataError, StudyError, dotted
from raybd.fronts import ALL_METHODS, checkpoint_name
from raybd.store import Store
from raybd.study import Study

Row = dict[str, Any]
_KEPT = re.compile(r"weights/([^/]+)/epoch-(\d{4,7})\.safetensors")
_NAMED = re.compile(r"(.+):([0-9]{1,9})", re.DOTALL)
_SHOWN = 12  # points that an error names, at most


@dataclass(frozen=True)
class Point:
    """A model: epoch 0 is a poisoned one, as it was before cleaning."""

    checkpoint: str
    epoch: int | None = None
    pretrain_id: str | None = None
    objective: str | None = None
    method: str | None = None
    trial_id: str | None = None

    @property
    def name(self) -> str:
        """What the point is called on the screen and in names of files."""
        return f"{self.trial_id or self.pretrain_id or Path(self.checkpoint).stem}-{self.epoch or 0:04d}"

    def __post_init__(self) -> None:
        if "/" in self.name:
            raise CheckpointError("no id of a trial or a pretraining run", where=self.name, expected="ids without /")


def study_of(store: Store) -> tuple[Study, Row]:
    """Return the study of a run directory, and its whole record. Errors: StudyError where it holds numbers only.

    Where decoded images are kept is for this machine to say: a run directory of somebody else would have us write
    anywhere.
    """
    record = run_record.read(store)
    if "kind" in record and record["kind"] != "study":
        raise StudyError(
            f"holds no models, only numbers ({record['kind']})",
            where=store.uri,
            fix="give a run directory that `raybd run` made",
        )
    where = store.path(run_record.NAME)
    run_record.require(record, ("study", "hash", "pretrain_ids"), where=where)
    try:
        study = Study.model_validate_json(json.dumps(record["study"]))
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"study.{dotted(first['loc'])}: {first['msg']}", where=where) from None
    return study.model_copy(update={"data": study.data.model_copy(update={"cache_dir": None})}), record


def points(store: Store, record: Row, chosen: Sequence[str] = ()) -> list[Point]:
    """Return the models of a run: poisoned ones, then those on a front of all epochs; or those chosen.

    Args:
        chosen: see `named`.

    Errors: as of `named`; CheckpointError where there is no model yet.
    """
    if chosen:
        return [named(store, text, where=f"--point {text}") for text in dict.fromkeys(chosen)]
    ids = record["pretrain_ids"]
    poisoned = [Point(f"pretrained/{ids[name]}.safetensors", 0, ids[name], name) for name in ids]
    kept = [point for point in poisoned if store.exists(point.checkpoint)]
    if not kept:
        raise CheckpointError("no model yet", where=store.uri, fix="let `raybd pretrain` or `raybd run` end")
    found = {}
    for row in tables.read(store, "fronts").to_pylist():
        # The front over all methods has no point that is on no method's own.
        shown = row["kind"] == "any_epoch" and row["method"] != ALL_METHODS
        if shown and row["epoch"] and row["checkpoint"] and store.exists(row["checkpoint"]):
            names = ("checkpoint", "epoch", "pretrain_id", "objective", "method", "trial_id")
            found[row["checkpoint"]] = Point(**{name: row[name] for name in names})
    return kept + list(found.values())


def named(store: Store, text: str, *, where: str) -> Point:
    """Return the point of a run that a user names.

    Args:
        text: `TRIAL:EPOCH`, epoch 0 being the poisoned model that the trial started from; or `TRIAL` alone where one
            of its epochs is kept. A trial goes by its id, or by the number that tables of fronts show.
        where: what errors call the text.

    Errors: StudyError where it may mean several points; CheckpointError where there is no such point, or its weights
        are not kept. Each says which points there are.
    """
    measured = tables.read(store, "epochs").select(["trial_id", "epoch", "alpha", "pretrain_id", "objective", "method"])
    epochs: dict[str, dict[int, Row]] = {}
    for row in measured.to_pylist():
        epochs.setdefault(row["trial_id"], {})[row["epoch"]] = row
    given = None if text in epochs else _NAMED.fullmatch(text)
    name, after = given.groups() if given else (text, "")
    every = _kept(store)
    trial_id = _trial(store, name, epochs, every, where=where)
    kept, rows = every[trial_id], epochs[trial_id]
    there = _several(_texts(trial_id, kept, rows))
    if not after and len(kept) == 1:
        after = str(kept[0])
    if not after:
        raise StudyError(
            f"trial {trial_id} has {len(kept)} points whose weights are kept, not one",
            where=where,
            expected=f"one of {there}" if kept else f"{trial_id}:0, the poisoned model",
            fix="say which epoch, as TRIAL:EPOCH",
        )
    number = int(after)
    if number not in rows:
        near = min(kept, key=lambda epoch: abs(epoch - number), default=0)
        raise CheckpointError(
            f"trial {trial_id} has no epoch {number}, its last is {max(rows)}",
            where=where,
            expected=f"epoch 0, or one whose weights are kept: {there}" if kept else "epoch 0",
            fix=f"the nearest is {trial_id}:{near}",
        )
    row = rows[number]
    weights = checkpoint_name(trial_id, number) if number else f"pretrained/{row['pretrain_id']}.safetensors"
    if not store.exists(weights):
        raise _not_kept(store, Point(weights, number, trial_id=trial_id), kept, where=where)
    return Point(weights, number, row["pretrain_id"], row["objective"], row["method"], trial_id if number else None)


def _trial(
    store: Store, name: str, known: Mapping[str, Mapping[int, Row]], kept: Mapping[str, Sequence[int]], *, where: str
) -> str:
    """Return the id of a trial given by its id or its number. Errors: StudyError, CheckpointError."""
    if name in known:
        return name
    numbers = tables.read(store, "trials").select(["trial_id", "number"]).to_pylist()
    found = [row["trial_id"] for row in numbers if str(row["number"]) == name and row["trial_id"] in known]
    if len(found) == 1:
        return str(found[0])
    if found:
        raise StudyError(
            f"several trials have the number {name}", where=where, expected=f"an id: {', '.join(found[:_SHOWN])}"
        )
    close = difflib.get_close_matches(name, known, n=3)
    measured = sorted(kept.keys() & known.keys())
    there = [text for trial_id in measured for text in _texts(trial_id, kept[trial_id], known[trial_id])]
    raise CheckpointError(
        f"no trial {name!r} in this run",
        where=where,
        expected=f"one of {_several(there)}" if there else "a trial that has ended",
        fix=f"did you mean {', '.join(close)}?" if close else "`raybd pareto RUN -f json` has the ids",
    )


def _not_kept(store: Store, point: Point, kept: Sequence[int], *, where: str) -> CheckpointError:
    """Return an error that says why a point's weights are not there, and what to do."""
    fronts = tables.read(store, "fronts").select(["checkpoint", "epoch"]).to_pylist()
    on_front = not point.epoch or any(row["epoch"] and row["checkpoint"] == point.checkpoint for row in fronts)
    if on_front:
        fix = f"copy {point.checkpoint} from where the run was made: tables alone hold no models"
    else:
        fix = "take a point of a front: only they keep their weights"
    expected = f"epoch 0 or one of: {', '.join(map(str, kept[:_SHOWN]))}" if kept else "epoch 0"
    return CheckpointError(
        f"the weights of epoch {point.epoch} are not kept" + (", though it is on a front" if on_front else ""),
        where=where,
        expected=expected,
        fix=fix,
    )


def _kept(store: Store) -> dict[str, list[int]]:
    """Return the epochs of each trial whose weights are in the run directory; of others none."""
    found: dict[str, list[int]] = defaultdict(list)
    for name in map(_KEPT.fullmatch, store.names("weights", suffix=".safetensors")):
        if name:
            found[name[1]].append(int(name[2]))
    return found


def _texts(trial_id: str, epochs: Iterable[int], rows: Mapping[int, Row]) -> list[str]:
    """Return points as they are named; of those made without training, which tables show by their place, that too."""
    alphas = {epoch: row["alpha"] for epoch, row in rows.items() if row["alpha"] is not None}
    return [f"{trial_id}:{epoch}" + (f" (α {alphas[epoch]:.4g})" if epoch in alphas else "") for epoch in epochs]


def _several(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
