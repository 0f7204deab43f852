"""Pretraining on Ray Train: DDP over any number of workers, resumed from our own state after any death.

One group of workers trains one objective after the other: to start a group takes longer than a short epoch.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from raybd.cluster.session import Share, uninterrupted
from raybd.errors import ClusterError, RaybdError, TrialError
from raybd.ledger import Kind, Ledger
from raybd.store import Store
from raybd.study import Study
from raybd.train.context import LedgerContext
from raybd.train.distributed import wait_for_all
from raybd.train.pretraining import done, pretrain, start_record
from raybd.watchdog import Watchdog


def _worker(config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Run on each worker. A run that fails by itself is returned, not raised: Ray would only try it again."""
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(config["threads"])
    where, store = ray.train.get_context(), config["store"]
    failed = {}
    for objective, pretrain_id in config["pretrain_ids"].items():
        if done(store, pretrain_id) is not None:
            continue
        study, rank = Study.model_validate_json(config["study"]), where.get_world_rank()
        record = start_record(study, objective, pretrain_id)
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
            device=get_device(),
            notify=partial(_report, watchdog),
        )
        with watchdog:
            try:
                pretrain(study, objective, context)
            except TrialError as error:
                failed[pretrain_id] = (error.what, error.fix)
            # What is done is asked of the store: no rank may ask before rank 0 has said so.
            wait_for_all(get_device())
    return failed


def _report(watchdog: Watchdog, epoch: int, _: dict[str, Any]) -> None:
    # The driver may be slow to take it.
    with watchdog.waiting():
        ray.train.report({"epoch": epoch})


def run_pretraining(study: Study, pretrain_ids: Mapping[str, str], store: Store, share: Share) -> None:
    """Pretrain each of some objectives to its end.

    Workers that die, or hang and are ended, are started again (`resources.max_failures` times) and go on after the last
    finished epoch; so does a new call after the driver died. Ray's own run has a new name each time: under an old one
    it would return an old result.

    Args:
        pretrain_ids: by pretrain objective; none of them done.

    Errors: TrialError (a loss that is not finite; the other objectives are trained all the same), DataError,
        ClusterError.
    """
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "study": study.model_dump_json(),
            "pretrain_ids": dict(pretrain_ids),
            "store": store,
            "threads": share.cpus_per_worker,
        },
        torch_config=TorchConfig(backend="nccl" if share.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=share.num_workers,
            use_gpu=share.use_gpu,
            resources_per_worker={"CPU": share.cpus_per_worker, **({"GPU": 1} if share.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=f"pretrain-{uuid.uuid4().hex[:8]}",
            storage_path=share.scratch,
            failure_config=FailureConfig(max_failures=study.resources.max_failures),
        ),
    )
    try:
        result = uninterrupted(trainer.fit)
    except WorkerGroupError as error:
        raise _cause(error) from None
    for pretrain_id, (what, fix) in result.return_value.items():
        raise TrialError(what, where=f"pretraining {pretrain_id}", fix=fix)


def _cause(error: WorkerGroupError) -> RaybdError:
    """Return our own error among those of the workers, or one that says that they died."""
    for failure in error.worker_failures.values():
        cause = getattr(failure, "cause", None) or failure
        while cause is not None:
            if isinstance(cause, RaybdError):
                return cause
            cause = cause.__cause__
    first = next(iter(error.worker_failures.values()), error)
    return ClusterError(
        f"pretraining workers died: {str(first).strip().splitlines()[-1]}",
        where="pretraining",
        fix="call the same command again: it goes on after the last finished epoch",
    )
