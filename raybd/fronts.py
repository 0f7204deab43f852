"""From the `epochs` table to the `fronts` table, and the summary that a reader wants of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raybd import pareto
from raybd.columns import grouped
from raybd.metrics import SPLITS
from raybd.points import Points, Row
from raybd.points import standing as trial_standing

Key = tuple[str, str, str]
KINDS = ("any_epoch", "final")
# The half on which points are chosen and the one on which they are quoted; or the only one, for both.
HALVES, WHOLE = SPLITS, ("all",)
# The name of the group that holds every method's trials, where a study has several.
ALL_METHODS = "all"
WITHIN_POINTS = (0.5, 1, 2, 3, 5, 10)
CEILINGS = (0.01, 0.05, 0.10)
# Accuracies are shares of counted images: less than this apart they are the same.
SLACK = 1e-12
_KEY = ("objective", "pretrain_id", "method")
_POINT = ("trial_id", "epoch", "zeroshot_top1", "asr_top1")
_SAME = ("study", "study_hash", "pretrain_id", "objective", *_POINT)


def checkpoint_name(trial_id: str, epoch: int) -> str:
    """Return where a trial's weights after an epoch are, relative to the run directory."""
    return f"weights/{trial_id}/epoch-{epoch:04d}.safetensors"


def objective_names(rows: Iterable[Row]) -> dict[tuple[str, str], str]:
    """Return a name for each (objective, pretrain_id), by objective; the id shows where an objective has several."""
    pairs = sorted({(row["objective"], row["pretrain_id"]) for row in rows})
    count = Counter(objective for objective, _ in pairs)
    return {(o, i): o if count[o] == 1 else f"{o} ({i})" for o, i in pairs}


