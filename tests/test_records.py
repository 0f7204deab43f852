"""What a run directory holds: whole files, tables, the ledger, rows made from it; errors, seeds and provenance."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import raybd
from raybd import errors, ledger, provenance, records, seeding, tables
from raybd.errors import DataError, RaybdError, StorageError, SupersededError
from raybd.ledger import Kind, Ledger, State
from raybd.metrics import Counts
from raybd.provenance import digest
from raybd.seeding import fork, share
from raybd.store import Store
from raybd.study import CleanSettings, LossWeights, searchable
from raybd.study.methods import Abd, Par
from raybd.terms import TERMS


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"), patience=0)


def files(store: Store) -> list[str]:
    """Return all files of a local run directory, hidden ones too."""
    root = Path(store.root)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


# --- store


def test_files_come_back_as_they_went_in(store: Store) -> None:
    assert store.names("") == []
    store.put("a/b/c.bin", b"\x00\xff")
    store.put("a/d.json", b"{}")
    assert store.get("a/b/c.bin") == b"\x00\xff"
    store.put("a/b/c.bin", b"")
    assert store.get("a/b/c.bin") == b""
    assert store.names("a") == ["a/b/c.bin", "a/d.json"]
    assert store.names("a", suffix=".json") == ["a/d.json"]
    assert store.names("a/b") == ["a/b/c.bin"]
    assert store.names("nothing") == []
    assert (store.exists("a/d.json"), store.exists("a"), store.exists("a/x")) == (True, False, False)
    store.delete("a/d.json")
    store.delete("a/d.json")
    store.delete("never/there")
    assert files(store) == ["a/b/c.bin"]
    with pytest.raises(DataError, match="no such file in the run directory") as caught:
        store.get("a/d.json")
    assert caught.value.where == f"{store.root}/a/d.json"


def test_hidden_files_have_no_names(store: Store) -> None:
    store.put("t/part.parquet", b"1")
    Path(store.path("t/.part.parquet.1234")).write_bytes(b"half")
    assert store.names("t", suffix="") == ["t/part.parquet"]
    assert store.names("") == ["t/part.parquet"]


def test_every_way_to_name_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(str(tmp_path / "run")).put("a/x", b"1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for uri in ("run", "./run/", "~/run", f"file://{tmp_path}/run", f"file://{tmp_path}/run/", f"{tmp_path}/a/../run"):
        if ".." in uri:
            (tmp_path / "a").mkdir()
        found = Store(uri)
        assert found.local
        assert (found.names(""), found.names("a"), found.get("a/x")) == (["a/x"], ["a/x"], b"1"), uri
        again = pickle.loads(pickle.dumps(found))
        assert (again.uri, again.root, again.get("a/x")) == (found.uri, found.root, b"1")
    monkeypatch.chdir("/")
    assert found.get("a/x") == b"1", "a path is fixed where it was given"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_put_that_fails_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, broken: str, error: BaseException
) -> None:
    store.put("a/old", b"old")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, broken, fail)
    for name in ("a/old", "a/new"):
        with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
            store.put(name, b"new")
    assert files(store) == ["a/old"]
    assert store.get("a/old") == b"old"


def test_a_reader_never_sees_a_part_of_a_file(store: Store) -> None:
    contents = [bytes([i]) * size for i, size in enumerate((1, 300_000, 7, 1_000_000))]
    store.put("x", contents[0])
    seen: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(store.get("x"))
            assert store.names("") == ["x"]

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        for content in contents:
            store.put("x", content)
    done.set()
    reader.join()
    assert len(seen) > 1
    assert set(seen) <= set(contents)


def test_other_filesystems_get_whole_objects_in_one_write() -> None:
    store = Store("mock:///bucket/run")
    assert not store.local
    store.fs.create_dir("bucket/run/a")
    store.put("a/x", b"12")
    assert store.get("a/x") == b"12"
    assert store.names("") == ["a/x"]
    store.delete("a/x")
    assert not store.exists("a/x")
    with pytest.raises(DataError):
        store.get("a/x")


# --- tables

PLAN_ROW = {
    "key": "000000001",
    "shard": "train/a.tar.gz",
    "trigger": "{}",
    "placement": "0,0",
    "target_class": "fruit",
    "caption_before": "été",
    "caption_after": "a photo of a fruit.",
    "seed": 2**63 - 1,
}


def test_tables_round_trip_in_the_order_of_parts(store: Store) -> None:
    assert tables.read(store, "poison_plan").schema == tables.SCHEMAS["poison_plan"]
    assert tables.read(store, "poison_plan").num_rows == 0
    rows = [{**PLAN_ROW, "key": key} for key in "cab"]
    tables.write(store, "poison_plan", "part-b", rows[:2])
    tables.write(store, "poison_plan", "part-a", rows[2:])
    tables.write(store, "poison_plan", "empty", [])
    found = tables.read(store, "poison_plan")
    assert found.schema == tables.SCHEMAS["poison_plan"]
    assert found.schema.metadata is None
    assert found.to_pylist() == [rows[2], rows[0], rows[1]]
    tables.write(store, "poison_plan", "part-b", rows[:1])
    assert tables.read(store, "poison_plan")["key"].to_pylist() == ["b", "c"]
    assert files(store) == [f"tables/poison_plan/{name}.parquet" for name in ("empty", "part-a", "part-b")]
    part = pq.read_metadata(store.path("tables/poison_plan/part-a.parquet"))
    assert part.metadata[b"raybd.schema_version"] == b"2"
    assert part.metadata[b"raybd.table"] == b"poison_plan"
    assert part.row_group(0).column(0).compression == "ZSTD"


COUNTS = {"n_triggered": 4, "hit_target": 1, "correct_triggered": 2, "asr_top1": 0.25, "robust_top1": 0.5}
# What rows of these tables must have, beside whose they are.
EPOCH: dict[str, dict[str, object]] = {
    "epochs": {"method": "cleanclip", "zeroshot_top1": 0.5, "n_clean": 4, "correct_clean": 2, **COUNTS},
    "attacks": {"role": "planted", "trigger": "{}", "target_class": "fruit", **COUNTS},
}


@given(
    st.lists(st.tuples(st.integers(0, 2 * tables.TOGETHER), st.integers(1, 3)), min_size=1, max_size=12),
    st.sampled_from(("epochs", "attacks")),
)
@settings(max_examples=25)
def test_trials_share_parts_and_each_is_there_once_as_it_was_written_last(
    writes: list[tuple[int, int]], table: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, last = Store(folder), dict[str, list[dict[str, object]]]()
        for number, epochs in writes:
            trial = {"trial_id": f"mmcl-{number:04d}", "number": number, "objective": "mmcl"}
            known = {"study": "s", "study_hash": "h", "pretrain_id": "p", "objective": "mmcl", "split": "all"}
            mine = [{**known, **EPOCH[table], "trial_id": trial["trial_id"], "epoch": n} for n in range(epochs)]
            tables.write_trial(store, table, trial, mine)
            last[str(trial["trial_id"])] = mine
        found = tables.read(store, table).select(["trial_id", "epoch"]).to_pylist()
        assert found == [{"trial_id": id, "epoch": row["epoch"]} for id in sorted(last) for row in last[id]]
        assert len(store.names("tables")) == len({number // tables.TOGETHER for number, _ in writes})


def test_a_trial_that_cannot_be_written_leaves_the_others_of_its_part(store: Store) -> None:
    one, other = ({"trial_id": f"mmcl-{n:04d}", "number": n, "objective": "mmcl"} for n in (0, 1))
    row = {"study": "s", "study_hash": "h", "pretrain_id": "p", "objective": "mmcl", "split": "all", "epoch": 1}
    row |= EPOCH["epochs"]
    tables.write_trial(store, "epochs", one, [{**row, "trial_id": "mmcl-0000"}])
    with pytest.raises(DataError, match="columns that epochs has not"):
        tables.write_trial(store, "epochs", other, [{**row, "trial_id": "mmcl-0001", "colour": 1}])
    assert tables.read(store, "epochs")["trial_id"].to_pylist() == ["mmcl-0000"]
    store.put("tables/epochs/mmcl-0000-0031.parquet", b"no Parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        tables.write_trial(store, "epochs", other, [{**row, "trial_id": "mmcl-0001"}])


def test_columns_without_values_keep_their_types(store: Store) -> None:
    known = {"study": "s", "study_hash": "h", "pretrain_id": "p", "objective": "mmcl", "epoch": 1}
    tables.write(store, "pretrain_epochs", "t", [known])
    part = pq.read_table(store.path("tables/pretrain_epochs/t.parquet"))
    assert part.schema.field("loss").type == pa.float64()
    assert part.schema.field("broken").type == pa.int64()
    row = tables.read(store, "pretrain_epochs").to_pylist()[0]
    assert {name: value for name, value in row.items() if value is not None} == known


def test_rows_with_unknown_keys_are_refused_and_nothing_is_written(store: Store) -> None:
    with pytest.raises(DataError) as caught:
        tables.write(store, "poison_plan", "p", [PLAN_ROW, {**PLAN_ROW, "sead": 1, "colour": 2}])
    assert str(caught.value) == "tables/poison_plan/p: row has columns that poison_plan has not: ['colour', 'sead']"
    assert store.names("tables") == []


def put_table(store: Store, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.put("tables/poison_plan/p.parquet", sink.getvalue().to_pybytes())


def test_parts_that_cannot_be_read_are_named(store: Store) -> None:
    tables.write(store, "poison_plan", "a", [PLAN_ROW])
    where = store.path("tables/poison_plan/p.parquet")
    schema = tables.SCHEMAS["poison_plan"]
    good = pa.Table.from_pylist([PLAN_ROW], schema=schema)

    def message(table: pa.Table | None = None) -> str:
        if table is not None:
            put_table(store, table)
        with pytest.raises(DataError) as caught:
            tables.read(store, "poison_plan")
        assert caught.value.where == where
        return f"{caught.value.what} | {caught.value.expected}"

    assert message(good) == "schema version missing | version 2"
    assert message(good.replace_schema_metadata({"raybd.schema_version": "3"})) == "schema version 3 | version 2"
    version = {"raybd.schema_version": "2"}
    fewer = good.drop_columns(["seed", "shard"]).replace_schema_metadata(version)
    assert message(fewer) == "columns missing: shard, seed | "
    other = good.set_column(7, "seed", pa.array(["many"])).replace_schema_metadata(version)
    assert message(other).startswith("columns of other types: ")
    content = Path(store.path("tables/poison_plan/a.parquet")).read_bytes()
    for damaged in (b"", b"PAR1", content[:-20], content[:40] + bytes(60) + content[100:]):
        store.put("tables/poison_plan/p.parquet", damaged)
        assert message().startswith("not a readable Parquet file: ")
    # More columns than the schema has, in another order, are no fault.
    more = good.append_column("extra", pa.array([1])).select(["extra", *reversed(schema.names)])
    put_table(store, more.replace_schema_metadata(version))
    assert tables.read(store, "poison_plan").to_pylist() == [PLAN_ROW, PLAN_ROW]


def test_every_setting_of_a_cleaning_has_a_column() -> None:
    assert set(tables.SETTINGS) == (set(searchable()) - {"method"}) | {"precision"}
    assert set(tables.SCHEMAS["trials"].names) >= {column for column, _ in tables.SETTINGS.values()}
    assert {"started", "ended", "train_seconds"} < tables.TIMES


# --- ledger


def test_ledger_of_a_trial_from_start_to_end(store: Store) -> None:
    book = Ledger(store)
    with pytest.raises(DataError, match="never started"):
        book.entry(Kind.TRIAL, "t1")
    assert book.start(Kind.TRIAL, "t1", {"lr": 0.5}) == 1
    assert book.entry(Kind.TRIAL, "t1") == ledger.Entry("t1", {"lr": 0.5}, 1, {}, None)
    book.epoch(Kind.TRIAL, "t1", 0, {"loss": float("nan"), "n": 0})
    book.epoch(Kind.TRIAL, "t1", 2, {"loss": 2.0})
    assert book.start(Kind.TRIAL, "t1", {"lr": "of the second attempt"}) == 2
    book.epoch(Kind.TRIAL, "t1", 2, {"loss": 2.5})
    running = book.entry(Kind.TRIAL, "t1")
    assert running.started == {"lr": 0.5}, "the record of the first start"
    assert running.attempts == 2
    assert running.ended is None
    assert sorted(running.epochs) == [0, 2], "an epoch that is recorded twice counts once"
    assert running.epochs[2] == {"loss": 2.0}, "what was recorded first stays"
    assert (book.last_epoch(Kind.TRIAL, "t1"), book.last_epoch(Kind.TRIAL, "t2")) == (2, -1)
    book.require_last(Kind.TRIAL, "t1", 2)
    with pytest.raises(SupersededError, match="attempt 1 counts no more"):
        book.require_last(Kind.TRIAL, "t1", 1)
    ended = book.end(Kind.TRIAL, "t1", {"state": State.COMPLETE})
    assert (ended.started, ended.attempts, ended.ended) == ({"lr": 0.5}, 2, {"state": "complete"})
    assert list(ended.epochs) == [0, 2]
    assert ended.epochs[0]["loss"] != ended.epochs[0]["loss"], "NaN survives"
    assert book.end(Kind.TRIAL, "t1", {"state": State.FAILED}).ended == ended.ended, "a run ends once"
    with pytest.raises(SupersededError):
        book.require_last(Kind.TRIAL, "t1", 2)


def test_an_attempt_thought_dead_that_gets_to_a_rung_late_decides_nothing(store: Store) -> None:
    book = Ledger(store)

    def now() -> tuple[bool, list[int]]:
        entry = book.entry(Kind.TRIAL, "t")
        return entry.waits, [pause["epoch"] for pause in entry.pauses]

    for attempt in (1, 2):  # the first one is on a machine that was thought dead
        assert book.start(Kind.TRIAL, "t", {"until": 1}) == attempt
    assert now() == (False, [])
    book.pause(Kind.TRIAL, "t", {"epoch": 1})
    assert now() == (True, [1]), "whichever attempt it was: the trial is at its rung, and nobody has let it go on"
    book.pause(Kind.TRIAL, "t", {"epoch": 1})
    book.start(Kind.TRIAL, "t", {"until": 3})
    assert now() == (False, [1, 1]), "it goes on to the next rung"
    book.pause(Kind.TRIAL, "t", {"epoch": 3})
    book.pause(Kind.TRIAL, "t", {"epoch": 1})
    assert now() == (True, [1, 1, 1, 3])
    book.start(Kind.TRIAL, "t", {"until": None})
    assert now() == (False, [1, 1, 1, 3])


def test_attempts_are_in_order_whatever_their_number(store: Store) -> None:
    for number, until in ((999, 1), (1000, 1), (1001, 3)):
        store.put(f"ledger/trials/t/started-{number:03d}.json", json.dumps({"until": until}).encode())
    Ledger(store).pause(Kind.TRIAL, "t", {"epoch": 1})
    assert not Ledger(store).entry(Kind.TRIAL, "t").waits
    # Without it nobody knows whether the trial was told to go on.
    store.put("ledger/trials/t/started-1002.json", b"{}")
    with pytest.raises(DataError, match="not the records of a run: KeyError"):
        Ledger(store).entry(Kind.TRIAL, "t")


def test_starts_at_the_same_moment_are_attempts_of_their_own(store: Store) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(Ledger(store).start(Kind.TRIAL, "t", {}))) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 13))


def test_an_ended_entry_needs_one_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Ledger(store)
    book.start(Kind.TRIAL, "t", {"a": 1})
    for epoch in range(4):
        book.epoch(Kind.TRIAL, "t", epoch, {"loss": epoch})
    ended = book.end(Kind.TRIAL, "t", {"state": "failed"})
    read: list[str] = []
    monkeypatch.setattr(Store, "get", lambda self, name, get=Store.get: read.append(name) or get(self, name))
    assert book.entries(Kind.TRIAL) == [ended]
    assert read == ["ledger/trials/t/ended.json"]
    for name in store.names("ledger/trials/t"):
        if not name.endswith("ended.json"):
            store.delete(name)
    assert book.entry(Kind.TRIAL, "t") == ended
    assert [record["loss"] for record in ended.epochs.values()] == [0, 1, 2, 3]


def test_entries_are_by_kind_and_id(store: Store) -> None:
    book = Ledger(store)
    assert book.entries(Kind.TRIAL) == []
    for id in ("t10", "t2", "t1"):
        book.start(Kind.TRIAL, id, {"id": id})
    book.start(Kind.PRETRAIN, "p", {})
    book.end(Kind.TRIAL, "t2", {})
    assert [(entry.id, entry.ended) for entry in book.entries(Kind.TRIAL)] == [("t1", None), ("t10", None), ("t2", {})]
    assert [entry.id for entry in book.entries(Kind.PRETRAIN)] == ["p"]


def test_epochs_of_any_number_of_digits(store: Store) -> None:
    book = Ledger(store)
    book.start(Kind.PRETRAIN, "p", {})
    for epoch in (1, 1000, 10_000, 10_001):
        book.epoch(Kind.PRETRAIN, "p", epoch, {"epoch": epoch})
    assert {number: record["epoch"] for number, record in book.entry(Kind.PRETRAIN, "p").epochs.items()} == {
        number: number for number in (1, 1000, 10_000, 10_001)
    }


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"3"])
def test_damaged_records_are_named(store: Store, content: bytes) -> None:
    Ledger(store).start(Kind.TRIAL, "t", {})
    store.put("ledger/trials/t/epoch-0001.json", content)
    with pytest.raises(DataError, match="not a ledger record") as caught:
        Ledger(store).entries(Kind.TRIAL)
    assert caught.value.where == store.path("ledger/trials/t/epoch-0001.json")


# --- rows from records

SEARCH = {"n_clean": 10, "correct_clean": 6, "n_triggered": 8, "hit_target": 2, "correct_triggered": 5}
REPORT = {"n_clean": 30, "correct_clean": 15, "n_triggered": 24, "hit_target": 24, "correct_triggered": 0}


def epoch_record(epoch: int, *, pretraining: bool = False) -> dict[str, Any]:
    """Return what training records of an epoch."""
    return {
        **{"epoch": epoch, "step": 3 * epoch, "samples_seen": 96 * epoch, "lr": 1e-3, "logit_scale": 14.3, "broken": 1},
        **{"loss": None, **{f"loss_{term}": None for term in TERMS}, "loss_mmcl": 2.5},
        **{"train_seconds": 1.5, "evaluate_seconds": 0.5, "samples_per_second": 64.0},
        "counts": {"search": SEARCH, "report": REPORT},
        **({"poisoned_seen": 9} if pretraining else {}),
    }


def test_rows_of_a_pretraining_count_both_halves(store: Store) -> None:
    book = Ledger(store)
    same = {"study": "s", "study_hash": "h", "pretrain_id": "p", "objective": "mmcl"}
    book.start(Kind.PRETRAIN, "p", {**same, "settings": {}, "started": "2025-01-02T03:04:05+00:00"})
    for epoch in (2, 1):
        book.epoch(Kind.PRETRAIN, "p", epoch, epoch_record(epoch, pretraining=True))
    rows = records.pretrain_rows(book.end(Kind.PRETRAIN, "p", {"state": State.COMPLETE}))
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0] == {
        **same,
        **{name: value for name, value in epoch_record(1, pretraining=True).items() if name != "counts"},
        **{"n_clean": 40, "correct_clean": 21, "n_triggered": 32, "hit_target": 26, "correct_triggered": 5},
        **{"zeroshot_top1": 21 / 40, "asr_top1": 26 / 32, "robust_top1": 5 / 32},
    }
    tables.write(store, "pretrain_epochs", "p", rows)
    read = tables.read(store, "pretrain_epochs").to_pylist()
    assert read == rows
    assert set(tables.SCHEMAS["pretrain_epochs"].names) == set(rows[0])


METHOD_SECTIONS = {"shrink_perturb", "deep_clustering", "pseudo_labels", "par", "ft_sam", "abd"}


def test_settings_of_methods_are_columns(store: Store) -> None:
    settings = CleanSettings(par=Par(threshold=1.5), abd=Abd(steps=7)).model_dump(mode="json")
    same = {"study": "s", "study_hash": "h", "trial_id": "t", "pretrain_id": "p", "objective": "mmcl", "method": "m"}
    started = {**same, "number": 0, "seed": 1, "params": {}, "settings": settings}
    Ledger(store).start(Kind.TRIAL, "t", {**started, "started": "2025-01-02T03:04:05+00:00"})
    row = records.trial_row(Ledger(store).entry(Kind.TRIAL, "t"))
    assert (row["par.threshold"], row["abd.steps"], row["shrink_perturb.shrink"]) == (1.5, 7, 0.95)


@pytest.mark.parametrize("params", [[1], "lr", None, 3])
def test_searched_settings_of_another_kind_are_no_records_of_a_run(store: Store, params: object) -> None:
    book, settings = Ledger(store), CleanSettings().model_dump(mode="json")
    same = dict.fromkeys(("study", "study_hash", "pretrain_id", "objective", "method"), "x")
    started = {**same, "number": 0, "seed": 1, "settings": settings, "started": "2025-01-02T03:04:05+00:00"}
    book.start(Kind.TRIAL, "t", {**started, "trial_id": "t", "params": params})
    with pytest.raises(DataError, match="are no searched settings"):
        records.trial_row(book.entry(Kind.TRIAL, "t"))


def test_rows_of_a_trial_running_and_ended(store: Store) -> None:
    book = Ledger(store)
    settings = CleanSettings(lr=3e-4, epochs=2, loss_weights=LossWeights(mmcl=1, ssl=4))
    same = {"study": "s", "study_hash": "h", "trial_id": "t", "pretrain_id": "p", "objective": "mmcl", "method": "m"}
    started = {
        **{**same, "number": 5, "seed": 2**62, "params": {"lr": 3e-4, "epochs": 2}},
        **{"settings": settings.model_dump(mode="json"), "started": "2025-01-02T03:04:05+00:00"},
    }
    book.start(Kind.TRIAL, "t", started)
    running = records.trial_row(book.entry(Kind.TRIAL, "t"))
    assert (running["state"], running["epochs_done"], running["ended"], running["attempt"]) == (
        "running",
        None,
        None,
        1,
    )
    for epoch in (0, 1):
        book.epoch(Kind.TRIAL, "t", epoch, epoch_record(epoch))
    ending = {"state": State.STOPPED, "stop_reason": "r", "error_type": "E", "error_message": "m", "node": "n"}
    ending |= {
        "device": "cpu",
        "device_seconds": 2.5,
        "weight_decay_in_force": 0.1,
        "ended": "2025-01-02T03:05:05+01:00",
    }
    entry = book.end(Kind.TRIAL, "t", ending)
    row = records.trial_row(entry)
    assert row == {
        **same,
        **{**ending, "number": 5, "seed": 2**62, "attempt": 1, "epochs_done": 1},
        **{"params_json": '{"epochs": 2, "lr": 0.0003}', "epochs_planned": 2, "batch_size": 64, "warmup_steps": 50},
        **{"lr": 3e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "precision": "auto"},
        **{f"loss_weights.{term}": {"mmcl": 1.0, "ssl": 4.0}.get(term, 0.0) for term in TERMS},
        **{"image_view": "autoaugment", "text_view": "eda"},
        **{"num_samples": 100_000, "leaked_poison": 0, "leaked_share": 0.0, "schedule": "cosine"},
        **{name: value for name, value in row.items() if name.partition(".")[0] in METHOD_SECTIONS},
        "started": datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC),
        "ended": datetime(2025, 1, 2, 2, 5, 5, tzinfo=UTC),
    }
    rows = records.epoch_rows(entry)
    assert [(found["epoch"], found["split"]) for found in rows] == [
        (0, "search"),
        (0, "report"),
        (1, "search"),
        (1, "report"),
    ]
    expected = {name: value for name, value in epoch_record(1).items() if name != "counts"}
    rates = {"zeroshot_top1": 0.6, "asr_top1": 0.25, "robust_top1": 0.625}
    assert rows[2] == {**same, **expected, "alpha": None, "split": "search", **SEARCH, **rates}
    assert rows[3]["asr_top1"] == 1.0
    tables.write(store, "trials", "t", [row])
    tables.write(store, "epochs", "t", rows)
    assert tables.read(store, "trials").to_pylist() == [row]
    assert tables.read(store, "epochs").to_pylist() == rows
    assert set(tables.SCHEMAS["trials"].names) == set(row)
    assert set(tables.SCHEMAS["epochs"].names) == set(rows[0])


def test_counts_of_a_record_are_those_of_each_half() -> None:
    found = records.counts(epoch_record(1))
    assert found == {"search": Counts(**SEARCH), "report": Counts(**REPORT)}


# --- errors


def kinds(base: type[RaybdError] = RaybdError) -> list[type[RaybdError]]:
    return [base, *(kind for child in base.__subclasses__() for kind in kinds(child))]


def test_every_documented_error_exists_with_its_exit_code() -> None:
    codes = {kind.__name__: kind.exit_code for kind in kinds() if kind.__module__ == errors.__name__}
    assert codes == {
        **{"RaybdError": 1, "StudyError": 2, "DataError": 1},
        **{"CheckpointError": 1, "ClusterError": 3, "TrialError": 1},
        **{"StorageError": 3, "LockedError": 3, "SupersededError": 1, "NonFiniteError": 1},
    }


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_errors_survive_pickling(kind: type[RaybdError]) -> None:
    error = kind("what", where="f.yaml:3", expected="this", fix="do that")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert (again.what, again.where, again.expected, again.fix) == ("what", "f.yaml:3", "this", "do that")
        assert again.args == ("what",)
        assert str(again) == str(error) == "f.yaml:3: what\n  expected: this\n  to do: do that"
    assert str(pickle.loads(pickle.dumps(kind("only what")))) == "only what"


# --- seeds


def test_seeds_are_the_same_on_every_machine() -> None:
    assert fork(0) == 6711488920161924273
    assert fork(7, "poison", "pairs") == 3028114458548421115
    assert share(0, "x") == pytest.approx(0.5914034017610545, abs=1e-15)


def test_labels_tell_seeds_apart() -> None:
    labels: list[tuple[Any, ...]] = [
        (),
        (1,),
        ("1",),
        (1, 1),
        ("1", 1),
        (1, "1"),
        ("11",),
        (11,),
        ("1 1",),
        ("",),
        ("", ""),
    ]
    found = [fork(seed, *label) for seed in (0, 1, 11) for label in labels]
    assert len(set(found)) == len(found)
    assert fork(1, "a", "b") != fork(1, "b", "a")


@given(seed=st.integers(0, 2**70), labels=st.lists(st.integers() | st.text(), max_size=3))
def test_seeds_and_shares_stay_in_their_range(seed: int, labels: list[int | str]) -> None:
    assert 0 <= fork(seed, *labels) < 2**63
    assert fork(seed, *labels) == fork(seed, *labels)
    assert 0 <= share(seed, *labels) < 1


def test_shares_are_uniform_and_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sorted(share(3, "coin", i) for i in range(2000))
    assert max(abs(value - i / 2000) for i, value in enumerate(found)) < 0.03, "Kolmogorov-Smirnov, p < 0.05"
    monkeypatch.setattr(seeding, "fork", lambda *_: 2**63 - 1)
    assert 0.999 < share(0) < 1
    monkeypatch.setattr(seeding, "fork", lambda *_: 0)
    assert share(0) == 0


# --- provenance


def test_digests() -> None:
    assert digest({"a": 1, "b": [2.0, "é"]}) == digest({"b": [2.0, "é"], "a": 1}) == "c7ef86cf70d0"
    assert digest({"a": 1}, length=20)[:12] == digest({"a": 1})
    assert len({digest(value) for value in (1, "1", 1.5, None, [], {}, [1], True)}) == 8


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's code, which `code_version` takes for the package itself."""
    source = Path(raybd.__file__).parent
    ignore = shutil.ignore_patterns("*.gz", "*.png", "__pycache__", "LICENSES")
    shutil.copytree(source, tmp_path / "raybd", ignore=ignore)
    monkeypatch.setattr(raybd, "__file__", str(tmp_path / "raybd" / "__init__.py"))
    return tmp_path / "raybd"


