"""Replay: a search's trials take recorded curves in place of training, so that searches can be compared in minutes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from raybd import space as search_space
from raybd import tables
from raybd.assignment import Assignment, Notify, Stops, done_already, point, start_record
from raybd.curves import Curve
from raybd.errors import StudyError
from raybd.ledger import Entry, Kind, Ledger
from raybd.seeding import fork
from raybd.space import Range, Value
from raybd.stopping import Point
from raybd.store import Store
from raybd.study import Sampler, Study

_NEAREST = "lr"
_FIX = "search only what is recorded"


class Recorded:
    """The curves that a study is replayed against.

    A curve answers an assignment if it has its pretrain objective and method, every searched setting, and of the
    settings that tell the remaining curves apart the values that the study has. Settings in which these curves agree
    are theirs, whatever the study says: they are not asked for.

    Args:
        nearest: of a learning rate that no curve has, take the nearest one in the logarithm.
    """

    def __init__(self, curves: Sequence[Curve], *, nearest: bool) -> None:
        self._curves, self._nearest = tuple(curves), nearest

    def pretrain_ids(self, study: Study) -> dict[str, str]:
        """Return which pretrained model the curves of each pretrain objective start from. Errors: StudyError."""
        known: dict[str, set[str]] = {}
        for curve in self._curves:
            known.setdefault(curve.objective, set()).add(curve.pretrain_id)
        found = {}
        for objective in study.pretrain.objectives:
            if objective not in known:
                raise StudyError(
                    f"no curve is recorded for pretrain objective {objective!r}",
                    where="pretrain.objectives",
                    expected=", ".join(sorted(known)),
                )
            if len(known[objective]) > 1:
                raise StudyError(
                    f"the curves of {objective!r} start from several models: {', '.join(sorted(known[objective]))}",
                    where="pretrain.objectives",
                )
            found[objective] = min(known[objective])
        return found

    def check(self, study: Study) -> None:
        """Refuse a study that may draw settings which no curve answers. Errors: StudyError."""
        self.pretrain_ids(study)
        for params in self._drawable(study):
            for objective in study.pretrain.objectives:
                try:
                    study.clean.settings(params)
                except ValidationError:
                    continue  # a trial that cannot start fails, here as in a search that trains
                self.curve(study, objective, params)

    def _drawable(self, study: Study) -> Iterator[Mapping[str, Value]]:
        """Return every combination that may be drawn; of a learning rate with `nearest` one value stands for all."""
        space = {}
        for name, found in study.search.space.items():
            try:
                choices = tuple(found.grid())
            except ValueError:
                if name != _NEAREST or not self._nearest:
                    recorded = sorted({str(c.settings[name]) for c in self._curves if name in c.settings}, key=_order)
                    raise StudyError(
                        f"{name} is drawn from {search_space.describe(found)}, and curves have single values",
                        where=f"search.space.{name}",
                        expected=f"choices among {', '.join(recorded) or 'nothing: no curve says it'}",
                        fix="give choices" + (", or pass --nearest" if name == _NEAREST else ""),
                    ) from None
                assert found.low is not None
                choices = (found.low,)
            space[name] = Range(choices=choices, when=found.when)
        points = [*study.search.known, *search_space.grid(space)]
        yield from points[: study.search.num_trials] if study.search.sampler is Sampler.GRID else points

    def curve(self, study: Study, objective: str, params: Mapping[str, Value], *, seed: int = 0) -> Curve:
        """Return the curve that answers an assignment; where several do, `seed` picks one.

        Errors: StudyError that names the setting which none has, and the values recorded.
        """
        settings = study.clean.settings(params)
        flat: dict[str, Any] = {}
        for name, value in settings.model_dump(mode="json").items():
            flat |= {f"{name}.{leaf}": v for leaf, v in value.items()} if isinstance(value, dict) else {name: value}
        flat["leaked_poison"] = study.clean.leaked_poison
        where = f"pretrain objective {objective}"
        own = [curve for curve in self._curves if curve.objective == objective]
        found = [curve for curve in own if curve.method == settings.method]
        if not found:
            methods = ", ".join(sorted({curve.method for curve in own}))
            raise StudyError(f"no recorded curve has method={settings.method}", where=where, expected=methods, fix=_FIX)
        asked = [name for name in params if name not in ("method", "epochs", _NEAREST)]
        asked += sorted({name for curve in found for name in curve.settings} & set(flat) - {*asked, "epochs", _NEAREST})
        for name in [*asked, _NEAREST]:
            values = {curve.settings.get(name) for curve in found}
            if name in params or len(values) > 1:
                found = self._having(name, flat[name], found, where=f"{where}, method {settings.method}")
        enough = _long_enough(found, settings.epochs, where=where)
        curve = enough[seed % len(enough)]
        for rung in study.search.stopping.rungs:
            if rung < settings.epochs and rung not in curve.epochs:
                raise StudyError(
                    f"epoch {rung} of {curve.trial_id} is not recorded",
                    where="search.stopping.rungs",
                    expected=", ".join(str(epoch) for epoch in sorted(curve.epochs) if epoch),
                )
        return curve

    def _having(self, name: str, value: Value, curves: list[Curve], *, where: str) -> list[Curve]:
        """Return the curves of which a setting has a value. Errors: StudyError."""
        exact = [curve for curve in curves if _same(curve.settings.get(name), value)]
        known = [curve for curve in curves if name in curve.settings]
        if exact:
            return exact
        if name == _NEAREST and self._nearest and known:

            def distance(curve: Curve) -> float:
                return abs(math.log(float(curve.settings[name])) - math.log(float(value)))

            least = min(map(distance, known))
            # Of two that are equally far, the lower: a tie must not depend on the order of the curves.
            lowest = min(float(curve.settings[name]) for curve in known if distance(curve) <= least + 1e-12)
            return [curve for curve in known if curve.settings[name] == lowest]
        recorded = sorted({str(curve.settings[name]) for curve in known}, key=_order)
        raise StudyError(
            f"no recorded curve has {name}={value}",
            where=where,
            expected=", ".join(recorded) if recorded else "nothing: the recorded curves do not say it",
            fix=_FIX + (", or pass --nearest" if name == _NEAREST and recorded else ""),
        )


def _same(recorded: Value | None, value: Value) -> bool:
    if isinstance(recorded, str) or isinstance(value, str) or recorded is None:
        return recorded == value
    return math.isclose(recorded, value, rel_tol=1e-9)


def _order(text: str) -> tuple[int, float, str]:
    """Sort numbers by size, and names after them."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def _long_enough(curves: Sequence[Curve], epochs: int, *, where: str) -> list[Curve]:
    """Return the curves of so many epochs; of longer ones, which are cut, the shortest. Errors: StudyError."""
    enough = [curve for curve in curves if curve.last >= epochs]
    if not enough:
        longest = max(curve.last for curve in curves)
        raise StudyError(f"epochs={epochs}: the recorded curve has {longest}", where=where, expected=f"1 … {longest}")
    least = min(curve.last for curve in enough)
    found = sorted((curve for curve in enough if curve.last == least), key=lambda curve: curve.trial_id)
    if not any(0 < number <= epochs for number in found[0].epochs):
        first = min(number for number in found[0].epochs if number)
        raise StudyError(f"epochs={epochs}: the first epoch recorded is {first}", where=where)
    return found


