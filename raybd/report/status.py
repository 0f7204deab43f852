"""How far a run directory is, in lines of text: from its ledger, or from its tables where it has no ledger."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

import pyarrow.compute as pc
from pydantic import ValidationError

from raybd import failures, fronts, jobs, lock, run_record, tables
from raybd.assignment import seconds_before
from raybd.errors import DataError
from raybd.ledger import Entry, Kind, Ledger, State, reading
from raybd.points import Row
from raybd.records import trial_row
from raybd.report import progress
from raybd.report.progress import Meter
from raybd.store import Store
from raybd.study import Stopping, Study

_OPEN = "running or interrupted"
_WAITS = "waiting at a rung"
_SHOWN = 5  # reasons, and trials that are tried again


def lines(store: Store, *, width: int = 80, unicode: bool = False) -> Iterator[str]:
    """Yield what one wants to know of a run: driver, pretraining, trials by state, why some failed, where it stands.

    Args:
        width: of the screen, in characters.
        unicode: whether it shows more than ASCII.

    Errors: DataError where ledger or tables are not those of a run.
    """
    yield from _driver(store)
    with reading(store.path("ledger")):
        yield from _lines(store)
    yield from _reached(store, width=width, unicode=unicode)


def _driver(store: Store) -> Iterator[str]:
    """Yield who drives a run now; of one that nobody drives, what became of its last job, if there was one."""
    job, holder = jobs.last(store), lock.holder(store)
    if holder is not None:
        yield f"driver: {lock.described(holder)}"
    elif job:
        state = f"ended {job.ended}" if job.ended else "its driver died" if job.began else "has no driver yet"
        if job.overdue:  # without a minute of now: `--watch` says what changed
            state = (
                f"had no driver after {jobs.BEGINS_WITHIN_MINUTES} minutes: most likely Ray has given it up, or is gone"
            )
        yield f"detached: job {job.id} of {job.address}, submitted {job.submitted} on {job.host}, {state}"
        if job.waits:
            yield f"  what Ray says of it: {jobs.look_command(job.address, job.id)}"
        if job.overdue and job.command:
            yield f"  to submit it again: {job.command.splitlines()[0]}"  # one line: it may be anybody's text


def _lines(store: Store) -> Iterator[str]:
    ledger = Ledger(store)
    for entry in ledger.entries(Kind.PRETRAIN):
        planned = entry.started["settings"]["epochs"]
        where = "done" if entry.ended else _OPEN
        if entry.failures:
            where += f"; failures: {_kinds(entry)}"
        if entry.failures and not entry.ended:
            where += f", the last one: {entry.failures[-1]['message']}"
        yield f"pretraining {entry.id}: epoch {max(entry.epochs, default=0)}/{planned}, {where}"
    trials = ledger.entries(Kind.TRIAL)
    if trials:
        yield from _of_ledger(store, trials)
        with contextlib.suppress(DataError):  # of records that lack them nobody knows the hours
            yield from filter(None, [_device_hours(store, trials)])
    else:
        yield from _of_tables(store)


def _of_ledger(store: Store, trials: list[Entry]) -> Iterator[str]:
    yield _states(str(e.ended["state"]) if e.ended else _WAITS if e.waits else _OPEN for e in trials)
    yield from _failed(store, failures.failed_trials(trials))
    again = [e for e in trials if e.failures and not (e.ended and e.ended["state"] == State.FAILED)]
    if again:
        yield f"tried again after failures: {len(again)}"
    for entry in again[:_SHOWN]:
        yield f"  {entry.id}: {_kinds(entry)}; {entry.ended['state'] if entry.ended else _OPEN}"


def _device_hours(store: Store, trials: list[Entry]) -> str:
    """Return device-hours used, and left where the study says how many trials there will be."""
    study = _study(store)
    objectives = len(study.pretrain.objectives) if study else 0
    each = study.search.trials_each if study else None
    meter = Meter(study.search.stopping if study else Stopping(), each, objectives)
    for entry in trials:
        if entry.ended is not None or entry.pauses:
            meter.add(trial_row(entry), waited=seconds_before(entry))
    return progress.device_line(meter)


def _study(store: Store) -> Study | None:
    """Return the study of a run; None where it is none of this raybd's, as of imported sweeps."""
    try:
        return Study.model_validate(run_record.read(store)["study"])
    except (DataError, ValidationError):
        return None


def _reached(store: Store, *, width: int, unicode: bool) -> Iterator[str]:
    """Yield best points and hypervolumes from the tables; what is wrong with those costs nothing else."""
    try:
        with reading(store.path("tables")):
            found = list(_searches(store, width=width, unicode=unicode))
        yield from found
    except DataError as error:
        yield f"best points are not known: {error}"


def _searches(store: Store, *, width: int, unicode: bool) -> Iterator[str]:
    searches = progress.search_states(tables.read(store, "fronts").to_pylist())
    if not searches:
        return
    needed = ["trial_id", "split", "zeroshot_top1", "asr_top1"]
    points = tables.read(store, "epochs", columns=needed).select(needed)
    epochs: dict[str, list[Row]] = {}
    for row in points.filter(pc.not_equal(points.column("split"), fronts.HALVES[1])).to_pylist():
        epochs.setdefault(row["trial_id"], []).append(row)
    needed = ["trial_id", "objective", "pretrain_id", "state", "ended"]
    columns = tables.read(store, "trials", columns=needed).select(needed)
    # Times as Python objects would load pandas, which takes as long as all the rest.
    ended = columns.column("ended").cast("int64")
    trials = columns.set_column(columns.schema.get_field_index("ended"), "ended", ended).to_pylist()
    for (objective, pretrain_id), found in progress.areas(trials, epochs).items():
        for search in searches:
            if search.of == (objective, pretrain_id):
                search.areas = [area for _, area in found]
    yield ""
    yield "best points by accuracy lost, and hypervolume against trials, on the images that the search looks at:"
    yield from progress.objective_lines(searches, width=width, unicode=unicode)


def _kinds(entry: Entry) -> str:
    kinds = Counter(str(failure["kind"]) for failure in entry.failures)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


def _of_tables(store: Store) -> Iterator[str]:
    """Yield the same of a run whose trials others ran: imported ones have no ledger."""
    # Timestamps as Python objects would load pandas, which takes as long as all the rest.
    names = ["trial_id", "state", "error_type", "error_message"]
    rows = tables.read(store, "trials").select(names).to_pylist()
    yield _states(row["state"] for row in rows)
    yield from _failed(
        store,
        [(row["trial_id"], row["error_type"], row["error_message"]) for row in rows if row["state"] == State.FAILED],
    )


def _states(found: Iterable[str]) -> str:
    states = Counter(found)
    return "trials: " + (", ".join(f"{count} {state}" for state, count in states.most_common()) or "none yet")


def _failed(store: Store, failed: list[tuple[str, str | None, str | None]]) -> Iterator[str]:
    found = failures.reasons(failed)
    for reason in found[:_SHOWN]:
        yield f"  {reason}"
    if len(found) > _SHOWN:
        yield f"  and {len(found) - _SHOWN} other reasons"
    if any(store.exists(failures.traceback_name(trial_id)) for trial_id, *_ in failed[:_SHOWN]):
        yield f"tracebacks: {store.path(failures.traceback_name('TRIAL'))}"
