"""The search on Ray Tune: trials side by side, each a plain function on a core or a share of a GPU."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune
from ray.tune import Callback

from raybd.assignment import Assignment, CarryOut, point, settle
from raybd.cluster.searcher import LedgerSearcher
from raybd.cluster.session import Share
from raybd.errors import StudyError
from raybd.ledger import Entry, Kind, Ledger
from raybd.store import Store
from raybd.study import Study


def _trainable(config: dict[str, Any], *, study: str, store: Store, carry_out: CarryOut) -> None:
    """Run one trial in a Ray actor, which may have run others before."""
    logging.getLogger().setLevel(logging.WARNING)

    def notify(epoch: int, record: dict[str, Any]) -> None:
        top1, asr = point(record)
        tune.report({"epoch": epoch, "zeroshot_top1": top1, "asr_top1": asr, "ended": False})

    task, found = Assignment(**config), Study.model_validate_json(study)
    try:
        entry = carry_out(found, store, task, notify)
    except StudyError:
        # Settings that do not fit together: it could not start, and would not the next time.
        entry = settle(store, found, task)
    assert entry.ended is not None
    # A trial that failed before its first epoch must still report something: Ray takes silence for a fault of its own.
    tune.report({"epoch": max(entry.epochs, default=0), "zeroshot_top1": 0.0, "asr_top1": 1.0, "ended": True})


class _Watch(Callback):
    """Passes on what happens to trials. Ray pickles callbacks with its snapshots: the listeners stay behind."""

    def __init__(
        self, on_epoch: Callable[[str, int, float, float], None], on_end: Callable[[Assignment], None]
    ) -> None:
        self._on_epoch, self._on_end = on_epoch, on_end

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if result.get("ended") is False:
            self._on_epoch(trial.config["trial_id"], result["epoch"], result["zeroshot_top1"], result["asr_top1"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._on_end(Assignment(**trial.config))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._on_end(Assignment(**trial.config))


def run_search(
    study: Study,
    pretrain_ids: Mapping[str, str],
    store: Store,
    share: Share,
    carry_out: CarryOut,
    *,
    on_epoch: Callable[[str, int, float, float], None],
    on_end: Callable[[Entry], None],
) -> None:
    """Run every trial that the ledger has not as ended.

    Args:
        carry_out: what a trial does with its assignment: train, or look a recorded curve up.
        on_epoch: called with trial, epoch, accuracy and ASR (search half) as they come in.
        on_end: called with the ledger entry of each trial that ended, whatever its state.
    """
    searcher = LedgerSearcher(
        study, pretrain_ids, Ledger(store).entries(Kind.TRIAL), lambda task: settle(store, study, task)
    )
    if not searcher.remaining:
        return
    function = tune.with_parameters(_trainable, study=study.model_dump_json(), store=store, carry_out=carry_out)
    needs = {"cpu": share.cpus_per_trial, **({"gpu": share.gpus_per_trial} if share.gpus_per_trial else {})}
    tuner = tune.Tuner(
        tune.with_resources(function, needs),
        # Metric and mode stay out of TuneConfig: there they would silently make the search single-objective.
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=searcher.remaining,
            max_concurrent_trials=share.concurrent_trials,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=f"search-{uuid.uuid4().hex[:8]}",
            storage_path=share.scratch,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=study.search.retries),
            callbacks=[_Watch(on_epoch, lambda task: on_end(settle(store, study, task)))],
        ),
    )
    tuner.fit()
