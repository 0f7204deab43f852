"""The measures of a run row by row, in plain Python: what the columns of the product must give too.

Of a front's own rows and summary, the numbers of a pool and what is made of its resamples it takes the product's.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raybd import differences, fronts, measures, pareto, pools
from raybd.fronts import Key
from raybd.points import Floats, Row
from raybd.pools import Pool


@dataclass(frozen=True)
class Run:
    """Rows of the tables `epochs` and `trials` of a run."""

    name: str
    epochs: Sequence[Row]
    trials: Sequence[Row]

    @cached_property
    def fronts(self) -> list[dict[str, Any]]:
        return compute(self.epochs, self.trials)

    @cached_property
    def groups(self) -> dict[Key, list[Row]]:
        return groups(self.epochs)

    @cached_property
    def names(self) -> dict[tuple[str, str], str]:
        return fronts.objective_names({"objective": o, "pretrain_id": p} for o, p, _ in self.groups)

    def front(self, key: Key) -> list[dict[str, Any]]:
        same = ("objective", "pretrain_id", "method", "kind")
        return [row for row in self.fronts if tuple(row[name] for name in same) == (*key, "any_epoch")]


def front(top1: ArrayLike, asr: ArrayLike) -> NDArray[np.int64]:
    """Return the indices of the points that no other point beats, by rising accuracy."""
    accuracy_N, asr_N = np.asarray(top1), np.asarray(asr)
    # By falling accuracy, then rising ASR, then position: a point stays if its ASR is below all before it.
    order = np.lexsort((np.arange(len(asr_N)), asr_N, -accuracy_N))
    kept, lowest = [], np.inf
    for i in order:
        if asr_N[i] < lowest:
            kept.append(i)
            lowest = asr_N[i]
    return np.asarray(kept[::-1], dtype=np.int64)


def halves(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the splits of these rows: first the one that points are chosen on, last the one they are quoted on."""
    return fronts.HALVES if any(row["split"] == "search" for row in rows) else fronts.WHOLE


def groups(epochs: Iterable[Row]) -> dict[Key, list[Row]]:
    """Return the rows by (objective, pretrain_id, method); those of several methods are also together, as `all`."""
    found: dict[Key, list[Row]] = defaultdict(list)
    for row in epochs:
        found[row["objective"], row["pretrain_id"], row["method"]].append(row)
    methods = Counter(key[:2] for key in found)
    for key, rows in list(found.items()):
        if methods[key[:2]] > 1:
            found[*key[:2], fronts.ALL_METHODS] += rows
    return dict(sorted(found.items(), key=lambda item: (item[0][:2], item[0][2] != fronts.ALL_METHODS, item[0][2])))


def trial_order(trials: Iterable[Row]) -> dict[str, int]:
    """Return the place of each trial: of equal points that of the lowest number is preferred."""
    return {row["trial_id"]: row["number"] for row in trials if row["number"] is not None}


def candidates(rows: Iterable[Row], kind: str, order: Mapping[str, int], unfinished: Collection[str] = ()) -> list[Row]:
    """Return the rows that compete, as scored on the half that points are chosen on."""
    rows = list(rows)
    chosen_on = halves(rows)[0]
    searched = sorted(
        (row for row in rows if row["split"] == chosen_on),
        key=lambda row: (order.get(row["trial_id"], 1 << 60), row["trial_id"], row["epoch"]),
    )
    if kind == "any_epoch":
        return searched
    trained = [row for row in searched if row.get("alpha") is None]
    last: dict[str, int] = {}
    for row in trained:
        last[row["trial_id"]] = max(row["epoch"], last.get(row["trial_id"], 0))
    return [
        row
        for row in trained
        if row["epoch"] == 0 or (row["epoch"] == last[row["trial_id"]] and row["trial_id"] not in unfinished)
    ]


def unfinished_trials(trials: Iterable[Row]) -> set[str]:
    """Return the trials that did not come to their end: their last epoch is only where they stopped."""
    return {row["trial_id"] for row in trials if row.get("state", "complete") != "complete"}


def compute(epochs: Iterable[Row], trials: Iterable[Row]) -> list[dict[str, Any]]:
    """Compute every front of a run."""
    known = list(trials)
    order, unfinished = trial_order(known), unfinished_trials(known)
    found: list[dict[str, Any]] = []
    before: dict[tuple[str, str, str], tuple[float, float]] = {}
    # The group of all methods comes first, so all groups of a model have one baseline.
    for (objective, pretrain_id, method), rows in groups(epochs).items():
        by_point = {(row["trial_id"], row["epoch"], row["split"]): row for row in rows}
        for kind in fronts.KINDS:
            competing = candidates(rows, kind, order, unfinished)
            if not competing:
                continue
            kept = front([r["zeroshot_top1"] for r in competing], [r["asr_top1"] for r in competing])
            members = [competing[i] for i in kept]
            for split in halves(rows):
                points = [by_point[row["trial_id"], row["epoch"], split] for row in members]
                same = {"method": method, "kind": kind, "split": split}
                model = (objective, pretrain_id, split)
                found += fronts._front_rows(points, same, before.setdefault(model, baseline(rows, split)))
    return found


