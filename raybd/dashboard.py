"""optuna-dashboard on a run: its Optuna studies rebuilt in memory from ledger or tables, and kept up to date.

A run keeps no Optuna storage: the ledger has all that one would. What is changed in the dashboard goes with it.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from raybd import curves, failures, run_record
from raybd.assignment import point
from raybd.cluster.history import DIRECTIONS, distribution, told
from raybd.errors import ClusterError, DataError
from raybd.ledger import Entry, Kind, Ledger, State, reading
from raybd.plain import plain
from raybd.space import Value
from raybd.store import Store
from raybd.study import Study, Tell

log = logging.getLogger(__name__)

_NAMES = ("accuracy", "ASR")
_LEAVING_SECONDS = 5.0
_WIDE = 50  # from the lowest value to the highest: beyond, an axis is logarithmic


class Mirror:
    """The Optuna studies of a run, one for each pretrain objective, in a storage in memory.

    Values are what the search told Optuna of a trial (`cluster.history.told`); a trial under way has none yet. Beside
    them stand accuracy and ASR of each epoch (search half), and its accuracy x (1 - ASR) as intermediate values.

    Attributes:
        storage: of Optuna.

    Errors: DataError where the run has neither ledger nor finished trials in its tables, or they are not those of a
        run.
    """

    def __init__(self, store: Store) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = InMemoryStorage()
        self._ledger = Ledger(store)
        self._studies: dict[str, int] = {}
        self._open: dict[str, int] = {}  # trials that have not ended, with their ids in the storage
        self._ended, self._said = set[str](), set[str]()
        record = run_record.read(store)
        self._name = plain(record["study"].get("name", "run"))
        if self._ledger.ids(Kind.TRIAL) or record.get("kind", "study") in ("study", "replay"):
            try:
                self._study = Study.model_validate(record["study"])
            except ValidationError as error:
                raise DataError(
                    f"its study is not one of this raybd: {error.errors()[0]['msg']}", where=store.uri
                ) from None
            for objective in self._study.pretrain.objectives:
                self._study_id(objective)
            for entry in self._ledger.entries(Kind.TRIAL):
                self._take(entry)
        else:
            self._take_curves(curves.read(store.uri))

    def update(self) -> None:
        """Take over what has happened since; a trial that cannot be taken over costs no other."""
        for name in self._ledger.ids(Kind.TRIAL):
            if name in self._ended:
                continue
            try:
                self._take(self._ledger.entry(Kind.TRIAL, name))
            except Exception as error:  # of records, or of the storage: one may end and delete in the dashboard too
                self.warn(error)

    def warn(self, error: Exception) -> None:
        """Say once that something is not up to date."""
        text = f"{type(error).__name__}: {error}"
        if text not in self._said:
            self._said.add(text)
            log.warning("the dashboard is not up to date: %s", text)

    def _study_id(self, objective: str) -> int:
        if objective not in self._studies:
            directions = [StudyDirection[direction.upper()] for direction in DIRECTIONS]
            study_id = self.storage.create_new_study(directions, f"{self._name}: {plain(objective)}")
            self.storage.set_study_system_attr(study_id, "study:metric_names", list(_NAMES))
            self._studies[objective] = study_id
        return self._studies[objective]

    def _take(self, entry: Entry) -> None:
        """Take over a trial of the ledger. Errors: DataError where it is none of this study."""
        with reading(f"ledger/trials/{entry.id}"):
            params, rule = entry.started["params"], self._study.search.tell
            ranges = {name: distribution(name, self._study.search.space[name]) for name in params}
            trial = _trial(entry, rule, params, ranges)
            objective = str(entry.started["objective"])
        if entry.id not in self._open:
            self._open[entry.id] = self.storage.create_new_trial(self._study_id(objective), template_trial=trial)
        else:
            number = self._open[entry.id]
            for epoch, value in trial.intermediate_values.items():
                self.storage.set_trial_intermediate_value(number, epoch, value)
            for name, value in trial.user_attrs.items():
                self.storage.set_trial_user_attr(number, name, value)
            if trial.state.is_finished():
                self.storage.set_trial_state_values(number, trial.state, _told(entry, rule)[1])
        if entry.ended is not None:
            self._ended.add(entry.id)
            del self._open[entry.id]

    def _take_curves(self, found: Sequence[curves.Curve]) -> None:
        """Take over trials that others ran: of their settings those that differ among them."""
        for objective in sorted({curve.objective for curve in found}):
            own = [curve for curve in found if curve.objective == objective]
            settings = [{"method": curve.method, **curve.settings} for curve in own]
            ranges = _ranges(settings)
            for curve, known in zip(own, settings, strict=True):
                entry = Entry(
                    curve.trial_id, {"method": curve.method}, 1, dict(curve.epochs), {"state": State.COMPLETE}
                )
                params = {name: known[name] for name in ranges if name in known}
                trial = _trial(entry, Tell.LARGEST_AREA, params, {name: ranges[name] for name in params})
                self.storage.create_new_trial(self._study_id(objective), template_trial=trial)


def _trial(
    entry: Entry, rule: Tell, params: Mapping[str, Value], ranges: Mapping[str, BaseDistribution]
) -> FrozenTrial:
    """Return a trial as Optuna has it, of the times that it had."""
    state, values = _told(entry, rule)
    return FrozenTrial(
        number=0,  # the storage gives it
        state=state,
        value=None,
        values=values,
        datetime_start=_time(entry.started.get("started")),
        datetime_complete=_time((entry.ended or {}).get("ended")),
        params=dict(params),
        distributions=dict(ranges),
        user_attrs=_attributes(entry),
        system_attrs={},
        intermediate_values={epoch: top1 * (1 - asr) for epoch, (top1, asr) in _points(entry).items()},
        trial_id=0,
    )


def _time(text: str | None) -> datetime | None:
    """Return a time as Optuna has it: of this machine's zone, which it does not name."""
    return datetime.fromisoformat(text).astimezone().replace(tzinfo=None) if text else None


