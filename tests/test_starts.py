"""What pretraining starts from: random weights, a file, open_clip's tag, or nothing more than that checkpoint."""

from __future__ import annotations

import io
import itertools
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from raybd import checkpoint
from raybd.assignment import Assignment
from raybd.clean.trial import run_trial
from raybd.data.shards import find_shards, samples
from raybd.errors import CheckpointError, StudyError
from raybd.ledger import Kind, Ledger, State
from raybd.model import Clip, create, freeze_unused, load_weights, tag_file
from raybd.records import pretrain_rows
from raybd.store import Store
from raybd.study import Data, Study
from raybd.study_file import parse
from raybd.train.context import LedgerContext
from raybd.train.inputs import Inputs
from raybd.train.pretraining import done, pretrain, start_record, weights_name

VIT = "vit-tiny-32"
CLASSES = ("cat", "heart", "fruit")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs and 12 test images, embedded drawings in three classes."""
    root = tmp_path_factory.mktemp("data")
    (url,) = find_shards(Data(), "test/*.tar*", field_name="data.test")
    found = itertools.islice(samples(url), 36)
    for part, count in (("train", 24), ("test", 12)):
        (root / part).mkdir()
        with tarfile.open(root / part / f"{part}-000000.tar", "w") as tar:
            for number, sample in enumerate(itertools.islice(found, count)):
                meta = json.dumps({"label": number % 3, "class_name": CLASSES[number % 3]}).encode()
                for suffix, content in (("png", sample.image), ("txt", sample.caption.encode()), ("json", meta)):
                    info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    names = [{"label": label, "class_name": name} for label, name in enumerate(CLASSES)]
    (root / "classes.json").write_text(json.dumps(names))
    return root


def study_of(root: Path, model: dict[str, Any], **pretraining: Any) -> Study:
    common = {"epochs": 1, "batch_size": 12, "lr": 1e-3, "warmup_steps": 0, "precision": "fp32"}
    return Study.model_validate(
        {
            "name": "starts",
            "data": {"root": str(root), "cache_dir": str(root / "cache")},
            "model": {"name": VIT, **model},
            "poison": {"trigger": {"size": 8, "pattern": "fixed"}, "target_class": "fruit", "num_poisoned": 4},
            "pretrain": {**common, "objectives": {"one": {}}, **pretraining},
            "clean": {"num_samples": 16, "epochs": 1, "batch_size": 8, "warmup_steps": 0},
            "evaluation": {"templates": ["a picture of a {}."]},
        }
    )


def pretrained(study: Study, folder: Path) -> tuple[Store, list[dict[str, Any]]]:
    """Pretrain; return the run directory and the rows of its epochs."""
    store = Store(str(folder))
    Ledger(store).start(Kind.PRETRAIN, "one-made", start_record(study, "one", "one-made"))
    pretrain(study, "one", LedgerContext(store=store, kind=Kind.PRETRAIN, id="one-made"))
    entry = done(store, "one-made")
    assert entry is not None
    return store, pretrain_rows(entry)


def weights_in(store: Store) -> dict[str, torch.Tensor]:
    return checkpoint.from_bytes(store.get(weights_name("one-made")), where="made")


@pytest.fixture
def suspect(tmp_path: Path) -> tuple[Path, Clip]:
    """A checkpoint as open_clip's training writes it: below `state_dict`, with the prefix of DDP."""
    clip = create(VIT, seed=77)
    weights = {f"module.{name}": value for name, value in clip.net.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "suspect.pt")
    return tmp_path / "suspect.pt", clip


def test_a_suspect_checkpoint_is_evaluated_and_cleaned_as_it_is(
    root: Path, suspect: tuple[Path, Clip], tmp_path: Path
) -> None:
    path, clip = suspect
    study = study_of(root, {"start": str(path)}, epochs=0)
    store, rows = pretrained(study, tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0]
    assert (rows[0]["n_clean"], rows[0]["poisoned_seen"], rows[0]["loss"]) == (12, 0, None)
    for name, value in clip.net.state_dict().items():
        assert torch.equal(weights_in(store)[name], value), name
    task = Assignment("one-0000", 0, "one", "one-made", {})
    entry = run_trial(study, store, task, device=torch.device("cpu"))
    assert entry.ended is not None
    assert entry.ended["state"] == State.COMPLETE
    assert sorted(entry.epochs) == [0, 1]
    both = (entry.epochs[0]["counts"]["search"], entry.epochs[0]["counts"]["report"])
    assert sum(half["correct_clean"] for half in both) == rows[0]["correct_clean"]


def test_no_epochs_need_a_model_that_was_trained(root: Path) -> None:
    with pytest.raises(ValueError, match=r"pretrain.epochs: 0 for one: a model that nobody trained"):
        study_of(root, {}, epochs=0)
    with pytest.raises(ValueError, match="all the same model"):
        study_of(root, {"start": "x.pt"}, epochs=0, objectives={"one": {}, "two": {}})
    mixed = study_of(root, {"start": "x.pt"}, objectives={"one": {"epochs": 0}, "two": {}})
    assert [mixed.pretrain.settings(name).epochs for name in ("one", "two")] == [0, 1]
    with pytest.raises(StudyError, match="give one of the two"):
        parse("{name: a, poison: {num_poisoned: 1}, model: {start: x, pretrained: y}}", source="x")