def baseline(rows: Iterable[Row], split: str) -> tuple[float, float]:
    """Return accuracy and ASR of the poisoned model before cleaning, on one half; NaN if it was not measured."""
    measured = [(r["zeroshot_top1"], r["asr_top1"]) for r in rows if r["epoch"] == 0 and r["split"] == split]
    return max(measured, default=(float("nan"), float("nan")))


def instability(
    rows: Iterable[Row],
    *,
    top1_tolerance: float = measures.TOP1_TOLERANCE,
    asr_tolerance: float = measures.ASR_TOLERANCE,
) -> dict[str, Any] | None:
    """Say how steady the trials of a group are; None if none has an epoch after the poisoned model."""
    courses: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["epoch"]):
        if row.get("alpha") is None:
            courses[row["trial_id"]].append(row)
    found = []
    for trial_id, course in courses.items():
        if course[-1]["epoch"] == 0:
            continue
        top1, asr = [row["zeroshot_top1"] for row in course], [row["asr_top1"] for row in course]
        best = course[pareto.largest_area(top1, asr)]["epoch"]
        found.append(
            {
                "trial_id": trial_id,
                "steps": len(course) - 1,
                "unstable_steps": sum(
                    a - b > top1_tolerance + fronts.SLACK and t - s > asr_tolerance + fronts.SLACK
                    for (a, s), (b, t) in pairwise(zip(top1, asr, strict=True))
                ),
                "rebound": asr[-1] - min(asr),
                "best_epoch": best,
                "best_at": best / course[-1]["epoch"],
            }
        )
    if not found:
        return None
    steps, unstable = sum(t["steps"] for t in found), sum(t["unstable_steps"] for t in found)
    places = [trial["best_at"] for trial in found]
    return {
        "top1_tolerance": top1_tolerance,
        "asr_tolerance": asr_tolerance,
        "trials": len(found),
        "steps": steps,
        "unstable_steps": unstable,
        # A run that resumed from a lone row has no step.
        "unstable_share": unstable / steps if steps else None,
        "rebound": statistics.fmean(trial["rebound"] for trial in found),
        "best_at": statistics.fmean(places),
        "best_at_median": statistics.median(places),
        "by_trial": found,
    }


