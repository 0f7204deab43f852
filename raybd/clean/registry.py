"""Which recipe carries a cleaning method out."""

from __future__ import annotations

from collections.abc import Callable

from raybd.clean.adversarial import AdversarialViews
from raybd.clean.batchnorm import BatchNormRefresh, FrozenBatchNorm, require_layers
from raybd.clean.cleanclip import CleanClip
from raybd.clean.clustering import Clustered, PseudoLabelled, labeller
from raybd.clean.par import PerturbAndRecover
from raybd.clean.sam import SharpnessAware
from raybd.clean.weights import ImageTower, Interpolation, ShrinkAndPerturb
from raybd.model import create
from raybd.study import CleanSettings, Method, Study
from raybd.study.agreement import methods
from raybd.train.recipe import Recipe

# Given a trial's settings and seed.
METHODS: dict[Method, Callable[[CleanSettings, int], Recipe]] = {
    Method.CLEANCLIP: lambda settings, seed: CleanClip(),
    Method.MMCL: lambda settings, seed: CleanClip(),
    Method.SSL: lambda settings, seed: CleanClip(),
    Method.SHRINK_PERTURB: lambda settings, seed: ShrinkAndPerturb(settings.shrink_perturb, seed=seed),
    Method.INTERPOLATION: lambda settings, seed: Interpolation(settings.interpolation.alphas),
    Method.BATCHNORM_REFRESH: lambda settings, seed: BatchNormRefresh(),
    Method.FROZEN_BATCHNORM: lambda settings, seed: FrozenBatchNorm(),
    Method.IMAGE_TOWER: lambda settings, seed: ImageTower(),
    Method.DEEP_CLUSTERING: lambda settings, seed: Clustered(settings.deep_clustering, seed=seed),
    Method.PSEUDO_LABELS: lambda settings, seed: PseudoLabelled(settings.pseudo_labels, seed=seed),
    Method.PAR: lambda settings, seed: PerturbAndRecover(settings.par, seed),
    Method.FT_SAM: lambda settings, seed: SharpnessAware(settings.ft_sam),
    Method.ABD: lambda settings, seed: AdversarialViews(settings.abd, seed),
}


def recipe(settings: CleanSettings, *, seed: int) -> Recipe:
    """Return the recipe of a trial's method."""
    return METHODS[settings.method](settings, seed)


def check(study: Study) -> None:
    """Refuse methods that cannot be carried out, before any work: by what the model is, or what another lacks.

    Errors: StudyError, CheckpointError.
    """
    possible = methods(study.clean, study.search.space)
    needing = possible & {Method.BATCHNORM_REFRESH, Method.FROZEN_BATCHNORM}
    if needing:
        net = create(study.model.name, seed=0).net
        for method in sorted(needing):
            require_layers(net.visual, method=method, model=study.model.name)
    given = study.clean.pseudo_labels
    # One that the search draws is checked by its trials.
    if Method.PSEUDO_LABELS in possible and given.model and given.checkpoint:
        labeller(given)
