"""What a plan says of trials that share a GPU, before there is a cluster to measure on."""

from __future__ import annotations

import torch

from raybd import provenance
from raybd.cluster import shares
from raybd.planning import Sizes, prompt_count
from raybd.study import Study
from raybd.train import footprint

_COUNTED = (
    f"GPUs: counted as one for each trial. resources.gpus_per_trial is auto: what a trial takes is measured before the "
    f"search, and up to {shares.MOST} then share one; device-hours do not count that they slow each other"
)


def told(study: Study, found: Sizes, *, probe: bool, elsewhere: bool) -> str | None:
    """Return how many trials would share a GPU, measured where this machine has one; None where none is wanted.

    Args:
        found: of the study's data.
        probe: measure.
        elsewhere: the plan is for a cluster, whose GPUs are not here.
    """
    wanted = study.resources
    if wanted.gpus_per_trial != "auto" or wanted.use_gpu is False:
        return None
    here = torch.cuda.is_available()
    if not (here or elsewhere or wanted.use_gpu is True):
        return None
    if not (here and probe) or elsewhere:
        return _COUNTED
    device = torch.device("cuda")
    try:
        taken = footprint.measure(
            study,
            prompts=prompt_count(study, found),
            device=device,
            meter=footprint.CudaMeter(device),
            threads=min(provenance.cores(), wanted.cpus_per_trial),
        )
    except footprint.Unknown as error:
        return f"GPUs: {shares.whole(f'what one takes is not known: {error}')}"
    return f"GPUs: {here_chosen(study, taken, gpus=torch.cuda.device_count())}, as measured here"


def here_chosen(study: Study, taken: footprint.Footprint, *, gpus: int) -> shares.Choice:
    """Return how many trials would share a GPU of this machine, which has so many, alike."""
    wanted, trials = study.resources, study.search.trials_each * len(study.pretrain.objectives)
    cores = provenance.cores() // wanted.cpus_per_trial // gpus
    return shares.choose(
        taken, cores=cores, wanted=shares.for_each_gpu(wanted.concurrent_trials, trials=trials, gpus=gpus)
    )
