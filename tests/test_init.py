"""`raybd init`: what it writes is a study once the blanks are filled in, and replaces nothing unasked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from jsonschema import Draft7Validator
from typer.testing import CliRunner

from raybd import study_file, study_schema, study_template
from raybd.cli import app
from raybd.data import counts
from raybd.errors import StudyError
from raybd.study import Study
from raybd.study_template import Blank, Known
from raybd.train.inputs import Inputs

runner = CliRunner()


def schema_faults(path: Path) -> list[str]:
    """Return where the schema that the file itself names finds fault with it."""
    text = path.read_text(encoding="utf-8")
    found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert found
    named = Path(unquote(urlparse(found[1]).path))
    assert named == study_schema.path()
    validator = Draft7Validator(json.loads(named.read_text(encoding="utf-8")))
    raw = study_file.read_yaml(text, (), "study", {}, [])
    return [".".join(map(str, error.absolute_path)) for error in validator.iter_errors(raw)]


def test_what_is_left_to_fill_in_is_said_refused_by_line_and_marked_in_editors(tmp_path: Path) -> None:
    file = tmp_path / "my first study.yaml"
    done = runner.invoke(app, ["init", str(file)])
    assert done.exit_code == 0
    blanks = study_template.blanks(file.read_text(encoding="utf-8"))
    assert [blank.setting for blank in blanks] == ["data.root", "poison.target_class"]
    for blank in blanks:
        assert f"line {blank.line}: {blank.setting}: {blank.meaning}\n" in done.stdout
    assert f"raybd validate '{file}'" in done.stdout
    with pytest.raises(StudyError) as refused:
        study_file.load(str(file))
    said = refused.value.what.splitlines()
    assert len(said) == 3
    assert all(f"{file}:{b.line}: {b.setting}: " in line for b, line in zip(blanks, said[1:], strict=True))
    assert sorted(schema_faults(file)) == ["data.root", "poison.target_class"]

    text = file.read_text(encoding="utf-8")
    file.write_text(re.sub(r": # TO FILL IN: .*", ": mine", text), encoding="utf-8")
    study = study_file.load(str(file))
    assert (study.name, study.data.root, study.poison.target_class) == ("my_first_study", "mine", "mine")
    assert not schema_faults(file)


@pytest.mark.parametrize("start", [[], ["--start", "suspect model.pt"]])
def test_with_options_nothing_is_left(tmp_path: Path, start: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    options = ["--data", 's3://b/a: "b" #c', "--model", "ViT-B-32", "--target-class", "no", *start]
    done = runner.invoke(app, ["init", str(file), *options])
    assert (done.exit_code, "fill" in done.stdout) == (0, False)
    study = study_file.load(str(file))
    assert (study.data.root, study.model.name, study.poison.target_class) == ('s3://b/a: "b" #c', "ViT-B-32", "no")
    assert study.model.start == (start[1] if start else None)
    assert study.pretrain.epochs == (0 if start else 30)
    assert not schema_faults(file)
    # Each of the further settings, put in alone, makes a study too.
    text = file.read_text(encoding="utf-8")
    others = re.findall(r"^  #: .*$", text, flags=re.MULTILINE)
    assert len(others) >= 6
    for line in others:
        setting = line[5:].partition(":")[0]
        chosen = text.replace(line, line.replace("#: ", ""))
        if other := {"num_poisoned": "poison_rate", "pretrained": "start"}.get(setting):  # one of the two
            chosen = re.sub(rf"^  {other}: .*\n", "", chosen, flags=re.MULTILINE)
        assert isinstance(study_file.parse(chosen, source="chosen"), Study)


def shard_folder(root: Path, *, manifest: bool) -> Path:
    """Return a folder with the embedded test shard as its only one, to train on too."""
    embedded = study_file.embedded("emoji-32")
    assert embedded
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        (root / split / "a.tar.gz").symlink_to(embedded / "test/test-000000.tar.gz")
    (root / "classes.json").symlink_to(embedded / "classes.json")
    if manifest:
        told = {"splits": {"train": [{"samples": 700}, {"samples": 300}]}}
        (root / "manifest.json").write_text(json.dumps(told))
    return root


@pytest.mark.parametrize(("manifest", "pairs"), [(True, 1000), (False, 1054)])
def test_cleaning_pairs_are_as_many_as_the_data_has(tmp_path: Path, pairs: int, *, manifest: bool) -> None:
    """Of the manifest, or counted; then a study whose cleaning sets can be drawn."""
    root, file = shard_folder(tmp_path / "shards", manifest=manifest), tmp_path / "mine.yaml"
    options = ["--data", str(root), "--model", "resnet-tiny-32", "--target-class", "fruit"]
    assert runner.invoke(app, ["init", str(file), *options]).exit_code == 0
    text, study = file.read_text(encoding="utf-8"), study_file.load(str(file), overrides=["poison.trigger.size=8"])
    assert study.clean.num_samples == int(0.95 * pairs)
    assert f"95% of the {pairs} that the data has" in " ".join(text.replace("#", "").split())
    if not manifest:
        Inputs(study).check()


def test_where_the_data_is_not_here_init_says_so(tmp_path: Path) -> None:
    for data, why in ((str(tmp_path / "none"), "no such shard"), ("s3://bucket/shards", "a bucket is not read")):
        done = runner.invoke(app, ["init", str(tmp_path / "mine.yaml"), "--data", data, "--force"])
        assert done.exit_code == 0
        assert f"training pairs were not counted: {why}" in done.stdout
        text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
        assert "no more than it has\n  num_samples: 10000\n" in text


@pytest.mark.parametrize("told", ["{", "[]", '{"splits": {"train": [{"samples": -1}]}}', '{"splits": {"train": 1}}'])
def test_a_manifest_that_tells_nothing_is_none(tmp_path: Path, told: str) -> None:
    root = shard_folder(tmp_path / "shards", manifest=False)
    (root / "manifest.json").write_text(told)
    assert counts.training_pairs(str(root), most=20) == 20


def test_the_plan_of_what_it_writes(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    options = ["--data", "emoji-32", "--model", "resnet-tiny-32", "--target-class", "fruit"]
    assert runner.invoke(app, ["init", str(file), *options]).exit_code == 0
    shown = runner.invoke(app, ["run", str(file), "--dry-run", "--tflops", "1", "--format", "json"])
    assert (shown.exit_code, bool(json.loads(shown.stdout))) == (0, True)


@pytest.mark.parametrize(("model", "highest", "size"), [("resnet-tiny-32", 2e-2, 4), ("ViT-B-32", 1e-3, 16)])
def test_small_models_are_cleaned_with_larger_steps_and_small_images_have_small_triggers(
    model: str, highest: float, size: int
) -> None:
    text = study_template.write(Known(data="d", target_class="t", model=model), name="mine", schema=study_schema.path())
    study = study_file.parse(text, source="s")
    assert study.search.space["lr"].high == highest
    assert study.poison.trigger.model_dump()["size"] == size


def test_a_file_that_is_there_is_replaced_by_force_only(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("precious", encoding="utf-8")
    refused = runner.invoke(app, ["init", str(file)])
    assert isinstance(refused.exception, StudyError)
    assert file.read_text(encoding="utf-8") == "precious"
    assert runner.invoke(app, ["init", str(file), "--force"]).exit_code == 0
    assert "precious" not in file.read_text(encoding="utf-8")
    lost = runner.invoke(app, ["init", str(tmp_path / "none" / "mine.yaml")])
    assert isinstance(lost.exception, StudyError)
    assert "No such file" in str(lost.exception)


@pytest.mark.parametrize(("stem", "name"), [("a-b c", "a_b_c"), ("日本", "mine"), ("", "mine"), ("x" * 200, "x" * 100)])
def test_any_file_name_gives_a_name_of_a_study(stem: str, name: str) -> None:
    known = Known(data="d", target_class="t")
    assert study_file.parse(study_template.write(known, name=stem, schema=study_schema.path()), source="s").name == name


def test_comments_are_the_texts_of_the_settings() -> None:
    text = study_template.write(Known(), name="mine", schema=study_schema.path())
    meaning = Study.model_fields["data"].annotation.model_fields["root"].description
    assert study_template.blanks(text)[0] == Blank(9, "data.root", meaning)
    assert "lr: {low: 1.0e-06, high: 0.001, log: true}" in text
    assert max(map(len, text.splitlines())) <= 120