def _quoted(row: Row, rows: Iterable[Row], members: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Return a point with its scores and its regret on each half."""
    own = {r["split"]: r for r in rows if (r["trial_id"], r["epoch"]) == (row["trial_id"], row["epoch"])}
    return {
        "trial_id": row["trial_id"],
        "epoch": row["epoch"],
        "method": row["method"],
        "scores": {
            split: {
                "zeroshot_top1": r["zeroshot_top1"],
                "asr_top1": r["asr_top1"],
                **measures.regret(r["zeroshot_top1"], r["asr_top1"], members[split]),
            }
            for split, r in own.items()
        },
    }


def defenders_choice(
    rows: Sequence[Row], trials: Sequence[Row], front: Iterable[Row]
) -> dict[str, dict[str, Any] | None]:
    """Return what a defender who does not know the trigger would have taken from a group, and the regret of it."""
    order, unfinished = trial_order(trials), unfinished_trials(trials)
    members: dict[str, list[Row]] = defaultdict(list)
    for row in front:
        members[row["split"]].append(row)

    def competing(kind: str) -> list[Row]:
        # An alpha of 0 is the poisoned model itself.
        found = candidates(rows, kind, order, unfinished)
        return [row for row in found if row["epoch"] > 0 and row.get("alpha") != 0]

    def best(found: Sequence[Row], score: Callable[[Row], float]) -> dict[str, Any] | None:
        return _quoted(max(found, key=score), rows, members) if found else None

    every = competing("any_epoch")
    return {
        measures.Rule.LOWEST_LOSS.value: best([r for r in every if _finite(r.get("loss"))], lambda row: -row["loss"]),
        measures.Rule.HIGHEST_TOP1.value: best(every, lambda row: row["zeroshot_top1"]),
        measures.Rule.LAST_EPOCH.value: best(competing("final"), lambda row: row["zeroshot_top1"]),
    }


def _finite(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))


def refresh_baseline(rows: Sequence[Row], front: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the points that only had their BatchNorm statistics refreshed, best first: a baseline of its own."""
    members: dict[str, list[Row]] = defaultdict(list)
    for row in front:
        members[row["split"]].append(row)
    refreshed = [row for row in rows if row["method"] == measures.REFRESH and row["epoch"] > 0]
    chosen_on = halves(rows)[0]
    points = [row for row in refreshed if row["split"] == chosen_on]
    points.sort(key=lambda row: (-row["zeroshot_top1"] * (1 - row["asr_top1"]), row["trial_id"], row["epoch"]))
    return [_quoted(row, refreshed, members) for row in points]


def pool(rows: Sequence[Row], trials: Iterable[Row], *, model: Sequence[Row] | None = None) -> Pool | None:
    """Gather the points of one group; None without a trial, or without the poisoned model's accuracy."""
    splits = halves(rows)
    before, quoted_before = (baseline(model or rows, split)[0] for split in (splits[0], splits[-1]))
    order = trial_order(trials)
    by_trial: dict[str, list[Row]] = {}
    start: Row | None = None
    for row in candidates(rows, "any_epoch", order):
        if row["epoch"] > 0:
            by_trial.setdefault(row["trial_id"], []).append(row)
        elif start is None:
            start = row
    if not by_trial or start is None or not (before > 0 and quoted_before > 0):
        return None
    points = [(-1, start)]
    for number, course in enumerate(by_trial.values()):
        # What a trial's own front leaves out is on no front that the trial is part of.
        kept = front([r["zeroshot_top1"] for r in course], [r["asr_top1"] for r in course])
        points += [(number, course[i]) for i in sorted(kept)]
    quoted = {(r["trial_id"], r["epoch"]): r for r in rows if r["split"] == splits[-1]}
    points.sort(key=lambda point: (-point[1]["zeroshot_top1"], point[1]["asr_top1"]))
    chosen = [row for _, row in points]
    elsewhere = [quoted[row["trial_id"], row["epoch"]] for row in chosen]
    return PlainPool(
        trial_P=np.array([number for number, _ in points]),
        top1_P=np.array([row["zeroshot_top1"] for row in chosen]),
        asr_P=np.array([row["asr_top1"] for row in chosen]),
        quoted_top1_P=np.array([row["zeroshot_top1"] for row in elsewhere]),
        quoted_asr_P=np.array([row["asr_top1"] for row in elsewhere]),
        num_trials=len(by_trial),
        before=before,
        quoted_before=quoted_before,
    )


class PlainPool(Pool):
    """A pool whose selections are looked at one by one, and as a whole."""

    def values(self, included_RT: NDArray[np.bool_]) -> Floats:
        """Return the measures of selections of trials, shape [R, 3]."""
        return np.array([self._measures(included_T) for included_T in included_RT]).reshape(-1, 3)

    def _measures(self, included_T: NDArray[np.bool_]) -> tuple[float, float, float]:
        competing = np.flatnonzero((self.trial_P < 0) | included_T[self.trial_P])
        members = competing[front(self.top1_P[competing], self.asr_P[competing])]  # by rising accuracy
        under = members[self.asr_P[members] <= pools.CEILING]
        within = members[self.top1_P[members] >= self.before - pools.POINTS_LOST - fronts.SLACK]
        return (
            pareto.hypervolume(self.quoted_top1_P[members], self.quoted_asr_P[members]) / self.quoted_before,
            self.quoted_top1_P[under[-1]] if len(under) else np.nan,
            self.quoted_asr_P[within[0]] if len(within) else np.nan,
        )

    def resampled(self, count: int, generator: np.random.Generator) -> Floats:
        """Return the measures of as many draws of trials with replacement, shape [count, 3]."""
        drawn_RT = generator.integers(0, self.num_trials, size=(count, self.num_trials))
        included_RT = np.zeros(drawn_RT.shape, dtype=bool)
        np.put_along_axis(included_RT, drawn_RT, values=True, axis=1)
        return self.values(included_RT)


def of_run(run: Run) -> dict[str, Any]:
    """Return the measures of one run."""
    found: dict[str, Any] = {
        "run": run.name,
        "fronts": fronts.summarise(run.fronts),
        "instability": [],
        "defender": [],
        "batchnorm_refresh": [],
    }
    refreshed = set()
    for key, rows in run.groups.items():
        same = dict(zip(("objective", "pretrain_id", "method"), key, strict=True))
        quoted = halves(rows)[-1]
        steady = instability(row for row in rows if row["split"] == quoted)
        if steady:
            found["instability"].append({**same, "split": quoted, **steady})
            choices = defenders_choice(rows, run.trials, run.front(key))
            found["defender"].append({**same, "choices": choices})
        # The group of all methods comes first: a refresh is compared with the front that is the hardest to beat.
        points = refresh_baseline(rows, run.front(key)) if key[:2] not in refreshed else []
        if points:
            refreshed.add(key[:2])
            before = {
                split: dict(zip(("zeroshot_top1", "asr_top1"), baseline(rows, split), strict=True))
                for split in halves(rows)
            }
            found["batchnorm_refresh"].append({**same, "baseline": before, "points": points})
    return found


def between_objectives(runs: Sequence[Run], **bootstrap: Any) -> list[dict[str, Any]]:
    """Return the differences between pretrain objectives, by cleaning method; see `differences.compare`."""
    pools: dict[str, dict[str, list[Pool]]] = {}
    for run in runs:
        of_model: dict[tuple[str, str], list[Row]] = {}
        for (objective, pretrain_id, method), rows in run.groups.items():
            everyone = of_model.setdefault((objective, pretrain_id), rows)  # the group of all methods comes first
            found = pool(rows, run.trials, model=everyone)
            if found:
                pools.setdefault(method, {}).setdefault(run.names[objective, pretrain_id], []).append(found)
    compared = []
    for method, by_name in pools.items():
        whole = {name: found for name, found in sorted(by_name.items()) if len(found) == len(runs)}
        compared += [{"method": method, **entry} for entry in differences.compare(whole, **bootstrap)]
    return compared
