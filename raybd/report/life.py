"""What happened to one trial or pretraining run, in lines of text: from its start to its end, with its tracebacks."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from raybd import failures
from raybd.assignment import point
from raybd.errors import DataError
from raybd.ledger import Entry, Kind, Ledger, State, reading
from raybd.report import words
from raybd.store import Store

_NEAREST = 3


def lines(store: Store, id: str) -> Iterator[str]:
    """Yield what a run directory knows of a trial or a pretraining run, in the order of its epochs.

    Errors: DataError where it knows none of that name, or its ledger is not one of a run.
    """
    kind, entry = _find(store, id)
    with reading(store.path(f"ledger/{kind}/{id}")):
        yield from _lines(store, kind, entry)


def _find(store: Store, id: str) -> tuple[Kind, Entry]:
    ledger = Ledger(store)
    known = {each: kind for kind in Kind for each in ledger.ids(kind)}
    if id in known:
        return known[id], ledger.entry(known[id], id)
    nearest = difflib.get_close_matches(id, known, n=_NEAREST, cutoff=0.3)
    raise DataError(
        "no such trial or pretraining run" if known else "it has no ledger: nothing was started, or others ran it",
        where=f"{store.uri}, {id}",
        expected=f"an id, such as {', '.join(nearest)}" if nearest else "",
        fix="`raybd status` says what there is" if known else "",
    )


def _lines(store: Store, kind: Kind, entry: Entry) -> Iterator[str]:
    started = entry.started
    attempts = f"{entry.attempts} attempt{'s' if entry.attempts > 1 else ''}"
    yield f"{'trial' if kind is Kind.TRIAL else 'pretraining'} {entry.id}, started {started['started']}, {attempts}"
    if kind is Kind.TRIAL:
        settings = ", ".join(f"{name}={words.number(value)}" for name, value in started["params"].items())
        yield f"of {started['objective']}, {started['method']}: {settings or 'the settings of the study'}"
    rungs = {pause["epoch"] for pause in entry.pauses}
    yield from _failures(entry, after=None)
    for epoch, record in sorted(entry.epochs.items()):
        accuracy, asr = point(record)
        yield f"  epoch {epoch}  accuracy {accuracy:7.2%}  ASR {asr:7.2%}" + ("  at a rung" if epoch in rungs else "")
        yield from _failures(entry, after=epoch)
    yield _end(entry)
    whole = failures.traceback_name(entry.id)
    for name in store.names("errors", suffix=".txt"):
        # Of several processes at work on one thing each has a file.
        if name == whole or name.startswith(f"{whole.removesuffix('.txt')}-rank"):
            yield f"\n{store.path(name)}:"
            yield store.get(name).decode(errors="replace").rstrip()


def _failures(entry: Entry, *, after: int | None) -> Iterator[str]:
    for failure in entry.failures:
        if failure["epoch"] == after:
            yield f"  failed, {failure['kind']}, {failure['time']}: {failures.one_line(str(failure['message']))}"


def _end(entry: Entry) -> str:
    if entry.ended is None:
        return "waits at a rung to be compared with others" if entry.waits else "running, or interrupted"
    ended = entry.ended
    state = str(ended.get("state", State.COMPLETE))
    if state == State.FAILED:
        state += f", {ended['error_type']}: {failures.one_line(str(ended['error_message']))}"
    elif ended.get("stop_reason"):
        state += f", {ended['stop_reason']}"
    return f"{state}, {ended['ended']}"
