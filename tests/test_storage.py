"""Storage that fails for a while or for good, and one driver for each run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyarrow import fs

from raybd import jobs, lock, signals, tables
from raybd.assignment import remove_leftovers
from raybd.errors import DataError, LockedError, StorageError
from raybd.ledger import Kind, Ledger
from raybd.lock import only_driver
from raybd.store import Store


def files(store: Store) -> list[str]:
    """Return all files of a local run directory, hidden ones too."""
    root = Path(store.root)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@contextmanager
def no_room() -> Iterator[None]:
    """Let every write of more than ten bytes fail in the kernel, in this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# --- storage that fails


def test_a_disk_that_is_full_for_a_while_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(str(tmp_path), patience=20)
    store.put("a/old", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = threading.Timer(0.5, resource.setrlimit, (resource.RLIMIT_FSIZE, before))
    with no_room():
        room.start()
        began = time.monotonic()
        store.put("a/old", b"new" * 10)
        assert 0.4 < time.monotonic() - began < 10
    room.join()
    assert store.get("a/old") == b"new" * 10
    assert files(store) == ["a/old"]
    # Once, however often it is tried.
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot write {tmp_path}/a/old: file too large; trying again"
    ]


def test_a_disk_that_stays_full_is_an_error_that_says_so(tmp_path: Path) -> None:
    store = Store(str(tmp_path), patience=1.2)
    store.put("a/old", b"old")
    with no_room(), pytest.raises(StorageError) as caught:
        store.put("a/old", b"new" * 10)
    assert files(store) == ["a/old"]
    assert store.get("a/old") == b"old"
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.exit_code == 3
    assert error.where == f"{tmp_path}/a/old"
    assert "cannot write it: file too large, for 1 s (" in str(error)
    assert "GB free)" in str(error)
    assert "make room, then call the same command again" in error.fix
    assert "nothing that was finished is lost" in error.fix


def test_what_no_waiting_mends_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = Store(str(tmp_path / "file"), patience=60)
    began = time.monotonic()
    for action in (lambda: store.put("a", b""), lambda: store.put_new("a/b", b""), lambda: store.get("a")):
        with pytest.raises(StorageError, match="not a directory"):
            action()
    assert time.monotonic() - began < 5


def test_a_file_that_is_there_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, store in enumerate((Store(str(tmp_path)), Store("mock:///bucket"))):
        if number:
            store.fs.create_dir("bucket")
        assert store.put_new("x", b"first")
        assert not store.put_new("x", b"second")
        assert store.get("x") == b"first"
        assert store.names("") == ["x"]

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store = Store(str(tmp_path))
    assert store.put_new("y", b"first")
    assert not store.put_new("y", b"second")
    assert store.get("y") == b"first"
    assert files(store) == ["x", "y"]


