"""Optuna behind Ray's Searcher: one study for each pretrain objective, fed from the ledger alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from ray.tune.search import Searcher

from raybd import pareto
from raybd import space as search_space
from raybd.assignment import Assignment, point
from raybd.ledger import Entry, State, reading
from raybd.seeding import fork
from raybd.space import Range, Value
from raybd.study import Sampler, Search, Study, Tell, searchable

DIRECTIONS = ("maximize", "minimize")  # zero-shot accuracy, attack success rate


def make_sampler(search: Search, *, seed: int) -> BaseSampler:
    """Return the sampler that a study asks for. A grid needs none: its points are enumerated."""
    seed %= 2**32
    with warnings.catch_warnings():
        # multivariate, group and constant_liar are marked experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler is Sampler.NSGA2:
            return NSGAIISampler(population_size=search.population, seed=seed)
        if search.sampler is Sampler.TPE:
            return TPESampler(
                multivariate=True, group=True, constant_liar=True, n_startup_trials=search.startup_trials, seed=seed
            )
        return RandomSampler(seed=seed)


def distribution(name: str, found: Range) -> BaseDistribution:
    """Return a range as Optuna's distribution, of the type that the setting has."""
    if found.choices is not None:
        return CategoricalDistribution(found.choices)
    assert found.low is not None
    assert found.high is not None
    with warnings.catch_warnings():
        # Optuna lowers a `high` that the steps do not reach, as `Range.grid` does, and warns of it.
        warnings.filterwarnings("ignore", message=".*not divisible by `step`")
        if searchable()[name] is int:
            return IntDistribution(int(found.low), int(found.high), log=found.log, step=int(found.step or 1))
        return FloatDistribution(float(found.low), float(found.high), log=found.log, step=found.step)


def told(entry: Entry, rule: Tell) -> tuple[float, float] | None:
    """Return what Optuna is told of an ended trial: accuracy and ASR, search half, of the epoch that stands for it.

    None for one that failed. `largest_area` takes the epoch after cleaning began with the largest accuracy x (1 - ASR).
    """
    if entry.ended is None or entry.ended["state"] == State.FAILED:
        return None
    records = [record for epoch, record in sorted(entry.epochs.items()) if epoch]
    points = [point(record) for record in records]
    if not points:
        return None
    if rule is Tell.LAST_EPOCH:
        # Points without training come after the last epoch, and are none.
        return point([record for record in records if record.get("alpha") is None][-1])
    top1, asr = zip(*points, strict=True)
    return points[pareto.largest_area(top1, asr)]


class _Objective:
    """The search for one pretrain objective."""

    def __init__(self, study: Study, objective: str) -> None:
        self.name, self._study, self._search = objective, study, study.search
        self._distributions = {name: distribution(name, found) for name, found in self._search.space.items()}
        self.optuna = optuna.create_study(directions=list(DIRECTIONS), sampler=make_sampler(self._search, seed=0))
        assert len(self.optuna.directions) == 2
        self._grid = search_space.grid(self._search.space) if self._search.sampler is Sampler.GRID else None
        total = self._search.num_trials
        self.total = total if self._grid is None else min(total, len(self._grid) + len(self._search.known))
        self.running: dict[str, optuna.Trial] = {}
        self.taken: set[int] = set()

    def replay(self, entry: Entry) -> None:
        """Give Optuna a trial that has ended."""
        values = told(entry, self._search.tell)
        params = entry.started["params"]
        self.taken.add(entry.started["number"])
        attributes = {}
        if isinstance(self.optuna.sampler, NSGAIISampler):
            # As NSGA-II itself does when it is asked: a generation is full when so many of it are complete, and its
            # parents are chosen once.
            complete = len(self.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
            generation = complete // self._search.population
            attributes[self.optuna.sampler._get_generation_key()] = generation
            self.optuna.sampler.get_parent_population(self.optuna, generation)
        self.optuna.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE if values else TrialState.FAIL,
                values=values,
                params=params,
                distributions={name: self._distributions[name] for name in params},
                system_attrs=attributes,
            )
        )

    def ask(self, number: int, fixed: Mapping[str, Value] | None = None) -> optuna.Trial:
        """Open a trial; what `fixed` leaves open is drawn. A draw depends on the seed, the number and the history."""
        self.taken.add(number)
        self.optuna.sampler = make_sampler(self._search, seed=fork(self._study.seed, "search", self.name, number))
        if fixed is not None:
            self.optuna.enqueue_trial(dict(fixed))
        trial = self.optuna.ask()
        params: dict[str, Value] = {}
        for name, found in search_space.ordered(self._search.space):
            if found.active(params):
                params[name] = trial._suggest(name, self._distributions[name])
        return trial

    def fixed(self, number: int) -> Mapping[str, Value] | None:
        """Return the settings that are known beforehand for a trial: the study's own, or the grid's."""
        if number < len(self._search.known):
            return self._search.known[number]
        return self._grid[number - len(self._search.known)] if self._grid is not None else None

    def next_number(self) -> int | None:
        """Return the lowest number not tried yet, None if all are."""
        return next((n for n in range(self.total) if n not in self.taken), None)


