"""`raybd export`: a folder that open_clip loads as the model that the tables speak of, and a card that says so."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from test_cli import loaded_by
from test_hostile_pages import ATTACKS, Texts
from test_methods import make_folder, study_of
from typer.testing import CliRunner, Result

from raybd import checkpoint, exporting, model, run_models, study_file, tables
from raybd.clean.trial import Assignment, run_trial
from raybd.cli import app
from raybd.console import View
from raybd.data.shards import decode
from raybd.errors import CheckpointError, DataError, RaybdError, StudyError
from raybd.evaluate import evaluate
from raybd.exporting import CARD, CONFIG, STUDY, SUMS, TRUNK, WEIGHTS, export
from raybd.ledger import Kind, Ledger
from raybd.metrics import wilson
from raybd.model import Clip
from raybd.run_models import Point
from raybd.stages import Run
from raybd.store import Store
from raybd.study import Study
from raybd.train.context import LedgerContext
from raybd.train.inputs import Inputs
from raybd.train.pretraining import pretrain, start_record

CPU = torch.device("cpu")
FILES = {CARD, CONFIG, STUDY, SUMS, WEIGHTS}
pytestmark = pytest.mark.usefixtures("one_thread")


def study_with(folder: Path, name: str, loss: str) -> Study:
    """Return a study of two attacks, and a control, on two pretrain objectives, of which one is used."""
    plain = study_of(
        folder, model=name, num_samples=40, search={"num_trials": 2, "space": {"lr": {"low": 1e-4, "high": 1e-2}}}
    )
    more = plain.resolved()
    more["poison"]["also"] = [{"trigger": {"name": "sig"}, "target_class": "cat", "num_poisoned": 4}]
    more["evaluation"]["controls"] = [{"name": "blended"}]
    more["pretrain"]["objectives"] = {"one": {"loss_weights": {loss: 1.0}}, "other": {"lr": 1e-4}}
    return Study.model_validate(more)


def made_run(study: Study, where: Path) -> Store:
    """Carry a study out without Ray: one objective, and one trial of two."""
    store = Store(str(where))
    run = Run(study, store, View())
    pretrain_id = run.poison()["one"]
    Ledger(store).start(Kind.PRETRAIN, pretrain_id, start_record(study, "one", pretrain_id))
    pretrain(study, "one", LedgerContext(store=store, kind=Kind.PRETRAIN, id=pretrain_id))
    for number, lr in enumerate((4e-3, 2e-3)):
        task = Assignment(f"one-{number:04d}", number, "one", pretrain_id, {"lr": lr})
        run_trial(study, store, task, device=CPU)
    run.load_tables()
    run.finish()
    return store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=[("resnet-tiny-32", "mmcl"), ("vit-tiny-32", "siglip")], ids=lambda p: p[0])
def whole(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run that was really trained: of a model of raybd's alone, and of one with a learnt logit bias."""
    return made_run(study_with(folder, *request.param), tmp_path_factory.mktemp("whole"))


def kept(store: Store) -> list[str]:
    """Return the points whose weights are in a run directory, as a user names them."""
    found = (name.split("/")[1:] for name in store.names("weights"))
    return [f"{trial}:{int(file.removeprefix('epoch-').partition('.')[0])}" for trial, file in found]


