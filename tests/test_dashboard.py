"""`raybd dashboard`: the Optuna studies that it rebuilds from a ledger or from imported tables, as they grow."""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread

import optuna
import pytest
from optuna.trial import TrialState
from test_status import counts
from test_sweeps import made, write
from test_tracking import only_caplog

from raybd import dashboard
from raybd.assignment import Assignment, settle, start_record
from raybd.dashboard import Mirror
from raybd.errors import ClusterError
from raybd.ledger import Kind, Ledger
from raybd.store import Store
from raybd.study import Failure, Study
from raybd.sweeps import import_sweep

STUDY = Study.model_validate(
    {
        "name": "made",
        "poison": {"num_poisoned": 1},
        "search": {"space": {"lr": {"low": 1e-5, "high": 1e-3, "log": True}, "method": {"choices": ["mmcl", "par"]}}},
    }
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "run"))
    store.put("study.json", json.dumps({"study": STUDY.resolved()}).encode())
    return store


def start(store: Store, number: int, epochs: int) -> Assignment:
    task = Assignment(f"mmcl-{number:04d}", number, "mmcl", "mmcl-aaaa", {"lr": 1e-4, "method": "mmcl"})
    Ledger(store).start(Kind.TRIAL, task.trial_id, start_record(STUDY, task))
    for epoch in range(epochs):
        Ledger(store).epoch(Kind.TRIAL, task.trial_id, epoch, {**counts(60 - epoch, 90 - 40 * epoch), "epoch": epoch})
    return task


def studies(mirror: Mirror) -> dict[str, optuna.Study]:
    names = [study.study_name for study in mirror.storage.get_all_studies()]
    return {name: optuna.load_study(study_name=name, storage=mirror.storage) for name in names}


def test_a_run_under_way_is_followed(store: Store) -> None:
    start(store, 0, 3)
    Ledger(store).end(Kind.TRIAL, "mmcl-0000", {"state": "complete", "ended": "2026-01-02T03:04:05+00:00"})
    task = start(store, 1, 2)
    mirror = Mirror(store)
    found = studies(mirror)
    assert list(found) == ["made: mmcl", "made: mmcl_ssl"]
    assert found["made: mmcl_ssl"].trials == []
    mmcl = found["made: mmcl"]
    done, open_ = mmcl.trials
    assert (done.state, done.values, done.params) == (TrialState.COMPLETE, [0.58, 0.1], {"lr": 1e-4, "method": "mmcl"})
    assert done.user_attrs["trial"] == "mmcl-0000"
    assert done.user_attrs["ASR by epoch"] == "0: 90.00%, 1: 50.00%, 2: 10.00%"
    began = datetime.fromisoformat(Ledger(store).entry(Kind.TRIAL, "mmcl-0000").started["started"])
    assert done.datetime_start == began.astimezone().replace(tzinfo=None)
    ended = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert done.datetime_complete == ended.astimezone().replace(tzinfo=None)
    assert done.intermediate_values == {n: pytest.approx((0.6 - n / 100) * (0.1 + 0.4 * n)) for n in range(3)}
    assert (open_.state, open_.user_attrs["state"]) == (TrialState.RUNNING, "running")
    assert open_.intermediate_values == {0: pytest.approx(0.06), 1: pytest.approx(0.295)}
    assert [trial.number for trial in mmcl.best_trials] == [0]
    settle(store, STUDY, task, reason=(Failure.ERROR, "boom \x1b[1m"))
    start(store, 2, 0)
    mirror.update()
    mirror.update()
    assert [trial.state for trial in mmcl.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING]
    assert mmcl.trials[1].user_attrs["error_message"] == r"boom \x1b[1m"
    assert not store.names("optuna")


def test_what_is_ended_in_the_dashboard_costs_no_other_trial(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_caplog(monkeypatch)
    start(store, 0, 1)
    mirror = Mirror(store)
    (mmcl, _) = studies(mirror).values()
    mirror.storage.set_trial_state_values(mmcl.trials[0]._trial_id, TrialState.FAIL)
    start(store, 1, 1)
    mirror.update()
    mirror.update()
    assert [trial.state for trial in mmcl.trials] == [TrialState.FAIL, TrialState.RUNNING]
    assert len([record for record in caplog.records if "not up to date" in record.getMessage()]) == 1


def test_imported_sweeps_have_the_settings_that_differ(tmp_path: Path) -> None:
    import_sweep(write(tmp_path / "made.csv", made()), str(tmp_path / "out"))
    found = studies(Mirror(Store(str(tmp_path / "out"))))
    assert list(found) == ["made: mmcl", "made: mmcl_ssl"]
    trials = found["made: mmcl"].trials
    assert len(trials) == 6
    assert set(trials[0].params) == {"lr", "loss_weights.ssl"} | ({"method"} & set(trials[0].params))
    assert trials[0].distributions["lr"].log
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}


def test_without_optuna_dashboard_it_says_what_to_install(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(ClusterError, match="not installed") as caught,
        dashboard.serving(store, host="127.0.0.1", port=0, every=1),
    ):
        pass
    assert "raybd[dashboard]" in caught.value.fix


@pytest.mark.skipif(importlib.util.find_spec("optuna_dashboard") is None, reason="optuna-dashboard is not installed")
@pytest.mark.filterwarnings("ignore")  # its own
def test_it_serves_what_it_follows(store: Store) -> None:
    start(store, 0, 2)
    with dashboard.serving(store, host="127.0.0.1", port=0, every=0.1) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/api/studies", timeout=60) as answer:
            told = json.load(answer)
        server.shutdown()
        thread.join()
    assert [study["study_name"] for study in told["study_summaries"]] == ["made: mmcl", "made: mmcl_ssl"]
    with (
        dashboard.serving(store, host="127.0.0.1", port=0, every=9) as server,
        pytest.raises(ClusterError, match="cannot listen"),
        dashboard.serving(store, host="127.0.0.1", port=server.server_port, every=9),
    ):
        pass
