"""What the chaos harness would see: each kind of harm, done to a run directory on purpose, is found as what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from raybd import checkpoint, fronts, study_file, tables
from raybd.assignment import Assignment, start_record
from raybd.cluster.searcher import LedgerSearcher
from raybd.ledger import Kind, Ledger, State
from raybd.model import create
from raybd.records import epoch_rows, pretrain_rows, trial_row
from raybd.store import Store
from raybd.study import Study
from raybd.train import pretraining
from tests.chaos import checks
from tests.chaos.reader import Findings, Reader
from tests.chaos.tally import Harm

STUDY = Path(__file__).parent / "chaos" / "study.yaml"
NOW = datetime(2026, 1, 1, tzinfo=UTC).isoformat()


def record(epoch: int, *, right: int) -> dict[str, object]:
    """Return an epoch's record as training leaves it, of ten images in each half."""
    counts = {"n_clean": 10, "correct_clean": right, "n_triggered": 10, "hit_target": 5, "correct_triggered": 1}
    names = ("step", "samples_seen", "lr", "loss", "logit_scale", "broken", "poisoned_seen")
    same = dict.fromkeys((*names, "evaluate_seconds", "samples_per_second"), 0)
    return {**same, "epoch": epoch, "train_seconds": 1.0, "counts": {"search": counts, "report": counts}}


def write_run(store: Store, study: Study) -> None:
    """Write what a finished run leaves: ledger, tables, fronts and weights, with made-up numbers."""
    ids = {name: f"{name}-0" for name in study.pretrain.objectives}
    store.put("study.json", json.dumps({"study": study.resolved(), "pretrain_ids": ids}).encode())
    ledger, weights = Ledger(store), checkpoint.to_bytes(create(study.model.name, seed=0).net.state_dict())
    epochs, trials = [], []
    for objective, id in ids.items():
        ledger.start(Kind.PRETRAIN, id, pretraining.start_record(study, objective, id))
        ledger.epoch(Kind.PRETRAIN, id, 0, record(0, right=9))
        entry = ledger.end(Kind.PRETRAIN, id, {"state": State.COMPLETE, "ended": NOW})
        tables.write(store, "pretrain_epochs", id, pretrain_rows(entry))
        store.put(f"pretrained/{id}.safetensors", weights)
    searcher = LedgerSearcher(
        study, ids, [], lambda task: ledger.entry(Kind.TRIAL, task.trial_id), stop=lambda *_: False
    )
    for number in range(searcher.remaining):
        task = Assignment(**searcher.suggest(str(number)))
        ledger.start(Kind.TRIAL, task.trial_id, start_record(study, task))
        for epoch, right in enumerate((5, 8)):
            ledger.epoch(Kind.TRIAL, task.trial_id, epoch, record(epoch, right=right))
        store.put(fronts.checkpoint_name(task.trial_id, 1), weights)
        entry = ledger.end(Kind.TRIAL, task.trial_id, {"state": State.COMPLETE, "ended": NOW})
        searcher.on_trial_complete(str(number))
        tables.write(store, "epochs", entry.id, epoch_rows(entry))
        tables.write(store, "trials", entry.id, [trial_row(entry)])
        epochs, trials = [*epochs, *epoch_rows(entry)], [*trials, trial_row(entry)]
    tables.write(store, "fronts", "all", fronts.compute(epochs, trials))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("reference") / "run"), patience=0)
    write_run(store, study_file.load(str(STUDY), overrides=["search.num_trials=1"]))
    return store


@pytest.fixture
def run(reference: Store, tmp_path: Path) -> Store:
    shutil.copytree(reference.root, tmp_path / "run")
    return Store(str(tmp_path / "run"), patience=0)


def rewrite(store: Store, name: str, change: Callable[[dict[str, object]], object]) -> None:
    """Change a JSON file of a run directory."""
    found = json.loads(store.get(name))
    change(found)
    store.put(name, json.dumps(found).encode())


