"""A study in its run directory: Ray, the search, and what becomes of its trials; whether they train or not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from raybd import fronts, run_record, tables, tracking
from raybd.assignment import CarryOut, remove_leftovers, seconds_before, settle
from raybd.console import SearchView, View
from raybd.errors import StudyError
from raybd.growing_fronts import GrowingFronts
from raybd.ledger import Entry, Kind, Ledger, State, reading
from raybd.points import Points, Row
from raybd.records import attack_rows, epoch_rows, pretrain_rows, trial_row
from raybd.report import progress
from raybd.report.progress import Meter, Progress, SearchState
from raybd.store import Store
from raybd.study import FREE_SETTINGS, Resources, Study, differences
from raybd.tracking import Measured, Tracking


@dataclass(frozen=True)
class Outcome:
    """What a call to `run` leaves: how many trials and pretraining runs failed, and the path of the report."""

    failed: int
    failed_pretraining: int
    report: str


class StudyDirectory:
    """A run directory and the study that it holds.

    Args:
        address: of a Ray cluster; None uses this machine.

    Attributes:
        kind: what the record of the directory says it holds.
        keeps_weights: its trials leave models behind.
        earlier: the record that an earlier call left; None in a new directory.
        share: what the study has of the cluster, while there is one.
        failed_pretraining: why pretraining failed in this call, by objective.

        tracking: what gives TensorBoard and others their copies.

    Errors: StudyError where the directory holds another study; ClusterError where a tracker that the study asks for is
        not installed.
    """

    kind = "study"
    keeps_weights = True

    def __init__(self, study: Study, store: Store, view: View, *, address: str | None = None) -> None:
        tracking.require(study.record)
        self.study, self.store, self.view, self.address = study, store, view, address
        self.tracking = Tracking(store, tracking.open_trackers(store, study))
        self.ledger = Ledger(store)
        self.share: Any = None
        self.failed_pretraining: dict[str, str] = {}
        self._trial_rows: dict[str, dict[str, Any]] = {}
        self._fronts, self._front_rows = GrowingFronts(), dict[str, list[dict[str, Any]]]()
        self._areas: dict[str, progress.Areas] = {}  # as they were when the tables were read
        # By trial that has not ended: the weights of its epochs in the tables, but of the last one planned, which is on
        # the front `final` only once the trial has ended.
        self._measured: dict[str, set[str]] = {}
        self.earlier = self.record(study, store)

    @classmethod
    def record(cls, study: Study, store: Store) -> dict[str, Any] | None:
        """Return the record of a run directory to go on with; None for a new one, or one where nothing was done.

        Errors: StudyError where the directory holds another study.
        """
        if not store.exists("study.json"):
            return None
        earlier = run_record.read(store)
        kind = earlier.get("kind", "study")
        if kind != cls.kind:
            raise StudyError(
                f"this run directory holds another thing: {kind}", where=store.uri, fix="give another --run-dir"
            )
        if not store.names("ledger"):
            return None
        changed = [
            found
            for found in differences(earlier["study"], study.resolved())
            if not found.partition(":")[0].startswith(FREE_SETTINGS)
        ]
        if changed:
            raise StudyError(
                "this run directory holds another study: " + "; ".join(changed),
                where=store.uri,
                fix="give another --run-dir, or undo the changes",
            )
        return earlier

    @contextmanager
    def cluster(self, resources: Resources | None = None) -> Iterator[None]:
        """Connect to Ray for the length of a `with`; `resources` stand in for the study's own."""
        from raybd.cluster.session import session

        with ExitStack() as stack:
            with self.view.live("starting Ray"):
                self.share = stack.enter_context(session(resources or self.study.resources, address=self.address))
            for what in self.share.missing:
                self.view.warn(f"{what}: waiting for the cluster to grow")
            yield

    def trials(self, ids: dict[str, str]) -> tuple[int, int]:
        """Return how many trials the study has in all, and how many have ended."""
        from raybd.cluster.searcher import LedgerSearcher

        entries = self.ledger.entries(Kind.TRIAL)
        ended = sum(e.ended is not None and e.started["pretrain_id"] in ids.values() for e in entries)
        searcher = LedgerSearcher(
            self.study, ids, entries, lambda task: settle(self.store, self.study, task), stop=lambda *_: False
        )
        return ended + searcher.remaining, ended

    def run_trials(self, ids: dict[str, str], carry_out: CarryOut) -> None:
        """Run the trials that have not ended, each as `carry_out` does it."""
        from raybd.cluster.search import run_search

        total, ended = self.trials(ids)
        if total == ended:
            return
        share = self.share
        self.view.stage(f"search: {total} trials, {ended} done, {share.concurrent_trials} at a time")
        so_far = self._progress(ids, total=total)
        view = SearchView(self.view, so_far)

        def on_end(entry: Entry) -> None:
            self.add_trial(entry)
            if entry.ended is None:
                view.waits(entry)
                return
            objective = entry.started["objective"]
            now = self._search_state(objective, before=so_far.searches.get(objective))
            self.tracking.ended(entry.id)
            if now is not None:
                self._track(objective, {len(now.areas): (trial_row(entry), now.areas[-1])})
            view.ended(entry, now)

        with view.shown():
            run_search(self.study, ids, self.store, share, carry_out, on_epoch=view.epoch, on_end=on_end)

    def _progress(self, ids: dict[str, str], *, total: int) -> Progress:
        """Return how far the search is as it begins in this call."""
        meter = Meter(self.study.search.stopping, self.study.search.trials_each, len(ids))
        found = Progress(total, {}, meter)
        for trial in self._trial_rows.values():
            if trial["pretrain_id"] not in ids.values():
                continue
            waits = trial["state"] == State.RUNNING
            entry = self.ledger.entry(Kind.TRIAL, trial["trial_id"]) if waits else None
            meter.add(trial, waited=seconds_before(entry) if entry else 0.0)
            if entry is not None and entry.waits:
                found.waiting.add(entry.id)
            elif not waits:
                found.states[trial["state"]] = found.states.get(trial["state"], 0) + 1
            if trial["state"] == State.FAILED:
                found.failed.append((trial["trial_id"], trial["error_type"], trial["error_message"]))
        self._update_fronts()
        for objective in ids:
            areas = [area for _, area in self._areas.get(objective, ())]
            state = self._search_state(objective, before=None)
            if state is not None and areas:
                state.areas = areas
                found.searches[objective] = state
        return found

    def _search_state(self, objective: str, *, before: SearchState | None) -> SearchState | None:
        """Return where the search of an objective stands by its front, None where it has none.

        Args:
            before: where it stood; its hypervolumes are taken over.
        """
        found = progress.search_states(self._front_rows.get(objective, ()))
        if not found:
            return None
        if before is not None:
            before.areas += found[0].areas  # the live view may be drawing them: it takes a copy
            found[0].areas = before.areas
        return found[0]

    def _track(self, objective: str, reached: Mapping[int, tuple[Row, float]]) -> None:
        """Give trackers hypervolumes, by the number of trials that had ended, each with the last of these."""
        points = []
        for n, (trial, area) in reached.items():
            time = trial["ended"].timestamp() if trial["ended"] else 0.0
            points.append(Measured(n, time, {"hypervolume": area}))
        self.tracking.add(tracking.of_search(objective, points))

    def add_trial(self, entry: Entry) -> None:
        """Write the parts of a trial that has ended or waits at a rung, then the fronts as they are with it."""
        self._write_trial(entry)
        self._update_fronts()

    def _write_trial(self, entry: Entry) -> None:
        """Write the parts of a trial that has ended or waits, `trials` last: it says that all is there."""
        epochs, trial = epoch_rows(entry), trial_row(entry)
        with reading(f"ledger/trials/{entry.id}"):
            if attacks := attack_rows(entry):
                tables.write_trial(self.store, "attacks", trial, attacks)
            tables.write_trial(self.store, "epochs", trial, epochs)
            tables.write_trial(self.store, "trials", trial, [trial])
        self._know(epochs, trial)

    def _know(self, epochs: Sequence[Row], trial: dict[str, Any]) -> None:
        """Take note of what the tables have of a trial."""
        name = trial["trial_id"]
        self._trial_rows[name] = trial
        self._fronts.add(epochs, trial)
        self._measured.pop(name, None)
        if trial["state"] == State.RUNNING:
            found = {row["epoch"] for row in epochs} - {trial["epochs_planned"]}
            self._measured[name] = {fronts.checkpoint_name(name, epoch) for epoch in found}

    def _is_behind(self, entry: Entry) -> bool:
        """Say whether the tables lack a trial, or have it as it was before it went on."""
        there, now = self._trial_rows.get(entry.id), trial_row(entry)
        return there is None or any(there[name] != now[name] for name in ("state", "epochs_done", "attempt"))

    def write_pretraining(self, entry: Entry) -> None:
        """Write the parts of a pretraining run that has ended, `pretrain_epochs` last: it says that all is there."""
        # Counts of each attack, where there are several or controls.
        if rows := attack_rows(entry):
            tables.write(self.store, "attacks", entry.id, rows)
        tables.write(self.store, "pretrain_epochs", entry.id, pretrain_rows(entry))

    def load_tables(self) -> None:
        """Read what the tables have, and write the parts that only the ledger has: their writer died in between."""
        remove_leftovers(self.store)
        entries = self.ledger.entries(Kind.TRIAL)
        self._remove_parts_of({entry.id for entry in entries})
        self._fronts, self._front_rows = GrowingFronts(), {}
        epochs: dict[str, list[Row]] = defaultdict(list)
        for row in Points.of_table(tables.read(self.store, "epochs")):
            epochs[row["trial_id"]].append(row)
        for trial in tables.read(self.store, "trials").to_pylist():
            self._know(epochs[trial["trial_id"]], trial)
        for entry in entries:
            if (entry.ended is not None or entry.pauses) and self._is_behind(entry):
                self._write_trial(entry)
                epochs[entry.id] = list(epoch_rows(entry))
        for entry in self.ledger.entries(Kind.PRETRAIN):
            if entry.ended is not None and not self.store.exists(f"tables/pretrain_epochs/{entry.id}.parquet"):
                self.write_pretraining(entry)
        found = progress.areas(self._trial_rows.values(), epochs)
        self._areas = {objective: areas for (objective, _), areas in found.items()}
        self.tracking.catch_up()
        for objective, areas in self._areas.items():
            self._track(objective, {n: (self._trial_rows[id], area) for n, (id, area) in enumerate(areas, start=1)})

    def _remove_parts_of(self, trials: set[str]) -> None:
        """Remove what an earlier raybd wrote, a part for each trial: from the ledger they are written anew."""
        for table in ("attacks", "epochs", "trials"):
            for name in self.store.names(f"tables/{table}", suffix=".parquet"):
                if name.rpartition("/")[2].removesuffix(".parquet") in trials:
                    self.store.delete(name)

    def _update_fronts(self) -> None:
        """Write the fronts that have changed, then remove weights that are on none, of epochs in the tables."""
        by_objective: dict[str, list[dict[str, Any]]] = {}
        for row in self._fronts.compute():
            by_objective.setdefault(row["objective"], []).append(row)
        for objective, rows in by_objective.items():
            kept = rows if self.keeps_weights else [{**row, "checkpoint": None} for row in rows]
            if self._front_rows.get(objective) != kept:
                tables.write(self.store, "fronts", objective, kept)
                self._front_rows[objective] = kept
        keep = {row["checkpoint"] for rows in by_objective.values() for row in rows}
        for name in self.store.names("weights"):
            if name not in keep and self._may_go(name):
                self.store.delete(name)

    def _may_go(self, weights: str) -> bool:
        """Say whether the tables have the epoch of these weights, and nothing can put it on a front any more."""
        trial_id = weights.split("/")[1]
        measured = self._measured.get(trial_id)
        return trial_id in self._trial_rows and (measured is None or weights in measured)

    def _illustrate(self) -> None:
        """Write what the report shows beside the tables, given the fronts; nothing where there are no models to ask."""

    def finish(self) -> Outcome:
        """Write fronts and report from what there is."""
        from raybd.report import html

        self._update_fronts()
        self._illustrate()
        failed = sum(row["state"] == State.FAILED for row in self._trial_rows.values())
        return Outcome(failed=failed, failed_pretraining=len(self.failed_pretraining), report=html.write(self.store))
