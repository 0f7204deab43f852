"""What Optuna knows of the trials of one pretrain objective, and draws from: of very many those that matter."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from raybd import pareto, space, stopping
from raybd.assignment import point
from raybd.ledger import Entry, State
from raybd.seeding import fork
from raybd.space import Range, Value
from raybd.study import Sampler, Search, Tell, searchable

DIRECTIONS = ("maximize", "minimize")  # zero-shot accuracy, attack success rate
SHOWN = 1000  # trials that are left where twice as many have ended
_BEST = 100  # of them, the best there are: four times as many as TPE takes for good


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
    """Return what Optuna is told of a trial: accuracy and ASR, search half, of the epoch that stands for it.

    None for one that failed. `largest_area` takes the epoch after cleaning began with the largest accuracy x (1 - ASR).
    Of a trial that came to a rung only the epochs up to its first one count, however far it went on: trials are
    compared at the same cost, and what was told does not change.
    """
    if not entry.pauses and (entry.ended is None or entry.ended["state"] == State.FAILED):
        return None
    last = entry.pauses[0]["epoch"] if entry.pauses else math.inf
    records = [record for epoch, record in sorted(entry.epochs.items()) if 0 < epoch <= last]
    points = [point(record) for record in records]
    if not points:
        return None
    if rule is Tell.LAST_EPOCH:
        # Points without training come after the last epoch, and are none.
        return point([record for record in records if record.get("alpha") is None][-1])
    top1, asr = zip(*points, strict=True)
    return points[pareto.largest_area(top1, asr)]


@dataclass
class Drawn:
    """A trial that Optuna waits for.

    Attributes:
        place: Optuna's number of it now.
    """

    place: int
    params: Mapping[str, Value]


class History:
    """Optuna's study of one pretrain objective.

    TPE's time for a draw grows with what it is shown. Where twice `shown` have ended, it goes on with half of them: the
    best ones, which are the only ones that it takes for good, and of the others, whose density it estimates, as many as
    are wanted, drawn at random.

    Args:
        seed: of what is drawn here.
        shown: trials that are left, or twice as many as TPE draws at random before it models, where that is more.
    """

    def __init__(self, search: Search, *, seed: int, shown: int = SHOWN) -> None:
        self._search, self._seed, self._shown = search, seed, max(shown, 2 * search.startup_trials)
        self._distributions = {name: distribution(name, found) for name, found in search.space.items()}
        self._waited_for: list[Drawn] = []
        self._halvings = 0
        self.optuna = self._empty()

    def _empty(self) -> optuna.Study:
        study = optuna.create_study(directions=list(DIRECTIONS), sampler=make_sampler(self._search, seed=0))
        assert len(study.directions) == 2
        return study

    def add(self, params: Mapping[str, Value], values: tuple[float, float] | None) -> None:
        """Take in a trial of an earlier call; without values it failed."""
        self._halve()
        attributes = {}
        if isinstance(self.optuna.sampler, NSGAIISampler):
            # As NSGA-II itself does when it is asked: a generation is full when so many of it are complete, and its
            # parents are chosen once.
            complete = len(self.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
            generation = complete // self._search.population
            attributes[self.optuna.sampler._get_generation_key()] = generation
            self.optuna.sampler.get_parent_population(self.optuna, generation)
        self.optuna.add_trial(
            create_trial(
                state=TrialState.COMPLETE if values else TrialState.FAIL,
                values=values,
                params=dict(params),
                distributions={name: self._distributions[name] for name in params},
                system_attrs=attributes,
            )
        )

    def ask(self, fixed: Mapping[str, Value] | None, *, seed: int) -> Drawn:
        """Open a trial; what `fixed` leaves open is drawn. A draw depends on the seed and on the history."""
        self._halve()
        self.optuna.sampler = make_sampler(self._search, seed=seed)
        if fixed is not None:
            self.optuna.enqueue_trial(dict(fixed))
        trial = self.optuna.ask()
        params: dict[str, Value] = {}
        for name, found in space.ordered(self._search.space):
            if found.active(params):
                params[name] = trial._suggest(name, self._distributions[name])
        drawn = Drawn(trial.number, params)
        self._waited_for.append(drawn)
        return drawn

    def tell(self, drawn: Drawn, values: tuple[float, float] | None) -> None:
        """Say what became of a trial; without values it failed."""
        self._waited_for.remove(drawn)
        if values is None:
            self.optuna.tell(drawn.place, state=TrialState.FAIL)
        else:
            self.optuna.tell(drawn.place, list(values))

    def _halve(self) -> None:
        """Go on with half of the trials that have ended, where there are too many."""
        if self._search.sampler is not Sampler.TPE:
            return
        trials = self.optuna.get_trials(deepcopy=False)
        if len(trials) - len(self._waited_for) < 2 * self._shown:
            return
        ended = [trial for trial in trials if trial.state is TrialState.COMPLETE]
        named = {f"{trial.number:06d}": trial for trial in ended}
        best = [named.pop(name) for name in stopping.ranked({n: [_values(t)] for n, t in named.items()}, most=_BEST)]
        rest = sorted(named.values(), key=lambda trial: trial.number)
        draw = random.Random(fork(self._seed, "history", self._halvings))
        kept = [*best, *draw.sample(rest, min(len(rest), self._shown - _BEST))]
        self.optuna, self._halvings = self._empty(), self._halvings + 1
        self.optuna.add_trials(sorted(kept, key=lambda trial: trial.number))
        for drawn in self._waited_for:
            self.optuna.add_trial(trials[drawn.place])
            drawn.place = len(self.optuna.get_trials(deepcopy=False)) - 1


def _values(trial: FrozenTrial) -> tuple[float, float]:
    top1, asr = trial.values
    return top1, asr
