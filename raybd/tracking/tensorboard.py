"""TensorBoard: event files in `tensorboard/` of the run directory, on a disk or a bucket.

A file is whole or absent, and never changed: what follows stands in a further file of the same folder, named by its
last step. TensorBoard reads them in the order of their names, also while they appear.
"""

from __future__ import annotations

from collections.abc import Iterator

from raybd.store import Store
from raybd.tracking import Series, event_file

FOLDER = "tensorboard"
_PREFIX, _SUFFIX = "events.out.tfevents.", ".raybd"  # TensorBoard knows its files by `tfevents`


class TensorBoard:
    """Event files of a run directory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        store.remove_temporaries((FOLDER,), files=())
        self._last = dict(self._steps())  # files of a series come in the order of their steps

    def _steps(self) -> Iterator[tuple[str, int]]:
        for path in self._store.names(FOLDER, suffix=_SUFFIX):
            series, _, file = path.removeprefix(f"{FOLDER}/").rpartition("/")
            number = file.removeprefix(_PREFIX).removesuffix(_SUFFIX)
            if number.isdecimal():
                yield series, int(number)

    def last(self, name: str) -> int | None:
        """Return the last step that there is a file of."""
        return self._last.get(name)

    def goes_on(self, name: str) -> bool:
        """Return False: event files do not say that a series is over."""
        return False

    def add(self, series: Series) -> None:
        """Write a file."""
        last = series.points[-1].step if series.points else 0
        start = series.points[0].time if series.points else 0.0
        content = [event_file.head(start)]
        if series.settings:
            end = series.points[-1].time if series.points else start
            shown = series.points[-1].values if series.points else ()
            content.append(event_file.hparams(start, end, series.settings, shown, ok=not series.failed))
        content += [event_file.scalars(point.time, point.step, point.values) for point in series.points]
        self._store.put(f"{FOLDER}/{series.name}/{_PREFIX}{last:010d}{_SUFFIX}", b"".join(content))
        self._last[series.name] = last

    def close(self) -> None:
        """Do nothing: every file is whole."""
