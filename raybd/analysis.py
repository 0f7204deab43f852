"""Everything that is measured of a run, or of several: pure functions of table rows, and of `Run`, which holds them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raybd import attainment, differences, fronts, measures, tables
from raybd.fronts import Key, Standing
from raybd.points import COLUMNS, TRIAL_COLUMNS, Points, Row, Trials
from raybd.pools import Pool, gather
from raybd.store import Store


@dataclass(frozen=True)
class Run:
    """The rows of a run that measures are made of.

    Attributes:
        name: how the run is called: its directory, unless another name is given.
        epochs, trials: rows of these tables.
    """

    name: str
    epochs: Sequence[Row]
    trials: Sequence[Row]

    @staticmethod
    def read(uri: str, *, name: str = "") -> Run:
        """Return a run from the tables in its directory, a path or `s3://…`, with the columns that measures look at.

        Errors: as of `tables.read`.
        """
        store = Store(uri)
        trials = tables.read(store, "trials", columns=TRIAL_COLUMNS, encoded=True)
        epochs = tables.read(store, "epochs", columns=COLUMNS, encoded=True)
        return Run(name or uri, Points.of_table(epochs), Trials(trials))

    @cached_property
    def fronts(self) -> list[dict[str, Any]]:
        """Rows of the `fronts` table."""
        return fronts.compute(self.points, self.standing)

    @cached_property
    def points(self) -> Points:
        """Rows of the `epochs` table as columns."""
        return Points.of(self.epochs)

    @cached_property
    def standing(self) -> Standing:
        """What the `trials` table says of the trials of `points`."""
        return Standing.of(self.points, self.trials)

    @property
    def quoted(self) -> str:
        """The images that points are quoted on, a split: those they are not chosen on, where there are halves."""
        return fronts.halves(self.points)[-1]

    @cached_property
    def groups(self) -> dict[Key, Points]:
        """Rows of the `epochs` table by (objective, pretrain_id, method)."""
        return fronts.groups(self.points)

    @cached_property
    def names(self) -> dict[tuple[str, str], str]:
        """A name for each (objective, pretrain_id)."""
        return fronts.objective_names({"objective": o, "pretrain_id": p} for o, p, _ in self.groups)

    @cached_property
    def pools(self) -> dict[tuple[str, str], Pool]:
        """What can be on a front of some of the trials, by (name of the objective, method)."""
        found: dict[tuple[str, str], Pool] = {}
        of_model: dict[tuple[str, str], Points] = {}
        for (objective, pretrain_id, method), rows in self.groups.items():
            everyone = of_model.setdefault((objective, pretrain_id), rows)  # the group of all methods comes first
            pool = gather(rows, self.standing, model=everyone)
            if pool:
                found[self.names[objective, pretrain_id], method] = pool
        return found

    def trials_named(self, ids: Collection[str]) -> Sequence[Row]:
        """Return the rows of these trials in the `trials` table, in their order."""
        if isinstance(self.trials, Trials):
            return self.trials.named(ids)
        return [row for row in self.trials if row["trial_id"] in ids]

    def front(self, key: Key) -> list[dict[str, Any]]:
        """Return the rows of a group's front of all epochs, on each half."""
        return [
            row
            for row in self.fronts
            if (row["objective"], row["pretrain_id"], row["method"], row["kind"]) == (*key, "any_epoch")
        ]


def of_run(run: Run, *, by_trial: bool = True) -> dict[str, Any]:
    """Return the measures of one run.

    Args:
        by_trial: say of each trial too how steady it is.

    Returns: `fronts` (`fronts.summarise`), `instability` and `defender` (one entry for each group; `measures`), and
        `batchnorm_refresh` (one entry for each poisoned model with such trials). Instability chooses nothing and is
        measured on the half that is quoted.
    """
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
        quoted = fronts.halves(rows)[-1]
        steady = measures.instability(rows.take(rows.having("split", quoted)), by_trial=by_trial)
        if steady:
            found["instability"].append({**same, "split": quoted, **steady})
            choices = measures.defenders_choice(rows, run.standing, run.front(key))
            found["defender"].append({**same, "choices": choices})
        # The group of all methods comes first: a refresh is compared with the front that is the hardest to beat.
        points = measures.refresh_baseline(rows, run.front(key)) if key[:2] not in refreshed else []
        if points:
            refreshed.add(key[:2])
            before = {
                split: dict(zip(("zeroshot_top1", "asr_top1"), fronts.baseline(rows, split), strict=True))
                for split in fronts.halves(rows)
            }
            found["batchnorm_refresh"].append({**same, "baseline": before, "points": points})
    return found


