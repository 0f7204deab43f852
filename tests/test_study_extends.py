"""Studies that extend others: what is merged, what is replaced, and where a mistake is said to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from raybd import study_file
from raybd.errors import StudyError

BASE = """\
name: base
poison: {target_class: fruit, num_poisoned: 10, trigger: {size: 4, pattern: fixed}}
clean: {num_samples: 50, lr: 1.0e-3}
search:
  num_trials: 3
  space:
    lr: {low: 1.0e-4, high: 1.0e-2, log: true}
"""


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_own_settings_come_on_top(tmp_path: Path) -> None:
    write(tmp_path, "base", BASE)
    found = study_file.load(write(tmp_path, "own", "extends: base\nname: own\nclean: {lr: 5.0e-3}\n"))
    assert (found.name, found.clean.lr, found.clean.num_samples) == ("own", 5e-3, 50)
    assert found.search.num_trials == 3
    assert "extends" not in found.resolved()


def test_space_and_trigger_are_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path, "base", BASE)
    own = "extends: base.yaml\nsearch: {space: {epochs: {choices: [1, 2]}}}\npoison: {trigger: {size: 6}}\n"
    found = study_file.load(write(tmp_path, "own", own))
    assert list(found.search.space) == ["epochs"]
    assert found.search.num_trials == 3
    assert (
        found.poison.trigger
        == study_file.parse("name: x\npoison: {num_poisoned: 1, trigger: {size: 6}}", source="x").poison.trigger
    )


def test_three_levels_and_overrides(tmp_path: Path) -> None:
    write(tmp_path, "base", BASE)
    write(tmp_path, "middle", "extends: base\nclean: {epochs: 7}\n")
    path = write(tmp_path, "top", "extends: middle\nclean: {lr: 2.0e-3}\n")
    found = study_file.load(path, overrides=["clean.lr=3e-3"])
    assert (found.clean.epochs, found.clean.lr, found.clean.num_samples) == (7, 3e-3, 50)


def test_mistakes_are_said_to_be_in_the_file_that_has_them(tmp_path: Path) -> None:
    base = write(tmp_path, "base", BASE.replace("lr: 1.0e-3", "lr: -1.0"))
    own = write(tmp_path, "own", "extends: base\nname: own\nclean:\n  epochs: 0\n")
    with pytest.raises(StudyError) as caught:
        study_file.load(own)
    assert f"{own}:4: clean.epochs" in str(caught.value)
    assert f"{base}:3: clean.lr" in str(caught.value)


def test_mistakes_are_listed_file_by_file(tmp_path: Path) -> None:
    base = write(tmp_path, "base", BASE.replace("num_trials: 3", "num_trials: 0").replace("lr: 1.0e-3", "lr: -1.0"))
    own = write(tmp_path, "own", "extends: base\nname: own\nclean:\n  epochs: 0\nseed: -1\n")
    with pytest.raises(StudyError) as caught:
        study_file.load(own, overrides=["data.max_broken=2"])
    where = [line.strip().partition(": ")[0] for line in caught.value.what.splitlines()[1:]]
    assert where == ["--set data.max_broken=2", f"{base}:3", f"{base}:5", f"{own}:4", f"{own}:5"]


def test_studies_on_top_of_each_other_are_limited(tmp_path: Path) -> None:
    write(tmp_path, "s0", BASE)
    for level in range(1, 10):
        write(tmp_path, f"s{level}", f"extends: s{level - 1}\nseed: {level}\n")
    assert study_file.load(str(tmp_path / "s8.yaml")).seed == 8
    with pytest.raises(StudyError, match="more than 8 studies on top of each other"):
        study_file.load(str(tmp_path / "s9.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nowhere\n", "extends: no such study file: nowhere"),
        ("extends: [a]\n", "extends takes a study"),
        ("extends: own\n", "extends this study in turn"),
        ("extends: other\n", "extends this study in turn"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "other", "extends: own\n")
    own = write(tmp_path, "own", text)
    with pytest.raises(StudyError, match=message) as caught:
        study_file.load(own)
    assert ".yaml:1" in caught.value.where


def test_shipped_studies_by_name() -> None:
    known = study_file.shipped()
    assert {"demo", "cifar10", "cc3m"} <= set(known)
    assert all(study_file.locate(name) == path for name, path in known.items())
    with pytest.raises(StudyError, match="no such study file") as caught:
        study_file.locate("dem")
    assert "demo" in caught.value.fix


@pytest.mark.parametrize("name", study_file.shipped())
def test_every_shipped_study_is_valid_and_says_what_it_is(name: str) -> None:
    study_file.load(name)
    assert study_file.shipped()[name].read_text(encoding="utf-8").startswith("# ")
