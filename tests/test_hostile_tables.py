"""Parquet files from strangers: pickles in metadata and extension types, as Ray registers them, are not loaded."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import Canary, with_pickles

from raybd import curves, parquet, tables
from raybd.errors import DataError
from raybd.store import Store


@pytest.fixture(scope="module", autouse=True)
def _ray_data() -> None:
    """Ray registers its extension types when Ray Data is loaded; Ray Train and Ray Tune load it."""
    import ray.data  # noqa: F401


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "canary")


def epochs() -> pa.Table:
    texts = dict.fromkeys(("study", "study_hash", "pretrain_id", "objective", "method"), "x")
    shares = {"zeroshot_top1": 0.5, "asr_top1": 0.5}
    own = {"trial_id": "mmcl-0000", "epoch": 1, "split": "all", **texts, **shares}
    row = {**dict.fromkeys(tables.SCHEMAS["epochs"].names), **own}
    version = {"raybd.schema_version": str(tables.SCHEMA_VERSION)}
    return pa.Table.from_pylist([row], schema=tables.SCHEMAS["epochs"]).replace_schema_metadata(version)


def fires(canary: Canary, content: bytes) -> None:
    """Assert that pyarrow alone would have loaded a pickle."""
    assert not canary.fired
    pq.ParquetFile(pa.BufferReader(content)).read().to_pylist()
    assert canary.fired == ["value"]
    canary.wipe()


def test_a_table_with_pickles_beside_its_columns_is_read_without_them(canary: Canary, tmp_path: Path) -> None:
    content = with_pickles(epochs(), canary)
    fires(canary, content)
    canary.proves(canary.pickled("field"))
    store = Store(str(tmp_path / "run"))
    store.put("tables/epochs/part.parquet", content)
    assert tables.read(store, "epochs").to_pylist() == epochs().to_pylist()
    assert not canary.fired


def test_a_table_of_pickles_is_refused(canary: Canary, tmp_path: Path) -> None:
    content = with_pickles(epochs(), canary, column="trial_id")
    fires(canary, content)
    store = Store(str(tmp_path / "run"))
    store.put("tables/epochs/part.parquet", content)
    with pytest.raises(DataError, match="columns of other types"):
        tables.read(store, "epochs")
    assert not canary.fired


def test_recorded_curves_with_pickles_are_read_without_them(canary: Canary, tmp_path: Path) -> None:
    """All columns are asked for their values here, those that nobody knows too."""
    row = {"objective": "mmcl", "method": "cleanclip", "epoch": 1, "lr": 1e-3}
    counts = {"n_clean": 10, "correct_clean": 5, "n_triggered": 10, "hit_target": 1}
    content = with_pickles(pa.Table.from_pylist([{**row, **counts}]), canary)
    fires(canary, content)
    path = tmp_path / "sweep.parquet"
    path.write_bytes(content)
    (curve,) = curves.read(str(path))
    assert curve.settings == {"lr": 1e-3}
    assert not canary.fired


def test_a_table_keeps_its_own_types_without_the_embedded_schema(tmp_path: Path) -> None:
    """The types of every table's columns are told from Parquet alone."""
    store = Store(str(tmp_path))
    for name, schema in tables.SCHEMAS.items():
        row = {field.name: "x" if field.type == pa.string() else None for field in schema}
        tables.write(store, name, "part", [row])
        found = parquet.read(store.get(f"tables/{name}/part.parquet"), where="", columns=schema.names)
        assert found.cast(schema).to_pylist() == [row]


def test_a_footer_that_lies_about_its_length_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for content in (b"", b"PAR1", b"PAR1" + b"\xff\xff\xff\xff" + b"PAR1", b"PAR1" + bytes(4) + b"PAR1"):
        store.put("tables/epochs/part.parquet", content)
        with pytest.raises(DataError, match="not a readable Parquet file"):
            tables.read(store, "epochs")