def rewrite_part(store: Store, table: str, change: Callable[[list[dict[str, object]]], object]) -> None:
    """Change the first part of a table."""
    name = store.names(f"tables/{table}")[0]
    part = Path(name).stem
    rows = [row for row in tables.read(store, table).to_pylist() if table == "fronts" or row.get("trial_id") == part]
    change(rows)
    tables.write(store, table, part, rows)


END = "ledger/trials/mmcl-0000/ended.json"
DAMAGE: dict[str, tuple[Harm, Callable[[Store], object]]] = {
    "a trial is gone": (Harm.LOST, lambda run: shutil.rmtree(run.path("ledger/trials/mmcl-0000"))),
    "a trial has not ended": (Harm.LOST, lambda run: run.delete(END)),
    "an epoch is gone": (Harm.LOST, lambda run: rewrite(run, END, lambda end: end["epochs"].pop("1"))),
    "a trial too many": (
        Harm.DOUBLED,
        lambda run: run.put(END.replace("0000", "0009"), run.get(END).replace(b"mmcl-0000", b"mmcl-0009")),
    ),
    "a trial under another name": (
        Harm.BROKEN,
        lambda run: shutil.copytree(run.path("ledger/trials/mmcl-0000"), run.path("ledger/trials/mmcl-0009")),
    ),
    "a row too many": (Harm.BROKEN, lambda run: rewrite_part(run, "epochs", lambda rows: rows.append(rows[0]))),
    "a number changed": (
        Harm.CHANGED,
        lambda run: rewrite(run, END, lambda end: end["epochs"]["1"].update(loss=0.1)),
    ),
    "a row changed": (Harm.CHANGED, lambda run: rewrite_part(run, "epochs", lambda rows: rows[0].update(step=1))),
    "a front of others": (Harm.CHANGED, lambda run: rewrite_part(run, "fronts", lambda rows: rows.pop())),
    "a trial failed": (
        Harm.FAILED,
        lambda run: rewrite(
            run, END, lambda end: end["ended"].update(state="failed", error_type="X", error_message="x")
        ),
    ),
    "weights gone": (Harm.WEIGHTLESS, lambda run: run.delete("weights/mmcl-0000/epoch-0001.safetensors")),
    "weights of no front": (Harm.REMAINS, lambda run: run.put("weights/mmcl-0000/epoch-0007.safetensors", b"")),
    "a state left": (Harm.REMAINS, lambda run: run.put("state/mmcl-0000.safetensors", b"")),
}


def test_two_runs_alike_differ_in_nothing(run: Store, reference: Store) -> None:
    assert list(checks.compare(run, reference)) == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_each_harm_is_found_at_the_end(run: Store, reference: Store, damage: str) -> None:
    harm, do = DAMAGE[damage]
    do(run)
    assert harm in {found for found, _ in checks.compare(run, reference)}


def seen(run: Store, change: Callable[[], object]) -> Findings:
    """Return what a reader sees that looks before and after a change."""
    reader = Reader(run)
    reader.poll()
    change()
    reader.poll()
    return reader.found


def test_a_reader_sees_what_is_half_there_or_changes(run: Store) -> None:
    assert seen(run, lambda: None) == Findings(polls=2, records=33)
    part, epoch = run.names("tables/epochs")[0], "ledger/trials/mmcl-0000/epoch-0001.json"
    run.delete(END)  # under way again: its epochs are read one by one
    whole = run.get(part)
    assert seen(run, lambda: run.put(part, whole[: len(whole) // 2])).broken
    run.put(part, whole)
    assert seen(run, lambda: run.put(epoch, b'{"epoch": ')).broken
    run.put(epoch, json.dumps(record(1, right=8)).encode())
    assert seen(run, lambda: rewrite(run, epoch, lambda found: found.update(step=1))).changed
    assert seen(run, lambda: rewrite(run, epoch, lambda found: found.update(train_seconds=2))).again
    assert seen(run, lambda: run.delete(epoch)).lost
    assert seen(run, lambda: run.delete("weights/mmcl-0000/epoch-0001.safetensors")).weightless
