"""What Ray Tune's actors run. It lies apart from the search: what suggests and judges trials is not loaded by them."""

from __future__ import annotations

import logging
from typing import Any

from ray import tune

from raybd.assignment import Assignment, CarryOut, point, settle
from raybd.errors import StudyError, TrialError
from raybd.failures import SPOILING
from raybd.store import Store
from raybd.study import Failure, Study


def trainable(config: dict[str, Any], *, study: str, store: Store, carry_out: CarryOut) -> None:
    """Run one trial in a Ray actor, which may have run others before.

    Errors: TrialError where it failed and is to be tried again, or after a failure that may have spoilt the process;
        whatever this raises ends the process.
    """
    logging.getLogger().setLevel(logging.WARNING)

    def notify(epoch: int, record: dict[str, Any]) -> None:
        top1, asr = point(record)
        tune.report({"epoch": epoch, "zeroshot_top1": top1, "asr_top1": asr, "ended": False})

    task, found = Assignment(**config), Study.model_validate_json(study)
    try:
        entry = carry_out(found, store, task, notify)
    except StudyError as error:
        # It could not start, and would not the next time.
        entry = settle(store, found, task, reason=(Failure.SETTINGS, error.what))
    if entry.ended is not None and entry.ended.get("error_type") in SPOILING:
        raise TrialError("this process is not used again", where=task.trial_id)
    # A trial that failed before its first epoch must still report something: Ray takes silence for a fault of its own.
    tune.report({"epoch": max(entry.epochs, default=0), "zeroshot_top1": 0.0, "asr_top1": 1.0, "ended": True})
