"""Study files and search spaces: what is read, and what every mistake is called, with its line."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raybd import space, study_file
from raybd.errors import StudyError
from raybd.space import Range
from raybd.study import ImageView, LossWeights, Placement, Study, differences, searchable

BASE = "name: t\npoison: {poison_rate: 0.1}\n"
ROOT = Path(__file__).parents[1]
EXHAUSTIVE = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def parse(text: str = BASE, *overrides: str) -> Study:
    return study_file.parse(text, source="f.yaml", overrides=overrides)


def mistakes(text: str = BASE, *overrides: str) -> list[str]:
    """Return the lines of the report on a study's mistakes, without its head and its advice."""
    with pytest.raises(StudyError) as caught:
        parse(text, *overrides)
    head, *lines = caught.value.what.splitlines()
    assert head == f"{len(lines)} mistake{'s' if len(lines) > 1 else ''} in the study"
    return [line.removeprefix("  ") for line in lines]


def refusal(text: str = BASE, *overrides: str) -> str:
    """Return what is said of a study that is refused as a whole: where and what."""
    with pytest.raises(StudyError) as caught:
        parse(text, *overrides)
    return f"{caught.value.where}: {caught.value.what}"


# --- mistakes


def test_four_mistakes_are_reported_at_once_each_with_its_line() -> None:
    text = """\
# A study with four mistakes.
name: four
poison:
  poison_rate: 0.1
  trigger:
    pattern: noise
    sise: 4

clean:
  epochs: many
search:
  space:
    lr:
      low: 1.0
      high: 0.5
    learning_rate: {low: 1.0, high: 2.0}
"""
    known = ", ".join(searchable())
    assert mistakes(text) == [
        "f.yaml:7: poison.trigger.sise: unknown key, did you mean 'size'?",
        "f.yaml:10: clean.epochs: input should be a valid integer, unable to parse string as an integer, got 'many'",
        "f.yaml:13: search.space.lr: low 1.0 is above high 0.5: swap them",
        f"f.yaml:16: search.space.learning_rate: 'learning_rate' is not a setting of cleaning: one of {known}",
    ]
    with pytest.raises(StudyError, match="to do: correct them and call again") as caught:
        parse(text)
    assert caught.value.where == "f.yaml"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("sed: 1", "f.yaml:3: sed: unknown key, did you mean 'seed'?"),
        ("model: {nmae: x}", "f.yaml:3: model.nmae: unknown key, did you mean 'name'?"),
        ("model: {qqqq: x}", "f.yaml:3: model.qqqq: unknown key (known: name, start, pretrained)"),
        (
            "clean:\n  loss_weights:\n    sssl: 1",
            "f.yaml:5: clean.loss_weights.sssl: unknown key, did you mean 'ssl'?",
        ),
        ("seed: -1", "f.yaml:3: seed: input should be greater than or equal to 0, got -1"),
        ("seed: .inf", "f.yaml:3: seed: input should be a finite number, got inf"),
        (
            "pretrain: {batch_size: 1}",
            "f.yaml:3: pretrain.batch_size: input should be greater than or equal to 2, got 1",
        ),
        (
            "pretrain: {objectives: {a-b: {}}}",
            "f.yaml:3: pretrain.objectives.a-b: 'a-b' must be letters, digits and _",
        ),
        (
            "clean: {loss_weights: {mmcl: 0, ssl: 0}}",
            "f.yaml:3: clean.loss_weights: all loss weights are 0: nothing would be learnt",
        ),
        (
            "search: {space: {lr: {choices: [1], low: 2}}}",
            "f.yaml:3: search.space.lr: choices stand alone: leave out low, high, log and step",
        ),
        ("search: {space: {epochs: {low: 1.5, high: 3}}}", "f.yaml:3: search.space.epochs: takes whole numbers"),
        ("search: {space: {lr: {choices: [fast]}}}", "f.yaml:3: search.space.lr: takes numbers"),
        (
            "search: {space: {image_view: {low: 1, high: 2}}}",
            "f.yaml:3: search.space.image_view: takes names, give them as choices",
        ),
        ("search: {known: [{lr: 1.0}]}", "f.yaml:3: search.known.0.lr: is not in the space"),
        (
            "search: {sampler: grid, space: {lr: {low: 0.1, high: 1.0}}}",
            "f.yaml:3: search.space.lr: a grid needs choices, or low and high with step",
        ),
        (
            "search: {space: {lr: {low: 0.1, high: 1.0, when: {eps: 1.0}}}}",
            "f.yaml:3: search.space.lr: `when` names 'eps', which is not searched",
        ),
        ("seed: 2024-13-45", "f.yaml:3: cannot read the value: month must be in 1..12"),
    ],
)
def test_one_mistake(extra: str, expected: str) -> None:
    assert expected in mistakes(f"{BASE}{extra}\n")


