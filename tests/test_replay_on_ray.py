"""Replays on real Ray, all on one cluster: searches against recorded curves, which train nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_stopping
from test_replay import IDS, LRS, curve, recorded, runner_invoke, store_of, study_of
from test_stopping import CURVES, EPOCHS, told
from typer.testing import CliRunner

from raybd import curves, fronts, tables
from raybd.assignment import Assignment
from raybd.cli import app
from raybd.cluster.searcher import LedgerSearcher
from raybd.console import View
from raybd.errors import StudyError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.replay import ReplayTrial, recorded_trial
from raybd.replaying import ReplayRun
from raybd.store import Store
from raybd.study import Resources

pytestmark = pytest.mark.ray
# Starts Ray as a run on one machine does, and keeps it until nobody listens any more.
KEEPER = """
import sys
import ray
from raybd.cluster.session import session
from raybd.study import Resources
with session(Resources(use_gpu=False)):
    print("at", ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a cluster: to start one takes longer than any search here."""
    tests, root = Path(__file__).parent, Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(root), *filter(None, sys.path)])}
    with subprocess.Popen(
        [sys.executable, "-c", KEEPER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        printed = next(line for line in keeper.stdout if line.startswith("at "))
        yield printed.split()[1]
        keeper.stdin.close()
        assert keeper.wait(timeout=60) == 0


def replayed(*arguments: str) -> str:
    """Run the command and return what it printed."""
    done = CliRunner().invoke(app, ["replay", *arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_a_replayed_grid_is_the_sweep_again(address: str, tmp_path: Path) -> None:
    on, run = store_of(tmp_path / "on"), str(tmp_path / "run")
    study = tmp_path / "made.yaml"
    study.write_text(json.dumps(study_of().resolved()))
    printed = replayed(str(study), "--on", on, "--run-dir", run, "--address", address)
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
    assert "nothing left to do" in replayed(str(study), "--on", on, "--run-dir", run)
    other = store_of(tmp_path / "other", [*recorded(), curve("mmcl", "cleanclip", 4, lr=2e-3)])
    with pytest.raises(StudyError, match="replayed against other curves"):
        raise runner_invoke("replay", str(study), "--on", other, "--run-dir", run) or AssertionError
    # A replay is a run directory like others: it can be replayed against in turn.
    assert len(curves.read(run)) == 12


def test_one_worker_draws_on_ray_what_the_searcher_draws_by_itself(address: str, tmp_path: Path) -> None:
    on, run = store_of(tmp_path / "on"), str(tmp_path / "run")
    space = {"method": {"choices": ["mmcl", "ssl", "cleanclip"]}, "lr": {"low": 1e-5, "high": 1e-3, "log": True}}
    study = study_of(space=space, sampler="tpe", startup_trials=2, num_trials=5)
    (tmp_path / "made.yaml").write_text(json.dumps(study.resolved()))
    replayed(str(tmp_path / "made.yaml"), "--on", on, "--nearest", "--run-dir", run, "--address", address)
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


def test_on_ray_several_workers_leave_what_one_leaves_without_it(address: str, tmp_path: Path) -> None:
    """A call that is broken off in the midst, and a second one; the tables say of each trial what the ledger has."""
    curves.write(Store(str(tmp_path / "on")), CURVES)
    on, run = str(tmp_path / "on" / "sweep.parquet"), Store(str(tmp_path / "run"))
    study = test_stopping.study_of().model_copy(update={"resources": Resources(concurrent_trials=2, use_gpu=False)})

    class Broken(View):
        """Breaks off once a few trials wait."""

        def line(self, text: str, *, style: str | None = None) -> None:
            if "mmcl-0009 waits" in text:
                raise KeyboardInterrupt
            super().line(text, style=style)

    with pytest.raises(KeyboardInterrupt):
        ReplayRun(study, run, Broken(), on=on, address=address).run()
    waiting = [entry for entry in Ledger(run).entries(Kind.TRIAL) if entry.waits]
    assert len(waiting) > 8
    rows = tables.read(run, "trials").to_pylist()
    assert {row["state"] for row in rows} == {"running"}
    assert len(rows) >= len(waiting) - 2

    outcome = ReplayRun(study, run, View(), on=on, address=address).run()
    assert outcome.failed == 0
    entries = {entry.id: entry for entry in Ledger(run).entries(Kind.TRIAL)}
    assert told(entries) == told(test_stopping.Search(test_stopping.study_of(), tmp_path / "plain").run())
    rows = tables.read(run, "trials").to_pylist()
    assert {row["trial_id"]: (row["state"], row["stop_reason"]) for row in rows} == {
        name: (ended["state"], ended.get("stop_reason")) for name, entry in entries.items() if (ended := entry.ended)
    }
    epochs = [(row["trial_id"], row["epoch"]) for row in tables.read(run, "epochs").to_pylist()]
    assert sorted(epochs) == sorted((name, epoch) for name, entry in entries.items() for epoch in entry.epochs)
    final = [row for row in tables.read(run, "fronts").to_pylist() if row["kind"] == "final" and row["epoch"]]
    assert all(row["epoch"] == EPOCHS for row in final)
