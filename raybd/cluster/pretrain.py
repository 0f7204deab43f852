"""Pretraining on Ray Train: DDP over any number of workers, resumed from our own state after any death.

One group of workers trains one objective after the other: to start a group takes longer than a short epoch.
"""

from __future__ import annotations

import logging
import traceback
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray.train
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from raybd import failures
from raybd.cluster.gloo import GlooConfig
from raybd.cluster.session import Share, uninterrupted
from raybd.errors import ClusterError, DataError, NonFiniteError, RaybdError, StorageError, SupersededError
from raybd.ledger import Kind, Ledger
from raybd.store import Store
from raybd.study import Failure, Study
from raybd.train.context import LedgerContext
from raybd.train.distributed import wait_for_all
from raybd.train.pretraining import done, pretrain, start_record
from raybd.watchdog import Watchdog


def _worker(config: dict[str, Any]) -> None:
    """Run on each worker. What is no fault of a run ends the group: a dead peer, or the run directory."""
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(config["threads"])
    store, device = config["store"], get_device()
    where, study = ray.train.get_context(), Study.model_validate_json(config["study"])
    for objective, pretrain_id in config["pretrain_ids"].items():
        if not _is_open(store, pretrain_id, config["failures"][pretrain_id]):
            continue
        # What is open is asked of the store: no rank may ask after rank 0 has gone on.
        wait_for_all(device)
        rank, record = where.get_world_rank(), start_record(study, objective, pretrain_id)
        watchdog = Watchdog(
            store, Kind.PRETRAIN, pretrain_id, part=f"-rank{rank}", seconds=60 * study.resources.hang_minutes
        )
        context = LedgerContext(
            store=store,
            kind=Kind.PRETRAIN,
            id=pretrain_id,
            attempt=Ledger(store).start(Kind.PRETRAIN, pretrain_id, record) if rank == 0 else None,
            rank=rank,
            world_size=where.get_world_size(),
            device=device,
            notify=partial(_report, watchdog),
        )
        with watchdog:
            try:
                pretrain(study, objective, context)
            except (StorageError, SupersededError):
                raise
            except Exception as error:
                _note(error, context)
            wait_for_all(device)


def _report(watchdog: Watchdog, epoch: int, _: dict[str, Any]) -> None:
    # The driver may be slow to take it.
    with watchdog.waiting():
        ray.train.report({"epoch": epoch})


def _note(error: Exception, context: LedgerContext) -> None:
    """Record a failure of the run's own, and return where every rank has it; raise it where the others go on."""
    kind, alone = failures.kind_of(error), context.world_size == 1
    if isinstance(error, RayError):
        # A report found one of Ray's own actors gone, with its machine: the run is as good as before.
        raise error
    if not alone and kind is Failure.ERROR and not isinstance(error, RaybdError):
        # Most likely what a dead peer looks like from here: Ray starts the group again.
        raise error
    # All ranks compute one loss.
    everywhere = alone or isinstance(error, NonFiniteError)
    if context.rank == 0 or not everywhere:
        context.require_last()
        message, trace = failures.message_of(error), "".join(traceback.format_exception(error))
        part = f"-rank{context.rank}" if context.rank else ""
        failures.note(context.store, context.id, kind, message, trace=trace, of=Kind.PRETRAIN, part=part)
    if not everywhere:
        raise error


def _failures(store: Store, pretrain_id: str) -> tuple[dict[str, Any], ...]:
    """Return the records of failures that are the run's own, not its workers'; none of one that never started."""
    try:
        found = Ledger(store).entry(Kind.PRETRAIN, pretrain_id).failures
    except DataError:
        return ()
    return tuple(failure for failure in found if failure["kind"] not in (Failure.DIED, Failure.HUNG))


def _is_open(store: Store, pretrain_id: str, before: int) -> bool:
    """Say whether a run is still to be brought to its end: it is not done, and has not failed since this call began."""
    return done(store, pretrain_id) is None and len(_failures(store, pretrain_id)) <= before