class LedgerSearcher(Searcher):
    """Suggests assignments and learns from the ledger what became of them.

    Args:
        study: with the space, the sampler and the number of trials.
        pretrain_ids: by pretrain objective, in the order of the study.
        entries: what the ledger has of earlier calls: ended ones are replayed, others are run first, as they were.
        settle: returns the ended ledger entry of a trial; None where the ledger cannot be read or written now.
    """

    def __init__(
        self,
        study: Study,
        pretrain_ids: Mapping[str, str],
        entries: list[Entry],
        settle: Callable[[Assignment], Entry | None],
    ) -> None:
        super().__init__(metric=None, mode=None)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study, self._pretrain_ids, self._settle = study, dict(pretrain_ids), settle
        self._objectives = {name: _Objective(study, name) for name in pretrain_ids}
        self._unfinished: list[Entry] = []
        self._assigned: dict[str, tuple[_Objective, Assignment, optuna.Trial]] = {}
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
        if entry.ended is None:
            self._unfinished.append(entry)
            objective.taken.add(entry.started["number"])
        else:
            objective.replay(entry)

    @property
    def planned(self) -> int:
        """How many trials there are in all: ended, running, and to be started."""
        return sum(len(o.taken | set(range(o.total))) for o in self._objectives.values())

    @property
    def remaining(self) -> int:
        """How many trials are still to be started."""
        untried = sum(o.total - len([n for n in o.taken if n < o.total]) for o in self._objectives.values())
        return untried + len(self._unfinished)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next assignment: unfinished ones first, then the objective that has had the fewest."""
        if self._unfinished:
            entry = self._unfinished.pop(0)
            objective = self._objectives[entry.started["objective"]]
            number, fixed = entry.started["number"], entry.started["params"]
        else:
            open_ones = [o for o in self._objectives.values() if o.next_number() is not None]
            if not open_ones:
                return Searcher.FINISHED
            objective = min(open_ones, key=lambda o: len(o.taken))
            number = objective.next_number() or 0
            fixed = objective.fixed(number)
        trial = objective.ask(number, fixed)
        task = Assignment(
            trial_id=f"{objective.name}-{number:04d}",
            number=number,
            objective=objective.name,
            pretrain_id=self._pretrain_ids[objective.name],
            params=dict(trial.params),
        )
        self._assigned[trial_id] = (objective, task, trial)
        return dict(vars(task))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: FBT001, FBT002
        """Tell Optuna what the ledger has; one that failed, or has no finite point, is told as failed."""
        if trial_id not in self._assigned:
            return
        objective, task, trial = self._assigned.pop(trial_id)
        entry = self._settle(task)
        values = told(entry, self._study.search.tell) if entry else None
        if values is None:
            objective.optuna.tell(trial, state=TrialState.FAIL)
        else:
            objective.optuna.tell(trial, list(values))

    def close(self) -> None:
        """Tell Optuna that what was under way when a search was broken off came to nothing."""
        for objective, _, trial in self._assigned.values():
            objective.optuna.tell(trial, state=TrialState.FAIL)
        self._assigned.clear()

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger is what a search goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: a search goes on by being called again."""
        raise RuntimeError("the search is rebuilt from the ledger; call `raybd run` again")


logging.getLogger("optuna").setLevel(logging.WARNING)