def known_to_open_clip(monkeypatch: pytest.MonkeyPatch, **cfg: Any) -> None:
    """Let open_clip know weights of the small model under the tag `made`."""
    cfg = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, **cfg}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, VIT, {"made": cfg})


def test_weights_that_open_clip_knows_are_trained_on(
    root: Path, suspect: tuple[Path, Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clip = suspect
    known_to_open_clip(monkeypatch, file=str(path))
    study = study_of(root, {"pretrained": "made"}, lr=1e-30)
    store, rows = pretrained(study, tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0, 1]
    for name, value in clip.net.state_dict().items():
        torch.testing.assert_close(weights_in(store)[name], value, rtol=0, atol=1e-20)
    ids = {Inputs(study_of(root, model)).pretrain_id("one", code="c") for model in ({"pretrained": "made"}, {})}
    assert len(ids) == 2
    # What the weights are counts, not what they are called.
    same = Inputs(study_of(root, {"start": str(path)})).pretrain_id("one", code="c")
    assert same in ids


def test_weights_that_are_not_to_be_had_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StudyError, match="open_clip has no weights of that tag") as unknown:
        Inputs(study_of(root, {"pretrained": "laion9"})).check()
    assert unknown.value.where == "model.pretrained"
    with pytest.raises(StudyError, match="another activation") as activation:
        tag_file("ViT-B-32", "laion400m_e32", where="model.pretrained")
    assert "ViT-B-32-quickgelu" in activation.value.fix
    known_to_open_clip(monkeypatch, url="http://127.0.0.1:9/made.pt", hf_hub="")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be downloaded") as offline:
        Inputs(study_of(root, {"pretrained": "made"})).check()
    assert "model.start" in offline.value.fix
    torch.save({"visual.w": torch.zeros(2)}, tmp_path / "other.pt")
    known_to_open_clip(monkeypatch, file=str(tmp_path / "other.pt"))
    with pytest.raises(CheckpointError, match="weights made of vit-tiny-32 cannot be read"):
        Inputs(study_of(root, {"pretrained": "made"})).check()


# The logit bias.


def test_the_sigmoid_loss_learns_a_bias_that_cleaning_finds_again(root: Path, tmp_path: Path) -> None:
    study = study_of(root, {}, loss_weights={"mmcl": 0, "siglip": 1}, epochs=2, weight_decay=5.0)
    store, rows = pretrained(study, tmp_path / "run")
    assert rows[0]["logit_scale"] == pytest.approx(10.0)
    assert rows[1]["loss_siglip"] == pytest.approx(rows[1]["loss"])
    assert rows[1]["loss_mmcl"] is None
    bias = float(weights_in(store)["logit_bias"])
    # Adam's steps are no longer than the learning rate; weight decay would have taken 1e-3 * 5 * 10 each time.
    assert 0 < abs(bias + 10) < 0.01
    entry = run_trial(study, store, Assignment("one-0000", 0, "one", "one-made", {}), device=torch.device("cpu"))
    assert entry.ended is not None
    assert entry.ended["state"] == State.COMPLETE
    assert entry.epochs[0]["counts"]["search"]["n_clean"] + entry.epochs[0]["counts"]["report"]["n_clean"] == 12
    (name,) = [name for name in store.names("weights") if "0001" in name or name.endswith("1.safetensors")]
    kept = checkpoint.from_bytes(store.get(name), where=name)
    assert float(kept["logit_bias"]) == bias, "no term of the cleaning uses it: it is left alone"


def test_what_no_term_uses_is_frozen() -> None:
    net = create(VIT, seed=0, sigmoid=True).net
    assert (float(net.logit_bias.detach()), float(net.logit_scale.detach())) == (-10.0, pytest.approx(math.log(10)))
    for image, text, bias in ((True, True, False), (True, False, False), (False, True, True)):
        for parameter in net.parameters():
            parameter.requires_grad = True
        freeze_unused(net, image=image, text=text, bias=bias)
        trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
        assert "logit_scale" in trained
        assert ("logit_bias" in trained) == bias
        assert any(name.startswith("visual.") for name in trained) == image
        assert ("token_embedding.weight" in trained) == text
    plain = create(VIT, seed=0).net
    freeze_unused(plain, image=True, text=True, bias=False)
    assert plain.logit_bias is None
    freeze_unused(plain, image=True, text=True, bias=True)
    assert plain.logit_bias.item() == -10.0


def test_a_bias_goes_with_the_weights() -> None:
    biased, plain = create(VIT, seed=1, sigmoid=True), create(VIT, seed=2)
    without = {name: value.clone() for name, value in plain.net.state_dict().items()}
    load_weights(plain, biased.net.state_dict(), where="w")
    assert plain.net.logit_bias.item() == -10.0
    load_weights(plain, {**without, "logit_scale": without["logit_scale"].reshape(1)}, where="w")
    assert plain.net.logit_bias.item() == -10.0
    assert plain.net.logit_scale.shape == ()


def test_a_model_with_a_bias_of_its_own_is_taken(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = open_clip.get_model_config(VIT) or (create(VIT, seed=0) and open_clip.get_model_config(VIT))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "own-bias-32", {**own, "init_logit_bias": -7})
    study = study_of(root, {"name": "own-bias-32"})
    store, rows = pretrained(study, tmp_path / "run")
    assert rows[1]["loss"] > 0
    assert float(weights_in(store)["logit_bias"]) == -7.0
