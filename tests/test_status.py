"""What `raybd status` says of a run."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raybd import failures, tables
from raybd.assignment import Assignment, settle, start_record
from raybd.cli import app
from raybd.errors import DataError
from raybd.ledger import Kind, Ledger
from raybd.report import life, status
from raybd.store import Store
from raybd.study import Failure, Study

STUDY = Study.model_validate({"name": "made", "poison": {"num_poisoned": 1}})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def start(store: Store, number: int, until: int | None = None) -> Assignment:
    task = Assignment(f"mmcl-{number:04d}", number, "mmcl", "mmcl-aaaa", {}, until)
    Ledger(store).start(Kind.TRIAL, task.trial_id, start_record(STUDY, task))
    return task


def test_a_run_without_trials(store: Store) -> None:
    assert list(status.lines(store)) == ["trials: none yet"]


def test_reasons_retries_and_where_the_tracebacks_are(store: Store) -> None:
    for number in range(6):
        task = start(store, number)
        if number < 3:
            failures.note(store, task.trial_id, Failure.OUT_OF_MEMORY, f"no room for {number} GiB", trace="")
            settle(store, STUDY, task)
        elif number == 3:
            settle(store, STUDY, task, reason=(Failure.SETTINGS, "they do not fit"))
    task = start(store, 6)
    for kind in (Failure.HUNG, Failure.DIED, Failure.HUNG):
        failures.note(store, task.trial_id, kind, "made", trace="")
    task = start(store, 7)
    failures.note(store, task.trial_id, Failure.DIED, "made", trace="")
    Ledger(store).end(Kind.TRIAL, task.trial_id, {"state": "complete"})
    assert list(status.lines(store)) == [
        "trials: 4 failed, 3 running or interrupted, 1 complete",
        "  3 x out_of_memory: no room for 0 GiB (mmcl-0000, mmcl-0001, mmcl-0002)",
        "  1 x settings: they do not fit (mmcl-0003)",
        f"tracebacks: {store.root}/errors/TRIAL.txt",
        "tried again after failures: 2",
        "  mmcl-0006: 2 x hung, 1 x died; running or interrupted",
        "  mmcl-0007: 1 x died; complete",
    ]


def test_trials_that_wait_at_a_rung_are_told_from_those_that_run(store: Store) -> None:
    for number in range(3):
        start(store, number, until=1)
    Ledger(store).pause(Kind.TRIAL, "mmcl-0000", {"epoch": 1})
    Ledger(store).pause(Kind.TRIAL, "mmcl-0001", {"epoch": 1})
    start(store, 1)  # goes on
    assert list(status.lines(store)) == ["trials: 2 running or interrupted, 1 waiting at a rung"]


def test_pretraining_whose_workers_failed(store: Store) -> None:
    started = {"settings": {"epochs": 3}}
    Ledger(store).start(Kind.PRETRAIN, "mmcl-aaaa", started)
    Ledger(store).epoch(Kind.PRETRAIN, "mmcl-aaaa", 1, {})
    failures.note(store, "mmcl-aaaa", Failure.HUNG, "made", trace="", of=Kind.PRETRAIN, part="-rank1")
    assert next(status.lines(store)) == (
        "pretraining mmcl-aaaa: epoch 1/3, running or interrupted; failures: 1 x hung, the last one: made"
    )
    assert store.names("errors") == ["errors/mmcl-aaaa-rank1.txt"]


def test_trials_that_others_ran_are_counted_in_the_tables(store: Store) -> None:
    now = datetime.now(UTC)
    for number, state in enumerate(("complete", "complete", "failed")):
        row = {"trial_id": f"t{number}", "state": state, "started": now, "ended": now}
        row |= {"pretrain_id": "p", "objective": "mmcl", "method": "cleanclip"}
        row |= {"error_type": "error", "error_message": "boom"} if state == "failed" else {}
        tables.write(store, "trials", f"t{number}", [row])
    before = ["trials: 2 complete, 1 failed", "  1 x error: boom (t2)"]
    assert list(status.lines(store)) == before
    point = {"pretrain_id": "p", "objective": "mmcl", "method": "cleanclip", "trial_id": "t0", "epoch": 1}
    point |= {"zeroshot_top1": 0.5, "asr_top1": 0.25}
    made = {"kind": "any_epoch", "hv_contribution": 0.375, "hypervolume": 0.375}
    known = {"baseline_top1": 0.6, "baseline_asr": 0.95}
    halves = ("search", "report")
    tables.write(store, "fronts", "mmcl", [{**point, **made, **known, "split": split} for split in halves])
    rows = [{**point, "split": split, "asr_top1": asr} for split, asr in zip(halves, (0.25, 0.0), strict=True)]
    tables.write(store, "epochs", "t0", rows)
    found = list(status.lines(store))
    assert found[:2] == before
    assert "  hypervolume 0.3750 after 3 trials" in found
    tables.write(store, "fronts", "mmcl", [{**point, **made, "split": split} for split in halves])
    assert list(status.lines(store))[:2] == before


def test_what_changed_is_said_again_until_one_stops_looking(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put("study.json", b"{}")
    command = [sys.executable, "-m", "raybd", "status", str(tmp_path), "--watch", "0.1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        when, first = process.stdout.readline(), process.stdout.readline()
        assert datetime.fromisoformat(when.strip())
        start(store, 0)
        process.stdout.readline()
        assert (first, process.stdout.readline()) == ("trials: none yet\n", "trials: 1 running or interrupted\n")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == ""  # nothing was said twice
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def counts(clean: int, hit: int) -> dict[str, Any]:
    found = {"n_clean": 100, "correct_clean": clean, "n_triggered": 100, "hit_target": hit, "correct_triggered": 0}
    return {"counts": {"search": found, "report": found}}


def test_what_happened_to_a_trial(store: Store) -> None:
    task, ledger = start(store, 3, until=1), Ledger(store)
    failures.note(store, task.trial_id, Failure.DIED, "its process died", trace="made")
    ledger.epoch(Kind.TRIAL, task.trial_id, 0, counts(50, 90))
    ledger.epoch(Kind.TRIAL, task.trial_id, 1, counts(40, 5))
    ledger.pause(Kind.TRIAL, task.trial_id, {"epoch": 1, "device_seconds": 1.0})
    assert list(life.lines(store, task.trial_id))[-3] == "waits at a rung to be compared with others"
    start(store, 3)
    failures.note(store, task.trial_id, Failure.NON_FINITE, "loss is nan", trace="Traceback: \x1b[1mmade")
    settle(store, STUDY, task)
    store.put("errors/mmcl-00031.txt", b"of another")
    when = r"20\d\d-[\d:.T+-]+"
    patterns = (
        rf"trial mmcl-0003, started {when}, 2 attempts",
        "of mmcl, cleanclip: the settings of the study",
        rf"  failed, died, {when}: its process died",
        r"  epoch 0  accuracy  50.00%  ASR  90.00%",
        r"  epoch 1  accuracy  40.00%  ASR   5.00%  at a rung",
        rf"  failed, non_finite, {when}: loss is nan",
        rf"failed, non_finite: loss is nan, {when}",
        rf"\n{store.root}/errors/mmcl-0003.txt:",
        r"failure 1, (.|\n)*made\n\nfailure 2, (.|\n)*made",
    )
    found = list(life.lines(store, task.trial_id))
    assert len(found) == len(patterns)
    for line, pattern in zip(found, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    with pytest.raises(DataError, match="such as mmcl-0003"):
        list(life.lines(store, "mmcl-003"))
    # What steers a terminal is shown by the command as what it is.
    store.put("study.json", b"{}")
    printed = CliRunner().invoke(app, ["logs", store.root, task.trial_id])
    assert printed.exit_code == 0
    assert "Traceback: \\x1b[1mmade" in printed.output


def test_what_happened_to_pretraining(store: Store) -> None:
    ledger = Ledger(store)
    ledger.start(Kind.PRETRAIN, "mmcl-aaaa", {"started": "2026-01-01", "settings": {"epochs": 3}})
    ledger.epoch(Kind.PRETRAIN, "mmcl-aaaa", 1, {"counts": {"all": counts(10, 20)["counts"]["search"]}})
    failures.note(store, "mmcl-aaaa", Failure.HUNG, "made", trace="of 1", of=Kind.PRETRAIN, part="-rank1")
    found = list(life.lines(store, "mmcl-aaaa"))
    assert found[:2] == [
        "pretraining mmcl-aaaa, started 2026-01-01, 1 attempt",
        "  epoch 1  accuracy  10.00%  ASR  20.00%",
    ]
    assert found[3] == "running, or interrupted"
    assert found[4] == f"\n{store.root}/errors/mmcl-aaaa-rank1.txt:"
    assert "of 1" in found[5]


def test_nothing_happened_to_what_was_never_there(store: Store) -> None:
    with pytest.raises(DataError, match="has no ledger"):
        list(life.lines(store, "t0"))
