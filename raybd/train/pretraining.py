"""Pretraining one poisoned model: the job that each worker runs, with or without Ray."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from raybd.ledger import Entry, Kind, Ledger, State
from raybd.seeding import fork
from raybd.store import Store
from raybd.study import Study
from raybd.train.context import LedgerContext
from raybd.train.inputs import inputs_for
from raybd.train.loop import Training


def weights_name(pretrain_id: str) -> str:
    """Return where a poisoned model's weights are, relative to the run directory."""
    return f"pretrained/{pretrain_id}.safetensors"


def start_record(study: Study, objective: str, pretrain_id: str) -> dict[str, Any]:
    """Return what the ledger keeps of a pretraining run's start."""
    return {
        "study": study.name,
        "study_hash": study.hash(),
        "pretrain_id": pretrain_id,
        "objective": objective,
        "settings": study.pretrain.settings(objective).model_dump(mode="json"),
        "started": datetime.now(UTC).isoformat(),
    }


def done(store: Store, pretrain_id: str) -> Entry | None:
    """Return the ledger's entry of a pretraining run that has finished, None otherwise."""
    for entry in Ledger(store).entries(Kind.PRETRAIN):
        if entry.id == pretrain_id and entry.ended is not None and entry.ended["state"] == State.COMPLETE:
            return entry
    return None


def pretrain(study: Study, objective: str, context: LedgerContext) -> None:
    """Pretrain on the poisoned pairs, from the start or from the last finished epoch.

    Errors: TrialError, DataError, CheckpointError.
    """
    inputs = inputs_for(study)
    settings = study.pretrain.settings(objective)
    seed = fork(study.seed, "pretrain", objective)
    clip = inputs.new_model(settings, seed=seed)
    pairs = inputs.pretraining_pairs(settings, clip, seed=seed)
    context.keep = lambda epoch, record: weights_name(context.id) if epoch == settings.epochs else None
    training = Training(clip, pairs, settings, context, inputs.evaluation_set, max_broken=study.data.max_broken)
    training.run()
    if context.rank == 0:
        context.end(
            {
                "state": State.COMPLETE,
                "ended": datetime.now(UTC).isoformat(),
                "world_size": context.world_size,
                "device": context.device.type,
            }
        )
