"""Where numbers come from: versions, code, host."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import raybd

_PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "ray", "optuna", "webdataset", "pyarrow", "nltk")
# What a trained weight depends on: a change elsewhere (report, command line) leaves old results valid.
_NUMERIC_CODE = (
    "objectives.py",
    "assignment.py",
    "evaluate.py",
    "model.py",
    "resnet_tiny.py",
    "seeding.py",
    "poison",
    "data",
    "train",
    "clean",
    "model_configs",
)


def digest(value: object, *, length: int = 12) -> str:
    """Return a hexadecimal hash of a JSON-able value; the order of mapping keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@cache
def code_version() -> str:
    """Return `version+hash`, the hash over the source files that a trained weight depends on."""
    root = Path(raybd.__file__).parent
    found = hashlib.sha256()
    for name in _NUMERIC_CODE:
        path = root / name
        for source in sorted(path.rglob("*.json" if name == "model_configs" else "*.py")) if path.is_dir() else [path]:
            found.update(source.relative_to(root).as_posix().encode() + b"\0" + source.read_bytes())
    return f"{raybd.__version__}+{found.hexdigest()[:8]}"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def environment() -> dict[str, Any]:
    """Return versions of Python, the packages that matter and the platform, without importing any of them."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    return {
        "raybd": code_version(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": cores(),
        "packages": versions,
    }
