"""Measures made of columns are those made row by row, on any tables, and on the published sweep."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import numpy as np
import plain_analysis as plain
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from raybd import analysis, columns, fronts, parquet, points, pools, study, sweeps, tables
from raybd.cli import app
from raybd.errors import DataError
from raybd.report import grids, text
from raybd.store import Store
from raybd.terms import TERMS

SWEEP = Path(__file__).resolve().parents[2] / "shared" / "published" / "cc3m_sweep.csv"


def drawn(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows of `epochs` and `trials` with many equal points, ids that several groups share, and odd values."""
    dice = random.Random(seed)
    methods = dice.sample(["cleanclip", "par", "batchnorm_refresh"], dice.choice([1, 1, 2, 3]))
    objectives = dice.sample([("mmcl", "m-1"), ("mmcl", "m-2"), ("mmcl_ssl", "s")], dice.choice([1, 2, 3]))
    splits = dice.choice([("search", "report"), ("all",)])
    shares = [i / dice.choice([4, 20, 1000]) for i in range(5)] if dice.random() < 0.3 else None
    base = {objective: (dice.random(), dice.random()) for objective in objectives}
    epochs, trials = [], []

    def rates() -> tuple[float, float]:
        chosen = (dice.choice(shares), dice.choice(shares)) if shares else (dice.random(), dice.random())
        return min(1.0, chosen[0]), min(1.0, chosen[1])

    for (objective, pretrain_id), number in ((o, n) for o in objectives for n in range(dice.choice([1, 3, 8, 40]))):
        method, name = dice.choice(methods), dice.choice([f"{objective}-{number}", f"t{number}"])
        where = {"study": "s", "study_hash": None, "objective": objective, "pretrain_id": pretrain_id, "method": method}
        if not any(row["trial_id"] == name for row in trials) and dice.random() < 0.9:
            state = dice.choice(["complete"] * 4 + ["failed", "stopped"])
            place = dice.choice([number, None, 0])
            trials.append({**where, "trial_id": name, "number": place, "state": state, "params_json": "{}", "lr": 0.1})
        elif any(
            (row["trial_id"], row["objective"], row["pretrain_id"], row["method"])
            == (name, objective, pretrain_id, method)
            for row in epochs
        ):
            continue
        for epoch in range(dice.choice([0, 0, 1]), dice.choice([1, 3, 6])):
            alpha = dice.choice([0.0, 0.5, float("nan")]) if epoch > 3 else None
            for split in splits:
                poisoned = epoch == 0 and dice.random() < 0.9
                top1, asr = base[objective, pretrain_id] if poisoned else rates()
                loss = dice.choice([None, float("nan"), 0.5, dice.random()])
                own = {"trial_id": name, "epoch": epoch, "alpha": alpha, "split": split, "loss": loss}
                epochs.append({**where, **own, "zeroshot_top1": top1, "asr_top1": asr})
    order = dice.choice(["as it is", "mixed"])
    if order == "mixed":
        dice.shuffle(epochs)
        dice.shuffle(trials)
    return epochs, trials


