"""Replay: which recorded curve answers, what is refused before Ray starts, and a search on real Ray against curves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from raybd import curves, fronts, study_file, tables
from raybd.assignment import Assignment
from raybd.cli import app
from raybd.curves import Curve
from raybd.errors import DataError, StudyError
from raybd.ledger import Kind, Ledger
from raybd.records import RECORDED
from raybd.replay import Recorded, ReplayTrial, recorded_trial
from raybd.store import Store
from raybd.study import Study

LRS = (1e-5, 1e-4, 1e-3)
IDS = {"mmcl": "mmcl-recorded", "mmcl_ssl": "mmcl_ssl-recorded"}


def epoch_of(number: int, top1: int, asr: int) -> dict[str, Any]:
    """Return an epoch's record with so many thousandths on all images."""
    counts = {"n_clean": 1000, "correct_clean": top1, "n_triggered": 1000, "hit_target": asr, "correct_triggered": None}
    return {**dict.fromkeys(RECORDED), "alpha": None, "epoch": number, "counts": {"all": counts}}


def curve(
    objective: str, method: str, number: int, *, last: int = 4, pretrain_id: str | None = None, **settings: Any
) -> Curve:
    """Return a curve whose accuracy falls with its learning rate, and whose ASR falls over the epochs."""
    lr = settings.get("lr", 1e-4)
    drop = round(40 * (lr / 1e-3) ** 0.5)
    keep = {"cleanclip": 0.4, "mmcl": 0.8, "ssl": 0.6}[method] + 0.1 * (objective == "mmcl_ssl")
    epochs = {n: epoch_of(n, 400 - drop * n - number % 3, round(990 * keep**n) + number % 2) for n in range(last + 1)}
    own = f"{objective}-{number:04d}"
    return Curve(own, objective, method, pretrain_id or f"{objective}-recorded", settings, epochs)


def recorded() -> list[Curve]:
    """Return a sweep of two objectives and three methods over three learning rates, `ssl` over the outer two only."""
    return [
        curve(objective, method, 10 * i + j, lr=lr)
        for objective in IDS
        for i, method in enumerate(("mmcl", "ssl", "cleanclip"))
        for j, lr in enumerate(LRS)
        if not (method == "ssl" and lr == 1e-4)
    ]


def study_of(*, space: dict[str, Any] | None = None, clean: dict[str, Any] | None = None, **search: Any) -> Study:
    space = space or {"method": {"choices": ["mmcl", "cleanclip"]}, "lr": {"choices": list(LRS)}}
    return Study.model_validate(
        {
            "name": "made",
            "poison": {"num_poisoned": 1},
            "clean": {"epochs": 4, **(clean or {})},
            "search": {"space": space, "num_trials": 6, "sampler": "grid", **search},
            "resources": {"concurrent_trials": 1, "use_gpu": False},
        }
    )


def store_of(path: Path, found: list[Curve] | None = None) -> str:
    curves.write(Store(str(path)), found or recorded())
    return str(path / "sweep.parquet")


# Which curve answers


def test_the_curve_of_the_drawn_settings_answers() -> None:
    on = Recorded(recorded(), nearest=False)
    for objective in IDS:
        for lr in LRS:
            found = on.curve(study_of(), objective, {"method": "cleanclip", "lr": lr})
            assert (found.objective, found.method, found.settings["lr"]) == (objective, "cleanclip", lr)


def test_settings_that_are_not_searched_take_the_studys_value_where_curves_differ() -> None:
    found = [curve("mmcl", "cleanclip", i, lr=1e-4, batch_size=size) for i, size in enumerate((64, 128))]
    on = Recorded(found, nearest=False)
    space = {"lr": {"choices": [1e-4]}}
    assert on.curve(study_of(space=space), "mmcl", {"lr": 1e-4}).settings["batch_size"] == 64
    study = study_of(space=space, clean={"batch_size": 128})
    assert on.curve(study, "mmcl", {"lr": 1e-4}).settings["batch_size"] == 128
    with pytest.raises(StudyError, match="batch_size=32") as caught:
        on.curve(study_of(space=space, clean={"batch_size": 32}), "mmcl", {"lr": 1e-4})
    assert caught.value.expected == "64, 128"
    # Where all curves agree, the setting is theirs.
    alike = Recorded(found[:1], nearest=False)
    assert alike.curve(study_of(space=space, clean={"batch_size": 32}), "mmcl", {"lr": 1e-4}) is found[0]


