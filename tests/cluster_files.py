"""The cluster files that come along, filled in as their comments ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
FILES = {
    "aws": ROOT / "cluster.yaml",
    "gcp": ROOT / "search_spaces" / "cluster" / "gcp.yaml",
    "local": ROOT / "search_spaces" / "cluster" / "local.yaml",
}
FILLED = {
    "BUCKET": "mine",
    "AMI_ID": "ami-03cf127a",
    "PROJECT_ID": "some-project",
    "sourceImage: IMAGE": "sourceImage: projects/some/global/images/one",
    "HEAD_ADDRESS": "192.0.2.1",
    "WORKER_ADDRESS": "192.0.2.2",
    "USER_NAME": "me",
}


def filled(name: str) -> str:
    """Return the text of a file that comes along as a user would have it."""
    text = FILES[name].read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines) + "\n"
    for word, value in FILLED.items():
        text = text.replace(word, value)
    return text


def config(name: str) -> dict[str, Any]:
    """Return the same as data."""
    found = yaml.safe_load(filled(name))
    assert isinstance(found, dict)
    return found
