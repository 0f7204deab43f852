"""Whole studies on real Ray, as a user runs them: `raybd run` in a process of its own, killed and called again.

One of them lies on a bucket, of moto's S3 server, where it is read as others read it too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow.dataset as ds
import pytest
from hostile import Canary, plant
from pyarrow import fs
from typer.testing import CliRunner

from raybd import examples, fronts, tables
from raybd.cli import app
from raybd.errors import StudyError
from raybd.ledger import Kind, Ledger
from raybd.store import Store
from tests.chaos.bucket import BUCKET
from tests.chaos.checks import without_times

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
TINY = Path(__file__).parent / "studies" / "tiny.yaml"


def start(study: Path, run_dir: Path | str, *extra: str, cwd: Path | None = None) -> subprocess.Popen[str]:
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
        time.sleep(0.15)  # to ask a bucket is work for its server
    process.send_signal(number)
    return process.communicate(timeout=60)[0]


PROC = Path("/proc").is_dir()


def processes_of(run_dir: str) -> list[str]:
    """Return the command lines of processes that work for a run directory."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")) if PROC else ():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if int(pid) != os.getpid() and run_dir.encode() in environment + line.encode():
            found.append(f"{pid} {line[:200]}")
    return found


@pytest.fixture(scope="module")
def finished(bucket: Mapping[str, str]) -> tuple[Store, str]:
    """The tiny study, run to its end on a bucket without a fault, and what it printed."""
    uri = f"s3://{BUCKET}/finished"
    return Store(uri), finish(start(TINY, uri))


def times(store: Store) -> dict[str, int]:
    """Return when each record of the ledger was written."""
    listed = store.fs.get_file_info(fs.FileSelector(store.path("ledger"), recursive=True))
    return {info.path: info.mtime_ns for info in listed if info.type == fs.FileType.File}


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
    asked = examples.read(store)
    assert asked
    assert [model.objective for model in asked.models if model.trial_id is None] == ["mmcl", "mmcl_ssl"]
    assert {(m.trial_id, m.epoch) for m in asked.models if m.trial_id} <= {(r["trial_id"], r["epoch"]) for r in epochs}
    assert "What the models say, before and after cleaning" in store.get("report.html").decode()
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
    printed = CliRunner().invoke(app, ["pareto", store.uri, "-f", "json"])
    assert printed.exit_code == 0, printed.output
    measured = json.loads(printed.stdout)
    assert measured["runs"][0]["run"] == store.uri
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
    before = times(store)
    # Ray is not started: no process of its own is needed.
    done = CliRunner().invoke(app, ["run", str(TINY), "--run-dir", store.uri])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "nothing left to do" in done.output
    assert times(store) == before


def test_another_study_in_the_same_run_directory_is_refused(finished: tuple[Store, str]) -> None:
    store, _ = finished
    done = CliRunner().invoke(app, ["run", str(TINY), "--run-dir", store.uri, "--set", "seed=8"])
    assert isinstance(done.exception, StudyError)
    assert done.exception.exit_code == 2
    assert "seed: 7 → 8" in str(done.exception)


@dataclass
class Resumed:
    """A run that was ended by SIGTERM in its search, and called again.

    Attributes:
        again: records of the ledger that were there at its end, and were written once more.
        read: what `raybd status` and `raybd pareto` printed of it as it ran.
        scratch: everything that Ray kept of its own as it ran.
        sessions: the folders in which Ray's logs are.
    """

    store: Store
    canary: Canary
    printed: list[str] = field(default_factory=list)
    read: dict[str, str] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    scratch: bytes = b""
    sessions: list[Path] = field(default_factory=list)


def content(folder: Path) -> Iterator[bytes]:
    """Yield the names and the bytes of all files below a folder, but those that are gone meanwhile."""
    for path in folder.rglob("*"):
        try:
            yield os.fsencode(path)
            yield path.read_bytes() if path.is_file() else b""
        except OSError:
            continue


