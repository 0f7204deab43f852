"""Tables of run directories from anywhere: read whole, by every reader there is, or refused by part, row and column."""

from __future__ import annotations

import io
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybd import analysis, curves, fronts, tables
from raybd.errors import DataError
from raybd.report import attacks, grids, text
from raybd.store import Store

SAME = {"study": "s", "study_hash": "h", "pretrain_id": "mmcl-1", "objective": "mmcl"}


def epochs() -> list[dict[str, Any]]:
    """Return rows of two trials of two epochs, on both halves."""
    return [
        {
            **SAME,
            "trial_id": f"mmcl-{t:04d}",
            "method": ("mmcl", "cleanclip")[t],
            "epoch": epoch,
            "split": split,
            "loss": 0.5,
            "zeroshot_top1": (50 - 5 * epoch + t) / 100,
            "asr_top1": (9 - 4 * epoch) / 10,
            "robust_top1": 0.1,
            "n_clean": 100,
            "correct_clean": 50 - 5 * epoch + t,
            "n_triggered": 10,
            "hit_target": 9 - 4 * epoch,
            "correct_triggered": 1,
            "lr": 1e-4,
        }
        for t in (0, 1)
        for epoch in (0, 1, 2)
        for split in ("search", "report")
    ]


def trials() -> list[dict[str, Any]]:
    return [
        {
            **SAME,
            "trial_id": f"mmcl-{t:04d}",
            "number": t,
            "method": ("mmcl", "cleanclip")[t],
            "lr": 1e-4,
            "state": "complete",
            "params_json": '{"lr": 0.0001}',
            "epochs_planned": 2,
            "epochs_done": 2,
            "num_samples": 10,
        }
        for t in (0, 1)
    ]


def attacked() -> list[dict[str, Any]]:
    return [
        {
            **SAME,
            "trial_id": "mmcl-0000",
            "epoch": 1,
            "split": split,
            "role": role,
            "trigger": '{"name": "sig"}',
            "target_class": "x",
            "n_triggered": 10,
            "hit_target": 5,
            "asr_top1": 0.5,
        }
        for role in ("attack", "control")
        for split in ("search", "report")
    ]


ROWS = {
    "epochs": epochs(),
    "trials": trials(),
    "fronts": fronts.compute(epochs(), trials()),
    "attacks": attacked(),
    "pretrain_epochs": [
        {**SAME, "epoch": 1, "asr_top1": 0.9, "zeroshot_top1": 0.5, "n_clean": 100, "correct_clean": 50}
    ],
    "poison_plan": [
        {
            "key": "k",
            "shard": "s",
            "trigger": '{"name": "sig"}',
            "target_class": "x",
            "caption_before": "a",
            "caption_after": "b",
        }
    ],
}
VALUES: list[Any] = [
    None,
    float("nan"),
    float("inf"),
    float("-inf"),
    -1,
    0,
    1,
    2,
    3,
    -0.5,
    0.5,
    1.5,
    1e308,
    2**31,
    2**62,
    -(2**63),
    10**6,
    10**7,
    "",
    "x",
    "all",
    "search",
    "report",
    "complete",
    "failed",
    "final",
    "mmcl",
    "ssl",
    "\0",
    "\x1b[2J",
    "<script>",
    "a" * 5000,
    "{",
    "[1]",
    '{"lr": NaN}',
    '{"lr": [1]}',
    "[" * 3000,
    "mmcl-0000",
]


def changed(rows: list[dict[str, Any]], dice: random.Random) -> list[dict[str, Any]]:
    """Return rows of which some are changed, left out or doubled."""
    rows = [dict(row) for row in rows]
    for _ in range(dice.choice([0, 1, 1, 1, 2, 3])):
        row = dice.choice(rows)
        what = dice.choice(["value", "value", "value", "value", "drop", "double", "all"])
        if what == "drop" and len(rows) > 1:
            rows.remove(row)
        elif what == "double":
            rows.append(dict(row))
        else:
            name, value = dice.choice(list(row)), dice.choice(VALUES)
            for changed_row in rows if what == "all" else [row]:
                changed_row[name] = value
    return rows


