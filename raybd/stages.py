"""The stages of a study, in order: poison, pretrain, search, fronts, report. What is done is not done twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

from raybd import fronts, provenance, tables
from raybd.console import SearchView, View
from raybd.errors import StudyError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.records import epoch_rows, pretrain_rows, trial_row
from raybd.store import Store
from raybd.study import Study, differences

# Settings that may differ between two calls on one run directory: they change what is done, not what it gives.
_FREE = ("resources", "search.num_trials", "search.retries", "data.cache_gb", "data.cache_dir", "data.loader_workers")
_ASR_GAP, _ASR_FLOOR = 0.05, 0.95


class Stage(IntEnum):
    """How far a call goes."""

    POISON = 1
    PRETRAIN = 2
    SEARCH = 3


@dataclass(frozen=True)
class Outcome:
    """What a call to `run` leaves: trials that failed, and the path of the report."""

    failed: int
    report: str


def open_run(study: Study, run_dir: str, *, allow_code_change: bool = False) -> Store:
    """Open the run directory of a study, new or one to go on with; write the resolved study into a new one.

    Errors: StudyError where the directory holds another study, or results of other code.
    """
    store = Store(run_dir)
    new: dict[str, Any] = {
        "study": study.resolved(),
        "hash": study.hash(),
        "environment": provenance.environment(),
        "created": datetime.now(UTC).isoformat(),
    }
    if not store.exists("study.json"):
        store.put("study.json", json.dumps(new, indent=1).encode())
        return store
    old = json.loads(store.get("study.json"))
    changed = [
        found
        for found in differences(old["study"], new["study"])
        if not any(found.partition(":")[0].startswith(free) for free in _FREE)
    ]
    if changed:
        raise StudyError(
            "this run directory holds another study: " + "; ".join(changed),
            where=run_dir,
            fix="give another --run-dir, or undo the changes",
        )
    code = old["environment"]["raybd"]
    if code != provenance.code_version() and not allow_code_change:
        raise StudyError(
            f"made by raybd {code}, this is {provenance.code_version()}: their numbers may differ",
            where=run_dir,
            fix="give another --run-dir, use that version, or pass --allow-code-change",
        )
    old["study"], old["environment"] = new["study"], {**new["environment"], "raybd": code}
    store.put("study.json", json.dumps(old, indent=1).encode())
    return store


class Run:
    """A study in its run directory.

    Args:
        address: of a Ray cluster; None uses this machine.
    """

    def __init__(self, study: Study, store: Store, view: View, *, address: str | None = None) -> None:
        # These import torch, which a report does without.
        from raybd.train.inputs import inputs_for

        self.study, self.store, self.view, self.address = study, store, view, address
        self.inputs = inputs_for(study)
        self.ledger = Ledger(store)
        self._share: Any = None

    @contextmanager
    def _cluster(self) -> Iterator[None]:
        from raybd.cluster.session import session

        with self.view.live("starting Ray"), session(self.study.resources, address=self.address) as self._share:
            yield

    def run(self, until: Stage = Stage.SEARCH) -> Outcome:
        """Carry the study out, as far as `until`. Errors: RaybdError, before any long work where it can be."""
        self.view.stage(f"study {self.study.name}: checking data, model and settings")
        self.inputs.check()
        self.poison()
        self._rebuild_tables()
        ids = {objective: self.inputs.pretrain_id(objective) for objective in self.study.pretrain.objectives}
        if until >= Stage.PRETRAIN and self._open_work(ids, until):
            with self._cluster():
                self.pretrain(ids)
                if until >= Stage.SEARCH:
                    self.search(ids)
        elif until >= Stage.PRETRAIN:
            self.view.stage("nothing left to do: pretraining and search are done")
            self._attack_summary(ids)
        return self.finish()

    def _open_work(self, ids: dict[str, str], until: Stage) -> bool:
        from raybd.train.pretraining import done

        if any(done(self.store, pretrain_id) is None for pretrain_id in ids.values()):
            return True
        total, ended = self._trials(ids)
        return until >= Stage.SEARCH and total > ended

    def _trials(self, ids: dict[str, str]) -> tuple[int, int]:
        """Return how many trials the study has in all, and how many have ended."""
        from raybd.cluster.search import settle
        from raybd.cluster.searcher import LedgerSearcher

        entries = self.ledger.entries(Kind.TRIAL)
        ended = sum(e.ended is not None and e.started["pretrain_id"] in ids.values() for e in entries)
        searcher = LedgerSearcher(self.study, ids, entries, lambda task: settle(self.store, self.study, task))
        return ended + searcher.remaining, ended

    def poison(self) -> None:
        """Write the poison plan, its preview, and what data could not be used."""
        import torch

        from raybd.poison.preview import preview

        plan = self.inputs.plan
        if not self.store.exists("tables/poison_plan/plan.parquet"):
            keys = list(plan.rows)[:3]
            images = [torch.from_numpy(pixels) for pixels in self.inputs.train_images(keys)]
            self.store.put("preview.png", preview(images, keys, plan))
            self.store.put("skipped.json", json.dumps(self.inputs.skipped, indent=1).encode())
            tables.write(self.store, "poison_plan", "plan", plan.table())
        total = len(self.inputs.train_index)
        self.view.stage(
            f"poison: {len(plan)} of {total} training pairs ({len(plan) / total:.3%}) carry {plan.trigger.name}, "
            f"captioned as {self.study.poison.target_class!r}"
        )

    def pretrain(self, ids: dict[str, str]) -> None:
        """Pretrain each objective that is not done."""
        from raybd.cluster.pretrain import run_pretraining
        from raybd.train.pretraining import done

        missing = {name: pretrain_id for name, pretrain_id in ids.items() if done(self.store, pretrain_id) is None}
        if missing:
            workers = f"{self._share.num_workers} worker{'s' if self._share.num_workers > 1 else ''}"
            self.view.stage(f"pretraining {' and '.join(missing)}: {workers}")
            with self.view.follow_pretraining(self.store, missing):
                run_pretraining(self.study, missing, self.store, self._share)
        for pretrain_id in ids.values():
            entry = done(self.store, pretrain_id)
            assert entry is not None
            tables.write(self.store, "pretrain_epochs", pretrain_id, pretrain_rows(entry))
        self._attack_summary(ids)

    def _attack_summary(self, ids: dict[str, str]) -> None:
        """Say how well the attack took; warn where the cleanings of the objectives will compare little."""
        from raybd.train.pretraining import done

        self.view.stage("poisoned models")
        asr = {}
        for objective, pretrain_id in ids.items():
            entry = done(self.store, pretrain_id)
            if entry is None:
                continue
            last = pretrain_rows(entry)[-1]
            asr[objective] = last["asr_top1"]
            self.view.line(
                f"  {objective}: accuracy {last['zeroshot_top1']:.2%} ({last['correct_clean']} of {last['n_clean']}), "
                f"ASR {last['asr_top1']:.2%} ({last['hit_target']} of {last['n_triggered']}), "
                f"{last['poisoned_seen']} poisoned pairs seen in {last['epoch']} epochs"
            )
        if not asr:
            return
        low, high = min(asr, key=asr.__getitem__), max(asr, key=asr.__getitem__)
        if asr[high] - asr[low] > _ASR_GAP:
            self.view.warn(
                f"{high} and {low} differ by {100 * (asr[high] - asr[low]):.1f} points of ASR: "
                "their cleanings compare little"
            )
        for objective, value in asr.items():
            if value < _ASR_FLOOR:
                self.view.warn(
                    f"the attack took incompletely in {objective}: ASR {value:.2%} is under {_ASR_FLOOR:.0%}"
                )

    def search(self, ids: dict[str, str]) -> None:
        """Run the trials that have not ended."""
        from raybd.cluster.search import run_search

        total, ended = self._trials(ids)
        if total == ended:
            return
        share = self._share
        self.view.stage(f"search: {total} trials, {ended} done, {share.concurrent_trials} at a time")
        view = SearchView(self.view, total=total, done=ended)

        def on_end(entry: Entry) -> None:
            self._write_trial(entry)
            self._prune()
            view.ended(entry)

        with self.view.live("search: starting trials"):
            run_search(self.study, ids, self.store, share, on_epoch=view.epoch, on_end=on_end)

    def _write_trial(self, entry: Entry) -> None:
        tables.write(self.store, "epochs", entry.id, epoch_rows(entry))
        tables.write(self.store, "trials", entry.id, [trial_row(entry)])

    def _rebuild_tables(self) -> None:
        """Write the parts that the ledger has and the tables lack: their writer died in between."""
        for entry in self.ledger.entries(Kind.TRIAL):
            if entry.ended is not None and not self.store.exists(f"tables/trials/{entry.id}.parquet"):
                self._write_trial(entry)
        for entry in self.ledger.entries(Kind.PRETRAIN):
            if entry.ended is not None and not self.store.exists(f"tables/pretrain_epochs/{entry.id}.parquet"):
                tables.write(self.store, "pretrain_epochs", entry.id, pretrain_rows(entry))

    def _prune(self) -> list[dict[str, Any]]:
        """Remove the weights of ended trials that are on no front; return the rows of the fronts."""
        trials = tables.read(self.store, "trials").to_pylist()
        rows = fronts.compute(tables.read(self.store, "epochs").to_pylist(), trials)
        keep = {row["checkpoint"] for row in rows}
        ended = {row["trial_id"] for row in trials}
        for name in self.store.names("weights"):
            if name not in keep and name.split("/")[1] in ended:
                self.store.delete(name)
        return rows

    def finish(self) -> Outcome:
        """Write fronts and report from what there is."""
        from raybd.report import html

        rows = self._prune()
        by_objective: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_objective.setdefault(row["objective"], []).append(row)
        for objective, part in by_objective.items():
            tables.write(self.store, "fronts", objective, part)
        trials = tables.read(self.store, "trials").to_pylist()
        return Outcome(failed=sum(row["state"] == State.FAILED for row in trials), report=html.write(self.store))
