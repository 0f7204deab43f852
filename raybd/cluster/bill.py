"""What a study takes on the machines of a cluster file: hours, machine-hours and money, before any is started."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raybd.cluster.node_types import Machines, NodeType, taken
from raybd.errors import ClusterError

if TYPE_CHECKING:
    from raybd.cluster.session import Share  # imports ray


@dataclass(frozen=True)
class Stage:
    """Pretraining of all objectives, or the whole search, while all machines that it can use are up.

    Attributes:
        at_once: pretraining workers or trials that find a place at the same time.
        machines: how many of each node type beside the head hold them; empty where it is not known what a machine has.
        hours: wall time; None where no speed is known.
    """

    name: str
    at_once: int
    machines: Mapping[str, int]
    hours: float | None


@dataclass(frozen=True)
class Bill:
    """What a study takes on a cluster.

    Attributes:
        hours: wall time of all stages; None where no speed is known.
        machine_hours: by node type, the head's too; None where no speed is known, or what a machine has.
        prices: USD for an hour of a machine, by node type, of those that are used.
        unpriced: node types that are used and have no price.
        dollars: None where one of these is missing.
    """

    stages: tuple[Stage, ...]
    hours: float | None
    machine_hours: Mapping[str, float] | None
    prices: Mapping[str, float]
    unpriced: tuple[str, ...]
    dollars: float | None


def make(machines: Machines, share: Share, work: Mapping[str, float | None]) -> Bill:
    """Return what a study takes.

    Of the node types that fit, the ones that cost least for each worker or trial are taken, where all have prices.

    Args:
        share: of the study, see `fit.share_at_start`.
        work: device-hours of "pretrain" and, if there is one, of "clean"; None where no speed is known.

    Errors: ClusterError where a stage finds no place on any machine.
    """
    needs = {
        "pretrain": (share.num_workers, share.cpus_per_worker, 1.0 if share.use_gpu else 0.0),
        "clean": (share.concurrent_trials, share.cpus_per_trial, share.gpus_per_trial),
    }
    stages = tuple(_stage(machines, name, hours, *needs[name]) for name, hours in work.items())
    hours = added(stage.hours for stage in stages)
    head = next((kind.name for kind in machines.kinds if kind.head), None)
    used = list(dict.fromkeys(name for stage in stages for name in stage.machines))
    if head is not None and machines.described:
        used.append(head)
    unpriced = tuple(name for name in used if name not in machines.prices)
    machine_hours = None
    if hours is not None and machines.described:
        spent = {name: sum(stage.machines.get(name, 0) * (stage.hours or 0) for stage in stages) for name in used}
        machine_hours = spent | ({head: spent[head] + hours} if head is not None else {})
    dollars = None
    if machine_hours is not None and not unpriced:
        dollars = sum(found * machines.prices[name] for name, found in machine_hours.items())
    prices = {name: machines.prices[name] for name in used if name in machines.prices}
    return Bill(stages, hours, machine_hours, prices, unpriced, dollars)


def _stage(machines: Machines, name: str, work: float | None, wanted: int, cpus: int, gpus: float) -> Stage:
    """Place as many as find room, and count how long that takes."""
    if not machines.described:
        return Stage(name, wanted, {}, _hours(work, wanted, gpus))
    # The head is there anyway.
    placed, used = sum(kind.holds(cpus, gpus) for kind in machines.kinds if kind.head), {}
    fitting = [kind for kind in machines.kinds if kind.holds(cpus, gpus)]
    for kind, there in taken(sorted(fitting, key=lambda kind: _worth(machines, kind, cpus, gpus)), machines.most):
        if placed < wanted:
            used[kind.name] = min(there, math.ceil((wanted - placed) / kind.holds(cpus, gpus)))
            placed += used[kind.name] * kind.holds(cpus, gpus)
    at_once = int(min(placed, wanted))
    if not at_once:
        raise ClusterError(
            f"no machine has room for {'a pretraining worker' if name == 'pretrain' else 'a trial'}",
            where="--cluster",
            fix="`raybd validate` with --study says what to change",
        )
    return Stage(name, at_once, used, _hours(work, at_once, gpus))


def _worth(machines: Machines, kind: NodeType, cpus: int, gpus: float) -> float:
    """Return what to take first by: the price for each that fits; where prices are missing, the largest machines."""
    holds = kind.holds(cpus, gpus)
    if all(other.name in machines.prices for other in machines.kinds if not other.head and other.most):
        return machines.prices.get(kind.name, 0.0) / holds
    return -holds


def _hours(work: float | None, at_once: int, gpus: float) -> float | None:
    """Return wall hours of device-hours: a share of a GPU is so much of a device."""
    return None if work is None else work / (at_once * (gpus or 1.0))


def added(values: Iterable[float | None]) -> float | None:
    """Return a sum, None where one of its parts is not known."""
    found = list(values)
    return None if None in found else sum(value for value in found if value is not None)
