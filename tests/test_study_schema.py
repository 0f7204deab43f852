"""The JSON Schema of study files: made from the settings, true of every study, and strict enough for an editor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from typer.testing import CliRunner

from raybd import study_file, study_schema
from raybd.cli import app
from raybd.study import CleanSettings, PretrainObjective, Study, searchable

TINY = Path(__file__).parent / "studies" / "tiny.yaml"
STUDIES = {**study_file.shipped(), "tiny": TINY}
SCHEMA = study_schema.make()


def faults(raw: Any) -> list[str]:
    """Return the places, and messages, of what the schema finds wrong, those within alternatives too."""

    def places(errors: Any) -> list[str]:
        found = []
        for error in errors:
            found += [f"{'.'.join(map(str, error.absolute_path))}: {error.message}", *places(error.context)]
        return found

    return places(Draft7Validator(SCHEMA).iter_errors(raw))


def as_data(text: str) -> Any:
    problems: list[tuple[str, str]] = []
    found = study_file.read_yaml(text, (), "study", {}, problems)
    assert not problems
    return found


def test_the_file_is_what_the_code_makes() -> None:
    Draft7Validator.check_schema(SCHEMA)
    text = study_schema.text()
    hint = "raybd schema > raybd/study.schema.json"
    assert study_schema.path().read_text(encoding="utf-8") == text, hint
    assert CliRunner().invoke(app, ["schema"]).stdout == text


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_that_comes_along_is_valid(name: str) -> None:
    assert not faults(as_data(STUDIES[name].read_text(encoding="utf-8")))
    resolved = study_file.load(str(STUDIES[name])).resolved()
    for found in resolved["search"]["space"].values():  # nulls are how a range says what it has not
        for key in [key for key, value in found.items() if value is None]:
            del found[key]
    assert not faults(resolved)


def test_the_readmes_studies_are_valid() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        assert not faults({"extends": "demo", **as_data(block)})


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("dat.root=x", ": Additional properties"),
        ("data.rot=x", "data: Additional properties"),
        ("data.root=3", "data.root: 3 is not of type"),
        ("clean.epochs=2.5", "clean.epochs: 2.5 is not of type"),
        ("clean.epochs=0", "clean.epochs: 0 is less than"),
        ("clean.lr=fast", "clean.lr: 'fast' is not of type"),
        ("clean.method=clip", "clean.method: 'clip' is not one of"),
        ("clean.par.treshold=2", "clean.par: Additional properties"),
        ("poison.trigger={name: badnets}", "poison.trigger: {'name': 'badnets'} is not valid"),
        ("poison.trigger={size: 0}", "poison.trigger.size: 0 is less than"),
        ("poison.trigger={alpha: 0.5}", "poison.trigger: {'alpha': 0.5} is not valid"),
        ("pretrain.objectives.mmcl.loss_weights.mcl=1", "loss_weights: Additional properties"),
        ("search.space={lrr: {choices: [1]}}", "search.space: Additional properties"),
        ("search.space={lr: {lo: 1}}", "search.space.lr: Additional properties"),
        ("search.space={lr: [1]}", "search.space.lr: [1] is not of type"),
        ("search.space={epochs: {low: 1.5, high: 3}}", "search.space.epochs.low: 1.5 is not of type"),
        ("search.space={method: {choices: [parr]}}", "search.space.method.choices.0: 'parr' is not one of"),
        ("search.space={par.noise: {choices: [1], when: {metod: par}}}", "when: Additional properties"),
        ("search.known=[{lrr: 1}]", "search.known.0: Additional properties"),
        ("resources.num_workers=many", "resources.num_workers: 'many' is not"),
    ],
)
def test_a_misspelt_key_and_a_value_of_the_wrong_kind_are_refused(override: str, place: str) -> None:
    raw = as_data(TINY.read_text(encoding="utf-8"))
    *parents, leaf = override.partition("=")[0].split(".")
    inner = raw
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[leaf] = as_data(override.partition("=")[2])
    assert any(place in fault for fault in faults(raw)), faults(raw)


def test_what_has_no_default_may_be_left_to_the_study_that_is_extended() -> None:
    assert faults({"name": "mine"})
    assert not faults({"name": "mine", "poison": {"num_poisoned": 1}})
    assert not faults({"extends": "demo", "clean": {"epochs": 1}})
    assert not faults({"extends": "demo", "poison": {"trigger": {"size": 4}}}), "badnet where no name is given"


def test_the_texts_are_those_of_the_settings() -> None:
    definitions = SCHEMA["definitions"]
    clean = definitions["Clean"]["properties"]
    assert clean["num_samples"]["description"] == CleanSettings.model_fields["num_samples"].description
    assert definitions["Search"]["properties"]["space"]["properties"]["lr"]["description"] == clean["lr"]["description"]
    assert clean["lr"]["default"] == CleanSettings.model_fields["lr"].default
    assert clean["loss_weights"]["default"] == {"ssl": 1.0}, "where cleaning's own differs from that of all"
    assert set(definitions["Search"]["properties"]["space"]["properties"]) == set(searchable())
    assert definitions["Data"]["description"].startswith("Webdataset shards.")
    assert definitions["PretrainObjective"]["properties"]["lr"]["description"] == clean["lr"]["description"]
    assert set(definitions["PretrainObjective"]["properties"]) == set(PretrainObjective.model_fields)
    assert set(SCHEMA["properties"]) == {"extends", *Study.model_fields}


def test_every_setting_says_what_it_is() -> None:
    definitions = SCHEMA["definitions"]

    def told(field: dict[str, Any]) -> bool:
        members = [field, *field.get("anyOf", [])]
        return any(
            "description" in one or "const" in one or "description" in definitions.get(one.get("$ref", "")[14:], {})
            for one in members
        )

    sections = {"": SCHEMA, **definitions}
    untold = [
        f"{section}.{name}"
        for section, schema in sections.items()
        for name, field in schema.get("properties", {}).items()
        if not told(field)
    ]
    assert not untold
