"""Cleaning trials without Ray: what they record, what they keep, how they fail, and how they go on."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from raybd import checkpoint
from raybd.clean.trial import Assignment, _Keeper, point, run_trial, start_record
from raybd.data.shards import find_shards, samples
from raybd.errors import StorageError, StudyError, TrialError
from raybd.evaluate import evaluate, measure
from raybd.fronts import checkpoint_name
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.model import create, load_weights
from raybd.records import counts, epoch_rows, trial_row
from raybd.store import Store
from raybd.study import Data, Study
from raybd.tables import SCHEMAS
from raybd.train import loop
from raybd.train.context import LedgerContext
from raybd.train.inputs import inputs_for
from raybd.train.pretraining import done, pretrain, weights_name
from raybd.train.pretraining import start_record as pretrain_record

MODEL, PRETRAINED = "resnet-tiny-32", "mmcl-made"
CPU = torch.device("cpu")
CLASSES = ("cat", "heart", "fruit")
TIMES = ("train_seconds", "evaluate_seconds", "samples_per_second")

pytestmark = pytest.mark.usefixtures("one_thread")


def write_shard(path: Path, first: int, count: int) -> None:
    """Write embedded drawings as a shard of their own, in three classes."""
    (url,) = find_shards(Data(), "test/*.tar*", field_name="data.test")
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(itertools.islice(samples(url), first, first + count)):
            meta = json.dumps({"label": number % 3, "class_name": CLASSES[number % 3]}).encode()
            for suffix, content in (("png", sample.image), ("txt", sample.caption.encode()), ("json", meta)):
                info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of 60 pairs, 40 of them to clean on, and 45 test images."""
    root = tmp_path_factory.mktemp("data")
    write_shard(root / "train" / "train-000000.tar", 0, 60)
    write_shard(root / "test" / "test-000000.tar", 60, 45)
    names = [{"label": label, "class_name": name} for label, name in enumerate(CLASSES)]
    (root / "classes.json").write_text(json.dumps(names))
    return Study.model_validate(
        {
            "name": "small",
            "seed": 3,
            "data": {"root": str(root), "cache_dir": str(root / "cache")},
            "model": {"name": MODEL},
            "poison": {
                "trigger": {"size": 8, "pattern": "fixed", "placement": "bottom_right"},
                "target_class": "fruit",
                "num_poisoned": 12,
            },
            "pretrain": {"epochs": 1, "batch_size": 60, "lr": 1e-3, "warmup_steps": 0},
            "clean": {"num_samples": 40, "epochs": 2, "batch_size": 20, "warmup_steps": 1, "weight_decay": 0.2},
            "evaluation": {"templates": ["a picture of a {}."]},
            "search": {
                "num_trials": 2,
                "space": {
                    "lr": {"low": 1e-6, "high": 1e31, "log": True},
                    "loss_weights.mmcl": {"choices": [0.0, 1.0]},
                    "loss_weights.ssl": {"choices": [0.0, 1.0]},
                    "weight_decay": {"choices": [0.2, 30.0]},
                },
            },
        }
    )