def test_poison_in_the_cleaning_set_tells_curves_apart() -> None:
    on = Recorded([curve("mmcl", "cleanclip", n, lr=1e-4, leaked_poison=n) for n in (0, 5)], nearest=False)
    study = study_of(clean={"leaked_poison": 5})
    assert on.curve(study, "mmcl", {"lr": 1e-4}).settings["leaked_poison"] == 5


def test_of_equal_curves_the_seed_picks_one() -> None:
    on = Recorded([curve("mmcl", "cleanclip", n, lr=1e-4, run=n) for n in range(3)], nearest=False)
    picked = [on.curve(study_of(), "mmcl", {"lr": 1e-4}, seed=seed).settings["run"] for seed in range(6)]
    assert picked == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("lr", "expected"),
    [(1e-7, 1e-5), (3e-5, 1e-5), (3.3e-5, 1e-4), (1e-4, 1e-4), (3e-4, 1e-4), (3.3e-4, 1e-3), (5.0, 1e-3)],
)
def test_nearest_is_in_the_logarithm(lr: float, expected: float) -> None:
    on = Recorded(recorded(), nearest=True)
    assert on.curve(study_of(), "mmcl", {"method": "cleanclip", "lr": lr}).settings["lr"] == expected


def test_nearest_stays_within_the_method_and_a_tie_goes_to_the_lower() -> None:
    on = Recorded(recorded(), nearest=True)
    found = on.curve(study_of(), "mmcl", {"method": "ssl", "lr": 1e-4})
    assert (found.method, found.settings["lr"]) == ("ssl", 1e-5)
    other_way = Recorded(recorded()[::-1], nearest=True)
    assert other_way.curve(study_of(), "mmcl", {"method": "ssl", "lr": 1e-4}).settings["lr"] == 1e-5


def test_longer_curves_are_cut_and_the_shortest_of_them_is_taken() -> None:
    found = [curve("mmcl", "cleanclip", n, last=last, lr=1e-4, epochs=last) for n, last in enumerate((4, 8))]
    study = study_of(space={"epochs": {"choices": [2, 4, 6]}})
    on = ReplayTrial(tuple(found), nearest=False)
    for wanted, own in ((2, 4), (4, 4), (6, 8)):
        task = Assignment("mmcl-0000", 0, "mmcl", "mmcl-recorded", {"epochs": wanted})
        record, epochs = recorded_trial(on, study, task)
        assert list(epochs) == list(range(wanted + 1))
        assert record["settings"]["epochs"] == wanted
        assert record["curve"] == found[0 if own == 4 else 1].trial_id
    with pytest.raises(StudyError, match="epochs=9: the recorded curve has 8"):
        Recorded(found, nearest=False).curve(study, "mmcl", {"epochs": 9})


# What is refused before Ray starts


def test_studies_that_stay_within_what_is_recorded_pass() -> None:
    on = Recorded(recorded(), nearest=False)
    on.check(study_of())
    on.check(study_of(sampler="tpe", space={"lr": {"choices": list(LRS)}}))
    # `lr` is not drawn for ssl: it has the study's.
    space = {
        "method": {"choices": ["ssl", "cleanclip"]},
        "lr": {"choices": list(LRS), "when": {"method": "cleanclip"}},
    }
    on.check(study_of(space=space, clean={"lr": 1e-3}))
    # Only what a grid will come to counts: the known settings, here.
    holes = {"method": {"choices": ["mmcl", "ssl"]}, "lr": {"choices": list(LRS)}}
    known = [{"method": "ssl", "lr": 1e-3}, {"method": "mmcl", "lr": 1e-4}]
    on.check(study_of(space=holes, known=known, num_trials=2))


