"""MLflow: a run for each trial, pretraining and search, in an experiment named after the study.

Where they go is MLflow's own setting: `MLFLOW_TRACKING_URI`, and `MLFLOW_EXPERIMENT_NAME` for another experiment.
"""

from __future__ import annotations

import os

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from raybd.plain import plain
from raybd.store import Store
from raybd.tracking import Series
from raybd.tracking.elsewhere import Elsewhere

_AT_ONCE = 500  # metrics in one request; MLflow takes 1000
_LONGEST = 5000  # characters of a parameter


class MLflow(Elsewhere[str]):
    """Runs of one study at an MLflow server, or in its database.

    Args:
        store: run directory; notes in it say what MLflow has.
        study: name of the study.
    """

    def __init__(self, store: Store, study: str) -> None:
        super().__init__(store, "mlflow")
        self._uri, self._client = store.uri, MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", study)
        found = self._client.get_experiment_by_name(name)
        self._experiment = found.experiment_id if found else self._client.create_experiment(name)

    def _log(self, run: str, series: Series) -> None:
        params = [Param(name, plain(value)[:_LONGEST]) for name, value in series.settings.items()]
        metrics = [
            Metric(name, value, round(1000 * point.time), point.step)
            for point in series.points
            for name, value in point.values.items()
        ]
        self._client.log_batch(run, params=params)
        for first in range(0, len(metrics), _AT_ONCE):
            self._client.log_batch(run, metrics=metrics[first : first + _AT_ONCE])

    def _end(self, run: str, *, failed: bool) -> None:
        self._client.set_terminated(run, status="FAILED" if failed else "FINISHED")

    def _run(self, series: Series) -> str:
        """Return the id of the run of a series, new or of an earlier call.

        MLflow itself is asked: a note in the run directory may have come with it from elsewhere.
        """
        key = self._marks.key(series.name)
        for run in self._client.search_runs([self._experiment], f"tags.`raybd.series` = '{key}'", max_results=1):
            self._client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)
        told = {"raybd.series": key, "raybd.run_dir": self._uri, "pretrain_objective": series.group}
        start = round(1000 * series.points[0].time) if series.points else None
        run = self._client.create_run(self._experiment, start_time=start, run_name=series.name, tags=told)
        return str(run.info.run_id)
