"""A Ray cluster of several nodes on this machine, kept by a process of its own.

A process that has asked a head for anything dies with it, so the harness does not: it speaks with the keeper in lines
of JSON. The keeper (this file, run as a module) holds a `ray.cluster_utils.Cluster`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.processes import start

NODES = 3
_OBJECT_STORE = 80 * 1024**2


@dataclass(frozen=True)
class Node:
    """A node by the processes that make it: its raylet, and the GCS where it is the head."""

    raylet: int
    gcs: int | None


class ClusterProcess:
    """A running cluster: a head without CPUs and some nodes of one CPU.

    Args:
        port: of the GCS, so that a cluster made anew has the address of the one before.
        environment: of the keeper and so of every process of the cluster.
        log: file that takes what Ray prints.
    """

    def __init__(self, port: int, environment: dict[str, str], log: Path) -> None:
        self._keeper = start("tests.chaos.cluster", str(port), environment=environment, log=log)
        answer = self._answer()
        self.address: str = answer["address"]
        self.head, *self.nodes = [Node(**node) for node in answer["nodes"]]

    def replace_node(self, raylet: int) -> None:
        """Let a new node join in the place of the one whose raylet was killed."""
        _, *self.nodes = [Node(**node) for node in self._ask(str(raylet))["nodes"]]

    def stop(self) -> None:
        """End what is left of the cluster."""
        if self._keeper.poll() is None:
            assert self._keeper.stdin is not None
            self._keeper.stdin.close()
            self._keeper.wait(timeout=60)

    def _ask(self, request: str) -> dict[str, Any]:
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(request + "\n")
        self._keeper.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._keeper.stdout is not None
        line = self._keeper.stdout.readline()
        if not line:
            raise RuntimeError(f"the keeper of the cluster ended with code {self._keeper.wait()}")
        return dict(json.loads(line))


def _keep(port: int) -> None:
    """Start a cluster and do as the lines of standard input say, until they end."""
    from ray.cluster_utils import Cluster

    # Ray prints to standard output as well, which is for answers here.
    answers, sys.stdout = sys.stdout, sys.stderr
    cluster = Cluster()
    same = {"object_store_memory": _OBJECT_STORE, "include_dashboard": False}
    cluster.add_node(num_cpus=0, gcs_server_port=port, **same)
    nodes: list[Any] = []

    def fill() -> None:
        while len(nodes) < NODES:
            nodes.append(cluster.add_node(num_cpus=1, **same))

    def pid(node: Any, kind: str) -> int | None:
        found = node.all_processes.get(kind)
        return found[0].process.pid if found else None

    def tell() -> None:
        known = [
            {"raylet": pid(node, "raylet"), "gcs": pid(node, "gcs_server")} for node in (cluster.head_node, *nodes)
        ]
        answers.write(json.dumps({"address": cluster.address, "nodes": known}) + "\n")
        answers.flush()

    fill()
    tell()
    for raylet in map(int, sys.stdin):
        for node in [node for node in nodes if pid(node, "raylet") == raylet]:
            # A dead process that nobody has waited for still is one: its workers would take it for alive.
            node.all_processes["raylet"][0].process.wait()
            cluster.remove_node(node, allow_graceful=False)
            nodes.remove(node)
        fill()
        tell()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    _keep(int(sys.argv[1]))