def test_what_is_missing_is_at_the_section_that_lacks_it() -> None:
    assert mistakes("poison:\n  poison_rate: 0.1\n") == ["f.yaml:1: name: missing, and it has no default"]
    assert mistakes("name: t\npoison:\n  target_class: banana\n") == [
        "f.yaml:2: poison: give poison_rate or num_poisoned, one of the two"
    ]
    assert mistakes("name: t\npoison: {poison_rate: 0.1, num_poisoned: 3}\n") == [
        "f.yaml:2: poison: give poison_rate or num_poisoned, one of the two"
    ]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n"])
def test_empty_study_lacks_what_has_no_default(text: str) -> None:
    found = mistakes(text)
    assert [line.split(": ", 1)[1] for line in found] == [
        "name: missing, and it has no default",
        "poison: missing, and it has no default",
    ]


def test_duplicate_keys_are_errors_with_their_line() -> None:
    assert mistakes("name: t\npoison: {poison_rate: 0.1}\nclean:\n  lr: 1.0e-4\n  epochs: 3\n  lr: 1.0e-3\n") == [
        "f.yaml:6: clean.lr: given twice"
    ]
    assert mistakes("name: t\nname: u\nseed: 1\nseed: 2\npoison: {poison_rate: 0.1}\n") == [
        "f.yaml:2: name: given twice",
        "f.yaml:4: seed: given twice",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [t\n", "f.yaml:2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("name: t\n  seed: 1\n", "f.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: not valid YAML: but found another document"),
        ("name: t\nseed: \x00\n", "f.yaml:2: not valid YAML: character U+0000: special characters are not allowed"),
        ("- a\n- b\n", "f.yaml:1: a study is a mapping of settings"),
        ("just text", "f.yaml:1: a study is a mapping of settings"),
        ("a: " + "[\n" * 1500, "f.yaml: nested too deeply"),
        ("a: &x {b: *x}\n", "f.yaml: nested too deeply"),
    ],
)
def test_what_is_no_study_at_all(text: str, expected: str) -> None:
    assert refusal(text) == expected


def test_aliases_may_repeat_values_but_not_explode() -> None:
    study = parse("name: t\npoison: {poison_rate: &share 0.25}\ndata: {max_broken: *share}\n")
    assert study.data.max_broken == 0.25
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    assert refusal(bomb) == "f.yaml: more than 100000 values, aliases followed"


@pytest.mark.parametrize(
    "value", ["!!bool foo", "!!timestamp foo", '!!int ""', "!!float ''", "!<x> a", "0b_", "9" * 5000]
)
def test_values_that_pyyaml_trips_over_are_mistakes_with_a_line(value: str) -> None:
    assert mistakes(f"{BASE}seed: {value}\n")[0].startswith("f.yaml:3: cannot read the value: ")
    assert mistakes(BASE, f"seed={value}")[0].startswith(f"--set seed={value[:90]}")


# --- values


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-7", 1e-7),
        ("1E-7", 1e-7),
        ("2e3", 2000.0),
        ("1.5e-3", 1.5e-3),
        (".5e1", 5.0),
        ("+1e2", 100.0),
        ("1_0e2", 1e3),
    ],
)
def test_floats_of_yaml_1_2_are_numbers(text: str, number: float) -> None:
    assert parse(f"{BASE}clean: {{lr: {text}}}\n").clean.lr == number
    assert parse(BASE, f"clean.lr={text}").clean.lr == number
    # A choice may be text too: only the file says that it is a number.
    found = parse(f"{BASE}search: {{space: {{lr: {{choices: [{text}]}}}}}}\n").search.space["lr"].choices
    assert found == (number,)


