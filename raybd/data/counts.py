"""How many training pairs a folder of shards has, told before anything is indexed or decoded."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from raybd.study import Data
from raybd.study_file import embedded


def training_pairs(root: str, *, most: int) -> int | None:
    """Return how many training pairs lie where a study's data does by default; None for a bucket, which is not asked.

    The manifest that `raybd data import` writes says it. Without one samples are counted, broken images among them.

    Args:
        root: as in `data.root`.
        most: counting ends there: there may be more.

    Errors: DataError where there are no shards, or one cannot be read.
    """
    if "://" in root:
        return None
    told = _manifest(embedded(root) or Path(root))
    if told is not None:
        return told
    from raybd.data import shards  # what reads shards takes a while to import

    data = Data(root=root)
    found = shards.find_shards(data, data.train, field_name="data.train")
    usable = (1 for url in found for sample in shards.samples(url) if not sample.problem)
    return sum(itertools.islice(usable, most))


def _manifest(root: Path) -> int | None:
    """Return the training samples that a manifest tells; None where there is none that does."""
    try:
        splits: Any = json.loads((root / "manifest.json").read_bytes())["splits"]
        counts = [entry["samples"] for entry in splits["train"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return sum(counts) if all(type(count) is int and count >= 0 for count in counts) else None
