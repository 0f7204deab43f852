"""From ledger entries to rows of the tables. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, TypeVar

from raybd.ledger import Entry, State, reading
from raybd.metrics import SPLITS, STRONG, Counts
from raybd.tables import SETTINGS
from raybd.terms import TERMS

Row = dict[str, Any]
Rows = TypeVar("Rows")

_TRAINING = ("epoch", "step", "samples_seen", "lr", "loss", "logit_scale", "broken")
_TERMS = tuple(f"loss_{term}" for term in TERMS)  # those of weight 0 need not be in a record
_SHOWS = 0.5  # ASR of a given model from which on there is no doubt that its backdoor is this one
_SPEED = ("train_seconds", "evaluate_seconds", "samples_per_second")
# What an epoch's record has beside its counts.
RECORDED = (*_TRAINING, *_TERMS, *_SPEED)


def counts(record: Mapping[str, Any]) -> dict[str, Counts]:
    """Return the counts in an epoch's record: of each half, or of all images where they were not halved."""
    return {split: Counts(**record["counts"][split]) for split in (*SPLITS, "all") if split in record["counts"]}


def _of_entry(rows: Callable[[Entry], Rows]) -> Callable[[Entry], Rows]:
    """Let a function of an entry raise a DataError where it is not made of the records of a run."""

    @wraps(rows)
    def checked(entry: Entry) -> Rows:
        with reading(f"ledger entry {entry.id}"):
            return rows(entry)

    return checked


@_of_entry
def pretrain_rows(entry: Entry) -> list[Row]:
    """Return the `pretrain_epochs` rows of a pretraining run; both halves of the evaluation set are counted."""
    same = {name: entry.started[name] for name in ("study", "study_hash", "pretrain_id", "objective")}
    rows = []
    for _, record in sorted(entry.epochs.items()):
        halves = counts(record)
        rows.append(
            {
                **same,
                **{name: record[name] for name in (*_TRAINING, "poisoned_seen", *_SPEED)},
                **{name: record.get(name) for name in _TERMS},
                **(halves["search"] + halves["report"]).columns(),
            }
        )
    return rows


@_of_entry
def epoch_rows(entry: Entry) -> list[Row]:
    """Return the `epochs` rows of a trial: two for each epoch, one for each half of the evaluation set."""
    names = ("study", "study_hash", "trial_id", "pretrain_id", "objective", "method")
    same = {name: entry.started[name] for name in names}
    return [
        {
            **same,
            **{name: record[name] for name in (*_TRAINING, *_SPEED)},
            **{name: record.get(name) for name in _TERMS},
            "alpha": record.get("alpha"),
            "split": split,
            **found.columns(),
        }
        for _, record in sorted(entry.epochs.items())
        for split, found in counts(record).items()
    ]


@_of_entry
def attack_rows(entry: Entry) -> list[Row]:
    """Return the `attacks` rows of a pretraining run or a trial: none where there is but one attack and no control."""
    same = {name: entry.started[name] for name in ("study", "study_hash", "pretrain_id", "objective")}
    return [
        {
            **same,
            "trial_id": entry.started.get("trial_id"),
            "epoch": record["epoch"],
            "alpha": record.get("alpha"),
            "split": split,
            **{name: attack[name] for name in ("role", "trigger", "target_class")},
            **found.attack_columns(),
        }
        for _, record in sorted(entry.epochs.items())
        for attack in record.get("attacks", ())
        for split, found in counts(attack).items()
    ]


def attack_lines(rows: Sequence[Row], *, epoch: int) -> list[str]:
    """Return one sentence for each attack and control of an epoch, both halves of the evaluation set together."""
    pooled: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        if row["epoch"] == epoch:
            found = pooled.setdefault((row["role"], row["trigger"], row["target_class"]), [0, 0])
            found[0] += row["hit_target"]
            found[1] += row["n_triggered"]
    return [
        f"{role} {trigger_text(trigger)} → {target}: ASR {hits / n:.2%} ({hits} of {n})"
        for (role, trigger, target), (hits, n) in pooled.items()
    ]


def weak_attack(name: str, asr: float, *, trained: bool) -> str:
    """Return what it means that an attack succeeds in less than `metrics.STRONG` before cleaning.

    Args:
        asr: a fraction.
        trained: whether the model saw the poison here; one that was given may have another backdoor, or none.
    """
    if trained or asr >= _SHOWS:
        return (
            f"The attack succeeds on {name} in {asr:.2%} only, less than {STRONG:.0%}: "
            "there is less to clean, and cleanings of it compare little with others."
        )
    return (
        f"{name} takes {asr:.2%} of triggered images for the target before anything is cleaned: it seems to have no "
        "backdoor, or one of another trigger or target, which these fronts do not show."
    )


def trigger_text(trigger: str) -> str:
    """Return a trigger's settings, given as JSON, in few words."""
    try:
        settings = json.loads(trigger)
        name = settings.pop("name")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return trigger  # somebody else's
    rest = (f"{key} {_setting_text(value)}" for key, value in settings.items())
    return f"{name} ({', '.join(rest)})" if settings else str(name)


def _setting_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@_of_entry
def trial_row(entry: Entry) -> Row:
    """Return the `trials` row of a trial, running or ended."""
    started, ended = entry.started, entry.ended or {}
    names = ("study", "study_hash", "trial_id", "number", "pretrain_id", "objective", "method", "seed")
    settings, params = started["settings"], started["params"]
    if not isinstance(params, dict):
        raise TypeError(f"{params!r} are no searched settings")
    flat = dict(settings)
    for section, inner in settings.items():
        if isinstance(inner, dict):
            flat |= {f"{section}.{name}": value for name, value in inner.items()}
    return {
        **{name: started[name] for name in names},
        **{column: flat[name] for name, (column, _) in SETTINGS.items()},
        "params_json": json.dumps(params, sort_keys=True),
        "state": ended.get("state", State.RUNNING),
        "stop_reason": ended.get("stop_reason"),
        "error_type": ended.get("error_type"),
        "error_message": ended.get("error_message"),
        "epochs_done": max((n for n, record in entry.epochs.items() if record.get("alpha") is None), default=None),
        "weight_decay_in_force": ended.get("weight_decay_in_force"),
        "attempt": entry.attempts,
        "node": ended.get("node"),
        "device": ended.get("device"),
        "started": datetime.fromisoformat(started["started"]),
        "ended": datetime.fromisoformat(ended["ended"]) if "ended" in ended else None,
        "device_seconds": ended.get("device_seconds"),
    }