def run_pretraining(study: Study, pretrain_ids: Mapping[str, str], store: Store, share: Share) -> dict[str, str]:
    """Pretrain each of some objectives to its end; return why those failed that did, by objective.

    Workers that die, or hang and are ended, are started again, `resources.max_failures` times in a row without an epoch
    between, and go on after the last finished epoch; so does a new call after the driver died. What failed by itself (a
    loss that is not finite, data that are broken) is left to the next call.

    Args:
        pretrain_ids: by pretrain objective; none of them done.

    Errors: StorageError, ClusterError.
    """
    before = {pretrain_id: len(_failures(store, pretrain_id)) for pretrain_id in pretrain_ids.values()}

    def left() -> dict[str, str]:
        return {name: id for name, id in pretrain_ids.items() if _is_open(store, id, before[id])}

    def reached() -> tuple[int, int]:
        epochs = sum(Ledger(store).last_epoch(Kind.PRETRAIN, id) for id in before)
        return epochs, len(pretrain_ids) - len(left())

    deaths, last = 0, reached()
    while missing := left():
        try:
            uninterrupted(_trainer(study, missing, before, store, share).fit)
        except WorkerGroupError as error:
            cause, now = _cause(error), reached()
            deaths, last = 1 if now != last else deaths + 1, now
            # A failure of a run's own is in the ledger: the others go on.
            if left() == missing and (isinstance(cause, RaybdError) or deaths > study.resources.max_failures):
                raise cause or _died(error) from None
    failed = {name: _failures(store, id)[before[id] :] for name, id in pretrain_ids.items()}
    return {name: f"{found[0]['kind']}: {found[0]['message']}" for name, found in failed.items() if found}


class _Trainer(TorchTrainer):
    """Ray's trainer without what is of no use here and starts a process, which takes seconds.

    Of no use is the manager of Ray datasets, of which there are none; and in a cluster of one's own the cleaner, which
    frees what a dead controller held: it asks the dashboard who is dead, and such a cluster has none.
    """

    own = False

    def _create_default_callbacks(self) -> list[Any]:
        unused = {DatasetsCallback, *([PlacementGroupCleanerCallback] if self.own else [])}
        return [callback for callback in super()._create_default_callbacks() if type(callback) not in unused]


def _trainer(
    study: Study, pretrain_ids: Mapping[str, str], failures_before: Mapping[str, int], store: Store, share: Share
) -> TorchTrainer:
    """Return Ray's trainer. Its run has a new name each time: under an old one it would return an old result."""
    trainer = _Trainer(
        _worker,
        train_loop_config={
            "study": study.model_dump_json(),
            "pretrain_ids": dict(pretrain_ids),
            "failures": dict(failures_before),
            "store": store,
            "threads": share.cpus_per_worker,
        },
        torch_config=TorchConfig(backend="nccl") if share.use_gpu else GlooConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=share.num_workers,
            use_gpu=share.use_gpu,
            resources_per_worker={"CPU": share.cpus_per_worker, **({"GPU": 1} if share.use_gpu else {})},
        ),
        # Whether a group is started again is decided here: Ray cannot tell what is worth it.
        run_config=RunConfig(
            name=f"pretrain-{uuid.uuid4().hex[:8]}",
            storage_path=share.scratch,
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    trainer.own = share.own
    return trainer


def _cause(error: WorkerGroupError) -> RaybdError | None:
    """Return our own error among those of the workers."""
    for failure in error.worker_failures.values():
        cause = getattr(failure, "cause", None) or failure
        while cause is not None:
            if isinstance(cause, RaybdError):
                return cause
            cause = cause.__cause__
    return None


def _died(error: WorkerGroupError) -> ClusterError:
    first = next(iter(error.worker_failures.values()), error)
    return ClusterError(
        f"pretraining workers died: {str(first).strip().splitlines()[-1]}",
        where="pretraining",
        fix="call the same command again: it goes on after the last finished epoch",
    )
