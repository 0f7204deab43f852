"""Optuna behind Ray's Searcher: one study for each pretrain objective, fed from the ledger alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from pydantic import ValidationError
from ray.tune.search import Searcher

from raybd import space as search_space
from raybd import stopping
from raybd.assignment import Assignment, point
from raybd.cluster.history import Drawn, History, told
from raybd.ledger import Entry, reading
from raybd.seeding import fork
from raybd.space import Value
from raybd.stopping import Point
from raybd.study import Sampler, Study


@dataclass
class _Known:
    """What a search with rungs remembers of a trial that has been at one.

    Attributes:
        task: what it does next, if it goes on.
        points: by epoch.
        rungs: the epochs at which it has arrived.
        waits: whether it waits at the last of them.
    """

    task: Assignment
    points: dict[int, Point]
    rungs: tuple[int, ...]
    waits: bool


class _Objective:
    """The search for one pretrain objective."""

    def __init__(self, study: Study, objective: str) -> None:
        self.name, self._study, self._search = objective, study, study.search
        self.history = History(self._search, seed=fork(study.seed, "search", objective))
        self._grid = search_space.grid(self._search.space) if self._search.sampler is Sampler.GRID else None
        self.total = self._search.trials_each
        self.taken: set[int] = set()
        self._lowest = 0
        self.known: dict[str, _Known] = {}
        self._going: list[Assignment] = []

    def replay(self, entry: Entry) -> None:
        """Take in a trial that has ended, or has come to its first rung."""
        self.history.add(entry.started["params"], told(entry, self._search.tell))

    def ask(self, number: int, fixed: Mapping[str, Value] | None = None) -> Drawn:
        """Open a trial; what `fixed` leaves open is drawn. A draw depends on the seed, the number and the history."""
        self.taken.add(number)
        return self.history.ask(fixed, seed=fork(self._study.seed, "search", self.name, number))

    def fixed(self, number: int) -> Mapping[str, Value] | None:
        """Return the settings that are known beforehand for a trial: the study's own, or the grid's."""
        if number < len(self._search.known):
            return self._search.known[number]
        return self._grid[number - len(self._search.known)] if self._grid is not None else None

    def next_number(self) -> int | None:
        """Return the lowest number not tried yet, None if all are."""
        while self._lowest in self.taken:
            self._lowest += 1
        return self._lowest if self._lowest < self.total else None

    def until(self, params: Mapping[str, Value]) -> int | None:
        """Return the first rung of a trial with these settings, None if it has none."""
        try:
            epochs = self._study.clean.settings(params).epochs
        except ValidationError:
            return None  # it will fail as it starts
        return stopping.next_rung(self._search.stopping, done=0, epochs=epochs)

    def arrived(self, entry: Entry) -> None:
        """Take note of a trial that is at a rung or has ended."""
        if not entry.pauses:
            return
        started = entry.started
        rungs = tuple(pause["epoch"] for pause in entry.pauses)
        task = Assignment(
            entry.id,
            started["number"],
            self.name,
            started["pretrain_id"],
            started["params"],
            until=stopping.next_rung(self._search.stopping, done=rungs[-1], epochs=started["settings"]["epochs"]),
        )
        points = {epoch: point(record) for epoch, record in entry.epochs.items()}
        self.known[entry.id] = _Known(task, points, rungs, entry.waits)

    @property
    def waiting(self) -> int:
        """How many trials wait at a rung."""
        return len(self._going) + sum(trial.waits for trial in self.known.values())

    def promotion(self, running: Sequence[Assignment], stop: Callable[[str, str], bool]) -> Assignment | None:
        """Return the assignment of a trial that goes on beyond the lowest rung where any wait; None if none does now.

        Once all have arrived there, those that do not go on are stopped.

        Args:
            running: what is under way of this objective.
            stop: see `LedgerSearcher`.
        """
        if not self._going:
            self._decide(running, stop)
        return self._going.pop(0) if self._going else None

    def _decide(self, running: Sequence[Assignment], stop: Callable[[str, str], bool]) -> None:
        """Decide who goes on beyond the lowest rung where trials wait, if all have arrived there."""
        while not self._going and (at := [trial.rungs[-1] for trial in self.known.values() if trial.waits]):
            rung = min(at)
            if any(task.until is not None and task.until <= rung for task in running):
                return
            arrived = {name: trial.points for name, trial in self.known.items() if rung in trial.rungs}
            decision = stopping.decide(self._search.stopping, rung, arrived)
            here = {name for name, trial in self.known.items() if trial.waits and trial.rungs[-1] == rung}
            for name, reason in decision.stopped.items():
                if name in here and not stop(name, reason):
                    return
            self._going = [self.known[name].task for name in decision.go_on if name in here]
            for name in here:
                self.known[name].waits = False


_UnderWay = tuple[_Objective, Assignment, Drawn | None]


class LedgerSearcher(Searcher):
    """Suggests assignments and learns from the ledger what became of them.

    A study with rungs (`raybd.stopping`) has a trial wait at each: it is suggested once up to its first rung, and, if
    it goes on, again up to the next one. Optuna is told of it once, at the first.

    Args:
        study: with the space, the sampler and the number of trials.
        pretrain_ids: by pretrain objective, in the order of the study.
        entries: what the ledger has of earlier calls: ended ones are replayed, others are run first, as they were.
        settle: returns the ledger entry of a trial, ended or waiting; None where the ledger fails now.
        stop: ends a trial that waits, given its id and the reason; False where the ledger fails now.
    """

    def __init__(
        self,
        study: Study,
        pretrain_ids: Mapping[str, str],
        entries: list[Entry],
        settle: Callable[[Assignment], Entry | None],
        *,
        stop: Callable[[str, str], bool],
    ) -> None:
        super().__init__(metric=None, mode=None)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study, self._pretrain_ids, self._settle, self._stop = study, dict(pretrain_ids), settle, stop
        self._objectives = {name: _Objective(study, name) for name in pretrain_ids}
        self._unfinished: list[Entry] = []
        self._assigned: dict[str, _UnderWay] = {}
        self._dropped: list[_UnderWay] = []
        with reading("ledger/trials"):
            entries = sorted(entries, key=lambda e: (e.started["objective"], e.started["number"]))
        for entry in entries:
            with reading(f"ledger/trials/{entry.id}"):
                self._take(entry)

    def _take(self, entry: Entry) -> None:
        """Take a trial of an earlier call into account."""
        if self._pretrain_ids.get(entry.started["objective"]) != entry.started["pretrain_id"]:
            return
        objective = self._objectives[entry.started["objective"]]
        if unknown := set(entry.started["params"]) - set(self._study.search.space):
            raise ValueError(f"settings {sorted(unknown)} are not in search.space")
        objective.taken.add(entry.started["number"])
        if entry.ended is not None or entry.pauses:
            objective.replay(entry)
            objective.arrived(entry)
        if entry.ended is None and not entry.waits:
            self._unfinished.append(entry)

    @property
    def planned(self) -> int:
        """How many trials there are in all: ended, running, and to be started."""
        return sum(len(o.taken | set(range(o.total))) for o in self._objectives.values())

    @property
    def remaining(self) -> int:
        """How many trials are still to be started or to go on."""
        untried = sum(o.total - len([n for n in o.taken if n < o.total]) for o in self._objectives.values())
        return untried + len(self._unfinished) + sum(o.waiting for o in self._objectives.values())

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next assignment: unfinished ones first, then new ones, then those that go on beyond a rung.

        New ones are for the objective that has had the fewest. None where what runs must arrive before it is known.
        """
        if self._dropped:
            return self._assign(trial_id, *self._dropped.pop(0))
        if self._unfinished:
            entry = self._unfinished.pop(0)
            return self._suggest_again(trial_id, entry)
        open_ones = [o for o in self._objectives.values() if o.next_number() is not None]
        if open_ones:
            objective = min(open_ones, key=lambda o: len(o.taken))
            number = objective.next_number() or 0
            return self._suggest(trial_id, objective, number, objective.fixed(number))
        running = [task for _, task, _ in self._assigned.values()]
        for objective in self._objectives.values():
            task = objective.promotion([task for task in running if task.objective == objective.name], self._stop)
            if task is not None:
                return self._assign(trial_id, objective, task)
        # Who is on the way to a rung may go on beyond it.
        return None if any(task.until is not None for task in running) else Searcher.FINISHED

    def _suggest_again(self, trial_id: str, entry: Entry) -> dict[str, Any]:
        """Return the assignment of a trial that was under way when a call ended."""
        objective, number = self._objectives[entry.started["objective"]], entry.started["number"]
        if not entry.pauses:
            return self._suggest(trial_id, objective, number, entry.started["params"])
        return self._assign(trial_id, objective, objective.known[entry.id].task)

    def _suggest(
        self, trial_id: str, objective: _Objective, number: int, fixed: Mapping[str, Value] | None
    ) -> dict[str, Any]:
        """Return the assignment of a trial that starts, its settings as fixed or as Optuna draws them."""
        drawn = objective.ask(number, fixed)
        task = Assignment(
            trial_id=f"{objective.name}-{number:04d}",
            number=number,
            objective=objective.name,
            pretrain_id=self._pretrain_ids[objective.name],
            params=drawn.params,
            until=objective.until(drawn.params),
        )
        return self._assign(trial_id, objective, task, drawn)

    def _assign(
        self, trial_id: str, objective: _Objective, task: Assignment, drawn: Drawn | None = None
    ) -> dict[str, Any]:
        """Take note of what is under way; of a trial that Optuna has been told of already there is no `drawn`."""
        self._assigned[trial_id] = (objective, task, drawn)
        return dict(vars(task))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: FBT001, FBT002
        """Tell Optuna what the ledger has; one that failed, or has no finite point, is told as failed.

        With `error` it did not begin: Tune tries what fails later again until it is stopped, which is no error.
        """
        if error:
            self.dropped(trial_id)
        if trial_id not in self._assigned:
            return
        objective, task, drawn = self._assigned.pop(trial_id)
        entry = self._settle(task)
        if entry is not None:
            objective.arrived(entry)
        if drawn is not None:
            objective.history.tell(drawn, told(entry, self._study.search.tell) if entry else None)

    def dropped(self, trial_id: str) -> None:
        """Take back an assignment that never began: it is suggested again, before any other."""
        if trial_id in self._assigned:
            self._dropped.append(self._assigned.pop(trial_id))

    def close(self) -> None:
        """Tell Optuna that what was under way when a search was broken off came to nothing."""
        for objective, _, drawn in (*self._assigned.values(), *self._dropped):
            if drawn is not None:
                objective.history.tell(drawn, None)
        self._assigned.clear()
        self._dropped.clear()

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger is what a search goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: a search goes on by being called again."""
        raise RuntimeError("the search is rebuilt from the ledger; call `raybd run` again")


logging.getLogger("optuna").setLevel(logging.WARNING)