def test_quoted_numbers_stay_text() -> None:
    assert parse(f'{BASE}model: {{name: "1e-7"}}\n').model.name == "1e-7"


def test_defaults_are_those_of_the_published_experiment() -> None:
    study = parse()
    assert study.pretrain.settings("mmcl").loss_weights == LossWeights(mmcl=1, ssl=0)
    assert study.pretrain.settings("mmcl_ssl").loss_weights == LossWeights(mmcl=1, ssl=1)
    assert (study.pretrain.epochs, study.pretrain.batch_size, study.pretrain.lr) == (64, 2048, 1e-3)
    assert (study.pretrain.warmup_steps, study.pretrain.weight_decay, study.pretrain.eps) == (10_000, 0.1, 1e-8)
    assert (study.clean.epochs, study.clean.batch_size, study.clean.warmup_steps) == (20, 64, 50)
    assert study.clean.loss_weights == LossWeights(mmcl=1, ssl=1)
    assert (study.clean.num_samples, study.clean.leaked_poison) == (100_000, 0)
    assert (study.poison.trigger.size, study.poison.trigger.placement) == (16, Placement.RANDOM)
    assert study.poison.target_class == "banana"
    assert not study.poison.trigger.wrap


# --- --set


def test_overrides_replace_add_and_make_sections() -> None:
    study = parse(BASE, "seed=3", "data.root=s3://bucket/x=y", "clean.loss_weights.ssl=4", "poison.trigger={size: 3}")
    assert study.seed == 3
    assert study.data.root == "s3://bucket/x=y"
    assert study.clean.loss_weights == LossWeights(mmcl=1, ssl=4)
    assert study.poison.trigger.size == 3
    assert study.poison.poison_rate == 0.1
    assert parse(f"{BASE}data:\n", "data.root=x").data.root == "x"
    assert parse(BASE, "seed=1", "seed=2").seed == 2


def test_overrides_reach_searched_settings_that_have_dots() -> None:
    study = parse(BASE, "search.space.loss_weights.ssl.low=1", "search.space.loss_weights.ssl.high=8")
    assert study.search.space == {"loss_weights.ssl": Range(low=1, high=8)}
    study = parse(BASE, "search.space.loss_weights.mmcl={choices: [1, 2]}", "search.space.lr={low: 1e-7, high: 1e-3}")
    assert study.search.space == {"loss_weights.mmcl": Range(choices=(1, 2)), "lr": Range(low=1e-7, high=1e-3)}
    assert mistakes(BASE, "search.space.loss_weights.ssl.low=1") == [
        "--set search.space.loss_weights.ssl.low=1: search.space.loss_weights.ssl: give low and high, or choices"
    ]


@pytest.mark.parametrize("override", ["seed", "=1", "", "seed:1"])
def test_overrides_of_a_bad_form(override: str) -> None:
    assert refusal(BASE, override) == f"--set {override}: not of the form key=value"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("name.x=1", "'name' is not a section"),
        ("seed=[", "the value is wrong: not valid YAML: expected the node content, but found '<stream end>'"),
        ("seed=\x00", "the value is wrong: not valid YAML: character U+0000: special characters are not allowed"),
        ("seed=" + "[\n" * 1500, "the value is wrong: nested too deeply"),
    ],
)
def test_overrides_that_cannot_be_put_in(override: str, what: str) -> None:
    shown = override if len(override) <= 100 else f"{override[:100]}…"
    assert refusal(BASE, override) == f"--set {shown}: {what}"


def test_mistakes_of_overrides_are_at_the_override() -> None:
    text = "name: t\npoison:\n  poison_rate: 0.1\n  trigger:\n    size: 4\nseed: 1\n"
    assert mistakes(text, "poison.trigger={size: 0}") == [
        "--set poison.trigger={size: 0}: poison.trigger.size: input should be greater than 0, got 0"
    ]
    assert mistakes(text, "poison.trigger.sise=4") == [
        "--set poison.trigger.sise=4: poison.trigger.sise: unknown key, did you mean 'size'?"
    ]
    assert mistakes(text, "seed={a: 1, a: 2}")[0] == "--set seed={a: 1, a: 2}: seed.a: given twice"
    # What the override leaves alone keeps its line.
    assert mistakes(text.replace("size: 4", "size: 0"), "poison.trigger.pattern=fixed") == [
        "f.yaml:5: poison.trigger.size: input should be greater than 0, got 0"
    ]
    assert mistakes(text, "seed=x:²") == [
        "--set seed=x:²: seed: input should be a valid integer, unable to parse string as an integer, got 'x:²'"
    ]


