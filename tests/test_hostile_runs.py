"""A run directory from elsewhere, full of pickles and false names: every command takes it for data."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import Canary, plant
from test_evaluations import TINY, shard, small, spread
from typer.testing import CliRunner, Result

from raybd import checkpoint, tables
from raybd.assignment import Assignment, settle
from raybd.cli import app
from raybd.console import View
from raybd.errors import CheckpointError, DataError, RaybdError
from raybd.ledger import Kind, Ledger
from raybd.metrics import Counts
from raybd.stages import Run
from raybd.store import Store
from raybd.study import Study
from raybd.train.pretraining import start_record

pytestmark = pytest.mark.usefixtures("one_thread")
runner = CliRunner()


def overrides(root: Path) -> list[str]:
    """Return the command line's form of what `small` changes in the tiny study."""
    return [f"data.root={root}", "data.classes=cifar10", "poison.target_class=dog", "clean.num_samples=20"]


def ledger_of(study: Study, store: Store, ids: dict[str, str]) -> None:
    """Write a ledger in which all is done: models pretrained, trials failed."""
    ledger = Ledger(store)
    counted = asdict(Counts(n_clean=10, correct_clean=5, n_triggered=10, hit_target=9, correct_triggered=0))
    record = dict.fromkeys(("lr", "loss", "samples_per_second"), None)
    record |= dict.fromkeys(("epoch", "step", "samples_seen", "broken", "poisoned_seen"), 0)
    record |= {**dict.fromkeys(("logit_scale", "train_seconds", "evaluate_seconds"), 1.0)}
    for objective, pretrain_id in ids.items():
        ledger.start(Kind.PRETRAIN, pretrain_id, start_record(study, objective, pretrain_id))
        counts = {"search": counted, "report": counted}
        ledger.epoch(Kind.PRETRAIN, pretrain_id, 0, {**record, "counts": counts})
        ledger.end(Kind.PRETRAIN, pretrain_id, {"state": "complete", "ended": "2025-01-01T00:00:00+00:00"})
        for number in range(study.search.num_trials):
            params = {"lr": 1e-3, "loss_weights.ssl": 1.0}
            settle(store, study, Assignment(f"{objective}-{number:04d}", number, objective, pretrain_id, params))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("root")
    for split in ("train", "test"):
        shard(found / split / "a.tar", count=120)
    return found


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run directory with two poisoned models, whose trials have all ended."""
    store, study = Store(str(tmp_path_factory.mktemp("made"))), small(root)
    ids = Run(study, store, View()).poison()
    for seed, pretrain_id in enumerate(ids.values()):
        store.put(f"pretrained/{pretrain_id}.safetensors", checkpoint.to_bytes(spread(seed).net.state_dict()))
    ledger_of(study, store, ids)
    return store


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "canary")


@pytest.fixture
def store(made: Store, tmp_path: Path) -> Store:
    """A copy to spoil, beside something precious."""
    (tmp_path / "precious.safetensors").write_bytes(b"precious")
    (tmp_path / "precious.parquet").write_bytes(b"precious")
    return Store(str(shutil.copytree(made.root, tmp_path / "run")))


def outside(store: Store) -> dict[str, bytes]:
    """Return all files beside the run directory."""
    beside = Path(store.root).parent
    return {
        str(path): path.read_bytes()
        for path in sorted(beside.rglob("*"))
        if path.is_file() and not path.is_relative_to(store.root)
    }


def call(*arguments: str) -> Result:
    return runner.invoke(app, list(arguments))


def commands(store: Store, root: Path) -> list[list[str]]:
    """Return every command that is given a run directory, the one that goes on with it too."""
    settings = [part for setting in overrides(root) for part in ("--set", setting)]
    readers = [["report"], ["pareto"], ["status"], ["evaluate"]]
    again = ["run", str(TINY), "--run-dir", store.root, *settings]
    export = ["export", store.root, "mmcl-0000:0", "--out", f"{store.root}/exported"]
    logs = ["logs", store.root, "mmcl-0000"]
    return [*([name, store.root] for (name,) in readers), again, ["report", store.root], export, logs]


def test_no_command_loads_a_pickle_of_a_run_directory(
    store: Store, root: Path, canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from within it, and with what Ray registers for Parquet loaded."""
    import ray.data  # noqa: F401

    plant(Path(store.root), canary)
    canary.proves((Path(store.root) / "ray/tuner.pkl").read_bytes())
    np.load(Path(store.root) / "cache.npy", allow_pickle=True)
    canary.wipe()
    monkeypatch.chdir(store.root)
    before = outside(store)
    for command in commands(store, root):
        result = call(*command)
        assert result.exception is None or isinstance(result.exception, RaybdError | SystemExit), (command, result)
        assert result.exit_code in (0, 1, 4), (command, result.output)
        assert not canary.fired, command
        assert command[0] != "run" or "nothing left to do" in result.output
    # All of them but `pareto`, `export` and `logs`, for which there is no finished trial, did what they are for.
    assert len(tables.read(store, "evaluations")) == 2
    assert outside(store) == before


def test_state_that_is_a_pickle_is_refused(store: Store, canary: Canary) -> None:
    """What a run under way left, under the very name that it is looked for."""
    with pytest.raises(CheckpointError):
        checkpoint.from_bytes(canary.pickled("mark"), where="state")
    pretrained = next(name for name in store.names("pretrained"))
    store.put(pretrained, canary.pickled("mark"))
    result = call("evaluate", store.root)
    assert isinstance(result.exception, CheckpointError)
    assert not canary.fired


