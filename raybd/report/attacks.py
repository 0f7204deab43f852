"""What the report says of each attack, and of triggers that were not planted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from raybd.records import trigger_text
from raybd.report import words
from raybd.report.words import Row


def planted(plan: Sequence[Row]) -> list[dict[str, Any]]:
    """Return trigger, target and number of pairs of each attack of a poison plan."""
    found = Counter((row["trigger"], row["target_class"]) for row in plan)
    return [
        {"trigger": trigger_text(trigger), "target": target, "pairs": pairs}
        for (trigger, target), pairs in found.items()
    ]


def tried(attacks: Sequence[Row]) -> list[dict[str, Any]]:
    """Return how each trigger works on the poisoned models, after the last epoch of pretraining, halves together.

    Args:
        attacks: rows of the `attacks` table.
    """
    poisoned = [row for row in attacks if row["trial_id"] is None]
    last: dict[tuple[str, str], int] = {}
    for row in poisoned:
        key = (row["objective"], row["pretrain_id"])
        last[key] = max(last.get(key, 0), row["epoch"])
    names = words.objective_names(poisoned)
    pooled: dict[tuple[str, str, str, str], list[int]] = {}
    for row in poisoned:
        key = (row["objective"], row["pretrain_id"])
        if row["epoch"] == last[key]:
            counts = pooled.setdefault((names[key], row["role"], row["trigger"], row["target_class"]), [0, 0])
            counts[0] += row["hit_target"]
            counts[1] += row["n_triggered"]
    found = []
    for (name, role, trigger, target), (hits, n) in pooled.items():
        found.append(
            {
                "name": name,
                "role": role,
                "trigger": trigger_text(trigger),
                "target": target,
                "percent": words.percent(hits / n),
                "interval": words.interval({"hits": hits, "n": n}, "hits", "n"),
                "counts": f"{hits} of {n}",
            }
        )
    return found
