"""The replay of a study: its search runs for real, its trials report recorded curves."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from raybd import curves, provenance
from raybd.console import View
from raybd.errors import StudyError
from raybd.replay import Recorded, ReplayTrial
from raybd.store import Store
from raybd.study import Resources, Study
from raybd.study_directory import Outcome, StudyDirectory


class ReplayRun(StudyDirectory):
    """A study that is replayed against recorded curves, in a run directory of its own. Data and models are not needed.

    Args:
        on: `sweep.parquet`, or a run directory.
        nearest: of a learning rate that no curve has, take the nearest one in the logarithm.

    Errors: StudyError where the directory holds another study or was replayed against other curves, or the study may
        draw what is not recorded; DataError where there are no curves.
    """

    kind = "replay"
    keeps_weights = False

    def __init__(
        self, study: Study, store: Store, view: View, *, on: str, nearest: bool = False, address: str | None = None
    ) -> None:
        super().__init__(study, store, view, address=address)
        self._curves, self._nearest = curves.read(on), nearest
        recorded = Recorded(self._curves, nearest=nearest)
        recorded.check(study)
        self.ids = recorded.pretrain_ids(study)
        self._on = {"path": on, "fingerprint": curves.fingerprint(self._curves), "nearest": nearest}
        if self.earlier and any(self.earlier["on"][name] != self._on[name] for name in ("fingerprint", "nearest")):
            raise StudyError(
                f"this run directory was replayed against other curves: {self.earlier['on']['path']}",
                where=store.uri,
                fix="give another --run-dir, or the same --on and --nearest",
            )

    def run(self) -> Outcome:
        """Run the trials that have not ended, then write fronts and report."""
        record = {
            "kind": self.kind,
            "study": self.study.resolved(),
            "hash": self.study.hash(),
            "pretrain_ids": self.ids,
            "on": self._on,
            "environment": provenance.environment(),
            "created": self.earlier["created"] if self.earlier else datetime.now(UTC).isoformat(),
        }
        self.store.put("study.json", json.dumps(record, indent=1).encode())
        self.view.stage(f"replay of {self.study.name}: {len(self._curves)} recorded curves, nothing is trained")
        with self.tracking:
            self.load_tables()
            self._search()
            return self.finish()

    def _search(self) -> None:
        total, ended = self.trials(self.ids)
        if total == ended:
            self.view.stage("nothing left to do: the search is done")
            return
        # What trials take when they train is not what looking curves up takes.
        wanted = Resources(
            num_workers=1, use_gpu=False, concurrent_trials=self.study.resources.concurrent_trials, cpus_per_trial=1
        )
        with self.cluster(wanted):
            self.run_trials(self.ids, ReplayTrial(tuple(self._curves), nearest=self._nearest))