def test_export_loads_no_pickle_either(
    store: Store, canary: Canary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a point that is there, from within the run directory; nothing but its own files comes along."""
    front(store)
    (pretrain_id, *_) = json.loads(store.get("study.json"))["pretrain_ids"].values()
    whose = {"study": "tiny", "pretrain_id": pretrain_id, "objective": "mmcl", "method": "cleanclip", "epoch": 0}
    rows = [
        {**whose, "trial_id": "mmcl-0000", "split": split, "zeroshot_top1": 0.5, "asr_top1": 0.5}
        for split in ("search", "report")
    ]
    tables.write(store, "epochs", "mmcl-0000", rows)
    plant(Path(store.root), canary)
    monkeypatch.chdir(store.root)
    before = outside(store)
    out = tmp_path / "out"
    result = call("export", store.root, "mmcl-0000:0", "--out", str(out))
    assert result.exit_code == 0, (result.output, result.exception)
    own = {"open_clip_model.safetensors", "open_clip_config.json", "raybd_resnet_tiny.py"}
    assert {path.name for path in out.iterdir()} == own | {"study.yaml", "README.md", "SHA256SUMS"}
    assert not canary.fired
    shutil.rmtree(out)
    assert outside(store) == before
    store.put(f"pretrained/{pretrain_id}.safetensors", canary.pickled("mark"))
    assert isinstance(call("export", store.root, "mmcl-0000:0", "--out", str(out)).exception, CheckpointError)
    assert not canary.fired
    assert outside(store) == before


def front(store: Store, **values: Any) -> None:
    """Write a front of one point."""
    same = {"study": "tiny", "pretrain_id": "x", "objective": "mmcl", "method": "cleanclip", "kind": "any_epoch"}
    same |= {"split": "report", "epoch": 1, "trial_id": "mmcl-0000", "zeroshot_top1": 0.5, "asr_top1": 0.5}
    same |= {"hv_contribution": 0.25, "hypervolume": 0.25}
    tables.write(store, "fronts", "mmcl", [{**same, **values}])


@pytest.mark.parametrize(
    "values",
    [
        {"checkpoint": "../precious.safetensors"},
        {"checkpoint": "/etc/passwd"},
        {"trial_id": "../../precious", "checkpoint": "pretrained/{id}.safetensors"},
        {"trial_id": "a/b", "checkpoint": "pretrained/{id}.safetensors"},
    ],
)
def test_a_front_whose_points_lie_elsewhere_is_refused(store: Store, values: dict[str, str]) -> None:
    """Before a model is evaluated, and before results are written under such a name."""
    (pretrain_id, *_) = json.loads(store.get("study.json"))["pretrain_ids"].values()
    front(store, **{name: value.replace("{id}", pretrain_id) for name, value in values.items()})
    before = outside(store)
    result = call("evaluate", store.root)
    assert isinstance(result.exception, RaybdError)
    assert "no name of a file in a run directory" in str(result.exception) or "ids without /" in str(result.exception)
    assert "evaluated" not in result.output
    assert outside(store) == before
    assert len(tables.read(store, "evaluations")) == 0


def test_a_record_whose_models_lie_elsewhere_is_refused(store: Store) -> None:
    record = json.loads(store.get("study.json"))
    for pretrain_id in ("../../precious", "../precious", "/etc/passwd"):
        record["pretrain_ids"] = {"mmcl": pretrain_id}
        store.put("study.json", json.dumps(record).encode())
        result = call("evaluate", store.root)
        assert isinstance(result.exception, RaybdError), result.output


def test_a_record_does_not_say_where_images_are_cached(store: Store, tmp_path: Path) -> None:
    """Of one's own study a setting, of a stranger's a way to write anywhere."""
    record = json.loads(store.get("study.json"))
    record["study"]["data"]["cache_dir"] = str(tmp_path / "elsewhere")
    store.put("study.json", json.dumps(record).encode())
    assert call("evaluate", store.root).exit_code == 0
    assert not (tmp_path / "elsewhere").exists()


def test_a_ledger_that_names_places_elsewhere_is_not_gone_on_with(store: Store, root: Path) -> None:
    ended = json.loads(store.get("ledger/trials/mmcl-0000/ended.json"))
    ended["started"] |= {
        "trial_id": "../../../precious",
        "objective": "../../../precious",
        "pretrain_id": "../precious",
    }
    store.put("ledger/trials/mmcl-0000/ended.json", json.dumps(ended).encode())
    before = outside(store)
    for command in (["status", store.root], commands(store, root)[4]):
        result = call(*command)
        assert isinstance(result.exception, DataError), result.output
        assert "records of '../../../precious' under 'mmcl-0000'" in str(result.exception)
    assert outside(store) == before


def test_weights_behind_a_link_are_not_removed(store: Store, root: Path) -> None:
    """Those of ended trials that are on no front are removed at the end of every call."""
    behind = Path(store.root).parent / "mine"
    behind.mkdir()
    (behind / "epoch-0001.safetensors").write_bytes(b"precious")
    own = Path(store.root) / "weights" / "mmcl-0001"
    own.mkdir(parents=True)
    (own / "epoch-0001.safetensors").write_bytes(b"of a trial on no front")
    assert call(*commands(store, root)[4]).exit_code == 4
    assert not (own / "epoch-0001.safetensors").exists()
    own.rmdir()
    own.symlink_to(behind)
    result = call(*commands(store, root)[4])
    assert isinstance(result.exception, DataError)
    assert "a link in a run directory is not followed" in str(result.exception)
    assert (behind / "epoch-0001.safetensors").read_bytes() == b"precious"
