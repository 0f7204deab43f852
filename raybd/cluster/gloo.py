"""Which network pretraining workers meet on where they compute on CPUs: the one on which Ray's nodes do."""

from __future__ import annotations

import logging
import os
import socket
import struct
from fcntl import ioctl
from typing import Any

import ray
from ray.train.torch import TorchConfig

log = logging.getLogger(__name__)

_SIOCGIFADDR = 0x8915  # of Linux: the address of an interface


class GlooConfig(TorchConfig):
    """Ray Train's set-up of gloo, for workers on machines whose own names lead to a loopback address.

    Gloo tells the others the address that a machine's name has for itself. As Debian and Ubuntu install it, that is
    127.0.1.1, which no other machine reaches.
    """

    @property
    def backend_cls(self) -> Any:
        """Return Ray's class for it, with one step before."""
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        warn_of_unknown(worker_group.execute(_meet_on_rays_network))
        super().on_start(worker_group, backend_config)


def _meet_on_rays_network() -> tuple[str, str | None]:
    """Return the node's address, and the interface on which this worker meets others, if it is known."""
    address = ray.util.get_node_ip_address()
    if name := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return address, os.environ.get("GLOO_SOCKET_IFNAME")


def warn_of_unknown(found: list[tuple[str, str | None]]) -> None:
    """Name the addresses of nodes whose interface is not known, where workers are on several nodes.

    Args:
        found: address and interface of each worker's node.
    """
    unknown = sorted({address for address, name in found if name is None})
    if unknown and len({address for address, _ in found}) > 1:
        log.warning(
            "no network interface is known for %s: gloo takes the one that the machine's name leads to; if workers do "
            "not meet, set GLOO_SOCKET_IFNAME there",
            ", ".join(unknown),
        )


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an IPv4 address, on Linux; None where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                found = ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
