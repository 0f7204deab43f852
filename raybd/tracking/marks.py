"""What trackers that keep their runs elsewhere have been given, noted in the run directory."""

from __future__ import annotations

import json
import uuid
from typing import Any

from raybd.errors import DataError
from raybd.provenance import digest
from raybd.store import Store
from raybd.tracking import Series

_FOLDER = "tracked"
_ID = f"{_FOLDER}/id"


class Marks:
    """Notes of one tracker: for each series the last step, and whether it is over.

    What a run directory was copied from, or was at the same place before it, has other keys: its notes do not count.

    Args:
        tracker: its name.
    """

    def __init__(self, store: Store, tracker: str) -> None:
        self._store, self._folder = store, f"{_FOLDER}/{tracker}"
        store.remove_temporaries((_FOLDER,), files=())
        store.put_new(_ID, uuid.uuid4().hex.encode())
        self._id = store.get(_ID).decode(errors="replace")
        self._there = set(store.names(self._folder, suffix=".json"))
        self._known: dict[str, dict[str, Any]] = {}

    def key(self, name: str) -> str:
        """Return what names a series among those of all run directories, always the same."""
        return digest([self._store.uri, self._id, name])

    def last(self, name: str) -> int | None:
        """Return the last step of a series, None if it has none."""
        found = self._get(name)
        return found["step"] if found else None

    def goes_on(self, name: str) -> bool:
        """Say whether a series is there that is not noted as over."""
        found = self._get(name)
        return found is not None and not found["over"]

    def put(self, series: Series) -> None:
        """Note that a tracker has been given these points, or that no more follow."""
        name, step = series.name, series.points[-1].step if series.points else self.last(series.name) or 0
        self._known[name] = {"key": self.key(name), "step": step, "over": series.over}
        self._there.add(self._path(name))
        self._store.put(self._path(name), json.dumps(self._known[name]).encode())

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}.json"

    def _get(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        if name not in self._known and path in self._there:
            try:
                found = json.loads(self._store.get(path))
                if found.get("key") == self.key(name):
                    self._known[name] = {**found, "step": int(found["step"]), "over": bool(found["over"])}
                else:
                    self._there.discard(path)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise DataError(f"no note of a tracker: {error!r}", where=self._store.path(path)) from None
        return self._known.get(name)
