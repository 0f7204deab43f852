"""From the `epochs` table to the `fronts` table, and the summary that a reader wants of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from raybd import pareto

Row = Mapping[str, Any]
KINDS = ("any_epoch", "final")
WITHIN_POINTS = (1, 3, 5)
CEILINGS = (0.01, 0.05, 0.10)
_POINT = ("trial_id", "epoch", "zeroshot_top1", "asr_top1")
_SAME = ("study", "study_hash", "pretrain_id", "objective", "method", *_POINT)


def checkpoint_name(trial_id: str, epoch: int) -> str:
    """Return where a trial's weights after an epoch are, relative to the run directory."""
    return f"weights/{trial_id}/epoch-{epoch:04d}.safetensors"


def _groups(epochs: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    found: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in epochs:
        found[row["objective"], row["pretrain_id"], row["method"]].append(row)
    return dict(sorted(found.items()))


def _candidates(
    rows: Sequence[Row], kind: str, trial_order: Mapping[str, int], unfinished: Collection[str]
) -> list[Row]:
    """Return the `search` rows that compete: every epoch, or the last trained of each trial that came to its end.

    The uncleaned model counts in both; points without training (those with an `alpha`) are candidates, not ends.
    """
    searched = sorted(
        (row for row in rows if row["split"] == "search"),
        key=lambda row: (trial_order.get(row["trial_id"], 1 << 60), row["trial_id"], row["epoch"]),
    )
    if kind == "any_epoch":
        return searched
    searched = [row for row in searched if row.get("alpha") is None]
    last: dict[str, int] = {}
    for row in searched:
        last[row["trial_id"]] = max(row["epoch"], last.get(row["trial_id"], 0))
    return [
        row
        for row in searched
        if row["epoch"] == 0 or (row["epoch"] == last[row["trial_id"]] and row["trial_id"] not in unfinished)
    ]


def compute(epochs: Iterable[Row], trials: Iterable[Row]) -> list[dict[str, Any]]:
    """Compute every front of a run.

    Which points form a front is decided on the `search` half alone; the rows of the `report` half are the same
    points, with what they score there (where one may beat another). So nothing is chosen on the images reported.

    Args:
        epochs: rows of the `epochs` table.
        trials: rows of the `trials` table; they fix the order in which equal points are preferred.

    Returns: rows of the `fronts` table, by objective, method, kind, split and rising accuracy on the search half.
    """
    known = list(trials)
    number = {row["trial_id"]: row["number"] for row in known}
    unfinished = {row["trial_id"] for row in known if row.get("state", "complete") != "complete"}
    found: list[dict[str, Any]] = []
    for rows in _groups(epochs).values():
        by_point = {(row["trial_id"], row["epoch"], row["split"]): row for row in rows}
        for kind in KINDS:
            candidates = _candidates(rows, kind, number, unfinished)
            if not candidates:
                continue
            kept = pareto.front([r["zeroshot_top1"] for r in candidates], [r["asr_top1"] for r in candidates])
            members = [candidates[i] for i in kept]
            for split in ("search", "report"):
                points = [by_point[row["trial_id"], row["epoch"], split] for row in members]
                found += _front_rows(points, kind, split, _baseline(rows, split))
    return found


def _baseline(rows: Sequence[Row], split: str) -> tuple[float, float]:
    """Return accuracy and ASR of the poisoned model before cleaning, on one half."""
    for row in rows:
        if row["epoch"] == 0 and row["split"] == split:
            return row["zeroshot_top1"], row["asr_top1"]
    return float("nan"), float("nan")


def _front_rows(points: Sequence[Row], kind: str, split: str, baseline: tuple[float, float]) -> list[dict[str, Any]]:
    top1, asr = [row["zeroshot_top1"] for row in points], [row["asr_top1"] for row in points]
    area, parts = pareto.hypervolume(top1, asr), pareto.contributions(top1, asr)
    return [
        {
            **{name: row[name] for name in _SAME},
            "kind": kind,
            "split": split,
            "hv_contribution": float(part),
            "hypervolume": area,
            "checkpoint": (
                checkpoint_name(row["trial_id"], row["epoch"])
                if row["epoch"]
                else f"pretrained/{row['pretrain_id']}.safetensors"
            ),
            "baseline_top1": baseline[0],
            "baseline_asr": baseline[1],
        }
        for row, part in zip(points, parts, strict=True)
    ]


def summarise(fronts: Iterable[Row]) -> list[dict[str, Any]]:
    """Summarise fronts for a reader: one entry for each objective, method, kind and split.

    `best_asr_within` maps points of accuracy lost to the front point of lowest ASR, `best_top1_at_asr` maps an ASR
    ceiling to the most accurate one; both are chosen on the search half and quoted on the entry's own half.
    None where no point qualifies.
    """
    grouped: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in fronts:
        grouped[row["objective"], row["pretrain_id"], row["method"], row["kind"], row["split"]].append(row)
    found = []
    for (objective, pretrain_id, method, kind, split), rows in grouped.items():
        searched = grouped[objective, pretrain_id, method, kind, "search"]
        own = {(row["trial_id"], row["epoch"]): row for row in rows}
        top1 = np.array([row["zeroshot_top1"] for row in searched])
        asr = np.array([row["asr_top1"] for row in searched])
        base = searched[0]["baseline_top1"]

        def quote(
            index: int | None, searched: list[Row] = searched, own: dict[Any, Row] = own
        ) -> dict[str, Any] | None:
            if index is None:
                return None
            row = own[searched[index]["trial_id"], searched[index]["epoch"]]
            return {name: row[name] for name in ("trial_id", "epoch", "zeroshot_top1", "asr_top1", "checkpoint")}

        within = {p: quote(pareto.lowest_asr(top1, asr, floor=base - p / 100 - 1e-12)) for p in WITHIN_POINTS}
        at = {c: quote(pareto.highest_top1(top1, asr, ceiling=c)) for c in CEILINGS}
        found.append(
            {
                "objective": objective,
                "pretrain_id": pretrain_id,
                "method": method,
                "kind": kind,
                "split": split,
                "baseline": {"zeroshot_top1": rows[0]["baseline_top1"], "asr_top1": rows[0]["baseline_asr"]},
                "hypervolume": rows[0]["hypervolume"],
                "best_asr_within": {str(points): point for points, point in within.items()},
                "best_top1_at_asr": {str(ceiling): point for ceiling, point in at.items()},
                "front": [
                    {
                        name: row[name]
                        for name in ("trial_id", "epoch", "zeroshot_top1", "asr_top1", "hv_contribution", "checkpoint")
                    }
                    for row in rows
                ],
            }
        )
    return found
