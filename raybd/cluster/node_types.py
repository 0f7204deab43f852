"""What the machines of a cluster file have, as far as it can be told without asking the cloud."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Ray takes so many where a file does not say: its defaults.yaml of each cloud.
_RAYS_MAX_WORKERS = 2
# vCPUs follow from the size: 4 for each "xlarge". GPUs by family and number of "xlarge"s.
_AWS_SIZE = re.compile(r"([a-z]+\d+[a-z]*)\.(?:(\d*)xlarge|large)")
_AWS_NO_GPU = re.compile(r"[cmr][5-8][a-z]*")
_ONE_TO_EIGHT = {1: 1, 2: 1, 4: 1, 8: 1, 16: 1, 12: 4, 24: 4, 48: 8}
_AWS_GPUS = {
    "g4dn": {1: 1, 2: 1, 4: 1, 8: 1, 16: 1, 12: 4},
    "g5": _ONE_TO_EIGHT,
    "g6": _ONE_TO_EIGHT,
    "g6e": _ONE_TO_EIGHT,
    "p3dn": {24: 8},
    "p4d": {24: 8},
    "p4de": {24: 8},
    "p5": {4: 1, 48: 8},
    "p5e": {48: 8},
    "p5en": {48: 8},
}


def aws_machine(instance_type: str) -> tuple[int, int] | None:
    """Return vCPUs and GPUs of an EC2 instance type, None of one that is not known here."""
    size = _AWS_SIZE.fullmatch(instance_type)
    if size is None:
        return None
    times = int(size[2] or 1) if size[2] is not None else 0
    if _AWS_NO_GPU.fullmatch(size[1]):
        return (4 * times or 2), 0
    gpus = _AWS_GPUS.get(size[1], {}).get(times)
    return None if gpus is None else (4 * times, gpus)


@dataclass(frozen=True)
class NodeType:
    """One node type: what a machine of it has, and how many there may be.

    Attributes:
        machine: the cloud's name of it, "" where there is none.
        cpus, gpus: None where they cannot be told.
        custom: custom resources, with more than none of them.
        least, most: machines beside the head, as the type itself has it; infinity where it sets no limit.
        head: whether the head is one.
    """

    name: str
    machine: str
    cpus: int | None
    gpus: int | None
    custom: frozenset[str]
    least: int
    most: float
    head: bool

    def holds(self, cpus: int, gpus: float) -> float:
        """Return how many times so many CPUs and GPUs fit on a machine; infinity where nothing can be told."""
        fits = math.inf if self.cpus is None or not cpus else self.cpus // cpus
        if gpus and self.gpus is not None:
            # A fraction is of one GPU: what is left over on several adds up to nothing.
            fits = min(fits, self.gpus * int(1 / gpus + 1e-9) if gpus < 1 else self.gpus // int(gpus))
        return fits

    def describe(self) -> str:
        """Return name, machine and what it has, in words."""
        has = [
            f"{count or 'no'} {what}{'s' if count > 1 else ''}"
            for count, what in ((self.cpus, "CPU"), (self.gpus, "GPU"))
            if count is not None
        ]
        machine = f" ({self.machine})" if self.machine else ""
        return f"{self.name}{machine}: {' and '.join(has) or 'what it has is not known here'}"


@dataclass(frozen=True)
class Machines:
    """All machines that a file allows.

    Attributes:
        most: how many beside the head.
        prices: USD for an hour of a machine, by node type, as far as they are known.
    """

    kinds: tuple[NodeType, ...]
    most: int
    prices: Mapping[str, float]

    @property
    def described(self) -> bool:
        """Whether it is known of each machine what it has."""
        return all(kind.cpus is not None and kind.gpus is not None for kind in self.kinds)


def max_workers(config: Mapping[str, Any]) -> int:
    """Return how many machines a file allows beside the head."""
    provider = config["provider"]
    given = whole(config.get("max_workers"))
    if provider.get("type") != "local" or "worker_ips" not in provider:
        return _RAYS_MAX_WORKERS if given is None else given
    there = len(provider["worker_ips"])
    return there if given is None else min(given, there)


def node_types(config: Mapping[str, Any]) -> tuple[NodeType, ...]:
    """Return the node types of a file that Ray's schema allows, the head's first.

    With `provider: local` machines are as they are: a head and workers, of which nothing is known but their number.
    """
    if config["provider"].get("type") == "local":
        most = max_workers(config)
        least = whole(config.get("min_workers"))
        least = most if least is None else min(least, most)
        return (
            NodeType("head", "", None, None, frozenset(), least=0, most=0, head=True),
            NodeType("workers", "", None, None, frozenset(), least=least, most=most, head=False),
        )
    found = [_node_type(name, given, config) for name, given in (config.get("available_node_types") or {}).items()]
    return tuple(sorted(found, key=lambda kind: not kind.head))


def _node_type(name: str, given: Mapping[str, Any], config: Mapping[str, Any]) -> NodeType:
    cloud, node, resources = config["provider"].get("type"), given["node_config"], given["resources"]
    machine = node.get("InstanceType") or node.get("machineType") or ""
    machine = machine if isinstance(machine, str) else ""
    known = aws_machine(machine) if cloud == "aws" else None
    if known is None and cloud == "gcp":
        known = (0, 0)  # Ray asks Google nothing: what is not written down is not there
    cpus, gpus = known or (None, None)
    head = name == config.get("head_node_type")
    own = whole(given.get("max_workers"))
    return NodeType(
        name=name,
        machine=machine,
        cpus=_first(whole(resources.get("CPU")), cpus),
        gpus=_first(whole(resources.get("GPU")), gpus),
        custom=frozenset(custom(resources)),
        least=whole(given.get("min_workers")) or 0,
        most=own if own is not None else 0 if head else math.inf,
        head=head,
    )


def prices(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a file says an hour of a machine costs, by node type: `metadata.prices`."""
    given = metadata(config, "prices")
    if isinstance(given, dict):
        yield from given.items()