@pytest.fixture(scope="module")
def pretrained(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run directory with a model that one step of poisoned pretraining made."""
    store = Store(str(tmp_path_factory.mktemp("pretrained")))
    Ledger(store).start(Kind.PRETRAIN, PRETRAINED, pretrain_record(study, "mmcl", PRETRAINED))
    assert done(store, PRETRAINED) is None
    pretrain(study, "mmcl", LedgerContext(store=store, kind=Kind.PRETRAIN, id=PRETRAINED))
    entry = done(store, PRETRAINED)
    assert entry is not None
    assert entry.epochs[1]["poisoned_seen"] == 12
    return store


@pytest.fixture
def store(pretrained: Store, tmp_path: Path) -> Store:
    shutil.copytree(pretrained.root, tmp_path / "run")
    return Store(str(tmp_path / "run"))


def task_of(number: int = 0, **params: Any) -> Assignment:
    """Return an assignment; `mmcl`, `ssl` stand for the loss weights."""
    dotted = {f"loss_weights.{name}" if name in ("mmcl", "ssl") else name: value for name, value in params.items()}
    return Assignment(f"mmcl-{number:04d}", number, "mmcl", PRETRAINED, dotted)


def without_times(entry: Entry) -> dict[int, dict[str, Any]]:
    return {
        epoch: {name: value for name, value in record.items() if name not in TIMES}
        for epoch, record in entry.epochs.items()
    }


def evaluated(study: Study, store: Store, weights: str) -> dict[str, dict[str, int]]:
    """Return the counts of a model that is in the run directory, evaluated anew."""
    clip = create(MODEL, seed=99)
    load_weights(clip, checkpoint.from_bytes(store.get(weights), where=weights), where=weights)
    found = evaluate(clip, inputs_for(study).evaluation_set, device=CPU)
    return {split: vars(counted) for split, counted in found.items()}


def test_a_trial_from_start_to_end(study: Study, store: Store) -> None:
    notified: list[tuple[int, float]] = []
    task = task_of(lr=5e-3, mmcl=1.0, ssl=1.0, weight_decay=30.0)
    entry = run_trial(study, store, task, device=CPU, notify=lambda epoch, r: notified.append((epoch, r["loss"])))
    assert entry == Ledger(store).entry(Kind.TRIAL, "mmcl-0000")
    assert entry.ended is not None
    assert entry.ended["state"] == State.COMPLETE
    assert entry.ended["weight_decay_in_force"] == 30.0
    assert entry.ended["device"] == "cpu"
    assert entry.ended["device_seconds"] > 0
    assert sorted(entry.epochs) == [0, 1, 2]
    assert [epoch for epoch, _ in notified] == [0, 1, 2]

    # Epoch 0 is the poisoned model, as its own pretraining evaluated it last.
    poisoned = done(store, PRETRAINED)
    assert poisoned is not None
    assert entry.epochs[0]["counts"] == poisoned.epochs[1]["counts"]
    assert entry.epochs[0]["counts"] == evaluated(study, store, weights_name(PRETRAINED))
    assert (entry.epochs[0]["loss"], entry.epochs[0]["step"], entry.epochs[0]["samples_seen"]) == (None, 0, 0)

    rows = epoch_rows(entry)
    assert [(row["epoch"], row["split"]) for row in rows] == list(itertools.product([0, 1, 2], ["search", "report"]))
    assert all(set(row) == set(SCHEMAS["epochs"].names) for row in rows)
    assert [row["step"] for row in rows[::2]] == [0, 2, 4]
    assert [row["samples_seen"] for row in rows[::2]] == [0, 40, 80]
    for epoch in (1, 2):
        record = entry.epochs[epoch]
        assert record["loss"] == pytest.approx(record["loss_mmcl"] + record["loss_ssl"], rel=1e-6)
        assert record["poisoned_seen"] == 0
        total = sum(found.n_clean for found in counts(record).values())
        assert total == 45

    row = trial_row(entry)
    assert set(row) == set(SCHEMAS["trials"].names)
    assert (row["state"], row["epochs_done"], row["attempt"], row["number"]) == ("complete", 2, 1, 0)
    assert (row["lr"], row["weight_decay"], row["weight_decay_in_force"]) == (5e-3, 30.0, 30.0)
    assert json.loads(row["params_json"]) == dict(task.params)
    # What was needed to go on is gone.
    assert store.names("state") == store.names("progress") == []


def test_the_poisoned_model_is_counted_once_for_all_trials_of_a_process(
    study: Study, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_trial(study, store, task_of(0, lr=1e-4), device=CPU)
    calls: list[object] = []

    def counting(*given: Any, **named: Any) -> Any:
        calls.append(given)
        return measure(*given, **named)

    monkeypatch.setattr(loop, "measure", counting)
    entry = run_trial(study, store, task_of(1, lr=1e-4), device=CPU)
    assert len(calls) == 2, "after each of two epochs"
    assert entry.epochs[0]["counts"] == evaluated(study, store, weights_name(PRETRAINED))
    assert not inputs_for(study).start_counts("another model")


def test_the_weights_that_are_kept_are_those_of_epochs_that_none_beat(study: Study, store: Store) -> None:
    entry = run_trial(study, store, task_of(lr=5e-3, mmcl=1.0, ssl=0.0), device=CPU)
    points = {epoch: point(record) for epoch, record in entry.epochs.items()}
    first_beaten = points[0][0] >= points[1][0] and points[0][1] <= points[1][1]
    expected = ([] if first_beaten else [1]) + [2]
    assert store.names("weights") == [checkpoint_name("mmcl-0000", epoch) for epoch in expected]
    for epoch in expected:
        name = checkpoint_name("mmcl-0000", epoch)
        assert evaluated(study, store, name) == entry.epochs[epoch]["counts"]
        assert checkpoint.metadata_of(store.get(name)) == {"epoch": epoch, "model": MODEL}


def _record(top1: int, asr: int) -> dict[str, Any]:
    half = {"n_clean": 10, "correct_clean": top1, "n_triggered": 10, "hit_target": asr, "correct_triggered": 0}
    return {"counts": {"search": half, "report": {**half, "correct_clean": 10, "hit_target": 0}}}


def test_beaten_epochs_are_not_kept() -> None:
    keeper = _Keeper({}, "t", 6)
    kept = [
        keeper(epoch, _record(*scores))
        for epoch, scores in enumerate([(8, 9), (7, 9), (7, 5), (7, 5), (8, 5), (9, 9), (1, 10)])
    ]
    # 0: the poisoned model, which is there already. 1 is beaten by it, 3 is no better than 2, 6 is the last.
    assert kept == [None, None, *(checkpoint_name("t", e) if e != 3 else None for e in (2, 3, 4, 5)), kept[6]]
    assert kept[6] == checkpoint_name("t", 6)
    # A second attempt knows of the epochs before, and an epoch done again does not beat itself.
    again = _Keeper({0: _record(8, 9), 1: _record(9, 3), 2: _record(7, 2)}, "t", 6)
    assert again(2, _record(7, 2)) == checkpoint_name("t", 2)
    assert again(3, _record(8, 4)) is None


@pytest.mark.parametrize(("weights", "null"), [((1.0, 0.0), "loss_ssl"), ((0.0, 1.0), "loss_mmcl")])
def test_a_loss_that_has_no_weight_has_no_column(
    weights: tuple[float, float], null: str, study: Study, store: Store
) -> None:
    entry = run_trial(study, store, task_of(lr=1e-3, mmcl=weights[0], ssl=weights[1]), device=CPU)
    assert entry.ended is not None
    assert entry.ended["state"] == State.COMPLETE
    other = {"loss_ssl": "loss_mmcl", "loss_mmcl": "loss_ssl"}[null]
    for row in epoch_rows(entry):
        assert row[null] is None
        if row["epoch"]:
            assert row[other] == row["loss"] > 0


def test_a_loss_that_is_not_finite_ends_the_trial_as_failed(study: Study, store: Store) -> None:
    entry = run_trial(study, store, task_of(number=4, lr=1e30, mmcl=1.0, ssl=0.0), device=CPU)
    assert entry.ended is not None
    assert entry.ended["state"] == State.FAILED
    assert entry.ended["error_type"] == "non_finite"
    assert entry.ended["error_message"].startswith("loss is nan at step 1 (epoch 1, lr 1e+30)")
    assert sorted(entry.epochs) == [0]
    # It would be so again: it is not tried again.
    assert [(failure["kind"], failure["epoch"]) for failure in entry.failures] == [("non_finite", 0)]
    found = store.get("errors/mmcl-0004.txt").decode()
    assert found.startswith("failure 1, ")
    assert "Traceback (most recent call last):" in found
    assert "_train_epoch" in found
    assert "loss is nan at step 1" in found
    assert store.names("weights") == store.names("state") == []
    row = trial_row(entry)
    assert (row["state"], row["error_type"], row["epochs_done"]) == ("failed", "non_finite", 0)
    assert row["weight_decay_in_force"] is None
    assert row["ended"] is not None


def test_an_error_is_tried_again_as_the_study_says_and_its_first_traceback_kept(study: Study, store: Store) -> None:
    missing = Assignment("mmcl-0001", 1, "mmcl", "mmcl-nowhere", {})
    with pytest.raises(TrialError, match="error: no such file in the run directory"):
        run_trial(study, store, missing, device=CPU)
    half = Ledger(store).entry(Kind.TRIAL, "mmcl-0001")
    assert (half.ended, half.attempts, len(half.failures)) == (None, 1, 1)
    store.put(weights_name("mmcl-nowhere"), checkpoint.to_bytes(create("vit-tiny-32", seed=0).net.state_dict()))
    entry = run_trial(study, store, missing, device=CPU)
    assert entry.ended is not None
    assert (entry.ended["state"], entry.ended["error_type"]) == (State.FAILED, "error")
    assert entry.ended["error_message"].startswith("weights of another model: ")
    assert (entry.attempts, [failure["epoch"] for failure in entry.failures]) == (2, [None, None])
    assert entry == Ledger(store).entry(Kind.TRIAL, "mmcl-0001")
    kept = store.get("errors/mmcl-0001.txt").decode()
    assert kept.index("pretrained/mmcl-nowhere.safetensors") < kept.index("weights of another model")
    assert kept.count("Traceback (most recent call last):") >= 2
    assert entry.epochs == {}
    assert trial_row(entry)["epochs_done"] is None
    assert trial_row(entry)["attempt"] == 2
    assert epoch_rows(entry) == []


def test_a_fault_of_the_storage_is_no_failure_of_the_trial(study: Study, store: Store) -> None:
    def fail(epoch: int, record: dict[str, Any]) -> None:
        raise StorageError("the disk is full")

    with pytest.raises(StorageError):
        run_trial(study, store, task_of(number=5, lr=5e-3, mmcl=1.0, ssl=0.0), device=CPU, notify=fail)
    entry = Ledger(store).entry(Kind.TRIAL, "mmcl-0005")
    assert (entry.ended, entry.failures) == (None, ())
    assert not store.exists("errors/mmcl-0005.txt")


class Killed(BaseException):
    """What the death of a process looks like from inside."""


def test_a_second_attempt_goes_on_to_the_same_numbers(study: Study, store: Store, tmp_path: Path) -> None:
    task = task_of(number=1, lr=5e-3, mmcl=1.0, ssl=1.0)
    shutil.copytree(store.root, tmp_path / "other")
    other = Store(str(tmp_path / "other"))
    whole = run_trial(study, other, task, device=CPU)

    def kill(epoch: int, record: dict[str, Any]) -> None:
        if epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        run_trial(study, store, task, device=CPU, notify=kill)
    half = Ledger(store).entry(Kind.TRIAL, "mmcl-0001")
    assert (half.ended, half.attempts, sorted(half.epochs)) == (None, 1, [0, 1])
    assert trial_row(half)["state"] == "running"
    assert store.names("state") == ["state/mmcl-0001.safetensors"]

    again: list[int] = []
    entry = run_trial(study, store, task, device=CPU, notify=lambda epoch, record: again.append(epoch))
    # What was recorded is not done again.
    assert again == [2]
    assert entry.attempts == 2
    assert entry.started == half.started
    assert without_times(entry) == without_times(whole)
    assert store.names("weights") == other.names("weights")
    for name in other.names("weights"):
        assert store.get(name) == other.get(name)


def test_the_seed_depends_on_objective_and_number(study: Study) -> None:
    seeds = {start_record(study, task_of(number=number))["seed"] for number in range(4)}
    assert len(seeds) == 4
    other = Assignment("ssl-0000", 0, "mmcl_ssl", PRETRAINED, {})
    assert start_record(study, other)["seed"] not in seeds
    assert start_record(study, task_of(number=2, lr=1e-5))["seed"] in seeds


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"mmcl": 0.0, "ssl": 0.0}, "all loss weights are 0: nothing would be learnt"),
        ({"batch_size": 1}, "batch_size: Input should be greater than or equal to 2"),
        ({"lr": -1.0}, "lr: Input should be greater than 0"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    params: dict[str, Any], reason: str, study: Study, store: Store
) -> None:
    with pytest.raises(StudyError, match="do not fit together") as caught:
        run_trial(study, store, task_of(number=7, **params), device=CPU)
    assert reason in str(caught.value)
    assert caught.value.where == "mmcl-0007"
    assert Ledger(store).entries(Kind.TRIAL) == []
