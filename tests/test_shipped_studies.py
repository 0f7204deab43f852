"""Studies that come along: each differs from what it extends by the lines that matter, and all of them ship."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import yaml

from raybd import space, study_file
from raybd.study import Sampler, Study, differences

ROOT = Path(__file__).parents[1]
NAMES = tuple(study_file.shipped())
# What each experiment changes of the study that it extends, by the beginnings of the settings' names; a search's kind
# and size go with its space.
CHANGES = {
    "paper/cc3m_grid": ("cc3m", ()),
    "paper/cc6m": ("cc3m", ("data.root", "data.max_train_samples", "poison.num_poisoned")),
    "paper/num_poisoned_400": ("paper/cc6m", ("poison.num_poisoned",)),
    "paper/num_poisoned_800": ("paper/cc6m", ("poison.num_poisoned",)),
    "paper/ssl_weights_clean": ("cc3m", ()),
    "paper/regularisation": ("cc3m", ()),
    "paper/cleaning_losses": ("cc3m", ()),
    "paper/poisoned_cleaning": ("cc3m", ()),
    "paper/cleaning_set_size": ("cc3m", ()),
    "paper/longer_cleaning": ("cc3m", ()),
    "small/grid": ("demo", ()),
    "small/ssl_weights_clean": ("demo", ()),
    "small/regularisation": ("demo", ()),
    "small/cleaning_losses": ("demo", ()),
    "small/poisoned_cleaning": ("demo", ()),
    "small/cleaning_set_size": ("demo", ()),
    "small/longer_cleaning": ("demo", ()),
    "small/attack_blended": ("demo", ("poison.trigger",)),
    "small/backbone_vit": ("demo", ("model.name",)),
    "small/halving": ("small/grid", ("clean.schedule",)),
    "paper/cc3m_halving": ("paper/cc3m_grid", ()),
    "small/methods": ("demo", ("pretrain.objectives", "clean.deep_clustering", "clean.abd")),
}


def searched(name: str) -> dict[str, space.Range]:
    return study_file.load(name).search.space


@pytest.mark.parametrize("name", CHANGES)
def test_a_study_changes_what_it_is_about_and_nothing_else(name: str) -> None:
    base, changed = CHANGES[name]
    found = differences(study_file.load(base).resolved(), study_file.load(name).resolved())
    settings = {line.partition(":")[0] for line in found} - {"name"}
    others = {setting for setting in settings if not setting.startswith("search.")}
    assert all(any(setting.startswith(start) for start in changed) for setting in others), others
    assert all(any(setting.startswith(start) for setting in others) for start in changed)
    assert found
    assert len(yaml.safe_load(study_file.shipped()[name].read_text(encoding="utf-8"))) <= 7


def choices(name: str, setting: str) -> tuple[object, ...]:
    found = searched(name)[setting].choices
    assert found is not None
    return found


def test_spaces_of_the_paper() -> None:
    thirteen = choices("paper/cc3m_grid", "lr")
    assert (len(thirteen), thirteen[0], thirteen[-1]) == (13, 1e-5, 4e-3)
    assert choices("paper/cleaning_losses", "lr") == thirteen
    hole = [lr for lr in choices("paper/cc6m", "lr") if isinstance(lr, float) and 1e-4 < lr < 3e-4]
    assert len(hole) >= 5
    assert choices("paper/ssl_weights_clean", "loss_weights.ssl") == (1, 2, 4, 6, 8)
    assert choices("paper/ssl_weights_clean", "lr") == (5e-5, 1e-4, 5e-4, 1e-3)
    assert {0.2, 0.5, 1, 2, 5, 10, 20, 50, 100} <= set(choices("paper/regularisation", "weight_decay"))
    assert {1, 2, 3, 4, 5, 10, 25} <= set(choices("paper/poisoned_cleaning", "leaked_poison"))
    assert choices("paper/cleaning_set_size", "num_samples") == (10_000, 100_000, 200_000)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("paper/", "small/"))])
def test_grids_are_as_large_as_the_budget_and_every_point_is_a_trial(name: str) -> None:
    study: Study = study_file.load(name)
    if study.search.sampler is Sampler.GRID:
        points = space.grid(study.search.space)
        assert study.search.num_trials == len(points) + len(study.search.known)
        for point in points:
            study.clean.settings(point)
    assert study.name == name.replace("small/", "small_").removeprefix("paper/")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("small/")])
def test_small_studies_need_nothing_that_does_not_come_along(name: str) -> None:
    study = study_file.load(name)
    assert study.data.root == "emoji-32"
    assert study.resources.use_gpu is False


def test_the_wheel_has_every_study(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        inside = set(archive.namelist())
    assert {f"raybd/search_spaces/{name}.yaml" for name in NAMES} <= inside
    assert "raybd/study.schema.json" in inside