@pytest.mark.parametrize("code", [errno.EEXIST, errno.EIO])
def test_a_new_file_whose_answer_got_lost_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A network filesystem may do what it is asked, lose its answer, and find the file there as it asks again."""
    link = os.link

    def lost(source: Path, target: Path) -> None:
        link(source, target)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", lost)
    store = Store(str(tmp_path))
    assert store.put_new("x", b"first")
    monkeypatch.undo()
    assert not store.put_new("x", b"second")
    assert store.get("x") == b"first"
    assert files(store) == ["x"]


def test_of_many_writers_of_a_new_file_one_is_told_that_it_wrote_it(tmp_path: Path) -> None:
    store, told = Store(str(tmp_path)), []

    def write(number: int) -> None:
        told.extend([number] if store.put_new("x", b"%d" % number) else [])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b"%d" % number for number in told] == [store.get("x")]


def test_half_written_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put("a/x", b"1")
    store.put("foreign/x", b"1")
    for name in ("a/.x.0123abcd", ".y.0123abcd", ".z.0123abcd", "foreign/.x.0123abcd", "a/.keep", "a/.x.0123abc"):
        Path(store.path(name)).write_bytes(b"half")
    store.remove_temporaries(("a", "absent"), files=("y",))
    assert files(store) == [".z.0123abcd", "a/.keep", "a/.x.0123abc", "a/x", "foreign/.x.0123abcd", "foreign/x"]


def test_every_place_that_a_run_writes_to_is_cleared(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    places = ["driver.lock", "examples.json", "preview.png", "report.html", "skipped.json", "study.json"]
    places += [
        "errors/t.txt",
        "jobs/j.json",
        "ledger/trials/t/started-001.json",
        "pretrained/p.safetensors",
        "progress/t.json",
    ]
    places += ["state/t.safetensors", "stop/j.json", "tables/epochs/t.parquet", "weights/t/epoch-0001.safetensors"]
    for name in places:
        store.put(name, b"whole")
        path = Path(store.path(name))
        path.with_name(f".{path.name}.0123abcd").write_bytes(b"half")
    remove_leftovers(store)
    assert files(store) == sorted(places)


# --- many files of a bucket

MANY = [f"many/{number:03d}" for number in range(100)]


class Answers:
    """Stands between a store and its filesystem: counts who reads at once, and fails where it is told to."""

    def __init__(self, filesystem: fs.FileSystem, fails: dict[str, int]) -> None:
        self._filesystem, self._fails = filesystem, fails
        self._lock, self._now = threading.Lock(), 0
        self.most, self.opened = 0, list[str]()

    def __getattr__(self, name: str) -> object:
        return getattr(self._filesystem, name)

    @contextmanager
    def open_input_stream(self, path: str) -> Iterator[object]:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            self.opened.append(path)
            left = self._fails.get(path, 0)
            self._fails[path] = left - 1
        try:
            time.sleep(0.002 * (len(self.opened) % 5))  # later ones are there before earlier ones
            if left > 0:
                raise OSError(errno.EIO, "Input/output error")
            with self._filesystem.open_input_stream(path) as stream:
                yield stream
        finally:
            with self._lock:
                self._now -= 1


def bucket_of_many(*, patience: float = 20, **fails: int) -> tuple[Store, Answers]:
    """Return a store that is not local, with the files of `MANY`; how often which of them, by number, fail."""
    store = Store("mock:///bucket", patience=patience)
    store.fs.create_dir("bucket/many")
    for name in MANY:
        store.put(name, name.encode())
    store.fs = Answers(store.fs, {f"bucket/many/{number[1:]}": times for number, times in fails.items()})
    return store, store.fs


def test_files_of_a_bucket_are_fetched_side_by_side_and_come_in_order() -> None:
    store, answers = bucket_of_many()
    assert list(store.get_each(MANY)) == [name.encode() for name in MANY]
    assert 1 < answers.most <= 16
    assert sorted(answers.opened) == [f"bucket/{name}" for name in MANY], "each once"


def test_no_more_files_are_held_than_are_fetched_at_once() -> None:
    store, answers = bucket_of_many()
    contents = store.get_each(MANY)
    assert [next(contents), next(contents)] == [b"many/000", b"many/001"]
    time.sleep(0.3)
    assert len(answers.opened) <= 17
    contents.close()


def test_a_file_that_fails_for_a_while_is_waited_for_in_its_turn(caplog: pytest.LogCaptureFixture) -> None:
    store, _ = bucket_of_many(_003=2, _050=1)
    assert list(store.get_each(MANY)) == [name.encode() for name in MANY]
    assert [record.getMessage() for record in caplog.records] == [
        "cannot read bucket/many/003: input/output error; trying again"
    ]


def test_the_error_of_the_first_file_that_has_one_is_told() -> None:
    store, _ = bucket_of_many(patience=0, _040=99, _042=99)
    names = [*MANY[:41], "many/absent", *MANY[41:]]
    contents, read = store.get_each(names), list[bytes]()
    with pytest.raises(StorageError, match="cannot read it: input/output error") as failed:
        read.extend(contents)
    assert failed.value.where == "bucket/many/040"
    assert len(read) <= 40
    with pytest.raises(DataError, match="no such file in the run directory") as absent:
        list(store.get_each(["many/000", "many/absent", "many/042"]))
    assert absent.value.where == "bucket/many/absent"


def test_ledger_and_tables_of_a_bucket_tell_the_first_damage_first() -> None:
    store, _ = bucket_of_many()
    for folder in ("ledger/trials/a", "ledger/trials/b", "tables/epochs"):
        store.fs.create_dir(f"bucket/{folder}")
    store.put("ledger/trials/a/ended.json", b"{")
    store.put("ledger/trials/b/started-001.json", b"[]")
    with pytest.raises(DataError, match="not a ledger record") as caught:
        Ledger(store).entries(Kind.TRIAL)
    assert caught.value.where == "bucket/ledger/trials/a/ended.json"
    store.put("tables/epochs/a.parquet", b"damaged")
    store.put("tables/epochs/b.parquet", b"too")
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        tables.read(store, "epochs")
    assert caught.value.where == "bucket/tables/epochs/a.parquet"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://AKIAKEY:SECRET@bucket/run", "s3://…@bucket/run"),
        ("s3://AKIAKEY:SEC/RET+@bucket/run?region=x", "s3://…@bucket/run?region=x"),
        ("s3://AKIAKEY:1234SECRET@bucket/run", "s3://…@bucket/run"),
        ("s3://AKIAKEY:1234/SECRET@bucket/run", "s3://…@bucket/run"),
        ("abfss://:SECRET@bucket/run", "abfss://…@bucket/run"),
    ],
)
def test_credentials_in_an_address_are_refused_and_not_shown(uri: str, shown: str) -> None:
    with pytest.raises(DataError, match="holds credentials") as caught:
        Store(uri)
    assert caught.value.where == shown
    assert "SEC" not in str(caught.value).replace("AWS_SECRET_ACCESS_KEY", "")


@pytest.mark.parametrize("uri", ["mock:///bucket/a:b@c", "s3://bucket/run@1?endpoint_override=127.0.0.1:9000", "a:b@c"])
def test_other_addresses_may_hold_what_looks_like_them(uri: str) -> None:
    assert Store(uri).root.endswith(("a:b@c", "run@1"))


# --- one driver

DRIVER = """
import sys, time
from raybd.lock import only_driver
from raybd.store import Store
sys.argv = ["raybd", "run", "a study"]
with only_driver(Store(sys.stdin.readline().strip())):
    print("held", flush=True)
    time.sleep(60)