def metadata(config: Mapping[str, Any], key: str, default: object = None) -> Any:
    """Return what a file says of its own under `metadata`, which Ray passes over; the default where it says nothing."""
    found = config.get("metadata")
    return found.get(key, default) if isinstance(found, dict) else default


def custom(resources: Mapping[str, Any]) -> list[str]:
    """Return the names of custom resources of which there are some."""
    own = ("CPU", "GPU", "TPU", "memory", "object_store_memory")
    return [
        name
        for name, amount in resources.items()
        if name not in own and not name.startswith(("accelerator_type:", "node:")) and _some(amount)
    ]


def _some(amount: object) -> bool:
    return isinstance(amount, int | float) and not isinstance(amount, bool) and amount > 0


def whole(value: object) -> int | None:
    """Return a whole number as one; JSON's schemas take 2.0 for one too."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or math.isinf(value):
        return None
    return int(value) if value == int(value) else None


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def room(kinds: Iterable[NodeType], most: int, *, cpus: int, gpus: float) -> float:
    """Return how many times so many CPUs and GPUs fit on a whole cluster: its head, and `most` machines beside it."""
    kinds = tuple(kinds)
    largest = sorted(kinds, key=lambda kind: kind.holds(cpus, gpus), reverse=True)
    heads = sum(kind.holds(cpus, gpus) for kind in kinds if kind.head)
    return heads + sum(count * kind.holds(cpus, gpus) for kind, count in taken(largest, most))


def taken(kinds: Iterable[NodeType], most: int) -> Iterator[tuple[NodeType, int]]:
    """Yield how many machines of each node type there may be beside the head, the first types before the others."""
    for kind in kinds:
        count = int(min(kind.most, most))
        if count > 0:
            yield kind, count
            most -= count