@dataclass(frozen=True)
class ReplayTrial:
    """Carries an assignment out by reporting the epochs of its recorded curve, one after the other.

    A curve longer than the study's `epochs` is cut. It is still the curve of the longer schedule: its learning rate
    has not fallen as far as that of a trial planned for so few epochs.
    """

    curves: tuple[Curve, ...]
    nearest: bool

    def __call__(self, study: Study, store: Store, task: Assignment, notify: Notify) -> Entry:
        """Return the entry, which has ended or waits at its rung. Errors: StudyError where no curve answers it."""
        ledger = Ledger(store)
        if (done := done_already(ledger, task)) is not None:
            return done
        record, epochs = recorded_trial(self, study, task)
        ledger.start(Kind.TRIAL, task.trial_id, record)
        known, points = ledger.epochs(Kind.TRIAL, task.trial_id), dict[int, Point]()
        stops = Stops(study.search.stopping, task.until, points)
        for number, found in epochs.items():
            points[number] = point(found)
            if number not in known:
                ledger.epoch(Kind.TRIAL, task.trial_id, number, found)
                notify(number, found)
            if number < record["settings"]["epochs"] and stops(number):
                break
        ended, place = stops.outcome(), {"node": None, "device": "recorded", "weight_decay_in_force": None}
        if ended is None:
            return ledger.pause(Kind.TRIAL, task.trial_id, {"epoch": task.until, "device_seconds": 0.0, **place})
        return ledger.end(Kind.TRIAL, task.trial_id, {**ended, **place, "ended": datetime.now(UTC).isoformat()})


def recorded_trial(on: ReplayTrial, study: Study, task: Assignment) -> tuple[dict[str, Any], dict[int, Any]]:
    """Return what the ledger keeps of a replayed trial: the record of its start, and its epochs by number.

    Settings are those that the curve is known to have; what was drawn stands in `params`. Errors: StudyError.
    """
    record = start_record(study, task)
    planned: int = record["settings"]["epochs"]
    seed = fork(record["seed"], "curve")
    curve = Recorded(on.curves, nearest=on.nearest).curve(study, task.objective, task.params, seed=seed)
    settings = {name: curve.settings.get(name) for name in tables.SETTINGS}
    record |= {"settings": {**settings, "epochs": planned}, "method": curve.method, "curve": curve.trial_id}
    whole = planned == curve.last
    epochs = {
        number: found
        for number, found in sorted(curve.epochs.items())
        if number <= planned or (whole and found.get("alpha") is not None)
    }
    return record, epochs
