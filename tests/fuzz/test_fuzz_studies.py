"""Study files made of anything, most of them near to one that comes along: a study, or all its mistakes with lines."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raybd import space, study_file
from raybd.study import Sampler, Study, agreement, searchable

SHIPPED = [name for name in study_file.shipped() if name not in ("demo",)]
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in study_file.shipped().items()}
RESOLVED = {
    name: study_file.load(name).resolved() for name in ("demo", "methods_cifar10", "paper/attack_several", "small/grid")
}
LINES = sorted({line for text in TEXTS.values() for line in text.splitlines()})
FIELDS = sorted(
    {*Study.model_fields, *searchable(), "low", "high", "step", "log", "when", "choices", "extends", "method"}
)
ODD_LINES = [
    "extends: demo",
    "extends: self",
    "extends: ../../../etc/passwd",
    "extends: {a: b}",
    "\tname: x",
    "<<: *a",
    "a: &a [*a]",
    "seed: 0x" + "f" * 5000,
    "seed: " + "9" * 5000,
    "seed: 1:30:00",
    "seed: 18446744073709551616",
    "? [a, b]\n: c",
    "{{",
    "--- ",
    "...",
    "%YAML 9.9",
    "!!python/object/apply:os.system [id]",
    "name: !!binary aGVsbG8=",
    "name: !!set {a, b}",
    'name: "\\ud800"',
    'name: "\\e[31mred"',
    'name: "\\0"',
    f"name: {'n' * 5000}",
    f"{'k' * 5000}: 1",
    "name: \ufeff",
    "data: {root: " + "[" * 200 + "]" * 200 + "}",
    "search: {space: {lr: {low: -1.0e308, high: 1.0e308, step: 5.0e-324}}, known: [{lr: 1.0}]}",
    "search: {space: {lr: {low: 1.0e-3, high: 1.0, step: 5.0e-324}}, known: [{lr: 0.5}]}",
    "search: {sampler: grid, space: {num_samples: {low: 1, high: 9223372036854775807}}}",
    "pretrain: {epochs: 0, objectives: {a: {}, b: {}}}",
]


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """Return the text of a study that comes along, changed by lines or by bytes."""
    dice = random.Random(draw(st.integers(0, 2**32)))
    lines = TEXTS[dice.choice(sorted(TEXTS))].splitlines()
    for _ in range(dice.choice([0, 1, 1, 2, 3])):
        place = dice.randrange(len(lines) + 1)
        what = dice.choice(["odd", "line", "drop", "double", "indent", "word", "swap"])
        line = lines[place] if place < len(lines) else ""
        if what in ("odd", "line"):
            lines.insert(place, dice.choice(ODD_LINES if what == "odd" else LINES))
        elif what == "drop":
            del lines[place : place + 1]
        elif what == "double":
            lines.insert(place, line)
        elif what == "indent":
            lines[place : place + 1] = [dice.choice(["  ", "    ", "\t", " ", "- "]) + line]
        elif what == "swap":
            lines[place : place + 1] = [line.replace(*dice.sample([*":-,[]{}#&*\"'", *FIELDS], 2))]
        else:
            words = line.split(" ")
            words[dice.randrange(len(words))] = str(dice.choice(VALUES))
            lines[place : place + 1] = [" ".join(words)]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    how = dice.choice(["as it is"] * 5 + ["damaged", "utf-16", "latin-1", "bom", "crlf"])
    if how == "damaged":
        return draw(fuzzing.damaged(content))
    if how == "utf-16":
        return content.decode("utf-8", "replace").encode("utf-16")
    if how == "latin-1":
        return content + "\n# é".encode("latin-1")
    if how == "bom":
        return b"\xef\xbb\xbf" + content
    return content.replace(b"\n", b"\r\n") if how == "crlf" else content


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 1e-5, 0.5, 1.0, -0.0, 1e308, 5e-324, float("inf"), float("nan"),
    10**18, 2**63, 10**400, "", "x", "auto", "tpe", "grid", "1e-7", "\ud800", "a" * 3000, "../x", "\x1b[2J",
    [], {}, [1], [None], {"a": 1}, [[1]], {"low": 1, "high": 2}, {"choices": [1, 2]}, {"choices": []},
    {"low": 1e-5, "high": 1e-3, "log": True}, {"low": 1, "high": 5, "when": {"method": "par"}},
    {"low": 1, "high": 10**7}, {"name": "sig"}, {"name": []}, {"name": "badnet", "size": 0}, *FIELDS,
]  # fmt: skip


@st.composite
def structures(draw: st.DrawFn) -> dict[str, Any]:
    """Return a resolved study with some values replaced, taken away, added or moved."""
    dice = random.Random(draw(st.integers(0, 2**32)))
    found: dict[str, Any] = copy.deepcopy(RESOLVED[dice.choice(sorted(RESOLVED))])
    for _ in range(dice.choice([1, 1, 2, 3])):
        inner: Any = found
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            key = dice.choice(keys) if keys else "x"
            below = inner[key] if keys else None
            if not (isinstance(below, dict | list) and below and dice.random() < 0.85):
                break
            inner = below
        value = copy.deepcopy(dice.choice(VALUES))
        if isinstance(inner, list):
            inner.insert(dice.randrange(len(inner) + 1), value)
        elif (what := dice.choice(["replace", "replace", "add", "drop"])) == "drop":
            inner.pop(key, None)
        else:
            inner[dice.choice(FIELDS) if what == "add" else key] = value
    # Without some sections, whose defaults are as good: reading YAML is what takes the time.
    kept = {key for key in found if key in ("name", "poison", "search", "clean") or dice.random() < 0.3}
    return {key: value for key, value in found.items() if key in kept}


def use(study: Study) -> Study:
    """Return a study after what is done with every one before anything runs."""
    if study.search.sampler is Sampler.GRID:
        assert len(space.grid(study.search.space)) <= 100_000
    assert [name for name, _ in space.ordered(study.search.space)] or not study.search.space
    for found in study.search.space.values():
        assert space.describe(found)
    agreement.cleaning_sets(study.clean, study.search.space)
    for objective in study.pretrain.objectives:
        study.pretrain.settings(objective)
    study_file.anchored(study)
    again = Study.model_validate(json.loads(json.dumps(study.resolved())))
    assert again.hash() == study.hash()
    return study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("studies")
    (found / "search_spaces").mkdir()
    return found


@given(content=texts())
@fuzzing.fuzzed(150)
def test_files(content: bytes, folder: Path) -> None:
    path = folder / "self.yaml"
    path.write_bytes(content)
    fuzzing.case("study file", lambda: use(study_file.load(str(path))), given=content, megabytes=64)


@given(raw=structures())
@fuzzing.fuzzed(150)
def test_structures(raw: dict[str, Any]) -> None:
    text = yaml.dump(raw, allow_unicode=True)
    fuzzing.case("study structure", lambda: use(study_file.parse(text, source="s.yaml")), given=text, megabytes=64)


FITTING = [
    "seed=5", "clean.lr=3e-3", "search.num_trials=2", "data.root=/x", "search.space.lr={low: 1e-5, high: 1e-3}",
    "poison.trigger={name: sig}", "poison.also=[]", "model={name: RN50}", "clean.method=par", "pretrain.epochs=1",
]  # fmt: skip
KEYS = [
    *FIELDS,
    "search.space.lr",
    "search.space.loss_weights.ssl.low",
    "data.root",
    "a..b",
    ".",
    "",
    "poison.also.0",
    "x" * 9000,
]
VALUE_TEXTS = [
    *(yaml.safe_dump(value) if value != "\ud800" else "\ud800" for value in VALUES if value == value),
    "[",
    "{a: b",
    "&a [*a]",
    "!!x 1",
    "a:" + "9" * 5000,
    "\0",
]


@given(data=st.data())
@fuzzing.fuzzed(120)
def test_overrides(data: st.DataObject) -> None:
    dice = random.Random(data.draw(st.integers(0, 2**32)))
    given = []
    for _ in range(dice.choice([1, 1, 2, 3])):
        if dice.random() < 0.5:
            given.append(dice.choice(FITTING))
            continue
        key = dice.choice(KEYS) if dice.random() < 0.7 else ".".join(dice.choices(FIELDS, k=dice.choice([1, 2, 3, 40])))
        given.append(key + dice.choice(["=", "=", "=", "=", "", ":"]) + dice.choice(VALUE_TEXTS))
    name = dice.choice(sorted(TEXTS))
    fuzzing.case("override", lambda: use(study_file.load(name, overrides=given)), given=(name, given), megabytes=64)


@given(data=st.data())
@fuzzing.fuzzed(60)
def test_studies_that_extend_others(data: st.DataObject, folder: Path) -> None:
    """Any graph of up to four files: chains, rings, names that are nothing."""
    dice = random.Random(data.draw(st.integers(0, 2**32)))
    names = ["a", "b", "c", "d"]
    files = {}
    for name in names:
        base = dice.choice(
            [*names, "demo", "small/grid", "none", "..", "/", "", ".", "a" * 300, "x\0y", "[1]", "search_spaces"]
        )
        own = dice.choice(
            ["", "seed: 3\n", "clean: {lr: 0}\n", "search: null\n", "clean: 5\n", "poison: {trigger: {name: sig}}\n"]
        )
        head = "" if dice.random() < 0.3 else f"extends: {json.dumps(base)}\n"
        files[name] = f"{head}name: {name}\n{own}" + ("poison: {num_poisoned: 1}\n" if not head else "")
        (folder / f"{name}.yaml").write_text(files[name])
    fuzzing.case("extends", lambda: use(study_file.load(str(folder / "a.yaml"))), given=files)


# What was found by these tests, and mended.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1:30", "s.yaml:3: cannot read the value: a number to the base 60"),
        ("seed: 0x" + "f" * 5000, "s.yaml:3: cannot read the value: a whole number of more than 64 bits"),
        (
            "clean: {epochs: 3}\nsearch:\n  space:\n    par.threshold: {low: 1.0, high: 2.0}",
            "s.yaml:6: search.space.par.threshold",
        ),
        ("clean:\n  epochs: 3\n  ft_sam:\n    rho: 1.0", "s.yaml:5: clean.ft_sam: has no effect on cleanclip"),
        ("seed: 3\npretrain:\n  epochs: 0", "s.yaml:5: pretrain.epochs: 0 for mmcl, mmcl_ssl"),
        (
            "search:\n  space: {lr: {low: 0.1, high: 1.0}}\n  known:\n  - {lr: 0.2}\n  - {lr: 3.0}",
            "s.yaml:7: search.known.1.lr: cannot be 3.0",
        ),
        ("pretrain:\n  objectives:\n    " + "n" * 101 + ": {}", "a name of 101 characters: at most 100"),
    ],
)
def test_mistakes_are_at_the_line_of_their_field(text: str, message: str) -> None:
    with pytest.raises(study_file.StudyError) as caught:
        study_file.parse(f"name: t\npoison: {{num_poisoned: 1}}\n{text}\n", source="s.yaml")
    assert message in str(caught.value)


def test_folders_long_names_and_other_encodings(tmp_path: Path) -> None:
    with pytest.raises(study_file.StudyError, match="this is a folder, not a study file"):
        study_file.load(str(tmp_path))
    with pytest.raises(study_file.StudyError, match="no such study file"):
        study_file.load("n" * 5000)
    (tmp_path / "a.yaml").write_bytes("name: t\n# é\n".encode("latin-1"))
    with pytest.raises(study_file.StudyError, match="not UTF-8 text") as caught:
        study_file.load(str(tmp_path / "a.yaml"))
    assert caught.value.where == f"{tmp_path}/a.yaml:2"


def test_of_many_mistakes_some_are_shown_and_all_are_counted() -> None:
    with pytest.raises(study_file.StudyError) as caught:
        study_file.parse("name: t\npoison: {num_poisoned: 1}\n" + "".join(f"k{i}: 1\n" for i in range(500)), source="s")
    assert caught.value.what.startswith("500 mistakes in the study")
    assert caught.value.what.endswith("and 450 more")
