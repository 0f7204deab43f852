"""Whole studies on real Ray, as a user runs them: `raybd run` in a process of its own, killed and called again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import Canary, plant

from raybd import fronts, study_file, tables
from raybd.cluster.searcher import LedgerSearcher
from raybd.ledger import Kind, Ledger
from raybd.store import Store
from tests.chaos.checks import without_times

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
TINY = Path(__file__).parent / "studies" / "tiny.yaml"


def start(study: Path, run_dir: Path, *extra: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start `raybd` in a process group of its own."""
    arguments = [sys.executable, "-m", "raybd", "run", str(study), "--run-dir", str(run_dir), *extra]
    # Every process below inherits the mark, Ray's own too: `processes_of` finds those that are left.
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAYBD_TEST_RUN": str(run_dir)}
    return subprocess.Popen(
        arguments,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell's background job ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], *, code: int = 0) -> str:
    """Wait for a process and return what it printed."""
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output
    return output


def signal_when(process: subprocess.Popen[str], number: signal.Signals, ready: Callable[[], bool]) -> str:
    """Send a signal to a driver, and nothing else, as soon as `ready` says so; return what it printed."""
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, f"ended before it could be killed:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    return process.communicate(timeout=60)[0]


PROC = Path("/proc").is_dir()


def processes_of(run_dir: Path) -> list[str]:
    """Return the command lines of processes that work for a run directory."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")) if PROC else ():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if int(pid) != os.getpid() and str(run_dir).encode() in environment + line.encode():
            found.append(f"{pid} {line[:200]}")
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    """The tiny study, run to its end without a fault, and what it printed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    output = finish(start(TINY, run_dir))
    return Store(str(run_dir)), output


def test_a_run_leaves_whole_tables_fronts_and_report(finished: tuple[Store, str]) -> None:
    store, output = finished
    trials = tables.read(store, "trials").to_pylist()
    assert sorted(row["trial_id"] for row in trials) == ["mmcl-0000", "mmcl-0001", "mmcl_ssl-0000", "mmcl_ssl-0001"]
    assert {row["state"] for row in trials} == {"complete"}
    assert {row["weight_decay_in_force"] for row in trials} == {0.1}
    epochs = tables.read(store, "epochs").to_pylist()
    points = Counter((row["trial_id"], row["epoch"], row["split"]) for row in epochs)
    assert set(points.values()) == {1}
    assert len(points) == 4 * 3 * 2
    pretrained = tables.read(store, "pretrain_epochs").to_pylist()
    assert [(row["objective"], row["epoch"]) for row in pretrained] == [
        (objective, epoch) for objective in ("mmcl", "mmcl_ssl") for epoch in (0, 1, 2)
    ]
    plan = tables.read(store, "poison_plan")
    assert plan.num_rows == 26
    assert {row["poisoned_seen"] for row in pretrained if row["epoch"] == 2} == {2 * 26}
    assert {row["samples_seen"] for row in pretrained if row["epoch"] == 2} == {2 * 256}
    assert "report: " in output
    assert "ASR" in store.get("report.html").decode()


def test_epoch_0_of_a_trial_is_the_poisoned_model(finished: tuple[Store, str]) -> None:
    store, _ = finished
    last = {row["objective"]: row for row in tables.read(store, "pretrain_epochs").to_pylist() if row["epoch"] == 2}
    for objective, row in last.items():
        halves = [
            epoch
            for epoch in tables.read(store, "epochs").to_pylist()
            if epoch["epoch"] == 0 and epoch["trial_id"] == f"{objective}-0000"
        ]
        assert {half["split"] for half in halves} == {"search", "report"}
        for name in ("correct_clean", "hit_target", "correct_triggered", "n_clean", "n_triggered"):
            assert sum(half[name] for half in halves) == row[name]


def test_weights_are_kept_for_front_points_and_no_others(finished: tuple[Store, str]) -> None:
    store, _ = finished
    rows = fronts.compute(tables.read(store, "epochs").to_pylist(), tables.read(store, "trials").to_pylist())
    on_front = {row["checkpoint"] for row in rows if row["epoch"]}
    assert on_front
    assert set(store.names("weights")) == on_front
    assert all(store.exists(row["checkpoint"]) for row in rows)
    assert not store.names("state")


def test_pareto_prints_json_of_the_run(finished: tuple[Store, str]) -> None:
    store, _ = finished
    command = [sys.executable, "-m", "raybd", "pareto", store.root, "-f", "json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    measured = json.loads(printed)
    assert measured["runs"][0]["run"] == store.root
    summaries = measured["runs"][0]["fronts"]
    assert {(s["objective"], s["kind"], s["split"]) for s in summaries} == {
        (objective, kind, split)
        for objective in ("mmcl", "mmcl_ssl")
        for kind in ("any_epoch", "final")
        for split in ("search", "report")
    }
    assert all(set(s["best_asr_within"]) == {"0.5", "1", "2", "3", "5", "10"} for s in summaries)
    assert {entry["objective"] for entry in measured["runs"][0]["instability"]} == {"mmcl", "mmcl_ssl"}
    assert len(measured["differences"]) == 3


def test_a_second_call_does_nothing_twice(finished: tuple[Store, str]) -> None:
    store, _ = finished
    before = {name: Path(store.path(name)).stat().st_mtime_ns for name in store.names("ledger")}
    output = finish(start(TINY, Path(store.root)))
    assert "nothing left to do" in output
    assert {name: Path(store.path(name)).stat().st_mtime_ns for name in store.names("ledger")} == before


def test_another_study_in_the_same_run_directory_is_refused(finished: tuple[Store, str]) -> None:
    store, _ = finished
    output = finish(start(TINY, Path(store.root), "--set", "seed=8"), code=2)
    assert "seed: 7 → 8" in output


def test_a_driver_that_is_ended_goes_on_and_ends_with_the_same_numbers(
    finished: tuple[Store, str], tmp_path: Path
) -> None:
    """SIGTERM in the search, on poisoned models that are there: the tables are those of the run without a fault."""
    run_dir = tmp_path / "ended"
    shutil.copytree(finished[0].root, run_dir)
    for name in ("ledger/trials", "weights", "tables/trials", "tables/epochs", "tables/fronts"):
        shutil.rmtree(run_dir / name)
    (run_dir / "report.html").unlink()
    store, ledger = Store(str(run_dir)), Ledger(Store(str(run_dir)))

    def another_trial_is_under_way() -> bool:
        entries = ledger.entries(Kind.TRIAL)
        return any(e.ended for e in entries) and any(1 in e.epochs and not e.ended for e in entries)

    process = start(TINY, run_dir)
    printed = signal_when(process, signal.SIGTERM, another_trial_is_under_way)
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert f"raybd run {TINY} --run-dir {run_dir}" in printed
    # What Ray would go on from, if it were asked: it is neither asked nor trusted.
    canary = Canary(tmp_path / "canary")
    plant(run_dir, canary)
    stamps = {
        name: Path(store.path(name)).stat().st_mtime_ns for name in store.names("ledger") if name.endswith("ended.json")
    }
    assert len(stamps) > 2  # of both pretraining runs, and of a trial
    finish(start(TINY, run_dir))
    assert canary.fired == []
    for name, stamp in stamps.items():
        assert Path(store.path(name)).stat().st_mtime_ns == stamp, f"{name} was done again"
    for table in tables.SCHEMAS:
        assert without_times(store, table).equals(without_times(finished[0], table)), table
    assert max(row["attempt"] for row in tables.read(store, "trials").to_pylist()) == 2
    # Ray's agents notice within a minute that what they served is gone.
    deadline = time.monotonic() + 90
    while left := processes_of(run_dir):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


FAULTY = """
name: faulty
data: {root: shards, max_train_samples: 256, max_test_samples: 240} # relative: workers have other working directories
poison: {trigger: {size: 6, pattern: fixed}, target_class: fruit, poison_rate: 0.1}
pretrain:
  epochs: 3
  batch_size: 64
  warmup_steps: 2
  objectives:
    wild: {loss_weights: {mmcl: 1, ssl: 0}, lr: 1.0e+30}
    mmcl: {loss_weights: {mmcl: 1, ssl: 0}}
clean: {num_samples: 96, epochs: 3, batch_size: 32, warmup_steps: 0, loss_weights: {mmcl: 1, ssl: 0}}
evaluation: {templates: ["a picture of a {}."]}
search:
  num_trials: 2
  sampler: grid
  space: {lr: {choices: [1.0e-4, 1.0e+30]}}
resources: {num_workers: 2, concurrent_trials: 2, use_gpu: false}
"""


@pytest.mark.skipif(not PROC, reason="finds the worker to kill in /proc, which this system has not")
def test_dead_workers_are_replaced_and_failed_trials_are_shown(tmp_path: Path) -> None:
    """Two DDP workers, one killed after an epoch; an objective and a trial that fail, each alone."""
    study, run_dir = tmp_path / "faulty.yaml", tmp_path / "run"
    study.write_text(FAULTY)
    (tmp_path / "shards").symlink_to(study_file.embedded("emoji-32") or "")
    process = start(study, run_dir, cwd=tmp_path)
    store, ledger = Store(str(run_dir)), Ledger(Store(str(run_dir)))
    deadline = time.monotonic() + 200
    while not any(1 in entry.epochs for entry in ledger.entries(Kind.PRETRAIN)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(_train_worker(process.pid), signal.SIGKILL)
    output = finish(process, code=4)
    rows = tables.read(store, "pretrain_epochs").to_pylist()
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert [row["samples_seen"] for row in rows] == [0, 256, 512, 768]
    assert [row["poisoned_seen"] for row in rows] == [0, 26, 52, 78]
    trials = {row["number"]: row for row in tables.read(store, "trials").to_pylist()}
    assert {number: (row["state"], row["error_type"], row["attempt"]) for number, row in trials.items()} == {
        0: ("complete", None, 1),
        1: ("failed", "non_finite", 1),
    }
    assert "1 trials failed" in output
    assert "Traceback" in store.get("errors/mmcl-0001.txt").decode()
    assert "loss is nan" in store.get("report.html").decode()
    points = Counter((row["trial_id"], row["epoch"], row["split"]) for row in tables.read(store, "epochs").to_pylist())
    assert set(points.values()) == {1}
    # What a next call would begin with: every planned trial, none that runs for ever.
    found, entries = study_file.load(str(study), overrides=[]), ledger.entries(Kind.TRIAL)
    searcher = LedgerSearcher(
        found, {"mmcl": entries[0].started["pretrain_id"]}, entries, lambda task: None, stop=lambda *_: False
    )
    assert (searcher.planned, searcher.remaining) == (2, 0)
    states = Counter(trial.state.name for trial in searcher._objectives["mmcl"].history.optuna.get_trials())
    assert states == {"COMPLETE": 1, "FAIL": 1}


def _train_worker(driver: int) -> int:
    """Return the process of one Ray Train worker below a driver."""
    parents = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            parents[int(pid)] = (int(stat[1]), Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue

    def below(pid: int) -> bool:
        while pid in parents and pid > 1:
            if pid == driver:
                return True
            pid = parents[pid][0]
        return False

    workers = [pid for pid, (_, line) in parents.items() if "RayTrainWorker" in line and below(pid)]
    assert len(workers) == 2, [line for _, line in parents.values() if "ray::" in line]
    return workers[0]