@pytest.mark.parametrize(
    ("changes", "what", "expected"),
    [
        ({"space": {"lr": {"choices": [1e-4, 2e-4]}}}, "no recorded curve has lr=0.0002", "1e-05, 0.0001, 0.001"),
        ({"space": {"lr": {"low": 1e-5, "high": 1e-3, "log": True}}, "sampler": "tpe"}, "lr is drawn from", "choices"),
        ({"space": {"method": {"choices": ["par"]}}}, "no recorded curve has method=par", "cleanclip, mmcl, ssl"),
        ({"space": {"weight_decay": {"choices": [0.1]}}}, "no recorded curve has weight_decay=0.1", "do not say it"),
        ({"space": {"lr": {"choices": [1e-4]}}, "clean": {"epochs": 5}}, "epochs=5: the recorded curve has 4", "1 … 4"),
        (
            {"space": {"method": {"choices": ["mmcl", "ssl"]}, "lr": {"choices": list(LRS)}}},
            "no recorded curve has lr=0.0001",
            "1e-05, 0.001",
        ),
    ],
)
def test_what_no_curve_has_is_refused_with_the_values_recorded(
    changes: dict[str, Any], what: str, expected: str
) -> None:
    with pytest.raises(StudyError, match=what) as caught:
        Recorded(recorded(), nearest=False).check(study_of(**changes))
    assert expected in caught.value.expected


def test_nearest_frees_the_learning_rate_and_nothing_else() -> None:
    on = Recorded(recorded(), nearest=True)
    lr = {"low": 1e-6, "high": 1e-2, "log": True}
    on.check(study_of(sampler="tpe", space={"method": {"choices": ["mmcl", "ssl", "cleanclip"]}, "lr": lr}))
    with pytest.raises(StudyError, match="no recorded curve has weight_decay"):
        on.check(study_of(sampler="tpe", space={"lr": lr, "weight_decay": {"choices": [0.1]}}))
    with pytest.raises(StudyError, match="weight_decay is drawn from"):
        on.check(study_of(sampler="tpe", space={"lr": lr, "weight_decay": {"low": 0.0, "high": 1.0}}))


def test_pretrain_objectives_must_be_recorded_and_start_from_one_model() -> None:
    own = [found for found in recorded() if found.objective == "mmcl"]
    with pytest.raises(StudyError, match="no curve is recorded for pretrain objective 'mmcl_ssl'"):
        Recorded(own, nearest=False).check(study_of())
    others = [*recorded(), curve("mmcl", "cleanclip", 99, lr=1e-2, pretrain_id="another")]
    with pytest.raises(StudyError, match="several models: another, mmcl-recorded"):
        Recorded(others, nearest=False).check(study_of())


def test_settings_that_do_not_fit_together_are_left_to_fail() -> None:
    weights = {f"loss_weights.{name}": {"choices": [0.0, 1.0]} for name in ("mmcl", "ssl")}
    found = [
        curve("mmcl", "cleanclip", 2 * a + b, lr=1e-4, **{"loss_weights.mmcl": float(a), "loss_weights.ssl": float(b)})
        for a in (0, 1)
        for b in (0, 1)
        if a or b
    ]
    found += [
        Curve(c.trial_id.replace("mmcl", "mmcl_ssl"), "mmcl_ssl", c.method, IDS["mmcl_ssl"], c.settings, c.epochs)
        for c in found
    ]
    Recorded(found, nearest=False).check(study_of(space=weights))


def test_the_command_refuses_before_anything_is_made(tmp_path: Path) -> None:
    on = store_of(tmp_path / "on")
    study = tmp_path / "made.yaml"
    study.write_text(json.dumps(study_of(space={"lr": {"choices": [2e-4]}}).resolved()))
    done = runner_invoke("replay", str(study), "--on", on, "--run-dir", str(tmp_path / "run"))
    assert isinstance(done, StudyError)
    assert "lr=0.0002" in str(done)
    assert "--nearest" in done.fix
    assert not (tmp_path / "run").exists()
    assert isinstance(runner_invoke("replay", str(study), "--on", str(tmp_path)), DataError)
    assert isinstance(runner_invoke("replay", str(study), "--on", str(tmp_path / "no.parquet")), DataError)


