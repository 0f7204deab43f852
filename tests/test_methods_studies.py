"""The studies of cleaning methods: each is of its method, and one search compares them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from raybd import space, study_file
from raybd.study import Method, Schedule, Study
from raybd.study.agreement import methods

FOLDER = Path(__file__).parents[1] / "search_spaces" / "paper"


def load(name: str) -> Study:
    return study_file.load(str(FOLDER / f"{name}.yaml"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("method_*.yaml")), ids=lambda path: path.stem)
def test_a_methods_study_is_of_that_method_and_differs_from_cc3m_in_cleaning_and_search_alone(path: Path) -> None:
    study, base = study_file.load(str(path)), study_file.load("cc3m")
    assert study.name == path.stem
    assert methods(study.clean, study.search.space) == {Method(path.stem.removeprefix("method_"))}
    for section in ("seed", "data", "model", "poison", "pretrain", "evaluation", "resources"):
        assert getattr(study, section) == getattr(base, section)


def test_par_has_its_published_settings() -> None:
    clean = load("method_par").clean.settings({})
    assert (clean.lr, clean.epochs, clean.warmup_steps, clean.schedule) == (3e-5, 2, 0, Schedule.PAR)
    assert (clean.beta1, clean.beta2, clean.weight_decay, clean.par.threshold) == (0.9, 0.98, 1e-4, 2.15)


def test_one_search_compares_all_methods_each_first_as_published() -> None:
    study = load("methods")
    found = study.search
    assert methods(study.clean, found.space) == set(Method)
    assert [point["method"] for point in found.known] == list(found.space["method"].choices or ())
    for point in found.known:
        # Every setting of a known point takes part in its trial, and it fits together.
        settings = study.clean.settings(point)
        assert all(found.space[name].active(point) for name in point)
        assert settings.epochs == (1 if settings.method is Method.BATCHNORM_REFRESH else point["epochs"])
    par = {"method": "par"}
    for name, limits in space.ordered(found.space):
        if limits.choices is not None and len(limits.choices) == 1 and limits.active(par):
            par[name] = limits.choices[0]  # type: ignore[assignment]
    given, own = study.clean.settings(par), load("method_par").clean.settings({})
    for name in ("schedule", "warmup_steps", "beta2", "weight_decay", "loss_weights"):
        assert getattr(given, name) == getattr(own, name)