# --- files


def test_files_that_cannot_be_studies(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    cases = {
        b"name: caf\xe9\n": f"{path}:1: not UTF-8 text",
        b"#" * 1_000_001: f"{path}: larger than such a file can be (1 MB)",
        b"name: 'x\n": f"{path}:2: not valid YAML",
        b"": f"{path}: 2 mistakes in the study\n  {path}: name: missing",
    }
    for content, expected in cases.items():
        path.write_bytes(content)
        with pytest.raises(StudyError) as caught:
            study_file.load(str(path))
        assert str(caught.value).startswith(expected)
    path.write_bytes(b"\xef\xbb\xbfname: bom\r\npoison: {poison_rate: 0.1}\r\n")
    assert study_file.load(str(path), overrides=["seed=5"]).seed == 5


def test_names_of_shipped_studies_are_found_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert study_file.locate("demo").read_bytes() == (ROOT / "search_spaces" / "demo.yaml").read_bytes()
    assert study_file.locate("demo.yaml") == study_file.locate("demo")
    for wrong in ("nothing", "elsewhere/demo", "demo.yml"):
        with pytest.raises(StudyError, match="no such study file") as caught:
            study_file.locate(wrong)
        assert caught.value.where == wrong
    Path("demo").write_text(BASE)
    assert study_file.load("demo").name == "t", "a file of one's own comes before a shipped one"


def test_embedded_data_sets() -> None:
    folder = study_file.embedded("emoji-32")
    assert folder is not None
    assert (folder / "classes.json").is_file()
    for name in ("", "emoji-64", "data/emoji-32", "../data/emoji-32", "."):
        assert study_file.embedded(name) is None


@pytest.mark.parametrize(
    "path",
    [*study_file.shipped().values(), *sorted((ROOT / "tests" / "studies").glob("*.yaml"))],
    ids=lambda path: path.stem,
)
def test_shipped_studies_load_and_survive_being_written_out(path: Path) -> None:
    study = study_file.load(str(path))
    assert Study.model_validate(study.resolved()) == study
    assert Study.model_validate_json(study.model_dump_json()) == study
    dumped = study_file.parse(yaml.safe_dump(study.resolved()), source="dump")
    assert dumped == study
    assert dumped.hash() == study.hash()
    for objective in study.pretrain.objectives:
        study.pretrain.settings(objective)


def test_relative_paths_are_anchored_to_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    study = parse(BASE, "data.root=shards", "data.cache_dir=c", "model.start=m.pt", "poison.target_class=x")
    found = study_file.anchored(study)
    assert (found.data.root, found.data.cache_dir) == (str(tmp_path / "shards"), str(tmp_path / "c"))
    assert found.model.start == str(tmp_path / "m.pt")
    for root in ("emoji-32", "s3://bucket/x"):
        assert study_file.anchored(parse(BASE, f"data.root={root}")).data.root == root


# --- hash, differences, settings in force


def test_hash_leaves_out_the_free_settings_only() -> None:
    base = parse(BASE, "search.space.lr={low: 1e-6, high: 1e-3}")
    same = [
        "search.num_trials=999",
        "resources.num_workers=7",
        "resources.gpus_per_trial=0.5",
        "resources.use_gpu=true",
        "search.retries=2",
        "data.cache_dir=x",
        "data.loader_workers=5",
    ]
    for override in same:
        changed = parse(BASE, "search.space.lr={low: 1e-6, high: 1e-3}", override)
        assert changed != base
        assert changed.hash() == base.hash(), override
    other = [
        "name=other",
        "seed=1",
        "data.root=x",
        "data.cache_gb=1",
        "model.name=RN50",
        "poison.trigger.size=5",
        "poison.poison_rate=0.2",
        "pretrain.lr=1",
        "pretrain.objectives.mmcl.lr=1",
        "clean.num_samples=5",
        "clean.loss_weights.ssl=2",
        "search.space.lr.high=1e-2",
        "search.space.lr.log=true",
        "search.startup_trials=3",
        "evaluation.search_share=0.4",
    ]
    hashes = [parse(BASE, "search.space.lr={low: 1e-6, high: 1e-3}", override).hash() for override in other]
    assert len({base.hash(), *hashes}) == len(other) + 1
    assert re.fullmatch("[0-9a-f]{12}", base.hash())


def test_differences() -> None:
    old = parse().resolved()
    new = parse(
        BASE, "seed=2", "poison.trigger.size=8", "search.space.lr={choices: [1.0]}", "data.cache_dir=x"
    ).resolved()
    lr = new["search"]["space"]["lr"]
    assert differences(old, old) == []
    assert differences(old, new) == [
        "data.cache_dir: None → x",
        "poison.trigger.size: 16 → 8",
        f"search.space.lr: None → {lr}",
        "seed: 0 → 2",
    ]
    assert differences({"a": {"b": 1}}, {"a": 2}) == ["a: {'b': 1} → 2"]


def test_pretrain_settings_take_what_an_objective_has_of_its_own() -> None:
    study = parse("""\
name: t
poison: {poison_rate: 0.1}
pretrain:
  epochs: 9
  lr: 0.5
  batch_size: 32
  weight_decay: 0.3
  loss_weights: {mmcl: 2, ssl: 3}
  objectives:
    plain: {}
    own: {loss_weights: {ssl: 5}, lr: 0.25, batch_size: 16, warmup_steps: 0, image_view: crop_flip_colour}
""")
    plain, own = study.pretrain.settings("plain"), study.pretrain.settings("own")
    assert (plain.epochs, plain.lr, plain.batch_size, plain.warmup_steps) == (9, 0.5, 32, 10_000)
    assert plain.loss_weights == LossWeights(mmcl=2, ssl=3)
    assert plain.image_view is ImageView.AUTOAUGMENT
    assert (own.epochs, own.lr, own.batch_size, own.warmup_steps) == (9, 0.25, 16, 0)
    assert own.loss_weights == LossWeights(mmcl=1, ssl=5)
    assert own.weight_decay == plain.weight_decay == 0.3
    assert own.image_view is ImageView.CROP_FLIP_COLOUR
    with pytest.raises(KeyError):
        study.pretrain.settings("none")


def test_clean_settings_put_searched_values_in_by_dotted_name() -> None:
    clean = parse(BASE, "clean.lr=0.5", "clean.loss_weights={mmcl: 3, ssl: 1}").clean
    found = clean.settings({"loss_weights.ssl": 8.0, "epochs": 2, "image_view": "crop_flip_colour"})
    assert found.loss_weights == LossWeights(mmcl=3, ssl=8)
    assert (found.lr, found.epochs, found.image_view) == (0.5, 2, ImageView.CROP_FLIP_COLOUR)
    assert clean.settings({}).loss_weights == LossWeights(mmcl=3, ssl=1)
    assert clean.loss_weights == LossWeights(mmcl=3, ssl=1), "the study itself is as it was"
    for wrong in ({"loss_weights.ssl": 0.0, "loss_weights.mmcl": 0.0}, {"lr": 0.0}, {"epochs": 1.5}, {"nothing": 1}):
        with pytest.raises(ValidationError):
            clean.settings(wrong)


def test_every_searchable_setting_can_be_set() -> None:
    clean = parse().clean
    dumped = clean.model_dump(mode="json")
    for name, kind in searchable().items():
        value: Any = dumped
        for part in name.split("."):
            value = value[part]
        assert value is None or isinstance(value, kind), name
        assert clean.settings({name: value}) == clean.settings({})


# --- search spaces


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give low and high, or choices"),
        ({"low": 1}, "give low and high, or choices"),
        ({"low": 2, "high": 1}, "low 2 is above high 1"),
        ({"low": 0.0, "high": 1.0, "log": True}, "log needs low > 0, got 0.0"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, "log and step exclude each other"),
        ({"low": 1, "high": 2, "step": 0}, "step must be positive and finite, got 0"),
        ({"low": 1, "high": 2, "step": math.inf}, "step must be positive and finite, got inf"),
        ({"low": 1, "high": math.inf}, "low and high must be finite"),
        ({"low": math.nan, "high": 1.0}, "low and high must be finite"),
        ({"low": 10**400, "high": 10**401}, "low and high must be finite"),
        ({"choices": ()}, "choices is empty"),
        ({"choices": (1, 1.0)}, "choices repeats a value"),
        ({"choices": (1.0, math.nan)}, "choices must be finite"),
        ({"choices": (1,), "log": True}, "choices stand alone"),
        ({"low": 1, "high": 2, "steps": 1}, "Extra inputs are not permitted"),
    ],
)
def test_ranges_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        Range(**given)


