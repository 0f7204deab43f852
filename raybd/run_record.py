"""The record of a run directory, `study.json`: its study, every default resolved, and what it was made with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from raybd.errors import DataError
from raybd.store import Store

NAME = "study.json"
_KINDS: dict[str, type] = {
    "study": dict,
    "hash": str,
    "kind": str,
    "pretrain_ids": dict,
    "environment": dict,
    "created": str,
    "gpu_share": dict,
}


def read(store: Store) -> dict[str, Any]:
    """Return the record of a run directory, which has a study. Errors: DataError where there is none."""
    where = store.path(NAME)
    if not store.exists(NAME):
        raise DataError(
            f"not a run directory: it has no {NAME}", where=where, fix="give the folder that `raybd run` made"
        )
    try:
        record = json.loads(store.get(NAME))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not readable as JSON: {error}", where=where) from None
    if not isinstance(record, dict):
        raise DataError("holds no resolved study", where=where, expected='{"study": {...}, "hash": ..., ...}')
    require(record, ("study",), where=where)
    return record


def update(store: Store, **parts: object) -> None:
    """Put parts into the record of a run directory. Errors: DataError where there is none."""
    store.put(NAME, json.dumps({**read(store), **parts}, indent=1).encode())


def require(record: Mapping[str, Any], needs: Sequence[str], *, where: str) -> None:
    """Raise DataError where a record lacks something that it must have, or has it of another kind."""
    for name, kind in _KINDS.items():
        if not isinstance(record.get(name, kind()), kind) or (name in needs and name not in record):
            got = repr(record.get(name, "missing"))[:80]
            raise DataError(f"{name} is {got}", where=where, expected="an object" if kind is dict else "text")
