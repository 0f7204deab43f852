"""What a run took, from its tables: pairs, epochs, device time, and on which devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from raybd import fronts
from raybd.report import words
from raybd.report.words import Row

_TIMES = ("train_seconds", "evaluate_seconds")


def stages(found: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Return what each pretraining and each poisoned model's trials took, and all together.

    Args:
        found: rows by table.

    Returns: entries with stage, runs, epochs, samples (pairs seen), seconds, train_seconds and evaluate_seconds, each
        None where it is not known. Empty where no time is: of results of others.
    """
    entries: list[dict[str, Any]] = []
    for key, name in words.objective_names(found["pretrain_epochs"]).items():
        rows = _of(found["pretrain_epochs"], key)
        times = {part: _sum(row[part] for row in rows) for part in _TIMES}
        seen = max((row["samples_seen"] or 0 for row in rows), default=0)
        epochs = sum(row["epoch"] > 0 for row in rows)
        known = {"runs": 1, "epochs": epochs, "samples": seen, "seconds": _sum(times.values()), **times}
        entries.append({"stage": f"pretraining {name}", **known})
    quoted = fronts.halves(found["epochs"])[-1]
    for key, name in words.objective_names(found["trials"]).items():
        trials = _of(found["trials"], key)
        rows = [row for row in _of(found["epochs"], key) if row["split"] == quoted]
        seen_by: dict[str, int] = {}
        for row in rows:
            seen_by[row["trial_id"]] = max(seen_by.get(row["trial_id"], 0), row["samples_seen"] or 0)
        known = {
            "runs": len(trials),
            "epochs": sum(row["epoch"] > 0 for row in rows),
            "samples": sum(seen_by.values()),
            "seconds": _sum(row["device_seconds"] for row in trials),
            **{part: _sum(row[part] for row in rows) for part in _TIMES},
        }
        entries.append({"stage": f"cleaning {name}", **known})
    if all(entry["seconds"] is None for entry in entries):
        return []
    whole = {name: _sum(entry[name] for entry in entries) for name in entries[0] if name != "stage"}
    return [*entries, {"stage": "in all", **whole}] if len(entries) > 1 else entries


def devices(trials: Iterable[Row]) -> list[tuple[str, int]]:
    """Return the devices that trials ran on, each with their number."""
    return Counter(row["device"] for row in trials if row["device"]).most_common()


def span(trials: Iterable[Row]) -> str:
    """Return the time from the first trial's start to the last one's end in words; empty where it is not known."""
    times = [row[name] for row in trials for name in ("started", "ended") if isinstance(row[name], datetime)]
    return words.span((max(times) - min(times)).total_seconds()) if len(times) > 1 else ""


def _of(rows: Iterable[Row], key: tuple[str, str]) -> list[Row]:
    return [row for row in rows if (row["objective"], row["pretrain_id"]) == key]


def _sum(values: Iterable[Any]) -> Any:
    """Return the sum of what is known, None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