def test_grids_of_one_range() -> None:
    assert Range(choices=(4, "a", 0.5)).grid() == [4, "a", 0.5]
    assert Range(low=2, high=5).grid() == [2, 3, 4, 5]
    assert Range(low=2, high=9, step=3).grid() == [2, 5, 8]
    assert Range(low=0.0, high=1.0, step=0.1).grid() == [i / 10 for i in range(11)]
    assert Range(low=0.5, high=0.5, step=1.0).grid() == [0.5]
    for endless, message in (
        (Range(low=0.0, high=1.0), "a grid needs choices, or low and high with step"),
        (Range(low=1, high=8, log=True), "a grid needs choices instead of a log range"),
        (Range(low=0.0, high=1.0, step=1e-9), "a grid of more than 100000 values"),
        (Range(low=0, high=1e308, step=1e-10), "a grid of more than 100000 values"),
    ):
        with pytest.raises(ValueError, match=message):
            endless.grid()


def test_what_a_range_contains() -> None:
    for found in (Range(choices=(4, "a", 0.5)), Range(low=2, high=9, step=3), Range(low=0.0, high=0.7, step=0.1)):
        assert all(found.contains(value) for value in found.grid())
    assert Range(low=1e-6, high=1e-3, log=True).contains(1e-3)
    for found, value in (
        (Range(choices=(4, "a")), "b"),
        (Range(low=2, high=9, step=3), 4),
        (Range(low=0.0, high=0.7, step=0.1), 0.75),
        (Range(low=1e-6, high=1e-3, log=True), 2e-3),
        (Range(low=0, high=1), "0"),
    ):
        assert not found.contains(value)