"""


def start_driver(run_dir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{run_dir}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_driver_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    first = start_driver(tmp_path / "run")
    try:
        began = time.monotonic()
        with pytest.raises(LockedError) as caught, only_driver(store):
            raise AssertionError
        assert time.monotonic() - began < 1
        assert caught.value.exit_code == 3
        for part in (f"process {first.pid} on {socket.gethostname()}, since 20", "raybd run 'a study'"):
            assert part in str(caught.value)
    finally:
        first.kill()
        first.communicate()
    store.put("x", b"1")
    with only_driver(store):
        assert files(store) == [lock.NAME, "x"]
    assert files(store) == ["x"]


def test_a_folder_that_stayed_empty_is_not_left(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    with only_driver(store):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with only_driver(store):
        store.put("x", b"")
    assert files(store) == ["x"]


def test_a_lock_is_of_the_file_that_is_there(tmp_path: Path) -> None:
    """Many threads take turns, each of which removes the file at its end: never two at once."""
    store, inside, most = Store(str(tmp_path)), [], []

    def work() -> None:
        for _ in range(30):
            try:
                with only_driver(store):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()
            except LockedError:
                time.sleep(0.001)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) > 6
    assert set(most) == {1}


def test_a_filesystem_without_locks_is_held_like_a_bucket(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    store = Store(str(tmp_path))
    with only_driver(store):
        held = json.loads(store.get(lock.NAME))
        assert held["pid"] == os.getpid()
        with pytest.raises(LockedError, match=f"process {os.getpid()} on"), only_driver(store):
            raise AssertionError
        assert json.loads(store.get(lock.NAME))["nonce"] == held["nonce"]
    assert files(store) == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lock, "_STALE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.1)


def other(**more: object) -> bytes:
    """Return the lock of a driver on another machine."""
    found = {"host": "elsewhere", "pid": 7, "started": "2026-01-01", "command": "raybd run x", "nonce": "n", "beat": 1}
    return json.dumps({**found, "renewed": time.time(), **more}).encode()


def test_a_bucket_is_held_by_an_object_that_is_renewed(tmp_path: Path, quick: None) -> None:
    store = Store(str(tmp_path))
    with lock._renewed(store, lock._self()):
        first = json.loads(store.get(lock.NAME))
        with pytest.raises(LockedError, match=f"process {os.getpid()} on"), lock._renewed(store, lock._self()):
            raise AssertionError
        time.sleep(0.4)
        assert json.loads(store.get(lock.NAME))["beat"] > first["beat"] >= 0
    assert not store.exists(lock.NAME)
    store.put(lock.NAME, other())
    with (
        pytest.raises(LockedError, match="process 7 on elsewhere, since 2026-01-01: raybd run x"),
        lock._renewed(store, lock._self()),
    ):
        raise AssertionError


@pytest.mark.parametrize("left", [{"renewed": 0.0}, {"host": socket.gethostname(), "pid": 2**22 + 1}])
def test_a_bucket_that_nobody_renews_is_taken_over(tmp_path: Path, quick: None, left: dict[str, object]) -> None:
    """One that was silent for long, and one of this machine whose process is gone."""
    store = Store(str(tmp_path))
    store.put(lock.NAME, other(**left))
    with lock._renewed(store, lock._self()):
        assert json.loads(store.get(lock.NAME))["pid"] == os.getpid()


def test_a_silent_driver_that_beats_again_keeps_its_bucket(tmp_path: Path, quick: None) -> None:
    store = Store(str(tmp_path))
    store.put(lock.NAME, other(renewed=0.0))
    beat = threading.Timer(0.1, store.put, (lock.NAME, other(renewed=0.0, beat=2)))
    beat.start()
    with pytest.raises(LockedError), lock._renewed(store, lock._self()):
        raise AssertionError
    beat.join()


def test_a_driver_whose_bucket_was_taken_over_stops(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    jobs.submitted(store, "j", address="auto")
    monkeypatch.setenv(jobs.JOB, "j")

    def drive() -> None:
        with (
            signals.interruptible(pytest.fail),
            lock._renewed(store, lock._self()) as taken,
            jobs.driven(store, taken),
        ):
            store.put(lock.NAME, other())
            time.sleep(10)

    with pytest.raises(LockedError, match="on elsewhere"):
        drive()
    assert json.loads(store.get(lock.NAME))["host"] == "elsewhere"
    assert not signals.received()
    job = jobs.last(store)
    assert job is not None
    assert job.ended.endswith("another driver took the run directory over")


def test_of_two_that_came_at_once_the_last_has_the_bucket(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    monkeypatch.setattr(
        lock, "_beat", lambda store, own, beat=lock._beat: (beat(store, own), store.put(lock.NAME, other()))
    )
    with pytest.raises(LockedError, match="on elsewhere"), lock._renewed(store, lock._self()):
        raise AssertionError


def test_a_bucket_that_fails_while_it_is_taken_is_waited_for(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_until = 0.0

    class Failing(fs.LocalFileSystem):
        def open_input_stream(self, *given: object) -> object:
            if time.monotonic() < fails_until:
                raise OSError(errno.EIO, "Input/output error")
            return super().open_input_stream(*given)

    def beat(store: Store, own: dict[str, object]) -> None:
        nonlocal fails_until
        written(store, own)
        fails_until = fails_until or time.monotonic() + 1.0

    written = lock._beat
    monkeypatch.setattr(fs, "LocalFileSystem", Failing)
    monkeypatch.setattr(lock, "_beat", beat)
    monkeypatch.setattr(lock, "_LOCK_PATIENCE_SECONDS", 0.0)
    store = Store(str(tmp_path), patience=20)
    with lock._renewed(store, lock._self()):
        assert time.monotonic() >= fails_until > 0
        assert store.exists(lock.NAME)
