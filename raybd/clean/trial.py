"""One cleaning trial: load the poisoned model, finetune it with a method, record every epoch, keep what may matter."""

from __future__ import annotations

import logging
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from raybd import checkpoint, failures
from raybd.assignment import Assignment, Stops, done_already, failed_record, point, seconds_before, start_record
from raybd.clean import registry
from raybd.errors import StorageError, SupersededError, TrialError
from raybd.fronts import checkpoint_name
from raybd.ledger import Entry, Kind, Ledger
from raybd.model import create, load_weights
from raybd.seeding import fork
from raybd.store import Store
from raybd.study import Study
from raybd.train.context import LedgerContext
from raybd.train.inputs import inputs_for
from raybd.train.loop import Training
from raybd.train.pretraining import weights_name

log = logging.getLogger(__name__)


class _Keeper:
    """Keeps the weights of epochs that could be on a front: not beaten by another epoch of the same trial, or last.

    Attributes:
        points: of the epochs so far.
    """

    def __init__(self, entry_epochs: Mapping[int, Mapping[str, Any]], trial_id: str, epochs: int) -> None:
        self.points = {epoch: point(record) for epoch, record in entry_epochs.items()}
        self._trial_id, self._last = trial_id, epochs

    def __call__(self, epoch: int, record: Mapping[str, Any]) -> str | None:
        top1, asr = point(record)
        beaten = any(
            other_top1 >= top1 and other_asr <= asr for e, (other_top1, other_asr) in self.points.items() if e != epoch
        )
        self.points[epoch] = (top1, asr)
        # Epoch 0 is the poisoned model itself, which is kept already.
        return checkpoint_name(self._trial_id, epoch) if epoch and (epoch == self._last or not beaten) else None


def run_trial(
    study: Study,
    store: Store,
    task: Assignment,
    *,
    device: torch.device,
    notify: Callable[[int, dict[str, Any]], None] = lambda epoch, record: None,
) -> Entry:
    """Run a trial to its end or its next rung, from where it was left, and return its ledger entry.

    A failure of the trial itself is recorded with its reason and traceback, and is no error here unless the trial may
    be tried again. A trial that has ended, or waits at its rung, is not run again.

    Errors: TrialError where it failed and is to be tried again; StorageError, which is no failure of the trial;
        SupersededError where another process has it; StudyError where its settings do not fit together.
    """
    ledger = Ledger(store)
    record = start_record(study, task)
    if (done := done_already(ledger, task)) is not None:
        return done
    attempt = ledger.start(Kind.TRIAL, task.trial_id, record)
    entry = ledger.entry(Kind.TRIAL, task.trial_id)
    # The clock is for device_seconds only.
    clock = time.perf_counter()
    place: dict[str, Any] = {
        "node": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    keeper = _Keeper(entry.epochs, task.trial_id, record["settings"]["epochs"])
    stops = Stops(study.search.stopping, task.until, keeper.points)
    context = LedgerContext(
        store=store,
        kind=Kind.TRIAL,
        id=task.trial_id,
        attempt=attempt,
        device=device,
        keep=keeper,
        notify=notify,
    )
    try:
        place["weight_decay_in_force"] = _clean(study, task, context, stops, seed=record["seed"])
        ended = stops.outcome()
    except (StorageError, SupersededError):
        # Not the trial: it is tried again from its last epoch, or another process has it.
        raise
    except Exception as error:
        context.require_last()
        log.debug("trial %s failed", task.trial_id, exc_info=True)
        kind, message = failures.kind_of(error), failures.message_of(error)
        entry = failures.note(store, task.trial_id, kind, message, trace=traceback.format_exc())
        if not failures.is_final(entry, study.search):
            # An error that can be read wherever it goes: the driver need not have the class of the first one.
            raise TrialError(f"{kind}: {message}", where=task.trial_id) from None
        ended = failed_record(entry)
    seconds = time.perf_counter() - clock
    if ended is None:
        return context.pause({**place, "epoch": task.until, "device_seconds": seconds})
    now = datetime.now(UTC).isoformat()
    return context.end({**ended, **place, "ended": now, "device_seconds": seconds + seconds_before(entry)})


def _clean(study: Study, task: Assignment, context: LedgerContext, stops: Stops, *, seed: int) -> float | None:
    inputs = inputs_for(study)
    settings = study.clean.settings(task.params)
    clip = create(study.model.name, seed=0)
    name = weights_name(task.pretrain_id)
    load_weights(clip, checkpoint.from_bytes(context.store.get(name), where=name), where=name)
    pairs = inputs.cleaning_pairs(settings, clip, seed=seed)
    recipe = registry.recipe(settings, seed=fork(seed, "method"))
    training = Training(
        clip,
        pairs,
        settings,
        context,
        inputs.evaluation_set,
        recipe=recipe,
        halt=stops,
        start_counts=inputs.start_counts(task.pretrain_id),
    )
    training.run()
    return training.weight_decay_in_force()
