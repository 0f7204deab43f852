"""A study on real Ray whose workers die: of two DDP workers one is killed; an objective and a trial fail alone."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from test_run import PROC, finish, start

from raybd import study_file, tables
from raybd.cluster.searcher import LedgerSearcher
from raybd.ledger import Kind, Ledger
from raybd.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

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
resources: {num_workers: 2, concurrent_trials: 1, use_gpu: false}
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
        time.sleep(0.1)
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