def table_of(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return rows as a table; values that a column cannot hold are null."""
    columns = []
    for field in schema:
        found = []
        for row in rows:
            try:
                found.append(pa.scalar(row.get(field.name), field.type).as_py())
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                found.append(None)
        columns.append(pa.array(found, field.type))
    return pa.table(columns, schema=schema)


def reshaped(table: pa.Table, dice: random.Random) -> pa.Table:
    """Return a table with another column, one less, one of another type, or others' order."""
    what = dice.choice(["as it is"] * 8 + ["drop", "add", "type", "rename", "twice", "order", "nested"])
    place = dice.randrange(table.num_columns)
    name = table.column_names[place]
    if what == "drop":
        return table.remove_column(place)
    if what == "add":
        return table.append_column("further", pa.array([[{"a": 1}]] * len(table)))
    if what == "type":
        kinds = [
            pa.string(),
            pa.float32(),
            pa.int8(),
            pa.uint64(),
            pa.bool_(),
            pa.binary(),
            pa.timestamp("ns"),
            pa.decimal128(9, 2),
        ]
        return table.set_column(place, name, pa.array([None] * len(table), dice.choice(kinds)))
    if what == "nested":
        values: list[Any] = dice.choice([[[1, 2]], [{"a": 1}], [[["x"]]]])
        return table.set_column(place, name, pa.array(values * len(table)))
    if what == "rename":
        return table.rename_columns(
            [dice.choice([*table.column_names, "x"]) if i == place else n for i, n in enumerate(table.column_names)]
        )
    if what == "twice":
        return table.append_column(name, table.column(place))
    return table.select(dice.sample(table.column_names, table.num_columns)) if what == "order" else table


@st.composite
def parts(draw: st.DrawFn) -> dict[str, bytes]:
    """Return the bytes of a part of each table of a run, one or two of them not as they should be."""
    dice = random.Random(draw(st.integers(0, 2**32)))
    odd = dice.choices(list(ROWS), weights=[6, 3, 3, 1, 1, 1], k=dice.choice([1, 1, 2]))
    found = {}
    for name, rows in ROWS.items():
        table = table_of(changed(rows, dice) if name in odd else rows, tables.SCHEMAS[name])
        table = reshaped(table, dice) if name in odd else table
        version = (
            dice.choice([str(tables.SCHEMA_VERSION)] * 20 + ["1", "3", "", "x", None])
            if name in odd
            else str(tables.SCHEMA_VERSION)
        )
        metadata = {} if version is None else {"raybd.schema_version": version}
        sink = io.BytesIO()
        pq.write_table(
            table.replace_schema_metadata(metadata), sink, compression=dice.choice(["zstd", "none", "snappy"])
        )
        content = sink.getvalue()
        if name in odd and dice.random() < 0.25:
            content = draw(fuzzing.damaged(content))
        found[name] = content
    return found


def use(store: Store, *, pages: bool) -> int:
    """Read a run as commands that need no model do, `pages` with a report; return how many texts came of it."""
    from raybd.report import html

    read = {
        name: tables.read(store, name).drop_columns(["started", "ended"] if name == "trials" else [])
        for name in tables.SCHEMAS
    }
    rows = {name: table.to_pylist() for name, table in read.items()}
    run = analysis.Run("r", rows["epochs"], rows["trials"])
    found = analysis.analyse([run])
    summaries = fronts.summarise(run.fronts)
    shown = [
        *grids.methods(summaries, kind="any_epoch"),
        *grids.of_run(found["runs"][0], run.trials),
        *grids.between(found),
    ]
    written = [text.as_csv({"r": run.fronts}), text.as_json(found), *map(text.rendered, shown)]
    written += list(text.front_tables(summaries, run.trials, kind="final"))
    written.append(attacks.tried(rows["attacks"]))
    curves.read(store.uri)
    if pages:
        written.append(html.build(store))
    return len(written)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("run")
    (found / "study.json").write_text(json.dumps({"study": {"name": "s"}, "hash": "h"}))
    return found


def put(folder: Path, found: dict[str, bytes]) -> None:
    for name, content in found.items():
        (folder / "tables" / name).mkdir(parents=True, exist_ok=True)
        (folder / "tables" / name / "part.parquet").write_bytes(content)


@given(found=parts())
@fuzzing.fuzzed(200)
def test_tables(found: dict[str, bytes], folder: Path) -> None:
    put(folder, found)
    pages = zlib.crc32(found["epochs"]) % 20 == 0  # it draws figures, which takes seconds
    fuzzing.case("table", lambda: use(Store(str(folder)), pages=pages), given=found, seconds=20)


def test_tables_as_they_should_be_pass(folder: Path) -> None:
    put(folder, {name: written(rows, tables.SCHEMAS[name]) for name, rows in ROWS.items()})
    assert use(Store(str(folder)), pages=True) > 5


def written(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    metadata = {"raybd.schema_version": str(tables.SCHEMA_VERSION)}
    pq.write_table(table_of(rows, schema).replace_schema_metadata(metadata), sink)
    return sink.getvalue()


# What was found by these tests, and mended.


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("epochs", {"zeroshot_top1": float("nan")}, "row 0: zeroshot_top1 is nan"),
        ("epochs", {"asr_top1": float("inf")}, "row 0: asr_top1 is inf"),
        ("epochs", {"asr_top1": 1.5}, "row 0: asr_top1 is 1.5"),
        ("epochs", {"n_clean": -3}, "row 0: n_clean is -3"),
        ("epochs", {"hit_target": 11}, "row 0: hit_target is 11"),
        ("epochs", {"trial_id": None}, "row 0: trial_id is None"),
        ("epochs", {"epoch": 10**9}, "row 0: epoch is 1000000000"),
        ("epochs", {"split": "test"}, "row 0: split is 'test'"),
        ("epochs", {"epoch": 1}, "has the splits"),
        ("trials", {"params_json": "[1]"}, "params_json is '[1]'"),
        ("trials", {"state": "lost"}, "row 0: state is 'lost'"),
        ("fronts", {"hypervolume": None}, "row 0: hypervolume is None"),
    ],
)
def test_rows_that_cannot_be(table: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    first, *others = ROWS[table]
    put(tmp_path, {table: written([{**first, **change}, *others], tables.SCHEMAS[table])})
    with pytest.raises(DataError) as caught:
        tables.read(Store(str(tmp_path)), table)
    assert message in caught.value.what
    assert f"tables/{table}" in caught.value.where


def test_a_part_cut_in_half_and_one_of_an_older_version(tmp_path: Path) -> None:
    content = written(ROWS["epochs"], tables.SCHEMAS["epochs"])
    put(tmp_path, {"epochs": content[: len(content) // 2]})
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        tables.read(Store(str(tmp_path)), "epochs")
    assert caught.value.where.endswith("tables/epochs/part.parquet")
    put(tmp_path, {"epochs": content.replace(b"raybd.schema_version\x18\x012", b"raybd.schema_version\x18\x011")})
    with pytest.raises(DataError, match="schema version 1"):
        tables.read(Store(str(tmp_path)), "epochs")


@pytest.mark.parametrize(
    "make", [lambda n: pa.array([1], pa.int64()).take(pa.array([0] * n)), lambda n: pa.nulls(n, pa.string())]
)
def test_a_few_kilobytes_with_many_rows_are_refused(make: Callable[[int], pa.Array], tmp_path: Path) -> None:
    many = make(3_000_000)
    schema = tables.SCHEMAS["epochs"]
    names = [name for name in schema.names if schema.field(name).type == many.type]
    sink = io.BytesIO()
    pq.write_table(pa.table([many] * len(names), names=names), sink)
    assert len(sink.getvalue()) < 200_000
    put(tmp_path, {"epochs": sink.getvalue()})
    with pytest.raises(DataError, match=rf"3000000 rows of {len(names)} columns"):
        tables.read(Store(str(tmp_path)), "epochs")


def test_long_texts_that_are_kept_once_are_refused(tmp_path: Path) -> None:
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(["x" * 100_000])).cast(pa.string())
    sink = io.BytesIO()
    pq.write_table(pa.table({"trial_id": long}), sink)
    put(tmp_path, {"epochs": sink.getvalue()})
    with pytest.raises(DataError, match="500000000 bytes of text"):
        tables.read(Store(str(tmp_path)), "epochs")
