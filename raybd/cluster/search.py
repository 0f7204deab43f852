"""The search on Ray Tune: cleaning trials side by side, each a plain function on a core or a share of a GPU."""

from __future__ import annotations

import gc
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch
from ray import tune
from ray.tune import Callback

from raybd.clean.trial import Assignment, point, run_trial, start_record
from raybd.cluster.searcher import LedgerSearcher
from raybd.cluster.session import Share
from raybd.errors import DataError, StudyError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.store import Store
from raybd.study import Study
from raybd.train.context import LedgerContext


def _trainable(config: dict[str, Any], *, study: str, run: str, threads: int, use_gpu: bool) -> None:
    """Run one trial in a Ray actor, which may have run others before."""
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    gc.collect()
    device = torch.device("cuda" if use_gpu else "cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()

    def notify(epoch: int, record: dict[str, Any]) -> None:
        top1, asr = point(record)
        tune.report({"epoch": epoch, "zeroshot_top1": top1, "asr_top1": asr, "ended": False})

    task, found, store = Assignment(**config), Study.model_validate_json(study), Store(run)
    try:
        entry = run_trial(found, store, task, device=device, notify=notify)
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


def settle(store: Store, study: Study, task: Assignment) -> Entry:
    """Return a trial's ended ledger entry; one that could not start, or whose process died, is ended as failed here."""
    ledger = Ledger(store)
    reason = ("WorkerDied", "the trial's process died (killed, or out of memory) and its retries are used up")
    try:
        entry = ledger.entry(Kind.TRIAL, task.trial_id)
    except DataError:
        try:
            record = start_record(study, task)
        except StudyError as error:
            reason = (type(error).__name__, error.what)
            record = {**start_record(study, replace(task, params={})), "params": dict(task.params)}
        ledger.start(Kind.TRIAL, task.trial_id, record)
        entry = ledger.entry(Kind.TRIAL, task.trial_id)
    if entry.ended is not None:
        return entry
    ended = {"state": State.FAILED, "error_type": reason[0], "error_message": reason[1]}
    LedgerContext(store=store, kind=Kind.TRIAL, id=task.trial_id).drop_state()
    return ledger.end(Kind.TRIAL, task.trial_id, {**ended, "ended": datetime.now(UTC).isoformat()})


def run_search(
    study: Study,
    pretrain_ids: Mapping[str, str],
    store: Store,
    share: Share,
    *,
    on_epoch: Callable[[str, int, float, float], None],
    on_end: Callable[[Entry], None],
) -> None:
    """Run every trial that the ledger has not as ended.

    Args:
        on_epoch: called with trial, epoch, accuracy and ASR (search half) as they come in.
        on_end: called with the ledger entry of each trial that ended, whatever its state.
    """
    searcher = LedgerSearcher(
        study, pretrain_ids, Ledger(store).entries(Kind.TRIAL), lambda task: settle(store, study, task)
    )
    if not searcher.remaining:
        return
    function = tune.with_parameters(
        _trainable, study=study.model_dump_json(), run=store.uri, threads=share.cpus_per_trial, use_gpu=share.use_gpu
    )
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
            storage_path=store.below("ray"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=study.search.retries),
            callbacks=[_Watch(on_epoch, lambda task: on_end(settle(store, study, task)))],
        ),
    )
    tuner.fit()