@pytest.fixture(scope="module")
def resumed(finished: tuple[Store, str], tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """SIGTERM in the search, on poisoned models that are there, read meanwhile; then called again."""
    folder, uri = tmp_path_factory.mktemp("resumed"), f"s3://{BUCKET}/resumed"
    store, ledger = Store(uri), Ledger(Store(uri))
    made_by_search = ("ledger/trials/", "weights/", "tables/trials/", "tables/epochs/", "tables/fronts/", "report.html")
    names = [name for name in finished[0].names("") if not name.startswith(made_by_search)]
    for name, copied in zip(names, finished[0].get_each(names), strict=True):
        store.put(name, copied)
    # What Ray would go on from, if it were asked: it is neither asked nor trusted.
    found = Resumed(store, Canary(folder / "canary"))

    def another_trial_is_under_way() -> bool:
        entries = ledger.entries(Kind.TRIAL)
        if not found.read and len(tables.read(store, "fronts")):
            for command in ("status", "pareto"):
                result = CliRunner().invoke(app, [command, uri])
                assert result.exit_code == 0, result.output
                found.read[command] = result.output
            assert process.poll() is None
            found.scratch = b"".join(b"".join(content(path)) for path in Path(tempfile.gettempdir()).glob("raybd-*"))
            return False
        return bool(found.read) and any(1 in e.epochs and not e.ended for e in entries)

    process = start(TINY, uri)
    found.printed.append(signal_when(process, signal.SIGTERM, another_trial_is_under_way))
    assert process.returncode == 130
    plant(folder / "planted", found.canary)
    for path in (folder / "planted").rglob("*"):
        if path.is_file():
            store.put(path.relative_to(folder / "planted").as_posix(), path.read_bytes())
    before = {name: written for name, written in times(store).items() if name.endswith("ended.json")}
    assert len(before) > 2  # of both pretraining runs, and of a trial
    second = start(TINY, uri)
    found.printed.append(finish(second))
    after = times(store)
    found.again = {name for name, written in before.items() if after[name] != written}
    rays = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"
    found.sessions = [folder for driver in (process, second) for folder in rays.glob(f"session_*_{driver.pid}")]
    return found


def test_a_driver_that_is_ended_goes_on_and_ends_with_the_same_numbers(
    finished: tuple[Store, str], resumed: Resumed
) -> None:
    """The tables are those of the run without a fault."""
    store = resumed.store
    assert "Traceback" not in resumed.printed[0]
    assert f"raybd run {TINY} --run-dir {store.uri}" in resumed.printed[0]
    assert resumed.canary.fired == []
    assert not resumed.again, "done again"
    for table in tables.SCHEMAS:
        assert without_times(store, table).equals(without_times(finished[0], table)), table
    assert max(row["attempt"] for row in tables.read(store, "trials").to_pylist()) == 2
    # Ray's agents notice within a minute that what they served is gone.
    deadline = time.monotonic() + 90
    while left := processes_of(store.uri):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_a_run_on_a_bucket_is_read_while_it_goes_on(resumed: Resumed) -> None:
    assert " complete" in resumed.read["status"]
    assert "front of all epochs" in resumed.read["pareto"]


def test_credentials_are_nowhere_but_in_the_environment(
    finished: tuple[Store, str], resumed: Resumed, bucket: Mapping[str, str]
) -> None:
    """All bytes of the objects, of what was printed, and of what Ray wrote."""
    texts = [finished[1], *resumed.printed, *resumed.read.values()]
    places = {f"text {number}": text.encode() for number, text in enumerate(texts)}
    for store in (finished[0], resumed.store):
        names = store.names("")
        places |= {f"{store.uri}/{name}": held for name, held in zip(names, store.get_each(names), strict=True)}
    assert len(resumed.sessions) == 2
    for folder in resumed.sessions:
        places[str(folder)] = b"".join(content(folder))
        assert b"raylet" in places[str(folder)]
    places["scratch"] = resumed.scratch
    assert b"search-" in resumed.scratch
    for name, held in places.items():
        for secret in bucket.values():
            assert secret.encode() not in held, name


def test_duckdb_polars_and_pandas_read_the_same_numbers_from_the_bucket(finished: tuple[Store, str]) -> None:
    store, _ = finished
    ours = tables.read(store, "epochs")
    folder = store.path("tables/epochs")
    epochs = ds.dataset(folder, filesystem=store.fs)
    names = ", ".join(f'"{name}"' for name in ours.column_names)
    found = {
        "duckdb": duckdb.sql(f"SELECT {names} FROM epochs").to_arrow_table(),
        "polars": pl.scan_pyarrow_dataset(epochs).collect().to_arrow(),
    }
    rows = sorted(map(repr, ours.to_pylist()))
    assert len(rows) == 4 * 3 * 2
    for reader, table in found.items():
        assert sorted(map(repr, table.to_pylist())) == rows, reader
    frame = pd.read_parquet(folder, filesystem=store.fs)
    numbers = [name for name in ours.column_names if pd.api.types.is_numeric_dtype(frame[name])]
    assert {"epoch", "zeroshot_top1", "asr_top1", "n_clean", "hit_target", "loss"} <= set(numbers)
    pd.testing.assert_frame_equal(frame[numbers], ours.to_pandas()[numbers])
    best = duckdb.sql("""
        SELECT objective, max(zeroshot_top1 * (1 - asr_top1)), sum(hit_target) FROM epochs
        WHERE split = 'report' GROUP BY objective ORDER BY objective
    """).fetchall()
    rows = [row for row in ours.to_pylist() if row["split"] == "report"]
    assert best == [
        (
            objective,
            max(row["zeroshot_top1"] * (1 - row["asr_top1"]) for row in rows if row["objective"] == objective),
            sum(row["hit_target"] for row in rows if row["objective"] == objective),
        )
        for objective in ("mmcl", "mmcl_ssl")
    ]
