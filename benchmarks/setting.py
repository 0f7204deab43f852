"""When, where and with what a benchmark runs: what its figures are quoted with."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata


def setting(*packages: str, device: str = "no GPU used") -> dict[str, str]:
    """Return the versions of raybd, some packages and Python, the date, and the machine.

    Args:
        device: the GPU's name, if one is used.
    """
    versions = {name: metadata.version(name) for name in ("raybd", *packages)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{cores} cores, {platform.machine()}, {platform.system()}, {device}"
    return {**versions, "python": sys.version.split()[0], "date": f"{datetime.now(UTC):%Y-%m-%d}", "device": machine}
