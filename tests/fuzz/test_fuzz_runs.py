"""Recorded curves, ledgers and `study.json` from anywhere: read whole, or refused with file and reason."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import fuzzing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_tables import SAME, changed, reshaped, table_of

from raybd import curves, run_record, tables
from raybd.ledger import Kind, Ledger
from raybd.records import attack_rows, epoch_rows, pretrain_rows, trial_row
from raybd.store import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curves")


# Curves to replay against


CURVES = [
    {
        "trial_id": f"t{t}",
        "objective": "mmcl",
        "method": "mmcl",
        "pretrain_id": "p",
        "lr": 10.0**-t,
        "image_view": "autoaugment",
        "epoch": epoch,
        "n_clean": 10,
        "correct_clean": 5,
        "n_triggered": 10,
        "hit_target": epoch,
    }
    for t in (3, 4)
    for epoch in (0, 1, 2)
]
CURVE_SCHEMA = pa.Table.from_pylist(CURVES).schema


@given(seed=st.integers(0, 2**32), data=st.data())
@fuzzing.fuzzed(100)
def test_curves(seed: int, data: st.DataObject, folder: Path) -> None:
    dice = random.Random(seed)
    sink = io.BytesIO()
    pq.write_table(reshaped(table_of(changed(CURVES, dice), CURVE_SCHEMA), dice), sink)
    content = sink.getvalue()
    if dice.random() < 0.2:
        content = data.draw(fuzzing.damaged(content))
    (folder / "sweep.parquet").write_bytes(content)

    def read() -> pa.Table:
        found = curves.read(str(folder / "sweep.parquet"))
        assert all(curve.last >= 0 for curve in found)
        return curves.table_of(found)

    fuzzing.case("curves", read, given=content)


# Ledger and record


STARTED = {
    **SAME,
    "trial_id": "t",
    "number": 0,
    "method": "mmcl",
    "seed": 3,
    "params": {"lr": 1e-3},
    "started": "2026-01-01T00:00:00+00:00",
    "settings": {
        "epochs": 2,
        "lr": 1e-3,
        **{name: None for name in tables.SETTINGS if "." not in name and name not in ("epochs", "lr")},
        **{name.split(".")[0]: {} for name in tables.SETTINGS if "." in name},
    },
}
for _name in tables.SETTINGS:
    if "." in _name:
        STARTED["settings"][_name.split(".")[0]][_name.split(".")[1]] = None  # type: ignore[index]
COUNTS = {"n_clean": 10, "correct_clean": 5, "n_triggered": 10, "hit_target": 5, "correct_triggered": 1}
EPOCH = {
    **dict.fromkeys(
        ("step", "samples_seen", "lr", "loss", "logit_scale", "broken", "train_seconds", "evaluate_seconds"), 1
    ),
    "samples_per_second": 1.0,
    "epoch": 1,
    "poisoned_seen": 1,
    "counts": {"search": COUNTS, "report": COUNTS},
    "attacks": [
        {
            "role": "attack",
            "trigger": '{"name": "sig"}',
            "target_class": "x",
            "counts": {"search": COUNTS, "report": COUNTS},
        }
    ],
}
ENDED = {"state": "failed", "ended": "2026-01-01T00:00:00+00:00", "error_type": "E", "error_message": "m"}
RECORD = {
    "study": {"name": "s", "poison": {"trigger": {"name": "sig"}}},
    "hash": "h",
    "pretrain_ids": {"mmcl": "mmcl-1"},
    "environment": {"raybd": "1"},
    "created": "2026",
}
JSON_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    10**400,
    "",
    "x",
    "\ud800",
    [],
    {},
    [[1, 2]],
    {"a": {}},
    "2026-99-99",
    [None],
]
GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"x"',
    b"\xff\xfe",
    b"[" * 50_000,
    b"9" * 5000,
    b"NaN",
    b'{"a": 1}',
    b'[["a", 1]]',
    b"\0" * 100,
]


def mutated(value: Any, dice: random.Random) -> bytes:
    """Return JSON with one thing in it replaced or taken away; or no JSON."""
    if dice.random() < 0.15:
        return dice.choice(GARBAGE)
    found = json.loads(json.dumps(value))
    inner = found
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            break
        key = dice.choice(keys)
        if isinstance(inner[key], dict | list) and inner[key] and dice.random() < 0.7:
            inner = inner[key]
            continue
        if isinstance(inner, dict) and dice.random() < 0.4:
            del inner[key]
        else:
            inner[key] = dice.choice(JSON_VALUES)
        break
    return json.dumps(found).encode()


def read_ledger(store: Store) -> list[Any]:
    """Return the rows of all that a ledger has."""
    ledger, found = Ledger(store), []
    for entry in ledger.entries(Kind.PRETRAIN):
        found.append(pretrain_rows(entry))
    for entry in ledger.entries(Kind.TRIAL):
        assert all(isinstance(record, dict) for record in (entry.started, *entry.epochs.values(), *entry.failures))
        row, points, tried = trial_row(entry), epoch_rows(entry), attack_rows(entry)
        tables.write(store, "trials", "one", [row])
        tables.write(store, "epochs", "one", points)
        tables.write(store, "attacks", "one", tried)
        found += [tables.read(store, name).num_rows for name in ("trials", "epochs", "attacks")]
    return found


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger")


@given(seed=st.integers(0, 2**32))
@fuzzing.fuzzed(150)
def test_ledgers(seed: int, book: Path) -> None:
    dice = random.Random(seed)
    names = [
        "started-001.json",
        "epoch-0001.json",
        "ended.json",
        "failed-001.json",
        "epoch-x.json",
        "started-.json",
        "other.json",
    ]
    kind = dice.choice(["trials", "trials", "pretrain"])
    whole = {"started": STARTED, "attempts": 1, "ended": ENDED, "epochs": {"1": EPOCH}, "failures": [ENDED]}
    contents: dict[str, Any] = dict(zip(names, [STARTED, EPOCH, whole, ENDED, EPOCH, STARTED, {}], strict=True))
    chosen = ["started-001.json", "epoch-0001.json", *dice.sample(names[2:], k=dice.choice([0, 0, 1, 2]))]
    odd = dice.choice([*chosen, None])
    for old in book.rglob("*.json"):
        old.unlink()
    given = {}
    for name in chosen:
        given[name] = mutated(contents[name], dice) if name == odd else json.dumps(contents[name]).encode()
        path = book / "ledger" / kind / "t" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(given[name])
    fuzzing.case("ledger", lambda: read_ledger(Store(str(book))), given=(kind, given))


@given(seed=st.integers(0, 2**32))
@fuzzing.fuzzed(100)
def test_records_of_run_directories(seed: int, folder: Path) -> None:
    content = mutated(RECORD, random.Random(seed))
    path = folder / "other" / "study.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    store = Store(str(path.parent))
    where = store.path(run_record.NAME)
    fuzzing.case(
        "study.json", lambda: run_record.require(run_record.read(store), list(RECORD), where=where), given=content
    )
