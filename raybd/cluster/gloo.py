"""Which network pretraining workers meet on where they compute on CPUs: the one on which Ray's nodes do."""

from __future__ import annotations

import os
import socket
import struct
from fcntl import ioctl
from typing import Any

import ray
from ray.train.torch import TorchConfig

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
        worker_group.execute(_meet_on_rays_network)
        super().on_start(worker_group, backend_config)


def _meet_on_rays_network() -> None:
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


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