def runner_invoke(*arguments: str) -> BaseException | None:
    return CliRunner().invoke(app, list(arguments)).exception


# Curves of files and runs


def test_tables_that_hold_no_curves_are_refused(tmp_path: Path) -> None:
    on = store_of(tmp_path)
    table = pq.read_table(on)

    def refused(found: pa.Table, what: str) -> None:
        pq.write_table(found, tmp_path / "bad.parquet")
        with pytest.raises(DataError, match=what):
            curves.read(str(tmp_path / "bad.parquet"))

    refused(table.drop_columns(["hit_target"]), "columns missing: hit_target")
    refused(pa.concat_tables([table, table.slice(3, 1)]), "epoch 3 of trial mmcl-0000 is there twice")
    refused(table.slice(0, 0), "no finished trial")
    texts = table.set_column(table.column_names.index("lr"), "lr", table["lr"].cast(pa.string()))
    refused(texts, "lr is of type string")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        curves.read(str(tmp_path / "text.parquet"))


def test_a_table_made_by_hand_needs_no_ids(tmp_path: Path) -> None:
    on = store_of(tmp_path)
    table = pq.read_table(on).drop_columns(["trial_id", "pretrain_id", "zeroshot_top1", "asr_top1"])
    pq.write_table(table, tmp_path / "bare.parquet")
    found = curves.read(str(tmp_path / "bare.parquet"))
    assert [(c.method, c.settings, c.epochs) for c in found] == [(c.method, c.settings, c.epochs) for c in recorded()]