def code_version() -> str:
    return provenance.code_version.__wrapped__()


def test_code_version_depends_on_numeric_code_alone(package: Path) -> None:
    before = code_version()
    assert before == provenance.code_version()
    assert before.startswith(f"{raybd.__version__}+")
    for name in ("cli.py", "report/html.py", "cluster/search.py", "tables.py", "space.py"):
        (package / name).write_text("# changed\n")
    (package / "data" / "notes.txt").write_text("no code")
    assert code_version() == before
    seen = {before}
    numeric = ["objectives.py", "evaluate.py", "model.py", "seeding.py", "poison/plan.py", "data/views.py"]
    numeric += ["data/pairs.py", "train/loop.py", "clean/cleanclip.py", "model_configs/resnet-tiny-32.json"]
    for name in numeric:
        (package / name).write_bytes((package / name).read_bytes() + b"\n")
        assert code_version() not in seen, name
        seen.add(code_version())
    (package / "train" / "new.py").write_text("")
    assert code_version() not in seen
    seen.add(code_version())
    (package / "train" / "new.py").rename(package / "train" / "other.py")
    assert code_version() not in seen, "a file that is renamed"


def test_environment_names_versions_without_importing_anything() -> None:
    found = provenance.environment()
    assert found["raybd"] == provenance.code_version()
    assert found["packages"]["pyarrow"] == pa.__version__
    assert found["cores"] >= 1
    assert json.loads(json.dumps(found)) == found
