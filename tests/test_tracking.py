"""TensorBoard, MLflow, W&B: one interface that all pass, what a killed call left out, failures that cost nothing.

Those that are not installed are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from raybd import tracking
from raybd.errors import ClusterError, RaybdError
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.store import Store
from raybd.study import FREE_SETTINGS, Recording, Study, TrackerName, differences
from raybd.tracking import Measured, Series, Tracking, event_file
from raybd.tracking.marks import Marks
from raybd.tracking.tensorboard import TensorBoard

STUDY = Study.model_validate({"name": "made", "poison": {"num_poisoned": 1}})


@dataclass
class Told:
    """What a tracker has of a series.

    Attributes:
        steps: by step what was measured; each step is there once, or reading fails.
        failed: of a run that ended; None of one that goes on, and where a tracker does not say.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: bool | None = None


Found = dict[str, Told]


def read_tensorboard(folder: Path) -> Found:
    """Return what event files say, read by the messages of another implementation."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    found: Found = {}
    for path in sorted(folder.rglob("*tfevents*")):
        told = found.setdefault(str(path.parent.relative_to(folder)), Told())
        content, events = path.read_bytes(), []
        while content:
            length, crc = struct.unpack("<QI", content[:12])
            data, content = content[12 : 12 + length], content[16 + length :]
            assert crc == event_file.masked_crc(struct.pack("<Q", length))
            events.append(Event.FromString(data))
        assert events[0].file_version == "brain.Event:2"
        for event in events[1:]:
            for value in event.summary.value:
                if value.tag == "_hparams_/session_start_info":
                    hparams = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    pairs = hparams.session_start_info.hparams.items()
                    given = {k: v.string_value if v.HasField("string_value") else v.number_value for k, v in pairs}
                    told.settings |= given
                elif not value.tag.startswith("_hparams_/"):
                    step = told.steps.setdefault(event.step, {})
                    assert value.tag not in step
                    step[value.tag] = round(value.simple_value, 6)
    return found


def read_mlflow(folder: Path) -> Found:
    from mlflow import MlflowClient

    client, found = MlflowClient(), Found()
    (experiment,) = [each for each in client.search_experiments() if each.name == "made"]
    for run in client.search_runs([experiment.experiment_id]):
        failed = {"FINISHED": False, "FAILED": True, "RUNNING": None}[run.info.status]
        told = Told(dict(run.data.params), failed=failed)
        for name in run.data.metrics:
            for metric in client.get_metric_history(run.info.run_id, name):
                step = told.steps.setdefault(metric.step, {})
                assert name not in step
                step[name] = metric.value
        assert run.info.run_name not in found
        found[run.info.run_name] = told
    return found


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of W&B's offline file: after its header a log as doc/log_format.md of LevelDB tells it."""
    block, head, full, last = 32768, 7, 1, 4
    assert content.startswith(b":W&B")
    at, held = head, b""
    while at < len(content):
        if (left := block - at % block) < head:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        held += content[at + head : at + head + length]
        at += head + length
        if kind in (full, last):
            yield held
            held = b""
    assert not held


def read_wandb(folder: Path) -> Found:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # waits until all is written, as the end of a process does
    found: Found = {}
    for path in sorted(folder.rglob("*.wandb")):  # by time: a call after another has a file of its own
        told, name = Told(), ""
        for data in wandb_records(path.read_bytes()):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run" and record.run.display_name:
                name = f"{record.run.job_type}/{record.run.display_name}"
                told.settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                step = int(items["_step"])
                assert step not in told.steps
                told.steps[step] = {key: value for key, value in items.items() if not key.startswith("_")}
            elif kind == "exit":
                told.failed = bool(record.exit.exit_code)
        before = found.setdefault(name, Told())
        assert not before.steps.keys() & told.steps.keys()
        own = {key: value for key, value in told.settings.items() if key in ("lr", "method")}
        found[name] = Told(before.settings | own, before.steps | told.steps, told.failed)
    return found


READERS: dict[str, Callable[[Path], Found]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
}


@pytest.fixture(params=list(READERS))
def tracker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if name != "tensorboard" and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    if name == "wandb":
        importlib.import_module(name).teardown()  # it reads its environment once
    return name


