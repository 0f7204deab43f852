"""A study in its run directory: Ray, the search, and what becomes of its trials; whether they train or not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from raybd import fronts, run_record, tables
from raybd.assignment import CarryOut, remove_leftovers, settle
from raybd.console import SearchView, View
from raybd.errors import StudyError
from raybd.growing_fronts import GrowingFronts
from raybd.ledger import Entry, Kind, Ledger, State, reading
from raybd.points import Points, Row
from raybd.records import attack_rows, epoch_rows, pretrain_rows, trial_row
from raybd.store import Store
from raybd.study import FREE_SETTINGS, Resources, Study, differences


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

    Errors: StudyError where the directory holds another study.
    """

    kind = "study"
    keeps_weights = True

    def __init__(self, study: Study, store: Store, view: View, *, address: str | None = None) -> None:
        self.study, self.store, self.view, self.address = study, store, view, address
        self.ledger = Ledger(store)
        self.share: Any = None
        self.failed_pretraining: dict[str, str] = {}
        self._trial_rows: dict[str, dict[str, Any]] = {}
        self._fronts, self._front_rows = GrowingFronts(), dict[str, list[dict[str, Any]]]()
        # By trial that has not ended: the weights of its epochs in the tables, but of the last one planned, which is on
        # the front `final` only once the trial has ended.
        self._measured: dict[str, set[str]] = {}
        self.earlier = self._open()

    def _open(self) -> dict[str, Any] | None:
        """Return the record of a run directory to go on with; None for a new one, or one where nothing was done."""
        if not self.store.exists("study.json"):
            return None
        earlier = run_record.read(self.store)
        kind = earlier.get("kind", "study")
        if kind != self.kind:
            raise StudyError(
                f"this run directory holds another thing: {kind}", where=self.store.uri, fix="give another --run-dir"
            )
        if not self.store.names("ledger"):
            return None
        changed = [
            found
            for found in differences(earlier["study"], self.study.resolved())
            if not found.partition(":")[0].startswith(FREE_SETTINGS)
        ]
        if changed:
            raise StudyError(
                "this run directory holds another study: " + "; ".join(changed),
                where=self.store.uri,
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
        view = SearchView(self.view, total=total, done=ended)

        def on_end(entry: Entry) -> None:
            self.add_trial(entry)
            if entry.ended is not None:
                view.ended(entry)
            else:
                view.waits(entry)

        with self.view.live("search: starting trials"):
            run_search(self.study, ids, self.store, share, carry_out, on_epoch=view.epoch, on_end=on_end)

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
        for entry in self.ledger.entries(Kind.PRETRAIN):
            if entry.ended is not None and not self.store.exists(f"tables/pretrain_epochs/{entry.id}.parquet"):
                self.write_pretraining(entry)

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

    def finish(self) -> Outcome:
        """Write fronts and report from what there is."""
        from raybd.report import html

        self._update_fronts()
        failed = sum(row["state"] == State.FAILED for row in self._trial_rows.values())
        return Outcome(failed=failed, failed_pretraining=len(self.failed_pretraining), report=html.write(self.store))
