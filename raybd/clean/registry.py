"""Which recipe carries a cleaning method out, and what a trial with it costs."""

from __future__ import annotations

import importlib

from raybd import costs
from raybd.study import TRAITS, CleanSettings, Method, Study
from raybd.study.agreement import methods
from raybd.train.recipe import Recipe


def recipe_class(method: Method) -> type[Recipe]:
    """Return the class that the method's traits name."""
    module, _, name = TRAITS[method].recipe.partition(".")
    found: type[Recipe] = getattr(importlib.import_module(f"raybd.clean.{module}"), name)
    return found


def recipe(settings: CleanSettings, *, seed: int) -> Recipe:
    """Return the recipe of a trial's method."""
    return recipe_class(settings.method).of(settings, seed=seed)


def check(study: Study) -> None:
    """Refuse methods that cannot be carried out, before any work; see `Recipe.check`.

    Errors: StudyError, CheckpointError.
    """
    for method in sorted(methods(study.clean, study.search.space)):
        recipe_class(method).of(study.clean, seed=0).check(study)


def cost(model: str, settings: CleanSettings, *, pairs: int) -> float:
    """Return the operations of a cleaning trial on so many pairs, its evaluations left out."""
    towers, views, found = costs.towers(model), costs.views(settings), recipe(settings, seed=0)
    epoch, once = found.operations(towers, views=views)
    if found.in_parts and costs.in_micro_batches(settings, pairs=pairs):
        epoch += views * towers.pair_forward
    return pairs * (settings.epochs * epoch + once)


def evaluations(settings: CleanSettings) -> int:
    """Return how often a trial is evaluated: after each epoch, and at each point without training.

    The poisoned model itself is evaluated once by each process, whatever the number of its trials.
    """
    return settings.epochs + len(recipe(settings, seed=0).alphas)