def trial(**over: Any) -> Series:
    points = [Measured(epoch, 1e9 + epoch, {"loss": 0.5, "asr_top1/search": 1 - epoch / 4}) for epoch in range(3)]
    return Series("trials/mmcl-0001", "mmcl", {"lr": 0.25, "method": "cleanclip"}, points, over=True, **over)


@pytest.mark.filterwarnings("ignore")  # theirs
def test_every_tracker_takes_series_once_whoever_gives_them(tracker: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    own = tracker == "tensorboard"
    record = Recording(tensorboard=own, trackers=() if own else (TrackerName(tracker),))
    study = STUDY.model_copy(update={"record": record})
    area = [Measured(n, 1e9 + n, {"hypervolume": n / 4}) for n in (1, 2, 3)]
    for points in (area[:2], area):  # the second call has all there is, as one that goes on
        given = tracking.open_trackers(store, study)
        assert list(given) == [tracker]
        opened = given[tracker]()
        assert opened.last("trials/none") is None
        for series in (tracking.of_search("mmcl", points), trial()):
            last = opened.last(series.name)
            rest = [point for point in series.points if last is None or point.step > last]
            if rest:
                opened.add(Series(series.name, series.group, series.settings, rest, series.over))
            assert opened.last(series.name) == series.points[-1].step
        opened.close()
    found = READERS[tracker](tmp_path / "run/tensorboard" if own else tmp_path)
    assert set(found) == {"search/mmcl", "trials/mmcl-0001"}
    told = found["trials/mmcl-0001"]
    assert {name: str(value) for name, value in told.settings.items()} == {"lr": "0.25", "method": "cleanclip"}
    assert told.steps == {n: {"loss": 0.5, "asr_top1/search": 1 - n / 4} for n in range(3)}
    assert found["search/mmcl"].steps == {n: {"hypervolume": n / 4} for n in (1, 2, 3)}


@pytest.mark.filterwarnings("ignore")  # theirs
def test_calls_that_go_on_add_what_lacks_and_double_nothing(tracker: str, tmp_path: Path) -> None:
    """Of a run that was killed twice: a pretraining under way and two trials, then its end and a third trial."""
    store, own = Store(str(tmp_path / "run")), tracker == "tensorboard"
    record = Recording(tensorboard=own, trackers=() if own else (TrackerName(tracker),))
    study, ledger = STUDY.model_copy(update={"record": record}), Ledger(store)

    def call() -> None:
        given = Tracking(store, tracking.open_trackers(store, study))
        given.catch_up()
        given.close()

    def ended(name: str, epochs: int, state: State) -> None:
        ledger.start(Kind.TRIAL, name, started(name))
        for number in range(epochs):
            ledger.epoch(Kind.TRIAL, name, number, epoch(number))
        ledger.end(Kind.TRIAL, name, {"state": state})

    ledger.start(Kind.PRETRAIN, "p", started("p"))
    for number in range(2):
        ledger.epoch(Kind.PRETRAIN, "p", number, epoch(number) | {"poisoned_seen": 0})
    ended("t0", 3, State.COMPLETE)
    ended("t1", 2, State.FAILED)
    call()
    ledger.epoch(Kind.PRETRAIN, "p", 2, epoch(2) | {"poisoned_seen": 0})
    ledger.end(Kind.PRETRAIN, "p", {"state": State.COMPLETE})
    ended("t2", 2, State.COMPLETE)
    for _ in range(2):
        call()
    found = READERS[tracker](tmp_path / "run/tensorboard" if own else tmp_path)
    steps = {"pretrain/mmcl": 3, "trials/t0": 3, "trials/t1": 2, "trials/t2": 2}
    assert {name: len(told.steps) for name, told in found.items()} == steps
    assert found["pretrain/mmcl"].steps[2]["asr_top1"] == pytest.approx(0.84)
    assert found["trials/t1"].steps[1]["asr_top1/search"] == pytest.approx(0.89)
    assert found["trials/t0"].steps[0]["loss"] == 0.5
    if not own:
        assert {name: told.failed for name, told in found.items()} == {**dict.fromkeys(steps, False), "trials/t1": True}
    assert str(found["trials/t2"].settings["lr"]) == "0.1"


def half(clean: int, hit: int) -> dict[str, int]:
    return {"n_clean": 100, "correct_clean": clean, "n_triggered": 100, "hit_target": hit, "correct_triggered": 0}


def epoch(number: int) -> dict[str, Any]:
    names = (*tracking._TRAINING, "step", "samples_seen", "broken", "train_seconds", "evaluate_seconds")
    known = {"epoch": number, "counts": {"search": half(50, 90 - number), "report": half(40, 80)}}
    return {**dict.fromkeys(names), **known, "loss": float("nan") if number else 0.5, "train_seconds": 2.0}


def started(trial_id: str) -> dict[str, Any]:
    own = {"study": "made", "study_hash": "h", "trial_id": trial_id, "pretrain_id": "p", "objective": "mmcl"}
    return {**own, "method": "cleanclip", "params": {"lr": 0.1}, "started": "2026-01-01T00:00:00+00:00"}


def test_a_trial_becomes_a_series_of_both_halves_without_what_is_no_number() -> None:
    entry = Entry("t", started("t"), 1, {n: epoch(n) for n in range(2)}, {"state": State.FAILED})
    found = tracking.of_trial(entry)
    assert (found.name, found.over, found.failed) == ("trials/t", True, True)
    assert found.settings == {"lr": 0.1, "method": "cleanclip"}
    first, second = found.points
    assert first.values["loss"] == 0.5
    assert "loss" not in second.values
    assert second.values["asr_top1/search"] == 0.89
    assert second.values["zeroshot_top1/report"] == 0.4
    assert second.time - first.time == 2.0


def test_what_a_killed_call_left_out_is_given_by_the_next(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    ledger = Ledger(store)
    for name in ("mmcl-0000", "mmcl-0001", "mmcl-0002"):
        ledger.start(Kind.TRIAL, name, started(name))
        ledger.epoch(Kind.TRIAL, name, 0, epoch(0))
    for name in ("mmcl-0000", "mmcl-0001"):
        ledger.end(Kind.TRIAL, name, {"state": State.COMPLETE})
    TensorBoard(store).add(tracking.of_trial(ledger.entry(Kind.TRIAL, "mmcl-0000")))
    before = {name: store.get(name) for name in store.names("tensorboard")}
    assert len(before) == 1
    given = Tracking(store, tracking.open_trackers(store, STUDY))
    given.catch_up()
    given.close()
    names = store.names("tensorboard")
    assert [name.split("/")[2] for name in names] == ["mmcl-0000", "mmcl-0001"]
    assert all(store.get(name) == content for name, content in before.items())


def only_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let warnings reach caplog, once, whatever an earlier command did to the logger."""
    monkeypatch.setattr(logging.getLogger("raybd"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("raybd"), "propagate", True)


def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(TensorBoard):
        def add(self, series: Series) -> None:
            raise OSError("no answer")

    def closed() -> TensorBoard:
        raise RaybdError("no such server")

    only_caplog(monkeypatch)
    store = Store(str(tmp_path))
    given = Tracking(store, {"a": lambda: Broken(store), "b": closed, "c": lambda: TensorBoard(store)})
    for _ in range(3):
        given.add(trial())
    given.close()
    assert [record.getMessage() for record in caplog.records] == [
        "b gets no more in this call: no such server",
        "a gets no more in this call: OSError: no answer",
    ]
    assert len(store.names("tensorboard")) == 1


class Noted:
    """A tracker that keeps what it is given."""

    def __init__(self, store: Store) -> None:
        self.marks, self.given = Marks(store, "noted"), list[Series]()
        self.last, self.goes_on = self.marks.last, self.marks.goes_on

    def add(self, series: Series) -> None:
        self.given.append(series)
        self.marks.put(series)

    def close(self) -> None:
        pass


def caught_up(store: Store) -> list[tuple[str, list[int], bool]]:
    """Return what a call gives a tracker, beside another one whose notes are damaged."""
    noted, damaged = Noted(store), Noted(store)
    damaged.last = lambda name: 1 // 0
    given = Tracking(store, {"damaged": lambda: damaged, "noted": lambda: noted})
    given.catch_up()
    given.close()
    assert not damaged.given
    return [(series.name, [point.step for point in series.points], series.over) for series in noted.given]


def test_an_end_is_given_once_with_or_without_points(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    ledger = Ledger(store)
    ledger.start(Kind.PRETRAIN, "p", started("p"))
    for number in range(2):
        ledger.epoch(Kind.PRETRAIN, "p", number, epoch(number) | {"poisoned_seen": 0})
    assert caught_up(store) == [("pretrain/mmcl", [0, 1], False)]
    assert caught_up(store) == []
    ledger.end(Kind.PRETRAIN, "p", {"state": State.COMPLETE})
    ledger.start(Kind.TRIAL, "t", started("t"))
    ledger.end(Kind.TRIAL, "t", {"state": State.FAILED})
    assert caught_up(store) == [("pretrain/mmcl", [], True), ("trials/t", [], True)]
    assert caught_up(store) == []
    assert Marks(store, "noted").last("pretrain/mmcl") == 1


def test_a_run_directory_that_was_copied_or_made_anew_is_another(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    Marks(store, "mlflow").put(trial())
    first = Marks(store, "mlflow")
    assert (first.last("trials/mmcl-0001"), first.goes_on("trials/mmcl-0001")) == (2, False)
    assert first.key("a") == Marks(store, "wandb").key("a") != first.key("b")
    copied = Marks(Store(str(shutil.copytree(store.root, tmp_path / "copy"))), "mlflow")
    assert copied.last("trials/mmcl-0001") is None
    shutil.rmtree(store.root)
    anew = Marks(store, "mlflow")
    assert len({first.key("a"), copied.key("a"), anew.key("a")}) == 3


@pytest.mark.filterwarnings("ignore")  # theirs
def test_mlflow_runs_end_with_the_call_and_go_on_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    from raybd.tracking.mlflow import MLflow

    store, client = Store(str(tmp_path / "run")), mlflow.MlflowClient()
    for n in (1, 2):
        opened = MLflow(store, "made")
        opened.add(tracking.of_search("mmcl", [Measured(n, 1e9 + n, {"hypervolume": 0.5})]))
        (experiment,) = [each for each in client.search_experiments() if each.name == "made"]
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "RUNNING"
        opened.close()
        assert client.get_run(run.info.run_id).info.status == "FINISHED"
    opened.add(Series("search/mmcl", "mmcl", {}, [], over=True))
    assert opened.last("search/mmcl") == 2


def test_a_call_that_ends_waits_for_trackers_only_for_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_caplog(monkeypatch)
    store, answer = Store(str(tmp_path)), threading.Event()

    def slow() -> TensorBoard:
        answer.wait(60)
        return TensorBoard(store)

    given = Tracking(store, {"slow": slow})
    given.add(trial())
    given.__exit__(KeyboardInterrupt)
    assert not caplog.records
    given.close(seconds=0.01)
    (record,) = caplog.records
    assert record.getMessage() == "slow took too long: the next call gives them the rest"
    answer.set()
    given.close()
    assert len(store.names("tensorboard")) == 1


def test_a_tracker_that_is_not_there_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ClusterError, match="mlflow is not installed") as caught:
        tracking.require(Recording(trackers=(TrackerName.MLFLOW,)))
    assert "raybd[mlflow]" in caught.value.fix
    tracking.require(Recording())


def test_wandb_is_refused_before_any_work_where_it_would_ask_for_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    record = Recording(trackers=(TrackerName.WANDB,))
    wandb.teardown()  # it reads its environment once
    with pytest.raises(ClusterError, match="does not know you"):
        tracking.require(record)
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking.require(record)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()
    tracking.require(record)


def test_where_numbers_go_changes_no_study() -> None:
    other = Study.model_validate({**STUDY.resolved(), "record": {"tensorboard": False, "trackers": ["wandb"]}})
    assert other.hash() == STUDY.hash()
    before = STUDY.resolved()
    del before["record"]  # a run of an earlier raybd
    assert all(found.startswith(FREE_SETTINGS) for found in differences(before, STUDY.resolved()))


def test_event_files_need_neither_torch_nor_others() -> None:
    code = (
        "import sys, raybd.tracking.tensorboard\n"
        "print([name for name in ('torch', 'tensorboardX', 'mlflow', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