def named(found: Mapping[str, Any]) -> set[str]:
    """Return the trials of the blind choices and refreshed points that `of_run` has found."""
    points = [point for entry in found["defender"] for point in entry["choices"].values() if point]
    points += [point for entry in found["batchnorm_refresh"] for point in entry["points"]]
    return {point["trial_id"] for point in points}


def between_objectives(runs: Sequence[Run], **bootstrap: Any) -> list[dict[str, Any]]:
    """Return the differences between pretrain objectives, by cleaning method; see `differences.compare`.

    Args:
        runs: one run, or several that differ by their seed. An objective counts if every run has it.
        bootstrap: arguments of `differences.compare`.
    """
    pools: dict[str, dict[str, list[Pool]]] = {}
    for run in runs:
        for (name, method), pool in run.pools.items():
            pools.setdefault(method, {}).setdefault(name, []).append(pool)
    compared = []
    for method, by_name in pools.items():
        whole = {name: found for name, found in sorted(by_name.items()) if len(found) == len(runs)}
        compared += [{"method": method, **entry} for entry in differences.compare(whole, **bootstrap)]
    return compared


def between_runs(runs: Sequence[Run], **bootstrap: Any) -> list[dict[str, Any]]:
    """Return the differences between runs, by pretrain objective and cleaning method; see `differences.compare`.

    Args:
        runs: runs of any studies, each with a name of its own; compared where both have that objective and method.
        bootstrap: arguments of `differences.compare`.
    """
    pools: dict[tuple[str, str], dict[str, list[Pool]]] = {}
    for run in runs:
        for key, pool in run.pools.items():
            pools.setdefault(key, {})[run.name] = [pool]
    return [
        {"objective": objective, "method": method, **entry}
        for (objective, method), by_run in pools.items()
        for entry in differences.compare(by_run, **bootstrap)
    ]


def worths(runs: Sequence[Run], **bootstrap: Any) -> list[dict[str, Any]]:
    """Return what the front of each run, pretrain objective and method is worth; see `differences.worth`."""
    return [
        {"run": run.name, "objective": objective, "method": method, **entry}
        for run in runs
        for (objective, method), pool in run.pools.items()
        for entry in differences.worth(pool, **bootstrap)
    ]


def across_runs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the attainment surfaces over several runs, by objective and method; see `attainment.surfaces`.

    Each run gives its front of all epochs, as scored on the half that is quoted.
    """
    if len(runs) < 2:
        return []
    found: dict[tuple[str, str], list[tuple[list[float], list[float]]]] = {}
    for run in runs:
        for key, rows in run.groups.items():
            members = [row for row in run.front(key) if row["split"] == fronts.halves(rows)[-1]]
            points = [row["zeroshot_top1"] for row in members], [row["asr_top1"] for row in members]
            found.setdefault((run.names[key[:2]], key[2]), []).append(points)
    return [
        {"objective": name, "method": method, "runs": len(runs), "levels": attainment.surfaces(points)}
        for (name, method), points in found.items()
        if len(points) == len(runs)
    ]


def analyse(runs: Sequence[Run], *, by_trial: bool = True) -> dict[str, Any]:
    """Return every measure of these runs: each run's own (`of_run`), differences between objectives, attainment."""
    return {
        "runs": [of_run(run, by_trial=by_trial) for run in runs],
        "differences": between_objectives(runs),
        "attainment": across_runs(runs),
    }
