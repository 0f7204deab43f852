"""Whether the machines of a cluster file can carry a study."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raybd.cluster.node_types import NodeType, max_workers, room
from raybd.cluster.session import Share, resolve
from raybd.study import Study
from raybd.study.mistakes import Place
from raybd.study_file import embedded

_MOST = 1_000_000  # machines


def share_at_start(study: Study, kinds: Sequence[NodeType]) -> Share:
    """Return what a study takes of the cluster as it is when the study connects: the head, and least workers."""
    there = [(1 if kind.head else 0) + kind.least for kind in kinds]
    return resolve(
        study.resources,
        cpus=sum(count * (kind.cpus or 0) for count, kind in zip(there, kinds, strict=True)),
        gpus=sum(count * (kind.gpus or 0) for count, kind in zip(there, kinds, strict=True)),
        may_grow=True,
    )


def misfits(
    study: Study, share: Share, kinds: Sequence[NodeType], config: Mapping[str, Any]
) -> Iterator[tuple[Place, str]]:
    """Yield what of a study would never find a place, and would wait for ever: where, a sentence that says what to do.

    Args:
        share: of the study, see `share_at_start`.
    """
    usable = [kind for kind in kinds if kind.head or kind.most]
    at: Place = ("available_node_types",)
    if study.resources.use_gpu == "auto" and not share.use_gpu and any(kind.gpus for kind in usable):
        yield (
            at,
            (
                "the study's resources.use_gpu is auto, and no machine with a GPU is there at the start: it would run "
                "on the head's CPUs; call it with --set resources.use_gpu=true"
            ),
        )
    trial = (share.cpus_per_trial, share.gpus_per_trial)
    if not any(kind.holds(*trial) for kind in usable):
        yield at, f"no node type fits a trial of {_amount(*trial)} ({_list(usable)}): {_instead(share, 'trial')}"
    worker = (share.cpus_per_worker, 1.0 if share.use_gpu else 0.0)
    if not any(kind.holds(*worker) for kind in usable):
        yield (
            at,
            f"no node type fits a pretraining worker of {_amount(*worker)} ({_list(usable)}): "
            + _instead(share, "worker"),
        )
        return
    most = max_workers(config)
    fits = room(kinds, most, cpus=worker[0], gpus=worker[1])
    if fits < share.num_workers:
        place, fix = _more(kinds, share, worker)
        yield (
            place,
            (
                f"{int(fits)} of {share.num_workers} pretraining workers of {_amount(*worker)} fit, and they start "
                f"together or not at all: {fix}" + (f", or --set resources.num_workers={int(fits)}" if fits else "")
            ),
        )


def _more(kinds: Sequence[NodeType], share: Share, worker: tuple[int, float]) -> tuple[Place, str]:
    """Return the setting that keeps pretraining workers out, and what to make of it."""

    def fits(machines: int) -> int:
        return int(min(room(kinds, machines, cpus=worker[0], gpus=worker[1]), share.num_workers))

    # A machine more is a worker more at least, or never.
    machines = bisect_left(range(_MOST), share.num_workers, key=fits)
    if machines < _MOST:
        return ("max_workers",), f"raise it to {machines}"
    best = max(kinds, key=lambda kind: not kind.head and kind.holds(*worker))
    if best.head or not best.holds(*worker):
        return ("available_node_types",), "no node type but the head's has room for one, add one"
    count = int(min(best.most, _MOST)) + math.ceil((share.num_workers - fits(_MOST)) / best.holds(*worker))
    return ("available_node_types", best.name, "max_workers"), (
        f"raise it to {count}, and max_workers of the cluster with it"
    )


def notes(study: Study, share: Share, kinds: Sequence[NodeType], *, machines: int) -> Iterator[str]:
    """Yield what is no mistake, but should be known before it costs money.

    Args:
        machines: how many there may be beside the head.
    """
    for kind in kinds:
        if kind.cpus is None or (kind.gpus is None and not kind.head):
            yield (
                f"{kind.describe()}: whether the study fits is not known before; give resources: {{CPU: …, GPU: …}}"
                if kind.machine
                else f"{kind.describe()}: whether the study fits on a machine shows when it runs"
            )
    autos = [
        name
        for name in ("num_workers", "cpus_per_worker", "concurrent_trials")
        if getattr(study.resources, name) == "auto"
    ]
    if machines and autos and any(kind.most > kind.least for kind in kinds):
        settled = ", ".join(f"resources.{name}={getattr(share, name)}" for name in autos)
        yield f"auto counts what is there at the start: {settled}; say more with --set"
    root = study.data.root
    if machines and "://" not in root and not embedded(root):
        yield f"data.root={root} is a folder: all machines must have it, or call with --set data.root=s3://…"


def describe(study: Study, share: Share) -> str:
    """Return what a study takes, in words."""
    workers = f"{share.num_workers} pretraining worker{'s' if share.num_workers > 1 else ''}"
    worker = _amount(share.cpus_per_worker, 0.0) + (" and a GPU" if share.use_gpu else "")
    trials = f"{share.concurrent_trials} trial{'s' if share.concurrent_trials > 1 else ''} at once"
    trial = _amount(share.cpus_per_trial, share.gpus_per_trial)
    if share.use_gpu and study.resources.gpus_per_trial == "auto":
        trial += " at most"  # what it takes is measured before the search
    return f"study {study.name}: {workers} of {worker}, {trials} of {trial}"


def _amount(cpus: int, gpus: float) -> str:
    return f"{cpus} CPU{'s' if cpus > 1 else ''}" + (f" and {gpus:g} GPU" if gpus else "")


def _list(kinds: Sequence[NodeType]) -> str:
    return "; ".join(kind.describe() for kind in kinds)


def _instead(share: Share, who: str) -> str:
    lower = f"--set resources.cpus_per_{who}=…" + (" or resources.use_gpu=false" if share.use_gpu else "")
    return f"take larger machines, or {lower}"
