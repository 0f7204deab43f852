"""How numbers, settings and points are put for a reader, on paper and in a terminal alike."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
SPLITS = ("search", "report")
# Trial columns that every table of points shows, so that `params_json` need not repeat them.
_SHOWN = ("lr", "epochs", "loss_weights.mmcl", "loss_weights.ssl")


def percent(fraction: float | None, *, digits: int = 2) -> str:
    """Return a fraction in percent, without the sign; a dash for nothing."""
    if fraction is None or not math.isfinite(fraction):
        return "–"
    return f"{100 * fraction:.{digits}f}"


def number(value: object) -> str:
    """Return a setting as a reader would write it: 1e-4 for 0.0001, no trailing zeros; a dash for nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def weights(trial: Row | None) -> str:
    """Return a trial's loss weights as `mmcl / ssl`."""
    if trial is None:
        return "–"
    return f"{number(trial['loss_weights.mmcl'])} / {number(trial['loss_weights.ssl'])}"


def other_params(trial: Row) -> str:
    """Return the searched settings of a trial that have no column of their own in a table of points."""
    try:
        params = json.loads(trial["params_json"] or "{}")
    except json.JSONDecodeError:
        return ""
    return ", ".join(f"{name} {number(value)}" for name, value in sorted(params.items()) if name not in _SHOWN)


def settings(trial: Row | None) -> str:
    """Return a trial's settings in one line."""
    if trial is None:
        return "–"
    parts = [
        f"lr {number(trial['lr'])}",
        f"epochs {number(trial['epochs_planned'])}",
        f"weights {weights(trial)}",
        other_params(trial),
    ]
    return ", ".join(part for part in parts if part)


def objective_names(rows: Iterable[Row]) -> dict[tuple[str, str], str]:
    """Return a name for each (objective, pretrain_id), by objective; the id shows where an objective has several."""
    pairs = sorted({(row["objective"], row["pretrain_id"]) for row in rows})
    count = Counter(objective for objective, _ in pairs)
    return {(o, i): o if count[o] == 1 else f"{o} ({i})" for o, i in pairs}


@dataclass(frozen=True)
class Front:
    """One front with what its points score on both halves: entries of `fronts.summarise` that belong together."""

    name: str
    objective: str
    pretrain_id: str
    method: str
    kind: str
    search: Row
    report: Row

    def points(self) -> list[tuple[Row, Row]]:
        """Return the members, each as scored on the search and on the report half, by rising accuracy on the first."""
        found = {(row["trial_id"], row["epoch"]): row for row in self.report["front"]}
        return [(row, found[row["trial_id"], row["epoch"]]) for row in self.search["front"]]

    def within(self) -> list[tuple[str, Row | None, Row | None]]:
        """Return (points of accuracy given up, best point on the search half, the same on the report half)."""
        return self._chosen("best_asr_within")

    def under(self) -> list[tuple[str, Row | None, Row | None]]:
        """Return (ASR ceiling, most accurate point under it on the search half, the same on the report half)."""
        return self._chosen("best_top1_at_asr")

    def _chosen(self, rule: str) -> list[tuple[str, Row | None, Row | None]]:
        other = self.report[rule]
        return [(limit, row, other[limit]) for limit, row in self.search[rule].items()]


def pair(summaries: Iterable[Row]) -> list[Front]:
    """Put the search and the report half of each front together, in the order they come."""
    found: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in summaries:
        key = (row["objective"], row["pretrain_id"], row["method"], row["kind"])
        found.setdefault(key, {})[row["split"]] = row
    names = objective_names({"objective": key[0], "pretrain_id": key[1]} for key in found)
    return [
        Front(names[key[:2]], *key, search=halves["search"], report=halves["report"])
        for key, halves in found.items()
        if set(halves) == set(SPLITS)
    ]