def test_grid_has_every_combination_once_and_conditional_settings_only_where_active() -> None:
    found = space.grid(
        {
            "view": Range(choices=("a", "b")),
            "ssl": Range(choices=(1, 2, 3), when={"view": "b"}),
            "lr": Range(low=1, high=2),
        }
    )
    assert found == [
        {"view": "a", "lr": 1},
        {"view": "a", "lr": 2},
        *({"view": "b", "lr": lr, "ssl": ssl} for lr in (1, 2) for ssl in (1, 2, 3)),
    ]
    assert space.grid({}) == [{}]
    with pytest.raises(ValueError, match="a grid of more than 100000 combinations"):
        space.grid({f"s{i}": Range(low=1, high=100) for i in range(4)})


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_grid_counts(sizes: list[int]) -> None:
    points = space.grid({f"s{i}": Range(low=0, high=size - 1) for i, size in enumerate(sizes)})
    assert len(points) == math.prod(sizes)
    assert len({tuple(point.items()) for point in points}) == len(points)
    assert points == sorted(points, key=lambda point: tuple(point.values())), "the first setting varies slowest"


def test_conditional_settings_come_after_what_they_depend_on() -> None:
    one = {"low": 0, "high": 1}
    found = space.ordered(
        {"c": Range(**one, when={"b": 1}), "b": Range(**one, when={"a": (0, 1)}), "z": Range(**one), "a": Range(**one)}
    )
    assert [name for name, _ in found] == ["z", "a", "b", "c"]
    for ring in (
        {"a": Range(**one, when={"b": 1}), "b": Range(**one, when={"a": 1}), "z": Range(**one)},
        {"a": Range(**one, when={"a": 1})},
    ):
        with pytest.raises(ValueError, match="a: `when` names a setting that depends on it in turn"):
            space.ordered(ring)
    with pytest.raises(ValueError, match="a: `when` names 'q', which is not searched"):
        space.ordered({"a": Range(**one, when={"q": 1, "b": 1}), "b": Range(**one)})


def test_when_takes_one_value_or_several() -> None:
    range_ = Range(low=0, high=1, when={"view": ("a", "b"), "epochs": 3})
    assert range_.active({"view": "b", "epochs": 3})
    assert not range_.active({"view": "c", "epochs": 3})
    assert not range_.active({"view": "a", "epochs": 4})
    assert not range_.active({"view": "a"}), "what it depends on is itself inactive"