def test_halves_of_a_run_stay_halves(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put("study.json", b"{}")
    same = {"study": "s", "study_hash": "h", "pretrain_id": "mmcl-1", "objective": "mmcl", "method": "cleanclip"}
    half = {"n_clean": 10, "n_triggered": 10, "correct_triggered": 3}
    rows = [
        {
            **same,
            **half,
            "trial_id": t,
            "epoch": e,
            "split": split,
            "correct_clean": e,
            "hit_target": 9 - e,
            "zeroshot_top1": e / 10,
            "asr_top1": (9 - e) / 10,
            "loss": 0.5,
        }
        for t in ("done", "broken")
        for e in (0, 1)
        for split in ("search", "report")
    ]
    tables.write(store, "epochs", "e", rows)
    states = {"done": "complete", "broken": "failed"}
    trials = [{**same, "trial_id": t, "number": i, "lr": 1e-4, "state": s} for i, (t, s) in enumerate(states.items())]
    tables.write(store, "trials", "t", trials)
    (found,) = curves.read(store.uri)
    assert (found.trial_id, found.settings, found.last) == ("done", {"lr": 1e-4}, 1)
    assert list(found.epochs[1]["counts"]) == ["search", "report"]
    assert found.epochs[1]["loss"] == 0.5


# A search on Ray


def invoke(*arguments: str) -> str:
    """Run the command line in a process of its own."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-m", "raybd", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.ray
def test_a_replayed_grid_is_the_sweep_again(tmp_path: Path) -> None:
    on, run = store_of(tmp_path / "on"), str(tmp_path / "run")
    study = tmp_path / "made.yaml"
    study.write_text(json.dumps(study_of().resolved()))
    printed = invoke("replay", str(study), "--on", on, "--run-dir", run)
    assert "search: 12 trials, 0 done, 1 at a time" in printed
    store = Store(run)
    trials = tables.read(store, "trials").to_pylist()
    assert {row["state"] for row in trials} == {"complete"}
    assert {row["batch_size"] for row in trials} == {None}
    epochs = tables.read(store, "epochs").to_pylist()
    assert {row["split"] for row in epochs} == {"all"}
    wanted = sorted(
        (c.objective, c.method, n, found["counts"]["all"]["correct_clean"], found["counts"]["all"]["hit_target"])
        for c in recorded()
        if c.method != "ssl"
        for n, found in c.epochs.items()
    )
    columns = ("objective", "method", "epoch", "correct_clean", "hit_target")
    assert sorted(tuple(row[name] for name in columns) for row in epochs) == wanted
    rows = tables.read(store, "fronts").to_pylist()
    assert all(row["checkpoint"] is None for row in rows)
    expected = fronts.compute(epochs, trials)
    assert {row["hypervolume"] for row in rows} == {row["hypervolume"] for row in expected}
    record = json.loads(store.get("study.json"))
    assert (record["kind"], record["on"]["path"], record["on"]["nearest"]) == ("replay", on, False)
    assert "nothing left to do" in invoke("replay", str(study), "--on", on, "--run-dir", run)
    other = store_of(tmp_path / "other", [*recorded(), curve("mmcl", "cleanclip", 4, lr=2e-3)])
    with pytest.raises(StudyError, match="replayed against other curves"):
        raise runner_invoke("replay", str(study), "--on", other, "--run-dir", run) or AssertionError
    # A replay is a run directory like others: it can be replayed against in turn.
    assert len(curves.read(run)) == 12


@pytest.mark.ray
def test_one_worker_draws_on_ray_what_the_searcher_draws_by_itself(tmp_path: Path) -> None:
    from raybd.cluster.searcher import LedgerSearcher
    from raybd.ledger import Entry, State

    on, run = store_of(tmp_path / "on"), str(tmp_path / "run")
    space = {"method": {"choices": ["mmcl", "ssl", "cleanclip"]}, "lr": {"low": 1e-5, "high": 1e-3, "log": True}}
    study = study_of(space=space, sampler="tpe", startup_trials=2, num_trials=5)
    (tmp_path / "made.yaml").write_text(json.dumps(study.resolved()))
    invoke("replay", str(tmp_path / "made.yaml"), "--on", on, "--nearest", "--run-dir", run)
    trial = ReplayTrial(tuple(curves.read(on)), nearest=True)
    done: dict[str, Entry] = {}
    searcher = LedgerSearcher(study, IDS, [], lambda task: done[task.trial_id], stop=lambda *_: False)
    for i in range(10):
        task = searcher.suggest(str(i))
        assert isinstance(task, dict)
        record, epochs = recorded_trial(trial, study, Assignment(**task))
        done[task["trial_id"]] = Entry(task["trial_id"], record, 1, epochs, {"state": State.COMPLETE})
        searcher.on_trial_complete(str(i))
    entries = Ledger(Store(run)).entries(Kind.TRIAL)
    assert {e.id: e.started["params"] for e in entries} == {e.id: e.started["params"] for e in done.values()}
    assert {e.id: e.started["curve"] for e in entries} == {e.id: e.started["curve"] for e in done.values()}
    # The table says what the curve had, the params what was drawn.
    row = next(row for row in tables.read(Store(run), "trials").to_pylist() if row["trial_id"] == "mmcl-0000")
    assert row["lr"] in LRS
    assert json.loads(row["params_json"])["lr"] not in LRS


def test_a_replay_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, raybd.cluster.search, raybd.replaying\n"
        "print([name for name in ('torch', 'open_clip', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_shipped_study_is_the_published_sweep(tmp_path: Path) -> None:
    published = Path(__file__).parents[2] / "shared" / "published" / "cc3m_sweep.csv"
    if not published.is_file():
        pytest.skip("the published sweeps are not part of the repository")
    from raybd.sweeps import import_sweep

    found = import_sweep(str(published), str(tmp_path / "out"))
    study = study_file.load("replay_cc3m")
    on = Recorded(found, nearest=False)
    on.check(study)
    answered = [on.curve(study, objective, known).trial_id for objective in IDS for known in study.search.known]
    assert sorted(answered) == sorted(c.trial_id for c in found)