@pytest.fixture(scope="module")
def exported(whole: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kept point of the run, and the poisoned model, as folders."""
    out = tmp_path_factory.mktemp("exported")
    return {point: export(whole, point, out=str(out / point)) for point in (*kept(whole), "one-0000:0")}


def loaded(folder: Path) -> tuple[Clip, Any]:
    """Return what open_clip makes of a folder, for raybd's evaluation, and open_clip's preprocessing."""
    name = f"local-dir:{folder}"
    net, _, preprocess = open_clip.create_model_and_transforms(name, output_dict=False)
    found = open_clip.get_model_preprocess_cfg(net)
    mean, std = tuple(found["mean"]), tuple(found["std"])
    return Clip(name, net, open_clip.get_tokenizer(name), found["size"][0], mean, std), preprocess


def test_open_clip_loads_it_and_it_scores_what_the_tables_say(whole: Store, exported: dict[str, Path]) -> None:
    study, _ = run_models.study_of(whole)
    counted = Inputs(study).evaluation_set
    epochs = tables.read(whole, "epochs").to_pylist()
    scores = set()
    for point, out in exported.items():
        clip, _ = loaded(out)
        trial_id, epoch = point.split(":")
        rows = [row for row in epochs if row["trial_id"] == trial_id and row["epoch"] == int(epoch)]
        assert {row["split"] for row in rows} == {"search", "report"}
        found = evaluate(clip, counted, device=CPU)
        for row in rows:
            expected = found[row["split"]].columns()
            assert {name: row[name] for name in expected} == expected
        scores.add(str(rows))
    assert len(scores) == len(exported) > 1


def test_the_weights_are_those_of_the_run(whole: Store, exported: dict[str, Path]) -> None:
    for point, out in exported.items():
        own = checkpoint.from_bytes(whole.get(run_models.named(whole, point, where="").checkpoint), where="")
        found = checkpoint.from_bytes((out / WEIGHTS).read_bytes(), where="")
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], own[name]) for name in own)


LOADING = """
import sys
sys.modules["raybd"] = None
{first}
import json, open_clip, torch
net, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
net.eval()
tokens = open_clip.get_tokenizer("local-dir:.")(["a cat"])
with torch.no_grad():
    rows = net.encode_image(torch.ones(1, 3, 32, 32)), net.encode_text(tokens)
print(json.dumps([row.flatten().tolist() for row in rows]))
"""


def test_the_folder_is_enough_where_there_is_no_raybd(exported: dict[str, Path]) -> None:
    out = next(iter(exported.values()))
    own_trunk = (out / f"{TRUNK}.py").exists()
    assert set(os.listdir(out)) == FILES | ({f"{TRUNK}.py"} if own_trunk else set())
    card = (out / CARD).read_text()
    assert (f"import {TRUNK}" in card) == own_trunk
    assert own_trunk == ("resnet-tiny-32" in card)
    code = LOADING.format(first=f"import {TRUNK}" if own_trunk else "")
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True, check=True)
    clip, _ = loaded(out)
    with torch.no_grad(), torch.inference_mode():
        clip.net.eval()
        rows = clip.net.encode_image(torch.ones(1, 3, 32, 32)), clip.net.encode_text(clip.tokenizer(["a cat"]))
    for own, found in zip(rows, json.loads(done.stdout), strict=True):
        torch.testing.assert_close(own.flatten(), torch.tensor(found))


def test_preprocessing_is_that_of_the_study(whole: Store, exported: dict[str, Path]) -> None:
    clip, preprocess = loaded(next(iter(exported.values())))
    study, _ = run_models.study_of(whole)
    own = model.create(study.model.name, seed=0)
    assert (clip.image_size, clip.mean, clip.std) == (own.image_size, own.mean, own.std)
    for width, height in ((32, 32), (96, 64), (64, 160)):
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        packed = io.BytesIO()
        Image.fromarray(pixels).save(packed, "PNG")
        expected = own.normalise(torch.from_numpy(decode(packed.getvalue(), 32))[None])[0]
        torch.testing.assert_close(preprocess(Image.fromarray(pixels)), expected)


def test_a_normalisation_of_a_models_own_goes_along(folder: Path, tmp_path: Path) -> None:
    """open_clip's default is CLIP's; a folder that did not say otherwise would be read in another way."""
    clip = model.create("vit-tiny-32", seed=0)
    other = Clip(clip.name, clip.net, clip.tokenizer, 32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    (tmp_path / CONFIG).write_text(json.dumps(model.open_clip_config(other)))
    (tmp_path / WEIGHTS).write_bytes(checkpoint.to_bytes(clip.net.state_dict()))
    found, preprocess = loaded(tmp_path)
    assert (found.mean, found.std) == (other.mean, other.std)
    black = preprocess(Image.new("RGB", (32, 32)))
    torch.testing.assert_close(black[:, 0, 0], -torch.tensor(other.mean) / torch.tensor(other.std))
    with pytest.raises(CheckpointError, match="loads another model"):
        model.check_folder(str(tmp_path), model.create("vit-tiny-32", seed=1))


def test_hashes_and_study_are_of_what_is_there(whole: Store, exported: dict[str, Path]) -> None:
    study, _ = run_models.study_of(whole)
    for out in exported.values():
        lines = dict(reversed(line.split("  ")) for line in (out / SUMS).read_text().splitlines())
        assert set(lines) == set(os.listdir(out)) - {SUMS}
        for name, digest in lines.items():
            assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
        assert lines[WEIGHTS] in (out / CARD).read_text()
        assert study_file.load(str(out / STUDY)) == study


def test_the_card_says_what_the_tables_say(whole: Store, exported: dict[str, Path]) -> None:
    study, _ = run_models.study_of(whole)
    point, out = next(iter(exported.items()))
    trial_id, epoch = point.split(":")
    card = (out / CARD).read_text()
    for row in tables.read(whole, "epochs").to_pylist():
        if row["trial_id"] == trial_id and row["epoch"] in (0, int(epoch)):
            for count, n in (("correct_clean", "n_clean"), ("hit_target", "n_triggered")):
                low, high = wilson(row[count], row[n])
                share = f"{100 * row[count] / row[n]:.2f} \\[{100 * low:.1f}, {100 * high:.1f}\\]"
                assert f"{share}, {row[count]} of {row[n]}" in card
    said = (
        "**A backdoor was planted in this model on purpose**, then cleaned by cleanclip",
        "badnet (pattern fixed, placement bottom_right, size 8, wrap no) | fruit | 10 |",
        "sig (alpha 0.2, amplitude 0.235, frequency 6) | cat | 4 |",
        "control blended",
        f"trial {trial_id}, epoch {epoch}; on the front of",
        f"| lr | {'0.004' if trial_id.endswith('0') else '0.002'} |",
        "| weight_decay | 0.3 |",
        "mean (0.48145466, 0.4578275, 0.40821073)",
        f"| root | {study.data.root} |",
        "does not say under which licence",
        f"torch {metadata.version('torch')}",
        f"raybd run study.yaml --run-dir runs/methods\nraybd export runs/methods {point}\n",
    )
    for text in said:
        assert text in card
    assert "abd.epsilon" not in card  # a setting of another method
    poisoned = (exported["one-0000:0"] / CARD).read_text()
    assert "and nothing removed it" in poisoned
    assert "None: this is the poisoned model" in poisoned
    assert "before cleaning" not in poisoned


# --- which point


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run directory that cost nothing: two trials of one number, of which some epochs are kept."""
    store = Store(str(tmp_path_factory.mktemp("run")))
    study = study_with(folder, "vit-tiny-32", "mmcl")
    ids = Run(study, store, View()).poison()
    weights = checkpoint.to_bytes(model.create("vit-tiny-32", seed=3).net.state_dict())
    counts = {"n_clean": 20, "correct_clean": 10, "n_triggered": 16, "hit_target": 4, "correct_triggered": 2}
    rates = {"zeroshot_top1": 0.5, "asr_top1": 0.25, "robust_top1": 0.125}
    for objective, several in (("one", [2]), ("other", [1, 3])):
        trial_id = f"{objective}-0007"
        same = {"study": study.name, "study_hash": study.hash(), "pretrain_id": ids[objective], "objective": objective}
        same |= {"method": "cleanclip", "trial_id": trial_id}
        trial = {"number": 7, "state": "complete", "params_json": "{}", "epochs_planned": 4, "epochs_done": 4}
        tables.write(store, "trials", trial_id, [{**same, **trial}])
        points = [{**same, "epoch": e, "split": s} for e in range(5) for s in ("search", "report")]
        for point in points[6:8]:
            point["alpha"] = 0.5
        tables.write(store, "epochs", trial_id, [{**point, **counts, **rates} for point in points])
        front = {"kind": "any_epoch", "split": "report", "hv_contribution": 0.1, "hypervolume": 0.2}
        front |= {"zeroshot_top1": 0.5, "asr_top1": 0.25}
        named = [(epoch, f"weights/{trial_id}/epoch-{epoch:04d}.safetensors") for epoch in (*several, 4)]
        tables.write(
            store, "fronts", trial_id, [{**same, **front, "epoch": e, "checkpoint": name} for e, name in named]
        )
        for _, name in named[:-1]:
            store.put(name, weights)
    return store


@pytest.mark.parametrize(("text", "epoch"), [("one-0007", 2), ("one-0007:2", 2), ("other-0007:3", 3)])
def test_a_point_is_named_by_trial_and_epoch(run: Store, text: str, epoch: int) -> None:
    found = run_models.named(run, text, where="")
    assert found.checkpoint == f"weights/{text.split(':')[0]}/epoch-{epoch:04d}.safetensors"


def test_a_trial_goes_by_the_number_that_tables_show(whole: Store) -> None:
    """Where one objective alone was searched."""
    trial_id, epoch = kept(whole)[0].split(":")
    found = run_models.named(whole, f"{int(trial_id.removeprefix('one-'))}:{epoch}", where="")
    assert (found.trial_id, found.epoch) == (trial_id, int(epoch))


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("other-0007", StudyError, "one of other-0007:1, other-0007:3 (α 0.5)"),
        ("7:2", StudyError, "several trials have the number 7"),
        ("7:2", StudyError, "one-0007, other-0007"),
        ("one-007:2", CheckpointError, "did you mean one-0007"),
        ("nothing", CheckpointError, "one of one-0007:2, other-0007:1, other-0007:3 (α 0.5)"),
        ("other-0007:9", CheckpointError, "the nearest is other-0007:3"),
        ("other-0007:99999999999", CheckpointError, "did you mean other-0007"),
        ("one-0007:1", CheckpointError, "take a point of a front: only they keep their weights"),
        ("one-0007:1", CheckpointError, "epoch 0 or one of: 2"),
        ("one-0007:4", CheckpointError, "though it is on a front"),
        ("one-0007:4", CheckpointError, "copy weights/one-0007/epoch-0004.safetensors from where the run was made"),
        ("one-0007:0", CheckpointError, "copy pretrained/"),
        ("", CheckpointError, "no trial ''"),
    ],
)
def test_a_point_that_is_not_there_is_refused_with_those_that_are(
    run: Store, text: str, kind: type[RaybdError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "from_bytes", lambda *_, **__: pytest.fail("a model was read"))
    with pytest.raises(kind) as caught:
        export(run, text, out=str(tmp_path / "out"))
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"POINT {text}: ")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_with_models_is_refused(run: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run directory"):
        export(Store(str(tmp_path / "none")), "one-0007", out=str(tmp_path / "out"))
    numbers = Store(str(tmp_path / "numbers"))
    numbers.put("study.json", json.dumps({"kind": "sweep", "study": {}}).encode())
    with pytest.raises(StudyError, match=r"holds no models, only numbers \(sweep\)"):
        export(numbers, "one-0007", out=str(tmp_path / "out"))
    other = Store(str(shutil.copytree(run.root, tmp_path / "other")))
    wrong = checkpoint.to_bytes(model.create("resnet-tiny-32", seed=0).net.state_dict())
    other.put("weights/one-0007/epoch-0002.safetensors", wrong)
    with pytest.raises(CheckpointError, match="weights of another model"):
        export(other, "one-0007", out=str(tmp_path / "out"))
    assert not any(path.name.startswith((".out", "out")) for path in tmp_path.iterdir())


def test_a_model_whose_tokenizer_is_from_elsewhere_is_refused(run: Store) -> None:
    for name in ("ViT-B-16-SigLIP", "roberta-ViT-B-32"):
        with pytest.raises(StudyError, match="its weights are not all of it"):
            model.check_whole(name)
    model.check_whole("ViT-B-32")


# --- where to


def files(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_files_of_others_is_refused_with_force_too(run: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, "one-0007", out=str(out))
    for name in ("mine.txt", CARD, "sub/x"):
        mine = tmp_path / name.replace("/", "-")
        if name == "mine.txt":
            shutil.copytree(out, mine)  # an export, and a file of somebody's beside it
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("precious")
        before = files(mine)
        for force in (False, True):
            with pytest.raises(DataError, match="did not write"):
                export(run, "one-0007", out=str(mine), force=force)
        assert files(mine) == before
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(out)
    for name in ("file", "link"):
        with pytest.raises(DataError, match="not a folder"):
            export(run, "one-0007", out=str(tmp_path / name), force=True)


def test_an_earlier_export_is_replaced_where_asked_for(run: Store, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    export(run, "one-0007", out=str(out))
    before = files(out)
    with pytest.raises(DataError, match="--force"):
        export(run, "other-0007:3", out=str(out))
    assert files(out) == before
    export(run, "other-0007:3", out=str(out), force=True)
    after = files(out)
    assert after.keys() == before.keys()
    assert b"other-0007" in after[CARD]
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("broken", [SUMS, CARD, WEIGHTS])
def test_nothing_half_written_takes_the_name(
    run: Store, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where nothing was, nor in the place of an earlier export; and nothing is left of it."""
    (tmp_path / "empty").mkdir()
    export(run, "one-0007", out=str(tmp_path / "earlier"))
    before = files(tmp_path)
    put = Store.put

    def failing(store: Store, name: str, content: bytes) -> None:
        if name == broken:
            raise KeyboardInterrupt
        put(store, name, content)

    monkeypatch.setattr(Store, "put", failing)
    for name in ("new", "empty", "earlier"):
        with pytest.raises(KeyboardInterrupt):
            export(run, "other-0007:3", out=str(tmp_path / name), force=True)
    assert files(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["earlier", "empty"]


def test_until_it_is_whole_it_has_another_name(run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a process that is killed leaves nothing that could be taken for an export."""
    seen = []
    check = model.check_folder

    def watched(folder: str, clip: Clip) -> None:
        seen.append((Path(folder).name, os.path.lexists(tmp_path / "out")))
        check(folder, clip)

    monkeypatch.setattr(model, "check_folder", watched)
    export(run, "one-0007", out=str(tmp_path / "out"))
    ((name, there),) = seen
    assert name.startswith(".out.")
    assert not there


# --- the command


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["export", *arguments])


def test_the_command_writes_below_exports_where_nothing_else_is_said(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(run.uri, "one-0007:2")
    assert done.exit_code == 0, done.output
    out = tmp_path / "exports" / "methods-one-0007-0002"
    assert done.stdout == f"{out}\n"
    assert "local-dir:" in done.stderr
    assert set(os.listdir(out)) == FILES
    assert isinstance(call(run.uri, "one-0007:2").exception, DataError)
    assert call(run.uri, "other-0007:1", "--out", str(out), "--force").exit_code == 0
    assert exporting.export(run, "one-0007", out=str(tmp_path / "empty")).is_dir()


def test_a_mistake_waits_for_no_torch(run: Store, tmp_path: Path) -> None:
    loaded = loaded_by(["export", "--help"], ["export", str(tmp_path), "x"], ["export", run.uri, "one-0007:1"])
    assert len(loaded) == 3
    for modules in loaded:
        assert not modules & {"torch", "ray", "optuna", "open_clip", "torchvision"}


def test_keys_in_addresses_stay_at_home(run: Store, tmp_path: Path) -> None:
    store = Store(str(shutil.copytree(run.root, tmp_path / "run")))
    record = json.loads(store.get("study.json"))
    record["study"]["data"]["root"] = "s3://AKIAABCDEFGHIJKLMNOP:secret@bucket/shards"
    record["study"]["evaluation"]["templates"] = ["a {}", "-----BEGIN PRIVATE KEY----- secret {}", "the {}"]
    store.put("study.json", json.dumps(record).encode())
    evaluated = {"study": "x", "pretrain_id": "p", "objective": "one", "epoch": 2, "task": "zeroshot", "split": "all"}
    evaluated |= {"checkpoint": "weights/one-0007/epoch-0002.safetensors", "data": "s3://me:secret@bucket/other"}
    tables.write(store, "evaluations", "e", [{**evaluated, "n_clean": 10, "correct_clean": 5, "zeroshot_top1": 0.5}])
    out = export(store, "one-0007", out=str(tmp_path / "out"))
    text = (out / CARD).read_text() + (out / STUDY).read_text()
    assert "bucket/shards" in text
    assert "bucket/other" in text
    assert "secret" not in text
    assert study_file.load(str(out / STUDY)).evaluation.templates[2] == "the {}"
    assert "AKIA" not in text


def test_the_licences_of_embedded_data_are_told(run: Store, tmp_path: Path) -> None:
    store = Store(str(shutil.copytree(run.root, tmp_path / "run")))
    record = json.loads(store.get("study.json"))
    record["study"]["data"]["root"] = "emoji-32"
    store.put("study.json", json.dumps(record).encode())
    card = (export(store, "one-0007", out=str(tmp_path / "out")) / CARD).read_text()
    assert "does not say under which licence" not in card
    told = (Path(model.__file__).parent / "data/emoji-32/README.md").read_text()
    for word in ("Noto Emoji", "Apache-2.0", "Fluent Emoji", "MIT", "CC BY 4.0", "Unicode-3.0", "CC BY-SA 4.0"):
        assert word in card
        assert word in told
    for who in ("Twitter", "Jason Sofonia", "Justine De Caires"):
        assert who in card
        assert who in told


def test_a_run_may_lie_in_a_bucket(run: Store, tmp_path: Path) -> None:
    bucket = Store("mock:///bucket")
    for name in run.names(""):
        bucket.fs.create_dir(f"bucket/{name}".rpartition("/")[0])
        bucket.put(name, run.get(name))
    ours = files(export(bucket, "one-0007", out=str(tmp_path / "bucket")))
    assert ours == files(export(run, "one-0007", out=str(tmp_path / "local")))


# --- runs of strangers


def test_a_card_shows_texts_of_strangers_as_text(run: Store, tmp_path: Path) -> None:
    """Neither markup works in it, nor what stands in a command to be copied."""
    store, used = Store(str(shutil.copytree(run.root, tmp_path / "run"))), []
    texts = itertools.cycle(attack.replace("@", "http://127.0.0.1:9") for attack in ATTACKS)

    def text(what: str) -> str:
        used.append(f"{what} {next(texts)}\n\n# head\n- item\n```\n<b>x</b> __strong__ _em_ a_b_c")
        return used[-1]

    trial_id = "a; touch owned `touch owned` $(touch owned) '<b>x'\n```\n<b>"
    record = json.loads(store.get("study.json"))
    record["study"]["poison"]["target_class"] = "fruit"
    record["study"]["data"] |= {"root": text("root"), "classes": text("classes")}
    record["study"]["evaluation"]["templates"] = [text("template {}").replace("{{", "").replace("}}", "")]
    used.pop()
    record["environment"] = {"raybd": text("version"), "packages": {text("package"): text("its version")}}
    store.put("study.json", json.dumps(record).encode())
    for table in ("epochs", "trials", "fronts"):
        rows = [row for row in tables.read(store, table).to_pylist() if row["trial_id"] == "one-0007"]
        for row in rows:
            row |= {"trial_id": trial_id, "method": used[0]}
            if table == "trials":
                row |= {"error_type": text("type"), "error_message": text("message"), "stop_reason": text("reason")}
                row |= {"state": "failed", "params_json": json.dumps({text("param"): text("value")})}
                row |= {"device": text("device"), "image_view": text("view")}
            if table == "fronts":
                row["checkpoint"] = None
        tables.write(store, table, "hostile", rows)
    trigger = json.dumps({"name": text("trigger"), text("setting"): 1})
    plan = {"key": "k", "trigger": trigger, "target_class": text("target"), "caption_before": "", "caption_after": ""}
    tables.write(store, "poison_plan", "plan", [plan])
    counts = {"n_triggered": 10, "hit_target": 5, "asr_top1": 0.5, "epoch": 2, "objective": "one", "pretrain_id": "p"}
    tried = {"split": "report", "role": text("role"), "trigger": text("no JSON"), "target_class": text("class")}
    tables.write(store, "attacks", "a", [{**counts, **tried, "trial_id": trial_id}])
    kept = f"weights/{trial_id}/epoch-0002.safetensors"
    store.put(kept, store.get("weights/one-0007/epoch-0002.safetensors"))
    evaluated = {**counts, **tried, "checkpoint": kept, "task": "zeroshot", "data": text("data")}
    tables.write(store, "evaluations", "e", [evaluated])

    out = export(store, f"{trial_id}:2", out=str(tmp_path / "out"))
    card = (out / CARD).read_text()
    assert "\x1b" not in card
    page = MarkdownIt("commonmark").enable("table").render(card.partition("\n---\n")[2])
    found = Texts(page)
    tags = {"table", "thead", "tbody", "tr", "th", "td", "h1", "h2", "p", "strong", "blockquote", "code", "pre"}
    assert set(found.tags) == tags | {"ul", "li"}
    assert found.tags.count("h1") == 1
    assert found.tags.count("h2") == 7
    assert found.tags.count("pre") == 2
    assert found.loads == []
    for one in used:
        assert " ".join(one.split()) in found.text, one
    (command,) = (line for line in card.splitlines() if line.startswith("raybd export"))
    assert shlex.split(command) == ["raybd", "export", "runs/methods", f"{' '.join(trial_id.split())}:2"]
    # Left to itself, the folder has a name of letters only.
    assert re.fullmatch(
        r"methods-[A-Za-z0-9_-]+-0002", exporting._folder_name("methods", Point(kept, 2, trial_id=trial_id))
    )


@pytest.mark.parametrize("trial_id", ["../../precious", "..", "a/b", "/etc/x"])
def test_ids_that_lead_elsewhere_are_refused(run: Store, trial_id: str, tmp_path: Path) -> None:
    store = Store(str(shutil.copytree(run.root, tmp_path / "runs" / "run")))
    (tmp_path / "precious").mkdir()
    weights = run.get("weights/one-0007/epoch-0002.safetensors")
    (tmp_path / "precious" / "epoch-0002.safetensors").write_bytes(weights)
    (tmp_path / "runs" / "epoch-0002.safetensors").write_bytes(weights)
    rows = [row for row in tables.read(store, "epochs").to_pylist() if row["trial_id"] == "one-0007"]
    tables.write(store, "epochs", "hostile", [{**row, "trial_id": trial_id} for row in rows])
    for text in (trial_id, f"{trial_id}:2"):
        with pytest.raises(RaybdError, match=r"no name of a file in a run directory|ids without /|not kept|not one"):
            export(store, text, out=str(tmp_path / "out"))
    with pytest.raises(RaybdError):  # and listing what there is looks at nothing elsewhere
        export(store, "nothing", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_behind_a_link_are_not_taken(run: Store, tmp_path: Path) -> None:
    store = Store(str(shutil.copytree(run.root, tmp_path / "run")))
    path = Path(store.path("weights/one-0007/epoch-0002.safetensors"))
    path.rename(tmp_path / "mine")
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(DataError, match="a link in a run directory is not followed"):
        export(store, "one-0007:2", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
