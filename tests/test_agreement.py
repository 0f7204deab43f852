"""What a study may ask of cleaning methods: settings that a method would ignore are refused, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_methods import make_folder, study_of

from raybd.clean import registry
from raybd.console import View
from raybd.errors import StudyError
from raybd.stages import Run
from raybd.store import Store
from raybd.study import Study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("clean", "space", "reason"),
    [
        (
            {"method": "mmcl"},
            {"loss_weights.ssl": {"choices": [0.0, 1.0]}},
            "space.loss_weights.ssl: has no effect on mmcl, only on abd, cleanclip, .*: remove it",
        ),
        (
            {},
            {"method": {"choices": ["cleanclip", "mmcl", "ssl"]}, "loss_weights.ssl": {"choices": [0.0, 1.0]}},
            r"has no effect on mmcl, ssl, only on .*: restrict it with `when: \{method: \[cleanclip\]\}`",
        ),
        (
            {},
            {"par.threshold": {"low": 1.5, "high": 2.5}},
            "space.par.threshold: has no effect on cleanclip, only on par: remove it",
        ),
        (
            {},
            {
                "method": {"choices": ["cleanclip", "par", "ft_sam"]},
                "par.threshold": {"low": 1.5, "high": 2.5, "when": {"method": ["par", "ft_sam"]}},
            },
            r"no effect on ft_sam, only on par: restrict it with `when: \{method: \[par\]\}`",
        ),
        (
            {},
            {"method": {"choices": ["cleanclip", "batchnorm_refresh"]}, "lr": {"low": 1e-4, "high": 1e-3}},
            "space.lr: has no effect on batchnorm_refresh, only on",
        ),
        ({"method": "par"}, {"image_view": {"choices": ["autoaugment"]}}, "space.image_view: has no effect on par"),
        (
            {"method": "image_tower", "loss_weights": {"mmcl": 0, "ssl": 0, "text_ssl": 1}},
            {},
            "clean.loss_weights: image_tower would learn nothing",
        ),
        ({"method": "ssl", "loss_weights": {"mmcl": 2, "ssl": 1}}, {}, "clean.loss_weights: has no effect on ssl"),
        ({"ft_sam": {"rho": 1.0}}, {}, "clean.ft_sam: has no effect on cleanclip, only on ft_sam: remove it"),
    ],
)  # fmt: skip
def test_settings_that_a_method_would_ignore_are_refused(
    clean: dict[str, Any], space: dict[str, Any], reason: str, folder: Path
) -> None:
    with pytest.raises(ValidationError, match=reason):
        study_of(folder, search={"space": space}, **clean)


def test_settings_that_some_method_uses_are_taken(folder: Path) -> None:
    space = {
        "method": {"choices": ["cleanclip", "mmcl", "par"]},
        "loss_weights.mmcl": {"choices": [1.0], "when": {"method": "cleanclip"}},
        # In the trials that draw the one it depends on, the method is cleanclip.
        "loss_weights.ssl": {"choices": [1.0, 4.0], "when": {"loss_weights.mmcl": 1.0}},
    }
    study = study_of(folder, search={"space": space}, par={"threshold": 1.9})
    # A resolved study, read again, is the same study.
    assert Study.model_validate_json(study.model_dump_json()) == study
    mmcl = study_of(folder, method="mmcl")
    assert Study.model_validate_json(mmcl.model_dump_json()) == mmcl


def test_a_searched_method_has_its_own_loss_weights_in_force(folder: Path) -> None:
    clean = study_of(folder, loss_weights={"mmcl": 1, "ssl": 4}).clean
    for method, weights in {"mmcl": (1, 0), "ssl": (0, 1), "par": (1, 0), "cleanclip": (1, 4), "abd": (1, 4)}.items():
        found = clean.settings({"method": method}).loss_weights
        assert (found.mmcl, found.ssl) == weights


@pytest.mark.parametrize("method", ["batchnorm_refresh", "frozen_batchnorm"])
def test_a_model_without_batchnorm_is_refused_before_any_work(method: str, folder: Path, tmp_path: Path) -> None:
    fixed = study_of(folder, model="vit-tiny-32", method=method)
    searched = study_of(folder, model="vit-tiny-32", search={"space": {"method": {"choices": ["mmcl", method]}}})
    for study in (fixed, searched):
        with pytest.raises(StudyError, match=f"{method} needs a model with BatchNorm, and vit-tiny-32 has none"):
            registry.check(study)
    registry.check(study_of(folder, model="vit-tiny-32"))
    registry.check(study_of(folder, method=method))
    # The product asks before it pretrains.
    run = Run(fixed, Store(str(tmp_path / "run")), View())
    with pytest.raises(StudyError, match="needs a model with BatchNorm"):
        run.poison()
