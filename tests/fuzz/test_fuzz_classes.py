"""Class files, templates and patterns of shards made of anything."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import fuzzing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybd.data import limits, prompts, shards
from raybd.errors import DataError, StudyError
from raybd.study import Data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classes")


# Class files

CLASSES = [{"label": i, "class_name": name} for i, name in enumerate(["cat", "dog", "red fox"])]
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    0.0,
    0.5,
    1e999,
    float("nan"),
    10**400,
    "",
    " ",
    "0",
    "cat",
    "\ud800",
    "x" * 10_001,
    [],
    {},
    [1],
    {"a": 1},
]
CLASS_FILES = [
    b"",
    b"[]",
    b"{}",
    b"3",
    b"null",
    b"[" * 5000,
    b"\xff",
    b"cat\ndog\n",
    b"label,class_name\n0,cat\n",
    b"9" * 5000,
]


@given(seed=st.integers(0, 2**32), data=st.data())
@fuzzing.fuzzed(100)
def test_class_files(seed: int, data: st.DataObject, folder: Path) -> None:
    dice = random.Random(seed)
    found: list[Any] = [dict(entry) for entry in CLASSES]
    for _ in range(dice.choice([0, 1, 1, 2])):
        place = dice.randrange(len(found))
        what = dice.choice(["value", "value", "drop", "double", "other", "key"])
        if what == "value" and isinstance(found[place], dict):
            found[place][dice.choice(["label", "class_name", "x"])] = dice.choice(ODD)
        elif what == "drop":
            del found[place]
        elif what == "double":
            found.append(found[place])
        elif what == "key" and isinstance(found[place], dict):
            found[place].pop(dice.choice(["label", "class_name"]), None)
        else:
            found[place] = dice.choice(ODD)
        if not found:
            break
    content = json.dumps(found).encode(dice.choice(["utf-8", "utf-8", "utf-8", "utf-16"]))
    if dice.random() < 0.2:
        content = dice.choice(CLASS_FILES) if dice.random() < 0.5 else data.draw(fuzzing.damaged(content))
    (folder / "classes.json").write_bytes(content)
    names = fuzzing.case("class file", lambda: shards.classes(Data(root=str(folder))), given=content, megabytes=64)
    assert names is None or all(name.encode() and len(name) <= limits.MAX_CAPTION for name in names)


# Templates and patterns

TEXTS = [
    "a photo of a {}.",
    "{}",
    "{} {}",
    "",
    "{",
    "{{}}",
    "{0}",
    "{x}",
    "é {}",
    "a" * 10_001 + "{}",
    "cifar",
    "simple",
    "nothing",
]


@given(named=st.sampled_from(TEXTS) | st.lists(st.sampled_from(TEXTS) | st.text(max_size=5), max_size=3))
@fuzzing.fuzzed(40)
def test_templates(named: str | list[str]) -> None:
    found = fuzzing.case("templates", lambda: prompts.templates(named, field="poison.templates"), given=named)
    assert found is None or all("cat" in make("cat") for make in found)


PIECES = [
    "train",
    "/",
    "-",
    "{",
    "}",
    ",",
    "..",
    "0",
    "9",
    "000",
    "{0..3}",
    "{a,b}",
    "{a..c}",
    "{000..002}",
    "{0..9..2}",
    "{1..99999999}",
    "*",
    "?",
    "[",
    "]",
    "[z-a]",
    "[!",
    "**",
    "***",
    "\\",
    "://",
    "file://",
    "memory://",
    "foo://",
    "zip://",
    "::",
    "~",
    "\0",
    "é",
    "\ud800",
    ".tar",
    "../",
    "n" * 300,
    " ",
]


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=8),
    root=st.sampled_from(["", "emoji-32", "/nowhere", "foo://x", "memory://x"]),
)
@fuzzing.fuzzed(150)
def test_patterns_of_shards(pieces: list[str], root: str, folder: Path) -> None:
    pattern = "".join(pieces)
    data = Data(root=root or str(folder))
    fuzzing.case(
        "pattern",
        lambda: shards.find_shards(data, pattern, field_name="data.train"),
        given=(root, pattern),
        megabytes=64,
    )


# What was found by these tests, and mended.


@pytest.mark.parametrize("pattern", ["[z-a].tar", "a**.tar", "/**", "**/x.tar"])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(DataError, match=r"not a glob|no such shard|every folder below") as caught:
        shards.find_shards(Data(), pattern, field_name="data.train")
    assert caught.value.where == "data.train"


@pytest.mark.parametrize("label", ["1e999", "0.5", "true", '"0"', "null"])
def test_labels_are_whole_numbers(label: str, tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(f'[{{"label": {label}, "class_name": "cat"}}]')
    with pytest.raises(DataError, match="not a list of classes: entry 0"):
        shards.classes(Data(root=str(tmp_path)))


def test_a_template_that_is_too_long() -> None:
    with pytest.raises(StudyError, match="a template of 10003 characters"):
        prompts.templates(["x" * 10_001 + "{}"], field="poison.templates")
