"""Runs whose driver is elsewhere, without a cluster: what a job of Ray's is made of, its record, requests to stop."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from raybd import jobs, lock, signals, stop, study_file
from raybd.cli import app
from raybd.cluster import submission
from raybd.errors import ClusterError, DataError, LockedError, RaybdError, StudyError
from raybd.ledger import Kind, Ledger
from raybd.lock import only_driver
from raybd.report import status
from raybd.store import Store
from raybd.study import Study

TINY = Path(__file__).parent / "studies" / "tiny.yaml"
STUDY = Study.model_validate({"name": "made", "poison": {"num_poisoned": 1}})
ADDRESS = "http://head:8265"
runner = CliRunner()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


# --- what a job is made of


@pytest.mark.parametrize("name", ["cc3m", "demo", "paper/methods", "replay_cc3m", "small/halving"])
def test_a_study_comes_to_the_cluster_whole(name: str) -> None:
    study = study_file.anchored(study_file.load(name))
    again = study_file.parse(submission.study_text(study), source="there")
    assert again == study
    assert again.hash() == study.hash()


def test_a_study_keeps_characters_of_every_size() -> None:
    study = study_file.load(str(TINY), overrides=['poison.target_class="\\U0001F34C é \\u2603 1e5"'])
    assert study.poison.target_class == "\U0001f34c é ☃ 1e5"
    assert study_file.parse(submission.study_text(study), source="there") == study


def test_the_entrypoint_drives_the_study_that_was_brought() -> None:
    command = submission.entrypoint(STUDY, "s3://bucket/my runs/made", allow_code_change=False)
    assert command == "exec raybd run made.yaml --run-dir 's3://bucket/my runs/made' --address auto"
    assert submission.entrypoint(STUDY, "/r", allow_code_change=True).endswith("--address auto --allow-code-change")


def test_the_driver_knows_its_job_and_has_time_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found = submission.runtime_env("/tmp/x", id="j", command="raybd run mine.yaml --detach")
    assert set(found) == {"working_dir", "env_vars"}
    assert int(found["env_vars"].pop("RAY_JOB_STOP_WAIT_TIME_S")) > signals.GRACE_SECONDS
    for name, value in found["env_vars"].items():
        monkeypatch.setenv(name, value)
    assert (jobs.own(), jobs.command()) == ("j", "raybd run mine.yaml --detach")


def test_a_driver_asks_for_the_head_where_there_is_one() -> None:
    assert submission.head_resources([{"CPU": 4.0}, {"CPU": 8.0, "head": 1.0}]) == {"head": 0.01}
    assert submission.head_resources([{"CPU": 4.0}]) == {}


@pytest.mark.parametrize("address", ["head:6379", "ray://head:10001", "127.0.0.1:8265"])
def test_an_address_of_no_job_api_is_refused(store: Store, address: str) -> None:
    with pytest.raises(StudyError, match="http://HEAD:8265, or auto"):
        submission.check(STUDY, store, address=address, command="")


@pytest.mark.parametrize(
    ("run_dir", "settings"),
    [
        ("s3://AKIAABCDEFGHIJKLMNOP:x@bucket/runs", []),
        ("/r", ["data.root=s3://me:secret@bucket/shards"]),
        ("/r", ["data.test=https://me:secret@host/test.tar"]),
        ("/r", ["data.root=s3://minio:se/secret@bucket/x"]),
        ("/r", ["data.root=s3://minio:12/secret@bucket/x"]),
        ("/r", ["data.root=abfss://:secret@bucket/x"]),
    ],
)
def test_secrets_do_not_go_into_a_job(run_dir: str, settings: list[str]) -> None:
    class At:
        uri = run_dir

    with pytest.raises(StudyError) as caught:
        submission.check(study_file.load(str(TINY), overrides=settings), At(), address="auto", command="")  # type: ignore[arg-type]
    assert "secret@" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def test_what_a_study_reads_from_disks_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.pt").touch()
    settings = [f"data.root={tmp_path}", "model.start=~/a.pt", "data.test=s3://b/t.tar", "data.cache_dir=/c"]
    settings += ["clean.method=pseudo_labels", "clean.pseudo_labels.model=RN50"]
    settings += [f"clean.pseudo_labels.checkpoint={tmp_path}/x.pt"]
    study = study_file.anchored(study_file.load(str(TINY), overrides=settings))
    assert study_file.local_paths(study) == {
        "data.root": str(tmp_path),
        "model.start": str(Path.home() / "a.pt"),
        "clean.pseudo_labels.checkpoint": f"{tmp_path}/x.pt",
    }
    assert study_file.local_paths(study_file.load(str(TINY))) == {}


# --- refusals of the command


def refused(*arguments: str) -> RaybdError:
    done = runner.invoke(app, ["run", str(TINY), *arguments])
    assert isinstance(done.exception, RaybdError), done.output
    return done.exception


def test_a_cluster_is_said_and_reached_and_a_run_has_one_driver(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raybd.tracking.require", pytest.fail)  # what the cluster has to have, not this machine
    where = ("--run-dir", store.uri)
    assert "on which cluster?" in str(refused(*where, "--detach"))
    assert "add --detach" in str(refused(*where, "--address", ADDRESS))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        error = refused(*where, "--detach", "--address", f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert error.exit_code == 3
    assert "Ray's job API" in str(error)
    assert not Path(store.root).exists()
    with only_driver(store):
        error = refused(*where, "--detach", "--address", ADDRESS)
    assert isinstance(error, LockedError)
    assert f"raybd stop {store.uri}" in error.fix
    store.put("study.json", json.dumps({"study": STUDY.resolved()}).encode())
    Ledger(store).start(Kind.PRETRAIN, "mmcl-1", {})
    assert "holds another study" in str(refused(*where, "--detach", "--address", ADDRESS))


# --- the record of a job


def test_a_driver_says_that_its_job_has_begun_and_how_it_ended(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with jobs.driven(store):
        assert not Path(store.root).exists()  # no job's driver
    jobs.submitted(store, "j", address=ADDRESS)
    (waits,) = (line for line in status.lines(store) if "j of" in line)
    assert waits.endswith("has no driver yet")
    shown = runner.invoke(app, ["status", store.root])
    assert f"{waits}\n  what Ray says of it: ray job status --address {ADDRESS} j\n" in shown.output
    monkeypatch.setenv(jobs.JOB, "j")
    with only_driver(store):
        who = f"driver: process {os.getpid()} on {socket.gethostname()}, as job j,"
        assert next(status.lines(store)).startswith(who)
    assert next(status.lines(store)).endswith("+00:00: its work is done")
    with jobs.driven(store):
        assert next(status.lines(store)).endswith("its driver died")
    with pytest.raises(DataError), jobs.driven(store):
        raise DataError("no shards", where="data.train", fix="give some")
    assert next(status.lines(store)).endswith(": data.train: no shards")
    with pytest.raises(KeyboardInterrupt), jobs.driven(store):
        raise KeyboardInterrupt
    assert next(status.lines(store)).endswith("it was stopped")
    store.put("jobs/k.json", b"[1]")
    found = jobs.last(store)
    assert found is not None
    assert (found.id, found.address, bool(found.began)) == ("j", ADDRESS, True)


def test_a_job_that_ray_gave_up_or_lost_is_told_from_one_that_waits(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(id: str, submitted: str) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "_now", lambda: submitted)
            jobs.submitted(store, id, address=ADDRESS, command="raybd run mine.yaml --detach")
        return list(status.lines(store))[:-1]

    now = datetime.now(UTC)
    look = f"  what Ray says of it: ray job status --address {ADDRESS} "
    first, *after = told("old", (now - timedelta(minutes=jobs.BEGINS_WITHIN_MINUTES, seconds=1)).isoformat())
    assert first.endswith(", had no driver after 20 minutes: most likely Ray has given it up, or is gone")
    assert after == [f"{look}old", "  to submit it again: raybd run mine.yaml --detach"]
    # One that came late all the same is not late any more.
    monkeypatch.setenv(jobs.JOB, "old")
    with only_driver(store):
        assert "as job old" in next(status.lines(store))
    (line,) = list(status.lines(store))[:-1]
    assert line.endswith("its work is done")
    # Also where clocks differ, or nobody knows when it was.
    for id, when in (("late", now - timedelta(minutes=15)), ("ahead", now + timedelta(minutes=40))):
        first, *after = told(id, when.isoformat())
        assert first.endswith(", has no driver yet")
        assert after == [look + id]
    for when in ("9998-01-01T00:00", "when?"):  # without a time zone; no time
        assert told("x", when)[0].endswith(", has no driver yet")


def test_a_job_that_ended_without_a_driver_does_not_wait(store: Store) -> None:
    jobs.submitted(store, "j", address=ADDRESS)

    class Client:
        status, driver_exit_code, message = JobStatus.FAILED, None, "no such image\nat all"

        def get_job_info(self, id: str) -> Client:
            return self

    job = object.__new__(submission.Submitted)
    job.store, job.address, job.id, job._client = store, ADDRESS, "j", Client()
    with pytest.raises(ClusterError, match="no such image"):
        job.begun(seconds=0)
    assert next(status.lines(store)).endswith(", before its driver began: FAILED: no such image")
    assert runner.invoke(app, ["stop", store.root]).output == f"no driver works on {store.root}\n"


def test_a_submission_that_is_broken_off_leaves_no_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def list_jobs(self) -> list[object]:
            return []

        def submit_job(self, **job: object) -> None:
            assert jobs.last(store)
            raise KeyboardInterrupt

    monkeypatch.setattr(submission, "_client", lambda _: Client())
    monkeypatch.setattr(submission, "_nodes", lambda _: [{"CPU": 1.0}])
    with pytest.raises(KeyboardInterrupt):
        submission.Submitted(STUDY, store, address=ADDRESS, command="c", allow_code_change=False, shared=True)
    assert jobs.last(store) is None


def test_the_note_of_the_end_is_not_waited_for_with_a_run_s_patience(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.submitted(store, "j", address=ADDRESS)
    monkeypatch.setenv(jobs.JOB, "j")
    written: list[float] = []
    monkeypatch.setattr(jobs, "_put", lambda store, job: written.append(store.patience))
    with jobs.driven(Store(store.root, patience=3600)):
        pass
    assert written == [3600, 5]


def test_a_run_directory_of_another_machine_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jobs.JOB, "j")
    with pytest.raises(ClusterError, match="of another machine"), jobs.driven(store):
        raise AssertionError


# --- requests to stop


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(signals, "end_main", signals.interrupt_main)  # without the end of this process


def drive(store: Store, *, seconds: float) -> None:
    with signals.interruptible(pytest.fail), only_driver(store):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.01)


def test_a_driver_obeys_a_request_to_itself_and_removes_it(store: Store, quick: None) -> None:
    def run() -> None:
        with signals.interruptible(pytest.fail), only_driver(store):
            holder = lock.holder(store)
            assert holder is not None
            stop.ask(store, holder["nonce"])
            time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert lock.holder(store) is None
    assert not Path(store.root).exists()


def test_a_request_waits_for_the_driver_of_its_job(store: Store, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.submitted(store, "j", address=ADDRESS)
    asked = runner.invoke(app, ["stop", store.root])
    assert asked.exit_code == 0
    assert "job j has no driver yet" in asked.output
    monkeypatch.setenv(jobs.JOB, "j")
    with pytest.raises(KeyboardInterrupt):
        drive(store, seconds=60)
    assert not store.exists("stop/j.json")
    assert next(status.lines(store)).endswith("it was stopped")


def test_requests_to_others_wait_for_them(store: Store, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for id in ("j", "k", "m"):
        jobs.submitted(store, id, address=ADDRESS)
    jobs.failed(store, "m", "FAILED: no such image")
    monkeypatch.setattr(lock, "holder", lambda _: {"nonce": "n", "host": "h", "pid": 1, "started": "", "command": "c"})
    done = runner.invoke(app, ["stop", store.root, "--wait", "0"])
    assert "still at work after 0 s" in str(done.exception)
    assert f"ray job stop --address {ADDRESS} k" in done.output
    asked = [f"stop/{name}.json" for name in ("j", "k", "n")]
    assert store.names("stop") == asked
    drive(store, seconds=0.3)  # is none of them
    assert store.names("stop") == asked
    monkeypatch.setenv(jobs.JOB, "k")
    with pytest.raises(KeyboardInterrupt):
        drive(store, seconds=60)
    assert store.names("stop") == ["stop/j.json", "stop/n.json"]


@pytest.mark.parametrize("content", [b'{"whom": "j"}', b"[" * 100_000])
def test_a_request_that_cannot_be_read_is_none(
    store: Store, quick: None, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    jobs.submitted(store, "j", address=ADDRESS)
    monkeypatch.setenv(jobs.JOB, "j")
    store.put("stop/j.json", content)
    drive(store, seconds=0.3)
    assert not store.exists("stop/j.json")


def test_a_request_that_comes_as_a_command_ends_does_not_end_the_process() -> None:
    signals.end_main()


def test_nobody_to_stop(store: Store) -> None:
    done = runner.invoke(app, ["stop", store.root])
    assert isinstance(done.exception, RaybdError)
    assert "not a run directory" in str(done.exception)
    store.put("study.json", b"{}")
    store.put(lock.NAME, b"what one that was killed left")
    done = runner.invoke(app, ["stop", store.root])
    assert (done.exit_code, done.output) == (0, f"no driver works on {store.root}\n")
    assert store.exists("study.json")
    assert not store.names("stop")


def test_who_does_not_stop_in_time_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "_LOOK_SECONDS", 60.0)
    with only_driver(store):
        done = runner.invoke(app, ["stop", store.root, "--wait", "0.1"])
        assert f"asked to stop: process {os.getpid()} on" in done.output
        assert "still at work after 0.1 s" in str(done.exception)
        assert len(store.names("stop")) == 1
    assert not store.names("stop")


def test_a_driver_on_a_bucket_that_is_silent_for_long_is_none(store: Store) -> None:
    mine = {"host": "elsewhere", "pid": 7, "started": "2026-01-01", "command": "raybd run x", "nonce": "n"}
    for renewed, there in ((time.time(), True), (0.0, False), ("soon", False)):
        content = json.dumps({**mine, "renewed": renewed}).encode()
        store.put(lock.NAME, content)
        bucket = Store(store.root)
        bucket.local = False
        assert (lock.holder(bucket) is not None) is there


def test_the_head_s_resource_is_that_of_the_cluster_files() -> None:
    root = Path(__file__).parent.parent
    head = yaml.safe_load((root / "cluster.yaml").read_text())["available_node_types"]["head"]
    assert set(submission.head_resources([head["resources"]])) <= set(head["resources"])
    assert submission.head_resources([head["resources"]])
