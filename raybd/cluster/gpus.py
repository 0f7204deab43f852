"""How many trials share a GPU of a Ray cluster: one is measured there, before the search."""

from __future__ import annotations

import faulthandler
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raybd.cluster import shares
from raybd.cluster.session import Share, resolve, uninterrupted
from raybd.cluster.shares import Choice
from raybd.failures import message_of
from raybd.study import Study

if TYPE_CHECKING:
    from raybd.train.footprint import Footprint  # imports torch

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger(__name__)

_MEASURE_SECONDS = 600.0  # once it has begun
_LOOK_SECONDS = 120.0  # for all GPUs of all machines, side by side


def settle(study: Study, share: Share, *, prompts: int, trials: int) -> tuple[Share, Choice]:
    """Return what a study has of the cluster with the share of a GPU measured, and how that came about.

    Waits for a GPU, as its first trial would. Where nothing can be measured each trial has a GPU for itself.

    Args:
        prompts: of an evaluation.
        trials: that are left to run.
    """
    try:
        found: Footprint = uninterrupted(lambda: ray.get(_measuring(study, prompts=prompts, cpus=share.cpus_per_trial)))
        nodes = gpu_nodes(ray.nodes())
        found = replace(found, total=min([found.total, *uninterrupted(lambda: _sizes(nodes))]))
    except Exception as error:  # whatever it is, no search ends for it
        choice = shares.whole(f"what one takes is not known: {message_of(_cause(error))}")
    else:
        choice = shares.choose(
            found,
            cores=cores_for(nodes, cpus_per_trial=share.cpus_per_trial),
            wanted=wanted_for(study, share, gpus=sum(node["GPU"] for node in nodes), trials=trials),
        )
    return _settled(study, share, choice, ray.cluster_resources()), choice


def _cause(error: Exception) -> Exception:
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error


def _settled(study: Study, share: Share, choice: Choice, have: Mapping[str, float]) -> Share:
    """Return a share with what was chosen, and as many trials at once as that allows."""
    wanted = study.resources.model_copy(update={"use_gpu": True, "gpus_per_trial": choice.share})
    cpus, gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
    trials = resolve(wanted, cpus=cpus, gpus=gpus, may_grow=True).concurrent_trials
    # Machines that were idle meanwhile may be gone, and come again.
    trials = max(trials, share.concurrent_trials) if wanted.concurrent_trials == "auto" else trials
    return replace(share, gpus_per_trial=choice.share, beside=choice.beside, concurrent_trials=trials)


def gpu_nodes(nodes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return id, CPUs and GPUs of each machine that is up and has GPUs, given what `ray.nodes` says."""
    return [
        {"id": node["NodeID"], "CPU": int(node["Resources"].get("CPU", 0)), "GPU": int(node["Resources"]["GPU"])}
        for node in nodes
        if node["Alive"] and node["Resources"].get("GPU", 0) >= 1
    ]


def cores_for(nodes: Sequence[Mapping[str, Any]], *, cpus_per_trial: int) -> int:
    """Return for how many trials a GPU the cores are enough, on the machine that has fewest for each."""
    return min((node["CPU"] // cpus_per_trial // node["GPU"] for node in nodes), default=1)


def wanted_for(study: Study, share: Share, *, gpus: int, trials: int) -> int:
    """Return how many trials there may be for a GPU with none left without.

    A cluster that grows will have as many GPUs as the study asks for workers.
    """
    return shares.for_each_gpu(study.resources.concurrent_trials, trials=trials, gpus=max(gpus, share.num_workers))


def _measuring(study: Study, *, prompts: int, cpus: int) -> ray.ObjectRef[Any]:
    # Its process ends with it, and gives the GPU's memory back.
    task = ray.remote(num_gpus=1, num_cpus=cpus, max_calls=1, max_retries=0)(_measured)
    return task.remote(study.model_dump_json(), prompts, cpus)


def _measured(study: str, prompts: int, threads: int) -> Footprint:
    """Measure in a process of Ray's that has a GPU. Errors: Unknown."""
    import torch

    from raybd.train.footprint import CudaMeter, measure

    logging.getLogger().setLevel(logging.WARNING)
    # A GPU that hangs would keep the search waiting for ever.
    faulthandler.dump_traceback_later(_MEASURE_SECONDS, file=2, exit=True)
    try:
        device = torch.device("cuda")
        found = Study.model_validate_json(study)
        return measure(found, prompts=prompts, device=device, meter=CudaMeter(device), threads=threads)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _sizes(nodes: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the bytes of the smallest GPU of each machine, at work or not. Errors: RayError."""
    look = ray.remote(num_gpus=0, num_cpus=0, max_calls=1, max_retries=0)(_smallest)
    there = [NodeAffinitySchedulingStrategy(node["id"], soft=False) for node in nodes]
    found: list[int] = ray.get([look.options(scheduling_strategy=at).remote() for at in there], timeout=_LOOK_SECONDS)
    return found


def _smallest() -> int:
    # Ray shows none to who asks for none; this takes no memory of them.
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    import torch

    return min(torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count()))
