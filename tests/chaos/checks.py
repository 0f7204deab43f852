"""What must hold at the end of a study, whatever happened on the way: it is what a run without a fault left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import torch
from optuna.trial import TrialState

from raybd import checkpoint, fronts, tables
from raybd.assignment import Assignment
from raybd.cluster.searcher import LedgerSearcher
from raybd.errors import DataError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.model import create, load_weights
from raybd.store import Store
from raybd.study import Study
from tests.chaos.reader import numbers
from tests.chaos.tally import Harm

Finding = tuple[Harm, str]


def compare(run: Store, reference: Store) -> Iterator[Finding]:
    """Yield all that a run has otherwise than one without a fault."""
    record, wanted = (json.loads(store.get("study.json")) for store in (run, reference))
    if record["pretrain_ids"] != wanted["pretrain_ids"]:
        raise ValueError(f"{reference.uri} is a run of another study, or of another version of raybd")
    study = Study.model_validate_json(json.dumps(record["study"]))
    for check in (
        lambda: _ledger(run, reference),
        lambda: _tables(run, reference),
        lambda: _fronts(run),
        lambda: _weights(run, reference, study),
        lambda: _optuna(run, study),
        lambda: _remains(run),
    ):
        try:
            yield from check()
        except DataError as error:  # what reads them finds more than is compared here
            yield Harm.BROKEN, str(error)


def _ledger(run: Store, reference: Store) -> Iterator[Finding]:
    """Every planned trial and every epoch, once, with the numbers of the reference."""
    for kind in Kind:
        have = {entry.id: entry for entry in Ledger(run).entries(kind)}
        want = {entry.id: entry for entry in Ledger(reference).entries(kind)}
        for id in want.keys() - have.keys():
            yield Harm.LOST, f"{kind} {id}"
        for id in have.keys() - want.keys():
            yield Harm.DOUBLED, f"{kind} {id} was not planned"
        for id in have.keys() & want.keys():
            yield from _entry(have[id], want[id])


def _entry(have: Entry, want: Entry) -> Iterator[Finding]:
    if have.ended is None:
        yield Harm.LOST, f"{have.id} has not ended"
    elif have.ended["state"] == State.FAILED:
        yield Harm.FAILED, f"{have.id}: {have.ended['error_type']}: {have.ended['error_message']}"
    for epoch in want.epochs.keys() - have.epochs.keys():
        yield Harm.LOST, f"{have.id} epoch {epoch}"
    for epoch in have.epochs.keys() - want.epochs.keys():
        yield Harm.DOUBLED, f"{have.id} epoch {epoch} was not planned"
    for epoch in have.epochs.keys() & want.epochs.keys():
        if repr(numbers(have.epochs[epoch])) != repr(numbers(want.epochs[epoch])):
            yield Harm.CHANGED, f"{have.id} epoch {epoch}: {have.epochs[epoch]} instead of {want.epochs[epoch]}"


def without_times(store: Store, table: str) -> pa.Table:
    """Return a table without what must differ between two runs: times, speed, node, attempts."""
    found = tables.read(store, table)
    return found.drop_columns([name for name in found.column_names if name in {*tables.TIMES, "attempt"}])


def _tables(run: Store, reference: Store) -> Iterator[Finding]:
    """The same rows, bit for bit, none twice. The fronts are among them, and so are hypervolumes."""
    for table in tables.SCHEMAS:
        have, want = without_times(run, table), without_times(reference, table)
        rows = Counter(map(repr, have.to_pylist()))
        for row, count in rows.items():
            if count > 1:
                yield Harm.DOUBLED, f"{table}: {count} times {row}"
        if not have.equals(want):
            other = [row for row in want.to_pylist() if repr(row) not in rows]
            yield Harm.CHANGED, f"{table}: {have.num_rows} rows, {want.num_rows} wanted, without {other[:2]}"


def _fronts(run: Store) -> Iterator[Finding]:
    """The fronts are those of the epochs that are there."""
    epochs, trials = (tables.read(run, name).to_pylist() for name in ("epochs", "trials"))
    columns = tables.SCHEMAS["fronts"].names
    have = sorted(map(repr, tables.read(run, "fronts").to_pylist()))
    want = sorted(repr({name: row[name] for name in columns}) for row in fronts.compute(epochs, trials))
    if have != want:
        yield Harm.CHANGED, f"fronts: {len(have)} rows, {len(want)} from the epochs"


def _weights(run: Store, reference: Store, study: Study) -> Iterator[Finding]:
    """Every front point has its weights, they load, and they are those of the reference."""
    clip = create(study.model.name, seed=0)
    on_front = set(tables.read(run, "fronts")["checkpoint"].to_pylist())
    for name in sorted(on_front):
        try:
            have = checkpoint.from_bytes(run.get(name), where=name)
            load_weights(clip, have, where=name)
        except Exception as error:
            yield Harm.WEIGHTLESS, f"{name}: {error}"
            continue
        want = checkpoint.from_bytes(reference.get(name), where=name)
        if have.keys() != want.keys() or not all(torch.equal(have[key], want[key]) for key in want):
            yield Harm.CHANGED, f"{name}: other weights"
    for name in set(run.names("weights")) - on_front:
        yield Harm.REMAINS, f"{name} is on no front"


def _optuna(run: Store, study: Study) -> Iterator[Finding]:
    """Optuna, told what the ledger has, knows every trial as ended, and has none to suggest."""
    ids = json.loads(run.get("study.json"))["pretrain_ids"]
    searcher = LedgerSearcher(study, ids, Ledger(run).entries(Kind.TRIAL), _never, stop=lambda *_: False)
    if searcher.remaining:
        yield Harm.LOST, f"Optuna: {searcher.remaining} trials remain"
    for name, objective in searcher._objectives.items():
        states = [trial.state for trial in objective.history.optuna.get_trials(deepcopy=False)]
        if not all(state.is_finished() for state in states):
            yield Harm.RUNNING, f"Optuna, {name}: {states}"
        if states != [TrialState.COMPLETE] * study.search.num_trials:
            yield Harm.LOST, f"Optuna, {name}: {states}"


def _never(task: Assignment) -> Entry:
    raise AssertionError(f"{task.trial_id} is settled already")


def _remains(run: Store) -> Iterator[Finding]:
    """No state is kept of what has ended."""
    for folder in ("state", "progress"):
        for name in run.names(folder):
            yield Harm.REMAINS, name
