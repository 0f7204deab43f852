"""The search on Ray Tune: trials side by side, each a plain function on a core or a share of a GPU."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune
from ray.tune.execution import class_cache
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.stopper import Stopper

from raybd.assignment import Assignment, CarryOut
from raybd.cluster.faults import Faults, error_of
from raybd.cluster.searcher import LedgerSearcher
from raybd.cluster.session import Share
from raybd.cluster.trainable import trainable
from raybd.errors import ClusterError
from raybd.ledger import Entry, Kind, Ledger
from raybd.store import Store
from raybd.study import Study

# Tune would copy the driver's credentials into the runtime environment of trials, which Ray stores and writes into its
# logs. As all processes of a cluster, trials have those of the machine that they are on.
class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
)

_IDLE_ROUNDS = 3  # how often a search may end with trials left and nothing done


class _Watch(TrialProgressCallback):
    """Passes on what happens to trials, in place of Ray's own callback, which prints it.

    Ray pickles callbacks with its snapshots: the listeners stay behind.
    """

    def __init__(
        self, faults: Faults, on_epoch: Callable[[str, int, float, float], None], on_drop: Callable[[str], None]
    ) -> None:
        self._faults, self._on_epoch, self._on_drop = faults, on_epoch, on_drop
        self._over = set[str]()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Look for trials that Tune has dropped: where an actor cannot be used again it tells nobody of its trial."""
        # All of them, each time: Tune moves a trial that is tried again to the end of its list.
        for trial in trials:
            if trial.trial_id not in self._over and trial.is_finished():
                self._over.add(trial.trial_id)
                # Of one that came to an end the search has been told: this is nothing to it.
                self._on_drop(trial.trial_id)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._faults.started(Assignment(**trial.config), trial.temporary_state.ray_actor)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if result.get("ended") is False:
            self._on_epoch(trial.config["trial_id"], result["epoch"], result["zeroshot_top1"], result["asr_top1"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._faults.ended(Assignment(**trial.config))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Leave it to the searcher: with failures without end, only a trial that did not begin gets here."""


class _Retries(FIFOScheduler):
    """First come, first served; of a trial that failed it is asked here whether it is over.

    Ray itself tries again without end: it does not tell the death of a machine from that of a process, nor a trial
    that gets on between two deaths from one that does not.
    """

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self._faults, self._seen = faults, set[str]()
        self._not_begun = set[str]()

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Take note of one whose process died before it got it: it had run another trial, and was kept for this one."""
        if trial in tune_controller._resetting_trials:
            self._not_begun.add(trial.trial_id)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if trial.trial_id not in self._seen:
            self._seen.add(trial.trial_id)
            return
        if trial.trial_id in self._not_begun:
            return  # nobody's failure: Tune drops it next
        if self._faults.guard(lambda: self._faults.is_over(Assignment(**trial.config), error_of(trial))):
            tune_controller.stop_trial(trial)


class _StopOnError(Stopper):
    """Stops every trial where it stands once something went wrong that is no trial's fault."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._faults.error is not None


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
        on_end: called with the ledger entry of each trial that ended, whatever its state, or waits at a rung.

    Errors: TrialError where too many trials failed; StorageError where the run directory fails, ClusterError where Ray
        does. The trials that run are then left to the next call.
    """
    function = tune.with_parameters(trainable, study=study.model_dump_json(), store=store, carry_out=carry_out)

    def search_on() -> Faults | None:
        """Let Tune run what is left, and return how that went; None if nothing is."""
        every = Ledger(store).entries(Kind.TRIAL)
        entries = [entry for entry in every if entry.started["pretrain_id"] in pretrain_ids.values()]
        searcher = LedgerSearcher(
            study,
            pretrain_ids,
            entries,
            lambda task: faults.settled(task),
            stop=lambda trial_id, reason: faults.stopped(trial_id, reason),
        )
        if not searcher.remaining:
            return None
        faults = Faults(study, store, entries, planned=searcher.planned, on_end=on_end)
        faults.check_share()
        _tune(function, searcher, share, faults, on_epoch)
        return faults

    idle = 0
    while idle < _IDLE_ROUNDS:
        faults = search_on()
        if faults is None:
            return
        # Ray may end with trials left: its out-of-memory killer stops Tune, and the last trial may be dropped. The
        # ledger knows what is left.
        idle = 0 if faults.events else idle + 1
    raise ClusterError("trials do not start", where="search", fix="look at Ray's logs, /tmp/ray/session_latest/logs")


def _tune(
    function: Callable[[dict[str, Any]], None],
    searcher: LedgerSearcher,
    share: Share,
    faults: Faults,
    on_epoch: Callable[[str, int, float, float], None],
) -> None:
    """Let Tune run what a searcher suggests, until it is done or an error ends it."""
    # Tune makes one itself where it is given a number, but it is to be told of trials that Tune forgets.
    limited = ConcurrencyLimiter(searcher, max_concurrent=share.concurrent_trials)

    def on_drop(trial_id: str) -> None:
        searcher.dropped(trial_id)
        limited.on_trial_complete(trial_id, error=True)

    needs = {"cpu": share.cpus_per_trial, **({"gpu": share.gpus_per_trial} if share.gpus_per_trial else {})}
    tuner = tune.Tuner(
        tune.with_resources(function, needs),
        # Metric and mode stay out of TuneConfig: there they would silently make the search single-objective.
        tune_config=tune.TuneConfig(
            search_alg=limited,
            scheduler=_Retries(faults),
            num_samples=-1,  # until the searcher says that it has no more
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=f"search-{uuid.uuid4().hex[:8]}",
            storage_path=share.scratch,
            verbose=0,
            stop=_StopOnError(faults),
            failure_config=tune.FailureConfig(max_failures=-1),
            callbacks=[_Watch(faults, on_epoch, on_drop)],
        ),
    )
    try:
        tuner.fit()
    except Exception as error:
        if faults.error is None:
            faults.broke_off(error)
    finally:
        searcher.close()
    if faults.error is not None:
        raise faults.error
