"""Weights & Biases: a run for each trial, pretraining and search, grouped by study, in the project `raybd`.

Where they go is W&B's own setting: `WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_MODE=offline`, `WANDB_DIR`.
"""

from __future__ import annotations

import os
from typing import Any

import wandb

from raybd.errors import ClusterError
from raybd.store import Store
from raybd.tracking import Series
from raybd.tracking.elsewhere import Elsewhere


def require_key() -> None:
    """Raise ClusterError where W&B would ask for a key, which nobody could give it while a study runs."""
    if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False, verify=False):
        raise ClusterError(
            "wandb does not know you on this machine",
            where="record.trackers",
            fix="wandb login; or WANDB_MODE=offline, and `wandb sync` later",
        )


class WeightsAndBiases(Elsewhere[Any]):
    """Runs of one study at W&B.

    Args:
        store: run directory; notes in it say what W&B has.
        study: name of the study.
    """

    def __init__(self, store: Store, study: str) -> None:
        super().__init__(store, "wandb")
        self._uri, self._study = store.uri, study

    def _log(self, run: Any, series: Series) -> None:
        for point in series.points:
            run.log(dict(point.values), step=point.step)

    def _end(self, run: Any, *, failed: bool) -> None:
        run.finish(exit_code=int(failed))

    def _run(self, series: Series) -> Any:
        """Return the run of a series. Its id is always the same: W&B takes no step twice, of a killed call either."""
        return wandb.init(
            id=self._marks.key(series.name),
            resume="allow",
            reinit="create_new",
            project=os.environ.get("WANDB_PROJECT", "raybd"),
            group=os.environ.get("WANDB_RUN_GROUP", self._study),
            job_type=series.name.partition("/")[0],
            name=series.name.partition("/")[2],
            config={**series.settings, "pretrain_objective": series.group, "run_dir": self._uri},
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True),
        )