def _told(entry: Entry, rule: Tell) -> tuple[TrialState, list[float] | None]:
    """Return state and values of a trial as Optuna has them: while it waits at a rung nothing is said yet."""
    if entry.ended is None:
        return TrialState.RUNNING, None
    values = told(entry, rule)
    return (TrialState.FAIL, None) if values is None else (TrialState.COMPLETE, list(values))


def _points(entry: Entry) -> dict[int, tuple[float, float]]:
    return {epoch: point(record) for epoch, record in sorted(entry.epochs.items())}


def _attributes(entry: Entry) -> dict[str, Any]:
    """Return what stands beside a trial's values."""
    found: dict[str, Any] = {"trial": entry.id, "method": str(entry.started["method"])}
    found["state"] = str(entry.ended["state"]) if entry.ended else "waits at a rung" if entry.waits else "running"
    for name in ("stop_reason", "error_type", "error_message"):
        if entry.ended and entry.ended.get(name):
            found[name] = failures.one_line(str(entry.ended[name]))
    points = _points(entry)
    found["accuracy by epoch"] = ", ".join(f"{epoch}: {top1:.2%}" for epoch, (top1, _) in points.items())
    found["ASR by epoch"] = ", ".join(f"{epoch}: {asr:.2%}" for epoch, (_, asr) in points.items())
    return {name: plain(value) for name, value in found.items()}


def _ranges(settings: Iterable[Mapping[str, Value]]) -> dict[str, BaseDistribution]:
    """Return the range of each setting that has more than one value."""
    values: dict[str, set[Value]] = {}
    for known in settings:
        for name, value in known.items():
            values.setdefault(name, set()).add(value)
    return {name: _range(found) for name, found in values.items() if len(found) > 1}


def _range(values: set[Value]) -> BaseDistribution:
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values):
        return CategoricalDistribution(sorted(map(str, values)))
    low, high = min(numbers), max(numbers)
    wide = low > 0 and high / low > _WIDE
    if all(isinstance(value, int) for value in numbers):
        return IntDistribution(int(low), int(high), log=wide)
    return FloatDistribution(low, high, log=wide)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests."""


@contextmanager
def serving(store: Store, *, host: str, port: int, every: float) -> Iterator[WSGIServer]:
    """Return a server of optuna-dashboard on a run, to be started, and follow the run for the length of a `with`.

    Args:
        port: 0 takes any that is free.
        every: seconds between two looks at the ledger.

    Errors: ClusterError where optuna-dashboard is not installed, or the port is taken; as of `Mirror`.
    """
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise ClusterError(
            "optuna-dashboard is not installed", fix='pip install "raybd[dashboard]" (or optuna-dashboard)'
        )
    import optuna_dashboard

    mirror = Mirror(store)
    app = optuna_dashboard.wsgi(mirror.storage)
    try:
        server = make_server(host, port, app, server_class=_Server, handler_class=_Quiet)
    except OSError as error:
        raise ClusterError(
            f"cannot listen: {error.strerror}", where=f"{host}:{port}", fix="give another --port"
        ) from None
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(mirror, stop, every), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        server.server_close()
        thread.join(_LEAVING_SECONDS)


def _follow(mirror: Mirror, stop: threading.Event, every: float) -> None:
    while not stop.wait(every):
        try:
            mirror.update()
        except Exception as error:  # the storage of the run may answer again
            mirror.warn(error)
