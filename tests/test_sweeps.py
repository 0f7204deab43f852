"""Sweeps of others, as CSV: what is read, what is refused, and the published numbers of CC3M."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from raybd import curves, fronts, tables
from raybd.cli import app
from raybd.errors import DataError
from raybd.store import Store
from raybd.sweeps import import_sweep

PUBLISHED = Path(__file__).parents[2] / "shared" / "published"
needs_published = pytest.mark.skipif(
    not (PUBLISHED / "cc3m_sweep.csv").is_file(), reason="the published sweeps are not part of the repository"
)
runner = CliRunner()
N_CLEAN, N_TRIGGERED = 1000, 950
NAMES = ["pretrain_objective", "cleaning_loss", "loss_weight_mmcl", "loss_weight_ssl", "lr", "epoch"]
NAMES += ["zeroshot_top1", "asr_top1", "n_clean", "n_triggered"]


def made(*, epochs: tuple[int, ...] = (0, 1, 2, 3)) -> list[dict[str, Any]]:
    """Return a sweep of two pretrain objectives, two losses and three learning rates."""
    rows = []
    for objective, keep in (("mmcl", 0.5), ("mmcl_ssl", 0.8)):
        for loss, weights in (("mmcl", (1, 0)), ("mmcl_ssl", (1, 1))):
            for i, lr in enumerate((1e-5, 1e-4, 1e-3)):
                for epoch in epochs:
                    left = keep ** (epoch * (i + 1) / (1 if loss == "mmcl_ssl" else 2))
                    counts = round((0.4 - 0.02 * i * epoch) * N_CLEAN), round(0.99 * left * N_TRIGGERED)
                    rates = counts[0] / N_CLEAN, counts[1] / N_TRIGGERED
                    values = (objective, loss, *weights, lr, epoch, *rates, N_CLEAN, N_TRIGGERED)
                    rows.append(dict(zip(NAMES, values, strict=True)))
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture
def sweep(tmp_path: Path) -> str:
    return write(tmp_path / "made.csv", made())


def test_tables_hold_what_the_csv_says(sweep: str, tmp_path: Path) -> None:
    found = import_sweep(sweep, str(tmp_path / "out"))
    store = Store(str(tmp_path / "out"))
    assert len(found) == 12
    trials = {row["trial_id"]: row for row in tables.read(store, "trials").to_pylist()}
    assert list(trials) == [f"{objective}-{i:04d}" for objective in ("mmcl", "mmcl_ssl") for i in range(6)]
    one = trials["mmcl-0004"]
    known = ("objective", "method", "number", "lr", "loss_weights.ssl", "state", "epochs_done")
    assert [one[name] for name in known] == ["mmcl", "cleanclip", 4, 1e-4, 1.0, "complete", 3]
    # What the CSV does not say is not known: no default of ours stands in for it.
    unknown = (
        "epochs_planned",
        "batch_size",
        "weight_decay",
        "precision",
        "device",
        "started",
        "weight_decay_in_force",
    )
    assert [one[name] for name in unknown] == [None] * len(unknown)
    epochs = tables.read(store, "epochs").to_pylist()
    assert {row["split"] for row in epochs} == {"all"}
    assert len(epochs) == 48
    for row, raw in zip(epochs, made(), strict=True):
        assert (row["epoch"], row["zeroshot_top1"], row["asr_top1"]) == (raw["epoch"], *list(raw.values())[6:8])
        assert row["correct_clean"] == round(raw["zeroshot_top1"] * N_CLEAN)
        assert row["hit_target"] == round(raw["asr_top1"] * N_TRIGGERED)
        assert row["correct_triggered"] is row["robust_top1"] is row["loss"] is None


def test_rates_stay_as_written_where_they_are_rounded(tmp_path: Path) -> None:
    rows = made()
    rows[1]["zeroshot_top1"] = 0.3333
    store = Store(str(tmp_path / "out"))
    import_sweep(write(tmp_path / "made.csv", rows), store.uri)
    row = tables.read(store, "epochs").to_pylist()[1]
    assert (row["zeroshot_top1"], row["correct_clean"]) == (0.3333, 333)


def test_the_record_says_where_it_comes_from(sweep: str, tmp_path: Path) -> None:
    import hashlib

    import_sweep(sweep, str(tmp_path / "out"), only={"lr": "0.0001"})
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert record["kind"] == "imported sweep"
    assert record["source"]["name"] == "made.csv"
    assert record["source"]["sha256"] == hashlib.sha256(Path(sweep).read_bytes()).hexdigest()
    assert record["source"]["columns"] == NAMES
    assert record["only"] == {"lr": "0.0001"}
    assert len(tables.read(Store(str(tmp_path / "out")), "trials")) == 4


def test_the_tidy_table_gives_the_curves_back(sweep: str, tmp_path: Path) -> None:
    found = import_sweep(sweep, str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out" / "sweep.parquet")
    settings = ["loss_weights.mmcl", "loss_weights.ssl", "lr"]
    counts = ["n_clean", "correct_clean", "n_triggered", "hit_target"]
    assert sorted(table.column_names) == sorted(
        ["trial_id", "objective", "method", "pretrain_id", *settings, "epoch", "zeroshot_top1", "asr_top1", *counts]
    )
    assert table.num_rows == 48
    from_table, from_run = curves.read(str(tmp_path / "out" / "sweep.parquet")), curves.read(str(tmp_path / "out"))
    assert [(c.trial_id, c.settings) for c in from_table] == [(c.trial_id, c.settings) for c in found]
    assert curves.fingerprint(from_table) == curves.fingerprint(from_run)
    assert from_table[4].last == 3


def test_pareto_and_report_take_an_imported_sweep(sweep: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = runner.invoke(app, ["data", "import-sweep", sweep, out])
    assert done.exit_code == 0, done.output
    assert f"{out}: 12 runs, 48 points" in done.output
    printed = runner.invoke(app, ["pareto", out, "-f", "json"])
    assert printed.exit_code == 0, printed.output
    summaries = json.loads(printed.output)["runs"][0]["fronts"]
    assert {row["split"] for row in summaries} == {"all"}
    rows = [r for r in made() if r["pretrain_objective"] == "mmcl" and r["cleaning_loss"] == "mmcl_ssl"]
    points = {(row["zeroshot_top1"], row["asr_top1"]) for row in rows}
    kept = sorted(p for p in points if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points))
    own = next(r for r in summaries if (r["objective"], r["method"], r["kind"]) == ("mmcl", "cleanclip", "any_epoch"))
    assert [(point["zeroshot_top1"], point["asr_top1"]) for point in own["front"]] == kept
    assert all(point["checkpoint"] is None for point in own["front"])
    assert runner.invoke(app, ["pareto", out]).exit_code == 0
    assert runner.invoke(app, ["report", out]).exit_code == 0
    refused = runner.invoke(app, ["evaluate", out])
    assert "holds no models, only numbers" in str(refused.exception)
    assert "made" in (tmp_path / "out" / "report.html").read_text()


def test_the_same_import_again_replaces_and_another_is_refused(sweep: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    import_sweep(sweep, out)
    import_sweep(sweep, out)
    assert len(tables.read(Store(out), "trials")) == 12
    with pytest.raises(DataError, match="holds another run"):
        import_sweep(write(tmp_path / "other.csv", made()[:4]), out)


def test_runs_of_equal_settings_are_told_apart_by_their_number(tmp_path: Path) -> None:
    rows = [{**row, "run": run} for run in (0, 1) for row in made(epochs=(1, 2))]
    found = import_sweep(write(tmp_path / "made.csv", rows), str(tmp_path / "out"))
    assert [curve.settings["run"] for curve in found] == [0] * 12 + [1] * 12


def test_settings_under_their_own_names_and_left_open(tmp_path: Path) -> None:
    rows = [{**row, "weight_decay": 0.1 if row["lr"] > 1e-5 else "", "text_view": "eda"} for row in made()]
    found = import_sweep(write(tmp_path / "made.csv", rows), str(tmp_path / "out"))
    assert [curve.settings.get("weight_decay") for curve in found[:3]] == [None, 0.1, 0.1]
    assert found[0].settings["text_view"] == "eda"


# Epoch 0 and the poison that leaked


def leaked(*counts: int) -> list[dict[str, Any]]:
    return [{**row, "poisoned_in_cleaning_set": n} for n in counts for row in made(epochs=(1, 2))]


def test_cleaning_sets_with_other_poison_are_other_runs(tmp_path: Path) -> None:
    source = write(tmp_path / "made.csv", leaked(5, 25))
    with pytest.raises(DataError, match="5, 25 poisoned pairs"):
        import_sweep(source, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    found = import_sweep(source, str(tmp_path / "out"), only={"poisoned_in_cleaning_set": "25"})
    assert {curve.settings["leaked_poison"] for curve in found} == {25}


def test_without_epoch_0_there_is_no_baseline_unless_one_is_given(sweep: str, tmp_path: Path) -> None:
    source = write(tmp_path / "leaked.csv", leaked(5))
    import_sweep(source, str(tmp_path / "bare"))
    bare = tables.read(Store(str(tmp_path / "bare")), "fronts").to_pylist()
    assert all(math.isnan(row["baseline_top1"]) for row in bare)
    assert runner.invoke(app, ["pareto", str(tmp_path / "bare")]).exit_code == 0
    assert runner.invoke(app, ["report", str(tmp_path / "bare")]).exit_code == 0
    import_sweep(source, str(tmp_path / "based"), baseline=sweep)
    based = tables.read(Store(str(tmp_path / "based")), "fronts").to_pylist()
    assert {row["baseline_top1"] for row in based} == {0.4}
    epochs = tables.read(Store(str(tmp_path / "based")), "epochs").to_pylist()
    assert sum(row["epoch"] == 0 for row in epochs) == 12


# What is refused


def changed(place: int, **values: Any) -> list[dict[str, Any]]:
    rows = made()
    rows[place] = {**rows[place], **values}
    return rows


def without(name: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != name} for row in made()]


@pytest.mark.parametrize(
    ("rows", "where", "what"),
    [
        (without("asr_top1"), ":1", "columns missing: asr_top1"),
        ([{**row, "momentum": 1} for row in made()], ":1", "unknown columns: momentum"),
        (changed(2, zeroshot_top1="forty"), ":4", "zeroshot_top1: 'forty' is no finite number"),
        (changed(2, zeroshot_top1="nan"), ":4", "'nan' is no finite number"),
        (changed(2, asr_top1="99.1"), ":4", "asr_top1: 99.1 is no share"),
        (changed(2, asr_top1="-0.1"), ":4", "is no share"),
        (changed(2, epoch="1.5"), ":4", "epoch: '1.5' is no whole number"),
        (changed(2, epoch="-1"), ":4", "epoch: '-1' is no whole number"),
        (changed(2, n_clean="0"), ":4", "n_clean: '0' is no whole number of at least 1"),
        (changed(2, lr="0"), ":4", "lr cannot be 0"),
        (changed(2, lr="small"), ":4", "lr: 'small' is no finite number"),
        (changed(2, loss_weight_ssl="-1"), ":4", "loss_weight_ssl cannot be -1"),
        (changed(2, cleaning_loss="clip"), ":4", "'clip' is no cleaning known"),
        (changed(2, pretrain_objective="a/b"), ":4", "must be letters"),
        (changed(2, epoch=1), ":4", "epoch 1 of this run is at"),
        (changed(2, n_triggered=949), ":4", "n_triggered is 949, and 950 at"),
        (made()[:2] + made()[3:], ":4", "this run has epoch 1, then 3"),
        (made()[1:], ":5", "epoch 0, the poisoned model, is missing here and there"),
        (made()[:1], ":2", "epoch 0 alone"),
    ],
)
def test_mistakes_are_named_with_their_line(rows: list[dict[str, Any]], where: str, what: str, tmp_path: Path) -> None:
    source = write(tmp_path / "made.csv", rows)
    with pytest.raises(DataError, match=what) as caught:
        import_sweep(source, str(tmp_path / "out"))
    assert caught.value.where == source + where
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="columns missing"):
        import_sweep(str(tmp_path / "empty.csv"), str(tmp_path / "out"))
    (tmp_path / "header.csv").write_text(",".join(NAMES) + "\n")
    with pytest.raises(DataError, match="no row"):
        import_sweep(str(tmp_path / "header.csv"), str(tmp_path / "out"))
    (tmp_path / "short.csv").write_text(",".join(NAMES) + "\nmmcl,mmcl,1\n")
    with pytest.raises(DataError, match="not as many fields"):
        import_sweep(str(tmp_path / "short.csv"), str(tmp_path / "out"))
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not readable as CSV"):
        import_sweep(str(tmp_path / "bytes.csv"), str(tmp_path / "out"))
    with pytest.raises(DataError, match="not readable as CSV"):
        import_sweep(str(tmp_path / "absent.csv"), str(tmp_path / "out"))


def test_only_must_name_a_column_and_leave_rows(sweep: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--only names columns that are not there: seed"):
        import_sweep(sweep, str(tmp_path / "out"), only={"seed": "1"})
    with pytest.raises(DataError, match="no row that --only leaves"):
        import_sweep(sweep, str(tmp_path / "out"), only={"lr": "7"})
    done = runner.invoke(app, ["data", "import-sweep", sweep, str(tmp_path / "out"), "--only", "lr"])
    assert done.exit_code != 0
    assert "COLUMN=VALUE" in str(done.exception)


def test_an_imported_sweep_is_not_overwritten_by_a_study(sweep: str, tmp_path: Path) -> None:
    from raybd import study_file
    from raybd.console import View
    from raybd.errors import StudyError
    from raybd.study_directory import StudyDirectory

    import_sweep(sweep, str(tmp_path / "out"))
    with pytest.raises(StudyError, match="holds another thing: imported sweep"):
        StudyDirectory(study_file.load("demo"), Store(str(tmp_path / "out")), View())


# The published numbers

# Pretrain objective, cleaning loss: hypervolume against (accuracy 0, ASR 1) and size of the front.
EXPECTED = {
    ("mmcl", "mmcl"): ("0.1371", 30),
    ("mmcl", "ssl"): ("0.1521", 36),
    ("mmcl", "cleanclip"): ("0.1742", 23),
    ("mmcl_ssl", "mmcl"): ("0.1557", 30),
    ("mmcl_ssl", "ssl"): ("0.1184", 25),
    ("mmcl_ssl", "cleanclip"): ("0.1640", 42),
}


@needs_published
def test_the_published_cc3m_sweep(tmp_path: Path) -> None:
    import_sweep(str(PUBLISHED / "cc3m_sweep.csv"), str(tmp_path / "out"))
    store = Store(str(tmp_path / "out"))
    assert len(tables.read(store, "trials")) == 68
    epochs = tables.read(store, "epochs").to_pylist()
    assert len(epochs) == 68 * 21
    for row in epochs:
        # Every rate is exactly a count over the number of images.
        assert row["zeroshot_top1"] == row["correct_clean"] / 50_000
        assert row["asr_top1"] == row["hit_target"] / 49_950
    summaries = {
        (row["objective"], row["method"]): row
        for row in fronts.summarise(tables.read(store, "fronts").to_pylist())
        if row["kind"] == "any_epoch"
    }
    found = {key: (f"{summaries[key]['hypervolume']:.4f}", len(summaries[key]["front"])) for key in EXPECTED}
    assert found == EXPECTED

    def percent(point: dict[str, float]) -> tuple[str, str]:
        return f"{100 * point['zeroshot_top1']:.2f}", f"{100 * point['asr_top1']:.2f}"

    best = {key[0]: row["best_top1_at_asr"]["0.05"] for key, row in summaries.items() if key[1] == "cleanclip"}
    assert {name: percent(point) for name, point in best.items()} == {
        "mmcl": ("16.49", "4.92"),
        "mmcl_ssl": ("14.16", "3.02"),
    }
    within = {key[0]: row["best_asr_within"]["1"] for key, row in summaries.items() if key[1] == "cleanclip"}
    assert f"{100 * within['mmcl']['asr_top1']:.2f}" == "0.25"
    assert f"{100 * within['mmcl_ssl']['asr_top1']:.1f}" == "42.4"


@needs_published
def test_the_published_poisoned_cleaning_sets(tmp_path: Path) -> None:
    for count, runs in ((5, 16), (10, 16), (25, 14)):
        out = str(tmp_path / str(count))
        found = import_sweep(
            str(PUBLISHED / "cc3m_poisoned_cleaning.csv"),
            out,
            only={"poisoned_in_cleaning_set": str(count)},
            baseline=str(PUBLISHED / "cc3m_sweep.csv"),
        )
        assert len(found) == runs
    five = {}
    for row in tables.read(Store(str(tmp_path / "5")), "epochs").to_pylist():
        before = {"mmcl": 0.1600, "mmcl_ssl": 0.1704}[row["objective"]]
        if row["zeroshot_top1"] >= round(before, 4) and row["epoch"]:
            five[row["objective"]] = min(row["asr_top1"], five.get(row["objective"], 1.0))
    assert {name: f"{100 * asr:.1f}" for name, asr in five.items()} == {"mmcl": "46.4", "mmcl_ssl": "98.3"}
