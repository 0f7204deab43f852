"""`raybd evaluate`: which models, on what images, against which attack, and what is kept of it."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from raybd import checkpoint, evaluations, examples, model, predictions, run_models, study_file, tables
from raybd.cli import app
from raybd.console import View
from raybd.errors import CheckpointError, DataError, RaybdError, StudyError
from raybd.evaluate import evaluate
from raybd.evaluations import Request, Task, evaluate_run
from raybd.fronts import checkpoint_name
from raybd.metrics import wilson
from raybd.model import Clip, create, load_weights
from raybd.seeding import share
from raybd.stages import Run
from raybd.store import Store
from raybd.study import Study
from raybd.train.inputs import Inputs

TINY = Path(__file__).parent / "studies" / "tiny.yaml"
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
runner = CliRunner()


def shard(path: Path, *, count: int, captions: bool = False, labelled: bool = True) -> Path:
    """Write images of noise in ten classes, with captions where asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            picture = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(picture, "PNG")
            about: dict[str, Any] = {"label": number % 10} if labelled or number % 2 else {}
            if captions:
                about["captions"] = [f"number {number}", f"an image of {number % 7}"]
            files = {
                "png": picture.getvalue(),
                "txt": f"{number} of {count}".encode(),
                "json": json.dumps(about).encode(),
            }
            for suffix, content in files.items():
                header = tarfile.TarInfo(f"{number:05d}.{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return path


def small(root: Path) -> Study:
    """Return a study on 120 images of noise, as quick to evaluate as can be."""
    for split in ("train", "test"):
        if not (root / split).is_dir():
            shard(root / split / "a.tar", count=120)
    data = [f"data.root={root}", "data.classes=cifar10", "poison.target_class=dog", "clean.num_samples=20"]
    return study_file.anchored(study_file.load(str(TINY), overrides=data))


def spread(seed: int) -> Clip:
    """Return a random model whose BatchNorm has seen noise: its predictions spread over the classes."""
    made = create("resnet-tiny-32", seed=seed)
    made.net.train()
    for part in made.net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 1.0
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.net.encode_image(made.normalise(torch.randint(0, 256, (64, 3, 32, 32), generator=draw)))
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run directory with two poisoned models and a trial whose second epoch is on the front, none of them trained."""
    store = Store(str(tmp_path_factory.mktemp("run")))
    ids = Run(small(root), store, View()).poison()
    for seed, pretrain_id in enumerate(ids.values()):
        store.put(f"pretrained/{pretrain_id}.safetensors", checkpoint.to_bytes(spread(seed).net.state_dict()))
    cleaned = checkpoint_name("mmcl-0", 2)
    store.put(cleaned, checkpoint.to_bytes(spread(7).net.state_dict()))
    same = {"study": "tiny", "pretrain_id": ids["mmcl"], "objective": "mmcl", "method": "cleanclip"}
    same |= {"study_hash": "h", "zeroshot_top1": 0.5, "asr_top1": 0.5}
    epochs = [
        {**same, "trial_id": "mmcl-0", "epoch": epoch, "split": split}
        for epoch in range(3)
        for split in ("search", "report")
    ]
    tables.write(store, "epochs", "mmcl-0", epochs)
    on_front = [
        {
            **same,
            "method": method,
            "trial_id": "mmcl-0",
            "epoch": epoch,
            "kind": kind,
            "split": split,
            "checkpoint": name,
            "hv_contribution": 0.1,
            "hypervolume": 0.2,
        }
        for method in ("cleanclip", "all")
        for epoch, name in ((0, f"pretrained/{ids['mmcl']}.safetensors"), (1, "weights/gone"), (2, cleaned))
        for kind in ("any_epoch", "final")
        for split in ("search", "report")
    ]
    tables.write(store, "fronts", "mmcl", on_front)
    return store


def ids_of(store: Store) -> dict[str, str]:
    found: dict[str, str] = json.loads(store.get("study.json"))["pretrain_ids"]
    return found


def test_poisoned_models_and_front_points_are_evaluated_on_the_report_half(run: Store, root: Path) -> None:
    rows = evaluate_run(run, Request())
    ids = ids_of(run)
    assert [(row["pretrain_id"], row["trial_id"], row["epoch"]) for row in rows] == [
        (ids["mmcl"], None, 0),
        (ids["mmcl_ssl"], None, 0),
        (ids["mmcl"], "mmcl-0", 2),
    ]
    inputs = Inputs(small(root))
    for row in rows:
        clip = create("resnet-tiny-32", seed=0)
        load_weights(clip, checkpoint.from_bytes(run.get(row["checkpoint"]), where=""), where="")
        expected = evaluate(clip, inputs.evaluation_set, device=CPU)["report"].columns()
        assert {name: row[name] for name in expected} == expected
        assert row["split"] == "report"
        assert row["role"] == "planted"
        assert row["target_class"] == "dog"
    assert len({row["correct_clean"] for row in rows}) > 1
    assert rows[2]["method"] == "cleanclip"


def test_rows_are_kept_and_replaced_where_the_same_is_evaluated_again(run: Store, tmp_path: Path) -> None:
    shard(tmp_path / "test/a.tar", count=40)
    request = Request(data=str(tmp_path), classes="cifar10", target_class="dog", templates="simple")
    before = tables.read(run, "evaluations").num_rows
    rows = evaluate_run(run, request)
    kept = tables.read(run, "evaluations")
    assert kept.num_rows == before + 3
    assert [row for row in kept.to_pylist() if row["data"] == str(tmp_path)] == sorted(
        rows, key=lambda row: row["trial_id"] or row["pretrain_id"]
    )
    assert all(set(row) == set(tables.SCHEMAS["evaluations"].names) for row in rows)
    evaluate_run(run, request)
    assert tables.read(run, "evaluations").num_rows == before + 3
    evaluate_run(run, Request(data=str(tmp_path), classes="cifar10", target_class="cat", templates="simple"))
    assert tables.read(run, "evaluations").num_rows == before + 6


def test_other_data_count_as_a_whole_with_another_target_and_classes(run: Store, tmp_path: Path) -> None:
    shard(tmp_path / "test/a.tar", count=60, labelled=False)
    request = Request(data=str(tmp_path), classes="cifar10", target_class="frog", templates="cifar")
    row = evaluate_run(run, request)[0]
    assert row["split"] == "all"
    assert row["n_clean"] == 30  # every other image has no label
    assert row["n_triggered"] == 30  # and none of the odd labels is that of the frog
    assert (row["classes"], row["templates"], row["target_class"]) == ("cifar10", "cifar", "frog")
    again = evaluate_run(run, Request(data=str(tmp_path), classes="cifar10", target_class="truck", templates="cifar"))
    assert again[0]["n_triggered"] == 24
    assert again[0]["correct_clean"] == row["correct_clean"]


def test_images_of_the_search_half_are_known_under_another_root(run: Store, root: Path, tmp_path: Path) -> None:
    own = Inputs(small(root)).evaluation_set.images.index
    shutil.copytree(root, tmp_path / "elsewhere")
    rows = evaluate_run(run, Request(data=str(tmp_path / "elsewhere"), classes="cifar10"))
    searched = sum(share(7, "split", str(key)) < 0.5 for key in own.keys)
    assert rows[0]["split"] == "report"
    assert rows[0]["n_clean"] == len(own) - searched


def test_one_point_may_be_chosen(run: Store) -> None:
    for text in ("mmcl-0:2", "mmcl-0"):  # the one epoch that is kept
        (row,) = evaluate_run(run, Request(), chosen=[text])
        assert row["checkpoint"] == checkpoint_name("mmcl-0", 2)
    (row,) = evaluate_run(run, Request(), chosen=["mmcl-0:0", "mmcl-0:0"])
    assert row["checkpoint"] == f"pretrained/{ids_of(run)['mmcl']}.safetensors"


@pytest.mark.parametrize(
    ("request_", "chosen", "said"),
    [
        (Request(), ["mmcl"], "did you mean mmcl-0"),
        (Request(), ["mmcl-9:2"], "did you mean mmcl-0"),
        (Request(), ["mmcl-0:1"], "epoch 0 or one of: 2"),
        (Request(target_class="dogs"), [], "no class 'dogs'"),
        (Request(templates="imagenet"), [], "openai_imagenet, simple, cifar, caltech101"),
        (Request(classes="cifar11"), [], "imagenet, cifar10, cifar100, caltech101"),
        (Request(test="none/*.tar"), [], "no such shard"),
        (Request(task=Task.RETRIEVAL, classes="cifar10"), [], "retrieval has captions"),
    ],
)
def test_what_cannot_be_is_refused_before_any_model_is_read(
    run: Store, request_: Request, chosen: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "from_bytes", lambda *_, **__: pytest.fail("a model was read"))
    with pytest.raises(RaybdError) as caught:
        evaluate_run(run, request_, chosen=chosen)
    assert said in str(caught.value)
    assert isinstance(caught.value, StudyError | DataError | CheckpointError)


def test_a_run_without_a_model_is_refused(root: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    Run(small(root), store, View()).poison()
    with pytest.raises(CheckpointError, match="no model yet"):
        evaluate_run(store, Request())


def test_retrieval_of_several_captions(run: Store, tmp_path: Path) -> None:
    shard(tmp_path / "test/a.tar", count=50, captions=True, labelled=False)
    rows = evaluate_run(run, Request(task=Task.RETRIEVAL, data=str(tmp_path)))
    for row in rows:
        assert (row["n_images"], row["n_texts"], row["n_triggered"], row["split"]) == (50, 100, 50, "all")
        for measure, n in (("image_to_text", 50), ("text_to_image", 100), ("retrieval_asr", 50)):
            hits = [row[f"{measure}_hits_at_{k}"] for k in tables.RECALL_AT]
            assert hits == sorted(hits)
            assert [row[f"{measure}_at_{k}"] for k in tables.RECALL_AT] == [count / n for count in hits]
        assert row["zeroshot_top1"] is None
    assert any(row["text_to_image_hits_at_10"] for row in rows)


def invoke(*arguments: str) -> str:
    done = runner.invoke(app, ["evaluate", *arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_the_command_prints_tables_json_and_csv(run: Store, tmp_path: Path) -> None:
    (found,) = json.loads(invoke(run.uri, "--point", "mmcl-0:2", "-f", "json"))
    low, high = wilson(found["correct_clean"], found["n_clean"])
    assert found["intervals"]["zeroshot_top1"] == [low, high]
    shown = invoke(run.uri, "--point", "mmcl-0:2")
    assert "badnet → dog" in shown
    assert f"{found['hit_target']} of {found['n_triggered']}" in shown
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in shown
    shard(tmp_path / "test/a.tar", count=50, captions=True)
    (row,) = csv.DictReader(
        io.StringIO(invoke(run.uri, "--retrieval", "--data", str(tmp_path), "--point", "mmcl-0:2", "-f", "csv"))
    )
    assert list(row) == tables.SCHEMAS["evaluations"].names
    shown = invoke(run.uri, "--retrieval", "--data", str(tmp_path), "--point", "mmcl-0:2")
    assert f"{100 * float(row['image_to_text_at_10']):.2f} [" in shown
    assert "poison, clean" in shown


def test_a_file_of_weights_is_evaluated_with_the_trigger_of_a_study(run: Store, root: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps(small(root).model_dump(mode="json", exclude_unset=True)))
    path = Path(run.path(checkpoint_name("mmcl-0", 2)))
    (alone,) = json.loads(invoke(str(path), "--study", str(study), "-f", "json"))
    (of_run,) = json.loads(invoke(run.uri, "--point", "mmcl-0:2", "-f", "json"))
    same = ("zeroshot_top1", "asr_top1", "robust_top1", "n_clean", "trigger", "study_hash", "intervals")
    assert {name: alone[name] for name in same} == {name: of_run[name] for name in same}
    other = tmp_path / "vit.safetensors"
    other.write_bytes(checkpoint.to_bytes(model.create("vit-tiny-32", seed=0).net.state_dict()))
    (found,) = json.loads(invoke(str(other), "--study", str(study), "--model", "vit-tiny-32", "-f", "json"))
    assert found["checkpoint"] == str(other)
    refused = runner.invoke(app, ["evaluate", str(other), "--study", str(study)])
    assert isinstance(refused.exception, CheckpointError)


@pytest.mark.parametrize("more", [[], ["--study", "demo", "--point", "mmcl-0:2"]])
def test_a_file_needs_a_study_and_has_no_points(run: Store, more: list[str]) -> None:
    refused = runner.invoke(app, ["evaluate", run.path(checkpoint_name("mmcl-0", 2)), *more])
    assert isinstance(refused.exception, StudyError)
    assert "needs --study" in str(refused.exception)


def test_parts_are_named_by_point_task_and_data(run: Store) -> None:
    found, record = run_models.study_of(run)
    several = [
        evaluations.Evaluator(found, Request(templates=templates, target_class=target))
        for templates, target in itertools.product((None, "simple"), (None, "cat"))
    ]
    points = run_models.points(run, record)
    names = {evaluator.part(point) for evaluator in several for point in points}
    assert len(names) == len(several) * len(points)
    assert all("/" not in name for name in names)


def test_examples_are_what_the_models_say_of_images_of_the_report_half(run: Store, root: Path) -> None:
    inputs = Inputs(small(root))
    baseline = {"baseline_top1": 0.5, "baseline_asr": 1.0}
    rows = [{**row, **baseline} for row in tables.read(run, "fronts").to_pylist() if row["epoch"] != 1]
    ids = ids_of(run)
    points = predictions.shown_points(run, ids, rows)
    assert [(point.pretrain_id, point.trial_id, point.epoch) for point in points] == [
        (ids["mmcl"], None, 0),
        (ids["mmcl"], "mmcl-0", 2),
        (ids["mmcl_ssl"], None, 0),
    ]
    predictions.update(run, inputs, points, device=CPU)
    found = examples.read(run)
    assert found
    assert len({image.label for image in found.images} - {"dog"}) == len(found.images) == 4
    keys = [image.key for image in found.images]
    assert all(share(inputs.study.seed, "split", key) >= 0.5 for key in keys)
    rows_of = [inputs.evaluation_set.images.index.keys.tolist().index(key) for key in keys]
    pixels = inputs.evaluation_set.images.pixels(np.array(rows_of))
    for image, expected_CHW in zip(found.images, pixels, strict=True):
        clean, change, after = (
            np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).transpose(2, 0, 1)
            for text in (image.clean, image.change, image.triggered)
        )
        assert (clean == expected_CHW).all()
        assert 0 < (after != clean).any(axis=0).mean() < 0.5
        assert (change == np.where((after != clean).any(axis=0), after, 235)).all()
    # By open_clip alone: the cleaned model's likeliest classes of the clean images.
    clip = spread(7)
    clip.net.eval()
    with torch.inference_mode():
        texts = clip.net.encode_text(clip.tokenize(list(inputs.evaluation_set.prompts)), normalize=True)
        classes = torch.nn.functional.normalize(texts.view(10, -1, texts.shape[-1]).mean(dim=1), dim=-1)
        looks = clip.net.encode_image(clip.normalise(torch.from_numpy(pixels)), normalize=True)
        shares, labels = (clip.net.logit_scale.exp() * looks @ classes.T).softmax(dim=-1).topk(5)
    said = found.models[1].clean
    assert [[guess.name for guess in one] for one in said] == [[inputs.classes[i] for i in row] for row in labels]
    assert [[guess.share for guess in one] for one in said] == [pytest.approx(row) for row in shares.tolist()]
    assert found.models[1].triggered != said
    before = run.get(examples.NAME)
    assert predictions.are_there(run, points)
    assert not predictions.are_there(run, points[:1])
    for content in (b"{", b"[]", before.replace(b'"share":', b'"share":1'), before.replace(b"iVBOR", b"iVBOS")):
        run.put(examples.NAME, content)
        with pytest.raises(DataError, match=r"examples\.json"):
            examples.read(run)
        assert not predictions.are_there(run, points)
    run.delete(examples.NAME)
    assert examples.read(run) is None
    assert not predictions.are_there(run, points)


def test_examples_of_attacks_that_share_no_image_take_turns(root: Path) -> None:
    found = Inputs(small(root)).evaluation_set
    labels = found.images.index.labels
    halves = [replace(found.probes[0], triggered_N=chosen_N) for chosen_N in (labels < 5, labels >= 5)]
    for planted in (halves, halves[:1]):
        chosen = predictions._chosen(found, planted)
        assert [probe for probe, _ in chosen] == (planted * 4)[:4]
        assert all(probe.triggered_N[row] and not found.in_search_N[row] for probe, row in chosen)
        assert len({int(labels[row]) for _, row in chosen}) == 4
    one_N = np.arange(len(labels)) == np.flatnonzero(~found.in_search_N)[0]
    assert len(predictions._chosen(found, [replace(halves[0], triggered_N=one_N)])) == 1


def test_a_run_ends_with_its_report_where_models_can_not_be_asked(
    run: Store, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(shutil.copytree(run.root, tmp_path / "run")))
    store.put(examples.NAME, b"{")
    known = {"baseline_top1": 0.5, "baseline_asr": 1.0}
    (part,) = store.names("tables/fronts")
    tables.write(
        store, "fronts", Path(part).stem, [{**row, **known} for row in tables.read(store, "fronts").to_pylist()]
    )
    for name in store.names("pretrained"):
        store.put(name, b"damaged")
    outcome = Run(small(root), store, View()).finish()
    assert Path(outcome.report).is_file()
    said = capsys.readouterr().out
    assert said.count("looking at what the models say") == said.count("warning: what the models say") == 1
