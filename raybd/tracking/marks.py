"""What trackers that keep their runs elsewhere have been given, noted in the run directory."""

from __future__ import annotations

import json
from typing import Any

from raybd.errors import DataError
from raybd.store import Store


class Marks:
    """Notes of one tracker: for each series the run that it became, and the last step.

    Args:
        tracker: its name.
    """

    def __init__(self, store: Store, tracker: str) -> None:
        self._store, self._folder = store, f"tracked/{tracker}"
        store.remove_temporaries((self._folder,), files=())
        self._there = set(store.names(self._folder, suffix=".json"))
        self._known: dict[str, dict[str, Any]] = {}

    def last(self, name: str) -> int | None:
        """Return the last step of a series, None if it has none."""
        found = self._get(name)
        return found["step"] if found else None

    def run(self, name: str) -> str | None:
        """Return the id of the run that a series became, None if it has none."""
        found = self._get(name)
        return found["run"] if found else None

    def put(self, name: str, run: str, step: int) -> None:
        """Note that a tracker has a series up to a step."""
        self._known[name] = {"run": run, "step": step}
        self._there.add(self._path(name))
        self._store.put(self._path(name), json.dumps(self._known[name]).encode())

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}.json"

    def _get(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        if name not in self._known and path in self._there:
            try:
                found = json.loads(self._store.get(path))
                self._known[name] = {"run": str(found["run"]), "step": int(found["step"])}
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise DataError(f"no note of a tracker: {error!r}", where=self._store.path(path)) from None
        return self._known.get(name)