def alike(found: Any, expected: Any) -> None:
    """Assert that two trees are equal; numbers to the last bits, in which a sum of other parts may differ."""
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            alike(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            alike(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)
    else:
        assert found == expected


def shown(run: Any, found: Any) -> tuple[str, ...]:
    """Return what `raybd pareto` prints of a run, as CSV and JSON, and as the cells of its grids."""
    trials = run.trials
    made = [*grids.of_run(found, trials), *grids.methods(found["fronts"], kind="final")]
    return text.as_csv({"r": run.fronts}), text.as_json(found), repr(made)


def same(columns: analysis.Run, rows: plain.Run) -> None:
    found, expected = analysis.of_run(columns), plain.of_run(rows)
    assert shown(columns, found) == shown(rows, expected)
    alike(analysis.between_objectives([columns], resamples=50), plain.between_objectives([rows], resamples=50))


def written(folder: Path, epochs: list[dict[str, Any]], trials: list[dict[str, Any]], *, parts: int) -> Store:
    store = Store(str(folder))
    store.put("study.json", b"{}")
    for name, rows in (("epochs", epochs), ("trials", trials)):
        for part in range(parts):
            if mine := rows[len(rows) * part // parts : len(rows) * (part + 1) // parts]:
                tables.write(store, name, f"{part:03d}", mine)
    return store


@given(st.integers(0, 2**32))
@example(0)
def test_columns_give_what_rows_give(seed: int) -> None:
    epochs, trials = drawn(seed)
    same(analysis.Run("r", epochs, trials), plain.Run("r", epochs, trials))


@given(st.integers(0, 2**32))
def test_tables_as_columns_give_what_their_rows_give(seed: int) -> None:
    epochs, trials = drawn(seed)
    read = {}
    for name, rows in (("epochs", epochs), ("trials", trials)):
        whole = pa.Table.from_pylist(rows, schema=tables.SCHEMAS[name])
        cuts = sorted(random.Random(seed).choices(range(len(rows) + 1), k=2))
        parts = [whole[: cuts[0]], whole[cuts[0] : cuts[1]], whole[cuts[1] :]]
        read[name] = pa.concat_tables([part.cast(tables._encoded(part.schema)) for part in parts])
    kept = points.Points.of_table(read["epochs"])
    expected = [{name: row.get(name) for name in points.COLUMNS} for row in epochs]
    # A loss that is not there and one that is no number are the same.
    expected = [{**row, "loss": float("nan") if row["loss"] is None else row["loss"]} for row in expected]
    assert repr([*kept]) == repr(expected)
    found = points.Trials(read["trials"])
    run = analysis.Run("r", kept, found)
    rows = found[:]
    assert [row["trial_id"] for row in found.named({row["trial_id"] for row in rows[::2]})] == [
        row["trial_id"] for row in rows[::2]
    ]
    same(run, plain.Run("r", epochs, rows))


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_pareto_of_the_published_sweep(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not SWEEP.exists():
        pytest.skip(f"THE PUBLISHED SWEEP IS NOT LOOKED AT: there is no {SWEEP}")
    store = Store(str(tmp_path / "run"))
    sweeps.import_sweep(str(SWEEP), store.uri)
    epochs, trials = (tables.read(store, name) for name in ("epochs", "trials"))
    rows = plain.Run(store.uri, epochs.to_pylist(), trials.drop_columns(["started", "ended"]).to_pylist())
    same(analysis.Run(store.uri, points.Points.of_table(epochs), points.Trials(trials)), rows)
    printed = CliRunner().invoke(app, ["pareto", store.uri, "-f", form]).output
    # The same command, made to measure row by row.
    monkeypatch.setattr(analysis, "of_run", lambda run, **_: plain.of_run(rows))
    monkeypatch.setattr(analysis.Run, "fronts", rows.fronts)
    assert printed == CliRunner().invoke(app, ["pareto", store.uri, "-f", form]).output
    assert len(printed) > 1000


def pool(seed: int, *, trials: int) -> pools.Pool:
    generator = np.random.default_rng(seed)
    found = []
    for number in range(trials):
        for epoch in range(4):
            top1, asr = (0.6, 0.99) if epoch == 0 else generator.integers(0, 60, 2) / 100
            where = {"objective": "o", "pretrain_id": "p", "method": "m", "trial_id": f"t{number:05d}"}
            found.append({**where, "epoch": epoch, "split": "all", "zeroshot_top1": top1, "asr_top1": asr})
    made = pools.gather(found, [])
    assert made is not None
    return made


@pytest.mark.parametrize(("layers", "trials"), [(1, 200), (2, 200), (12, 200), (12, 5)])
def test_resamples_that_look_at_few_points_are_those_of_all(
    layers: int, trials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few layers many draws have none of their trials, and are looked at as a whole."""
    monkeypatch.setattr(pools, "_LAYERS", layers)
    whole = pool(3, trials=trials)
    kept = whole._contenders(whole._layers())
    assert kept.sum() < len(kept) or trials == 5
    expected = plain.PlainPool(**vars(whole)).resampled(400, np.random.default_rng(1))
    assert whole.resampled(400, np.random.default_rng(1)) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("depth", [0, 5, 60])
def test_pools_that_leave_points_out_give_what_whole_ones_do(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little depth layers and draws need points that are left out."""
    whole = pool(3, trials=400)
    monkeypatch.setattr(pools, "_MANY_POINTS", 100)
    monkeypatch.setattr(pools, "_DEPTH", depth)
    some = pool(3, trials=400)
    assert whole.beyond is None
    assert some.beyond is not None
    assert len(some.trial_P) < len(whole.trial_P)
    assert some.num_trials == whole.num_trials
    expected, found = (p.resampled(300, np.random.default_rng(1)) for p in (whole, some))
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)
    included_RT = np.random.default_rng(2).random((50, whole.num_trials)) < np.linspace(0, 1, 50)[:, None]
    assert some.values(included_RT) == pytest.approx(whole.values(included_RT), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("layers", [1, 12])
def test_draws_of_few_trials_have_the_distribution_of_all(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_LAYERS", layers)
    whole = pool(4, trials=100)
    expected = whole.resampled(20_000, np.random.default_rng(1))
    monkeypatch.setattr(pools, "_MOST_DRAWS", 0)
    found = whole.resampled(20_000, np.random.default_rng(2))
    for one, other in zip(found.T, expected.T, strict=True):
        assert np.isfinite(one).mean() == pytest.approx(np.isfinite(other).mean(), abs=0.02)
        assert np.nanmean(one) == pytest.approx(np.nanmean(other), abs=5 * np.nanstd(other) / 100)
        assert np.nanquantile(one, [0.1, 0.9]) == pytest.approx(np.nanquantile(other, [0.1, 0.9]), abs=0.02)


def test_of_many_parts_the_first_fault_is_told(tmp_path: Path) -> None:
    """As if they were checked one by one: rules of an earlier part before a later part that is no Parquet."""
    epochs, _ = drawn(1)
    good = [row for row in epochs if row["objective"] == epochs[0]["objective"]]
    store = Store(str(tmp_path))
    for number in range(40):
        rows = [{**row, "trial_id": f"{number}-{row['trial_id']}"} for row in good]
        tables.write(store, "epochs", f"{number:03d}", rows)
    assert len(tables.read(store, "epochs")) == 40 * len(good)
    store.put("tables/epochs/030.parquet", b"no Parquet")
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        tables.read(store, "epochs")
    assert caught.value.where.endswith("030.parquet")
    for number in (29, 20):
        rows = [*good[:-1], {**good[-1], "n_clean": -1}]
        tables.write(store, "epochs", f"{number:03d}", rows)
        with pytest.raises(DataError, match=f"row {len(good) - 1}: n_clean is -1") as caught:
            tables.read(store, "epochs")
        assert caught.value.where.endswith(f"{number:03d}.parquet")


def test_some_columns_are_read_without_the_others(tmp_path: Path) -> None:
    epochs, _ = drawn(1)
    store = Store(str(tmp_path))
    tables.write(store, "epochs", "e", [*epochs[:-1], {**epochs[-1], "n_clean": -1}])
    with pytest.raises(DataError, match="n_clean is -1"):
        tables.read(store, "epochs")
    found = tables.read(store, "epochs", columns=points.COLUMNS)
    assert set(found.column_names) == set(points.COLUMNS)
    assert repr(found.to_pylist()) == repr([{name: row.get(name) for name in found.column_names} for row in epochs])
    tables.write(store, "epochs", "e", [*epochs[:-1], {**epochs[-1], "asr_top1": 1.5}])
    # What a row cannot be without is read in any case.
    for some in (points.COLUMNS, ()):
        with pytest.raises(DataError, match=r"asr_top1 is 1.5"):
            tables.read(store, "epochs", columns=some)


@pytest.mark.parametrize(
    ("params", "sound"),
    [
        ("{}", True),
        ('{"lr": 1e-05, "method": "par", "x.y": -0.25, "z": null}', True),
        ('{"lr": NaN}', True),
        ('{"é": [1, {"a": 2}]}', True),
        ('{"lr": 01}', False),
        ('{"lr": 1.}', False),
        ('{"lr": 1}\n{', False),
        ('{"lr": 1},{}', False),
        ("{" + '"a": 1, ' + "}", False),
        ("[1]", False),
        ("1" * 5000, False),
    ],
)
def test_settings_are_told_to_be_objects_as_a_parser_would(params: str, *, sound: bool, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    same = dict.fromkeys(("objective", "pretrain_id", "trial_id", "method"), "x")
    tables.write(store, "trials", "t", [{**same, "state": "complete", "params_json": params}])
    if sound:
        assert tables.read(store, "trials").column("params_json").to_pylist() == [params]
    else:
        with pytest.raises(DataError, match="params_json is"):
            tables.read(store, "trials")


def test_texts_that_are_no_utf_8_are_refused_as_dictionaries_too(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"trial_id": texts}), path)
    for encoded in (False, True):
        with pytest.raises(DataError, match="not a readable Parquet file"):
            parquet.read(path.read_bytes(), where="", columns=["trial_id"], encoded=encoded)


class OwnKeys(encryption.KmsClient):
    """Keys that are kept with what they lock."""

    def __init__(self, config: encryption.KmsConnectionConfig) -> None:
        super().__init__()

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        return base64.b64decode(wrapped_key)


@pytest.mark.parametrize("open_footer", [True, False])
def test_a_file_with_locked_columns_is_refused(*, open_footer: bool, tmp_path: Path) -> None:
    """Asked for where such a column lies, Arrow ends the process."""
    locked = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"k": ["trial_id"]}, plaintext_footer=open_footer
    )
    keys = encryption.CryptoFactory(OwnKeys).file_encryption_properties(encryption.KmsConnectionConfig(), locked)
    store = Store(str(tmp_path))
    tables.write(store, "epochs", "e", drawn(3)[0])
    path = tmp_path / "tables" / "epochs" / "e.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows, path, encryption_properties=keys)
    with pytest.raises(DataError, match="not a readable Parquet file"):
        tables.read(store, "epochs", columns=points.COLUMNS)


@pytest.mark.parametrize("size", [1, 2, 16, 17, 300, 100_000])
def test_rows_are_grouped_by_key(size: int) -> None:
    key_N = np.random.default_rng(size).integers(0, size, 1000)
    expected: dict[int, list[int]] = {}
    for place, key in enumerate(key_N.tolist()):
        expected.setdefault(key, []).append(place)
    assert [rows.tolist() for rows in columns.grouped(key_N, size)] == [*expected.values()]


@pytest.mark.parametrize("texts", [["a", "", "bc"], ["é", "x", "", "日本"], [None, "a"], [], [""]])
def test_texts_are_those_that_arrow_gives(texts: list[str | None]) -> None:
    whole = pa.array(["before", *texts, "after"], pa.string())
    assert columns._texts(whole[1:-1]) == texts
    codes_N, values = columns.encoded(pa.chunked_array([whole[:2], whole[2:]]))
    assert [values[code] for code in codes_N] == whole.to_pylist()


def test_binary_columns_that_hold_texts_are_read(tmp_path: Path) -> None:
    epochs, _ = drawn(2)
    store = Store(str(tmp_path))
    tables.write(store, "epochs", "e", epochs)
    expected = tables.read(store, "epochs")
    path = tmp_path / "tables/epochs/e.parquet"
    whole = pq.read_table(path)
    binary = [f.with_type(pa.binary()) if f.type == pa.string() else f for f in whole.schema]
    pq.write_table(whole.cast(pa.schema(binary, metadata=whole.schema.metadata)), path)
    assert repr(tables.read(store, "epochs").to_pylist()) == repr(expected.to_pylist())


def test_the_names_of_the_terms_are_those_that_have_weights() -> None:
    assert tuple(study.LossWeights.model_fields) == TERMS


def test_a_run_written_in_many_parts_prints_what_one_part_does(tmp_path: Path) -> None:
    epochs, trials = drawn(7)
    outputs = []
    for parts in (1, 30):
        store = written(tmp_path / str(parts), epochs, trials, parts=parts)
        done = CliRunner().invoke(app, ["pareto", store.uri, "-f", "csv"])
        assert done.exit_code == 0, done.output
        outputs.append(done.output.replace(store.uri, "run"))
    assert sorted(outputs[0].splitlines()) == sorted(outputs[1].splitlines())
    assert fronts.compute(epochs, trials)