def test_descriptions_and_records_of_settings() -> None:
    assert space.describe(Range(choices=(1, 2, 4))) == "1, 2, 4"
    assert space.describe(Range(low=1e-5, high=1e-3, log=True)) == "1e-05 … 0.001 (log)"
    assert space.describe(Range(low=0, high=8, step=2)) == "0 … 8 (step 2)"


# --- whatever the input


def accepts(text: str, *overrides: str) -> Study | None:
    """Return the study that a text is, None where it is refused; anything but a StudyError fails the test."""
    try:
        return parse(text, *overrides)
    except StudyError as error:
        refused = error
    assert refused.where.startswith(("f.yaml", "--set "))
    assert refused.what.strip()
    return None


FIELDS = sorted(
    {*Study.model_fields, *searchable(), "low", "high", "when", "space", "objectives", "trigger", "choices"}
)
SIGNS = [
    ": ",
    "- ",
    *":-?,[]{}|>'\"#&*!%@`=~",
    "\n",
    "\n  ",
    "\n    ",
    "\t",
    "&a",
    "*a",
    "<<",
    "---",
    "...",
    "%YAML 1.1",
]
TAGS = ["!!bool", "!!int", "!!float", "!!timestamp", "!!binary", "!!set", "!!null", "!x"]
ODD = ["1e-7", "2024-13-45", ".inf", ".nan", "-1", "0x", "0b_", "1:60", "yes", "9" * 400, "\x00", "²", "é", "\ufeff"]
TOKENS = st.sampled_from([*FIELDS, *SIGNS, *TAGS, *ODD])


@given(
    text=st.one_of(st.text(max_size=80), st.lists(TOKENS, max_size=30).map("".join)), head=st.sampled_from(["", BASE])
)
@EXHAUSTIVE
def test_any_text_is_a_study_or_a_study_error(text: str, head: str) -> None:
    accepts(f"{head}{text}")


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**6),
    st.just(10**400),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([*FIELDS, "tpe", "grid", "auto", "fixed", "autoaugment"]),
    st.text(max_size=6),
    st.dates(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=6,
)


@given(data=st.data())
@EXHAUSTIVE
def test_a_study_with_any_value_anywhere_is_a_study_or_a_study_error(data: st.DataObject) -> None:
    raw = parse(BASE, "search.space.lr={low: 1e-6, high: 1e-3}", "search.known=[{lr: 1e-5}]").resolved()
    at: list[str] = []
    inner: Any = raw
    while isinstance(inner, dict) and inner and (not at or data.draw(st.booleans())):
        at.append(data.draw(st.sampled_from(sorted(inner))))
        inner = inner[at[-1]]
    value = data.draw(VALUES)
    target = raw
    for part in at[:-1]:
        target = target[part]
    target[at[-1]] = value
    study = accepts(yaml.safe_dump(raw, allow_unicode=True))
    if study is not None:
        assert Study.model_validate_json(study.model_dump_json()).hash() == study.hash()


@given(override=st.one_of(st.text(max_size=30), st.tuples(st.sampled_from(FIELDS), st.lists(TOKENS, max_size=6))))
@EXHAUSTIVE
def test_any_override_is_taken_or_a_study_error(override: str | tuple[str, list[str]]) -> None:
    accepts(BASE, override if isinstance(override, str) else f"{override[0]}={''.join(override[1])}")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("lr: {low: -1.0, high: 1.0}", "space.lr: cannot be -1.0: Input should be greater than 0"),
        ("image_view: {choices: [autoaugment, x]}", "space.image_view: cannot be x"),
        ("beta2: {choices: [0.9, 1.0]}", "space.beta2: cannot be 1.0: Input should be less than 1"),
        ("epochs: {low: 0, high: 3}", "space.epochs: cannot be 0"),
    ],
)
def test_a_range_must_hold_values_that_its_setting_may_have(space: str, message: str) -> None:
    with pytest.raises(StudyError) as caught:
        study_file.parse(f"{BASE}\nsearch:\n  space:\n    {space}\n", source="f.yaml")
    assert message in str(caught.value)
