"""The stages of a study, in order: poison, pretrain, search, fronts, report. What is done is not done twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

from raybd import fronts, provenance, tables
from raybd.console import SearchView, View
from raybd.errors import StudyError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.metrics import ALIKE, STRONG
from raybd.records import epoch_rows, pretrain_rows, trial_row
from raybd.store import Store
from raybd.study import FREE_SETTINGS, Study, differences


class Stage(IntEnum):
    """How far a call goes."""

    PRETRAIN = 1
    SEARCH = 2


@dataclass(frozen=True)
class Outcome:
    """What a call to `run` leaves: trials that failed, and the path of the report."""

    failed: int
    report: str


class Run:
    """A study in its run directory.

    Args:
        address: of a Ray cluster; None uses this machine.
        allow_code_change: go on with what another version of raybd made.

    Errors: StudyError where the directory holds another study, or results of other code.
    """

    def __init__(
        self,
        study: Study,
        store: Store,
        view: View,
        *,
        address: str | None = None,
        allow_code_change: bool = False,
    ) -> None:
        # These import torch, which a report does without.
        from raybd.train.inputs import inputs_for

        self.study, self.store, self.view, self.address = study, store, view, address
        self.inputs = inputs_for(study)
        self.ledger = Ledger(store)
        self._share: Any = None
        self._trial_rows: list[dict[str, Any]] = []
        self._epoch_rows: list[dict[str, Any]] = []
        self._earlier = self._open(allow_code_change=allow_code_change)

    def _open(self, *, allow_code_change: bool) -> dict[str, Any] | None:
        """Return the record of a run directory to go on with; None for a new one, or one where nothing was trained."""
        if not (self.store.exists("study.json") and self.store.names("ledger")):
            return None
        earlier: dict[str, Any] = json.loads(self.store.get("study.json"))
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
        code = earlier["environment"]["raybd"]
        if code != provenance.code_version() and not allow_code_change:
            raise StudyError(
                f"made by raybd {code}, this is {provenance.code_version()}: their numbers may differ",
                where=self.store.uri,
                fix="give another --run-dir, use that version, or pass --allow-code-change",
            )
        return earlier

    def _record(self) -> dict[str, str]:
        """Write study, versions and the ids of the pretraining runs into the run directory; return the ids.

        A run directory has one id for each pretrain objective, for good. Errors: StudyError where the data changed.
        """
        environment = provenance.environment()
        if self._earlier:
            environment["raybd"] = self._earlier["environment"]["raybd"]
        ids = {
            objective: self.inputs.pretrain_id(objective, code=environment["raybd"])
            for objective in self.study.pretrain.objectives
        }
        if self._earlier and self._earlier["pretrain_ids"] != ids:
            raise StudyError(
                "the data, or the checkpoint to start from, are not those that this run directory was made with",
                where=self.store.uri,
                fix="give another --run-dir, or put them back",
            )
        record = {
            "study": self.study.resolved(),
            "hash": self.study.hash(),
            "pretrain_ids": ids,
            "environment": environment,
            "created": self._earlier["created"] if self._earlier else datetime.now(UTC).isoformat(),
        }
        self.store.put("study.json", json.dumps(record, indent=1).encode())
        return ids

    @contextmanager
    def _cluster(self) -> Iterator[None]:
        from raybd.cluster.session import session

        with ExitStack() as stack:
            with self.view.live("starting Ray"):
                self._share = stack.enter_context(session(self.study.resources, address=self.address))
            for what in self._share.missing:
                self.view.warn(f"{what}: waiting for the cluster to grow")
            yield

    def run(self, until: Stage = Stage.SEARCH) -> Outcome:
        """Carry the study out, as far as `until`. Errors: RaybdError, before any long work where it can be."""
        self.view.stage(f"study {self.study.name}: checking data, model and settings")
        ids = self.poison()
        self._load_tables()
        if self._open_work(ids, until):
            with self._cluster():
                self.pretrain(ids)
                if until >= Stage.SEARCH:
                    self.search(ids)
        else:
            self.view.stage("nothing left to do: pretraining and search are done")
            self._attack_summary(ids)
        return self.finish()

    def _open_work(self, ids: dict[str, str], until: Stage) -> bool:
        from raybd.train.pretraining import done

        if any(done(self.store, pretrain_id) is None for pretrain_id in ids.values()):
            return True
        if until < Stage.SEARCH:
            return False
        total, ended = self._trials(ids)
        return total > ended

    def _trials(self, ids: dict[str, str]) -> tuple[int, int]:
        """Return how many trials the study has in all, and how many have ended."""
        from raybd.assignment import settle
        from raybd.cluster.searcher import LedgerSearcher

        entries = self.ledger.entries(Kind.TRIAL)
        ended = sum(e.ended is not None and e.started["pretrain_id"] in ids.values() for e in entries)
        searcher = LedgerSearcher(self.study, ids, entries, lambda task: settle(self.store, self.study, task))
        return ended + searcher.remaining, ended

    def poison(self) -> dict[str, str]:
        """Check all inputs; write the plan, its preview and what was skipped; return the ids of the pretrainings."""
        import torch

        from raybd.clean import registry
        from raybd.poison.preview import preview

        self.inputs.check()
        registry.check(self.study)
        ids, plan = self._record(), self.inputs.plan
        if not (self._earlier and self.store.exists("tables/poison_plan/plan.parquet")):
            images = self.inputs.train_images(plan.examples(3))
            pictures = [torch.from_numpy(pixels) for pixels in images.values()]
            self.store.put("preview.png", preview(pictures, list(images), plan))
            self.store.put("skipped.json", json.dumps(self.inputs.skipped, indent=1).encode())
            tables.write(self.store, "poison_plan", "plan", plan.table())
        total = len(self.inputs.train_index)
        for attack, count in zip(plan.attacks, plan.counts(), strict=True):
            captions = "with captions that name" if attack.trigger.name == "label_consistent" else "captioned as"
            self.view.stage(
                f"poison: {count} of {total} training pairs ({count / total:.3%}) carry {attack.trigger.name}, "
                f"{captions} {attack.target_class!r}"
            )
        return ids

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
        if asr[high] - asr[low] > ALIKE:
            self.view.warn(
                f"{high} and {low} differ by {100 * (asr[high] - asr[low]):.1f} points of ASR: "
                "their cleanings compare little"
            )
        for objective, value in asr.items():
            if value < STRONG:
                self.view.warn(f"the attack took incompletely in {objective}: ASR {value:.2%} is under {STRONG:.0%}")

    def search(self, ids: dict[str, str]) -> None:
        """Run the trials that have not ended."""
        from raybd.clean.actor import CleanTrial
        from raybd.cluster.search import run_search

        total, ended = self._trials(ids)
        if total == ended:
            return
        share = self._share
        self.view.stage(f"search: {total} trials, {ended} done, {share.concurrent_trials} at a time")
        view = SearchView(self.view, total=total, done=ended)

        def on_end(entry: Entry) -> None:
            self._add_trial(entry)
            view.ended(entry)

        with self.view.live("search: starting trials"):
            clean = CleanTrial(threads=share.cpus_per_trial, use_gpu=share.use_gpu)
            run_search(self.study, ids, self.store, share, clean, on_epoch=view.epoch, on_end=on_end)

    def _add_trial(self, entry: Entry) -> None:
        """Write the parts of a trial that has ended, then the fronts as they are with it."""
        epochs, trial = self._write_trial(entry)
        self._epoch_rows += epochs
        self._trial_rows.append(trial)
        self._update_fronts()

    def _write_trial(self, entry: Entry) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Write the parts of a trial that has ended, `trials` last: it says that all is there; return the rows."""
        epochs, trial = epoch_rows(entry), trial_row(entry)
        tables.write(self.store, "epochs", entry.id, epochs)
        tables.write(self.store, "trials", entry.id, [trial])
        return epochs, trial

    def _load_tables(self) -> None:
        """Read what the tables have, and write the parts that only the ledger has: their writer died in between."""
        for entry in self.ledger.entries(Kind.TRIAL):
            if entry.ended is not None and not self.store.exists(f"tables/trials/{entry.id}.parquet"):
                self._write_trial(entry)
        for entry in self.ledger.entries(Kind.PRETRAIN):
            if entry.ended is not None and not self.store.exists(f"tables/pretrain_epochs/{entry.id}.parquet"):
                tables.write(self.store, "pretrain_epochs", entry.id, pretrain_rows(entry))
        self._epoch_rows = tables.read(self.store, "epochs").to_pylist()
        self._trial_rows = tables.read(self.store, "trials").to_pylist()

    def _update_fronts(self) -> None:
        """Write the fronts, then remove the weights of ended trials that are on none."""
        by_objective: dict[str, list[dict[str, Any]]] = {}
        for row in fronts.compute(self._epoch_rows, self._trial_rows):
            by_objective.setdefault(row["objective"], []).append(row)
        for objective, rows in by_objective.items():
            tables.write(self.store, "fronts", objective, rows)
        keep = {row["checkpoint"] for rows in by_objective.values() for row in rows}
        ended = {row["trial_id"] for row in self._trial_rows}
        for name in self.store.names("weights"):
            if name not in keep and name.split("/")[1] in ended:
                self.store.delete(name)

    def finish(self) -> Outcome:
        """Write fronts and report from what there is."""
        from raybd.report import html

        self._update_fronts()
        failed = sum(row["state"] == State.FAILED for row in self._trial_rows)
        return Outcome(failed=failed, report=html.write(self.store))