def halves(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the splits of these rows: first the one that points are chosen on, last the one they are quoted on.

    A study has `search` and `report`. Results of others, in which every image was counted once, have `all` alone.
    """
    return HALVES if Points.of(rows).having("split", "search").any() else WHOLE


def groups(epochs: Iterable[Row]) -> dict[Key, Points]:
    """Return the rows by (objective, pretrain_id, method); those of several methods are also together, as `all`."""
    points = Points.of(epochs)
    found: dict[Key, NDArray[np.int64]] = {}
    for index in grouped(*points.key(*_KEY)):
        # Texts of a group stand in its first row.
        objective, pretrain_id, method = (points.texts[name][points.column(name)[index[0]]] for name in _KEY)
        found[objective, pretrain_id, method] = index
    methods = Counter(key[:2] for key in found)
    for model, count in methods.items():
        if count > 1:
            own = [found[key] for key in found if key[:2] == model]
            found[*model, ALL_METHODS] = np.concatenate(own)
    ordered = sorted(found.items(), key=lambda item: (item[0][:2], item[0][2] != ALL_METHODS, item[0][2]))
    return {key: points if len(found) == 1 else points.take(index) for key, index in ordered}


@dataclass(frozen=True)
class Standing:
    """What the table `trials` says of the trials whose codes some points have.

    Attributes:
        rank_T: the place of each trial: of equal points that of the lowest number is preferred.
        unfinished_T: trials that did not come to their end: their last epoch is only where they stopped.
    """

    rank_T: NDArray[np.int64]
    unfinished_T: NDArray[np.bool_]

    @staticmethod
    def of(points: Points, trials: Iterable[Row] | Standing) -> Standing:
        """Return the standing of these points' trials."""
        if isinstance(trials, Standing):
            return trials
        ids = [name or "" for name in points.texts["trial_id"]]
        row_N, names, number_N, complete_N = trial_standing(trials)
        if list(names) == list(points.texts["trial_id"]):
            code_N = row_N  # most tables come in the same order
        else:
            codes = {name: code for code, name in enumerate(ids)}
            code_N = np.array([codes.get(name or "", -1) for name in names], dtype=np.int64)[row_N]
        number_T, unfinished_T = np.full(len(ids), 1 << 60), np.zeros(len(ids), dtype=bool)
        numbered_N = (code_N >= 0) & (number_N >= 0)
        number_T[code_N[numbered_N]] = number_N[numbered_N]
        unfinished_T[code_N[(code_N >= 0) & ~complete_N]] = True
        id_T = np.zeros(len(ids), dtype=np.int64)
        if (np.diff(np.sort(number_T)) == 0).any():
            id_T[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
        rank_T = np.empty(len(ids), dtype=np.int64)
        rank_T[np.lexsort((id_T, number_T))] = np.arange(len(ids))
        return Standing(rank_T, unfinished_T)

    def order(self, points: Points, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return rows of these points in the order in which equal ones are preferred: by trial, then by epoch."""
        rank_N, epoch_N = self.rank_T[points.column("trial_id")[rows]], points.column("epoch")[rows]
        key_N = rank_N * (int(epoch_N.max(initial=0)) + 1) + epoch_N
        return rows[np.argsort(key_N, kind="stable")]


def candidates(points: Points, kind: str, standing: Standing) -> NDArray[np.bool_]:
    """Say which rows compete: of the half that points are chosen on, shape [N].

    Args:
        points: of one group.
        kind: `any_epoch`, or `final`: the last epoch of each trial that came to its end. The uncleaned model counts
            in both; a point made without training (one that has an `alpha`) only in the first.
        standing: of their trials.
    """
    searched_N = points.having("split", halves(points)[0])
    if kind == "any_epoch":
        return searched_N
    trained_N = searched_N & ~points.column("mixed")
    trial_N, epoch_N = points.column("trial_id"), points.column("epoch")
    last_T = np.zeros(len(standing.rank_T), dtype=np.int64)
    np.maximum.at(last_T, trial_N[trained_N], epoch_N[trained_N])
    ended_N = (epoch_N == last_T[trial_N]) & ~standing.unfinished_T[trial_N]
    return np.asarray(trained_N & ((epoch_N == 0) | ended_N))


def compute(epochs: Iterable[Row], trials: Iterable[Row] | Standing) -> list[dict[str, Any]]:
    """Compute every front of a run.

    Which points form a front is decided on the `search` half alone; the rows of the `report` half are the same
    points, with what they score there (where one may beat another). So nothing is chosen on the images reported.
    Where the rows know one split only, `all`, points are chosen and quoted on the same images.

    Args:
        epochs: rows of the `epochs` table.
        trials: rows of the `trials` table; they fix the order in which equal points are preferred.

    Returns: rows of the `fronts` table, by objective, method, kind, split and rising accuracy on the search half.
        Where a model was cleaned by several methods, `method` is `all` in the rows of the front over all of them.
    """
    every = Points.of(epochs)
    standing = Standing.of(every, trials)
    found: list[dict[str, Any]] = []
    before: dict[tuple[str, str, str], tuple[float, float]] = {}
    # The group of all methods comes first, so all groups of a model have one baseline.
    for (objective, pretrain_id, method), points in groups(every).items():
        for kind in KINDS:
            competing = np.flatnonzero(candidates(points, kind, standing))
            if not len(competing):
                continue
            top1_N, asr_N = points.column("zeroshot_top1"), points.column("asr_top1")
            competing = competing[pareto.contenders(top1_N[competing], asr_N[competing])]
            competing = standing.order(points, competing)
            kept = competing[pareto.front(top1_N[competing], asr_N[competing])]
            members = list(points.take(kept))
            by_point = {(row["trial_id"], row["epoch"], row["split"]): row for row in points.same_points(kept)}
            for split in halves(points):
                rows = [by_point[row["trial_id"], row["epoch"], split] for row in members]
                same = {"method": method, "kind": kind, "split": split}
                model = (objective, pretrain_id, split)
                if model not in before:
                    before[model] = baseline(points, split)
                found += _front_rows(rows, same, before[model])
    return found


def baseline(rows: Iterable[Row], split: str) -> tuple[float, float]:
    """Return accuracy and ASR of the poisoned model before cleaning, on one half; NaN if it was not measured.

    Of several measurements (published runs measured it anew each time) the most accurate, so that no point is said
    to cost less than it may have; the order of the rows does not matter.
    """
    points = Points.of(rows)
    measured_N = points.having("split", split) & (points.column("epoch") == 0)
    if not measured_N.any():
        return float("nan"), float("nan")
    top1_N, asr_N = points.column("zeroshot_top1")[measured_N], points.column("asr_top1")[measured_N]
    return float(top1_N.max()), float(asr_N[top1_N == top1_N.max()].max())


def _front_rows(points: Sequence[Row], same: Row, before: tuple[float, float]) -> list[dict[str, Any]]:
    top1, asr = [row["zeroshot_top1"] for row in points], [row["asr_top1"] for row in points]
    area, parts = pareto.hypervolume(top1, asr), pareto.contributions(top1, asr)
    return [
        {
            **{name: row[name] for name in _SAME},
            "alpha": row.get("alpha"),
            **same,
            "hv_contribution": float(part),
            "hypervolume": area,
            "checkpoint": _checkpoint(row),
            "baseline_top1": before[0],
            "baseline_asr": before[1],
        }
        for row, part in zip(points, parts, strict=True)
    ]


def _checkpoint(row: Row) -> str | None:
    """Return where a point's weights are; none for the results of others, which come as numbers only."""
    if row["split"] in WHOLE:
        return None
    if row["epoch"]:
        return checkpoint_name(row["trial_id"], row["epoch"])
    return f"pretrained/{row['pretrain_id']}.safetensors"


def share_lost(top1: float, before: float) -> float | None:
    """Return the accuracy lost as a share of the accuracy before: below 0 for a gain, None without a baseline."""
    return (before - top1) / before if before > 0 else None


def summarise(fronts: Iterable[Row]) -> list[dict[str, Any]]:
    """Summarise fronts for a reader: one entry for each objective, method, kind and split.

    `best_asr_within` maps points of accuracy lost to the front point of lowest ASR, `best_top1_at_asr` maps an ASR
    ceiling to the most accurate one; both are chosen on the search half and quoted on the entry's own half.
    None where no point qualifies. `share_lost` is the accuracy that a point gives up, as a share of the baseline's;
    `hypervolume_share` see `pareto.hypervolume_share`.
    """
    grouped: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in fronts:
        grouped[row["objective"], row["pretrain_id"], row["method"], row["kind"], row["split"]].append(row)
    return [
        _summary(rows, grouped.get((*key[:4], HALVES[0]), rows), dict(zip(_ENTRY, key, strict=True)))
        for key, rows in grouped.items()
    ]


_ENTRY = ("objective", "pretrain_id", "method", "kind", "split")


def _summary(rows: Sequence[Row], searched: Sequence[Row], entry: Row) -> dict[str, Any]:
    """Summarise the rows of one front on one half, given the same points on the half that they are chosen on."""
    own = {(row["trial_id"], row["epoch"]): row for row in rows}
    top1 = np.array([row["zeroshot_top1"] for row in searched])
    asr = np.array([row["asr_top1"] for row in searched])
    before = rows[0]["baseline_top1"]

    def quote(index: int | None) -> dict[str, Any] | None:
        if index is None:
            return None
        row = own[searched[index]["trial_id"], searched[index]["epoch"]]
        return {
            **{name: row[name] for name in (*_POINT, "alpha", "checkpoint")},
            "share_lost": share_lost(row["zeroshot_top1"], before),
        }

    floors = {p: searched[0]["baseline_top1"] - p / 100 - SLACK for p in WITHIN_POINTS}
    return {
        **entry,
        "baseline": {"zeroshot_top1": before, "asr_top1": rows[0]["baseline_asr"]},
        "hypervolume": rows[0]["hypervolume"],
        "hypervolume_share": pareto.hypervolume_share(rows[0]["hypervolume"], before),
        "best_asr_within": {str(p): quote(pareto.lowest_asr(top1, asr, floor=floor)) for p, floor in floors.items()},
        "best_top1_at_asr": {str(c): quote(pareto.highest_top1(top1, asr, ceiling=c)) for c in CEILINGS},
        "front": [{name: row[name] for name in (*_POINT, "alpha", "hv_contribution", "checkpoint")} for row in rows],
    }
