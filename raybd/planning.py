"""The plan of a study before anything runs: trials, epochs, operations, device-hours, storage."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from raybd import costs, provenance, stopping
from raybd import space as search_space
from raybd.clean import registry
from raybd.cluster import bill, cluster_file
from raybd.cluster.bill import Bill
from raybd.cluster.cluster_file import Verdict
from raybd.data import cache, prompts, shards
from raybd.data.pairs import steps
from raybd.errors import DataError, StudyError
from raybd.model import image_size
from raybd.seeding import fork
from raybd.space import Range, Value
from raybd.study import CleanSettings, Sampler, Study, TrainSettings, mistakes
from raybd.train.probe import Speed, Workload, kind, measure

_PETA, _HOUR = 1e15, 3600.0
_DRAWS = 50
_BYTES_A_ROW = 500  # of an epoch in the ledger and the tables


@dataclass(frozen=True)
class Sizes:
    """How much data there is, and how that is known.

    Attributes:
        classes: None where the class list is not here.
    """

    pairs: int
    images: int
    classes: int | None
    how: str


@dataclass(frozen=True)
class Part:
    """What is done for one pretrain objective: its pretraining, or all trials of its search.

    Attributes:
        runs: trainings: 1, or the number of trials.
        epochs: over all runs.
        epochs_at_most: the same, were every trial drawn as long as the space allows.
        pairs: that one epoch sees; a range over the trials.
        steps: optimizer steps over all runs.
        evaluations: over all runs.
        training_pflops, evaluation_pflops: operations, 1e15.
        device_hours: None where no speed is known.
        kinds: what steps the runs take, see `probe.kind`.
    """

    stage: str
    objective: str
    runs: int
    epochs: int
    epochs_at_most: int
    pairs: tuple[int, int]
    steps: int
    evaluations: int
    training_pflops: float
    evaluation_pflops: float
    device_hours: float | None
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Storage:
    """Bytes that a study leaves, and the decoded images that it keeps in the cache.

    Attributes:
        model: weights of one point.
        poisoned: weights of all poisoned models.
        front: weights of front points, one for each trial.
        state: of one run while it is under way: weights and two moments.
    """

    model: int
    poisoned: int
    front: int
    state: int
    tables: int
    cache: int


@dataclass(frozen=True)
class Plan:
    """A study's plan.

    Attributes:
        drawn: whether trials are stood for by draws at random, the sampler's own not being known beforehand.
        left_out: points of a grid that `num_trials` leaves out, for each objective.
        bill: what it takes on a certain cluster, where one was given.
        unmeasured: why there is no speed, where one was to be measured.
        sharing: how many trials share a GPU, in words.
    """

    study: str
    sizes: Sizes
    sampler: Sampler
    drawn: bool
    left_out: int
    parts: tuple[Part, ...]
    speed: Speed | None
    storage: Storage
    bill: Bill | None = None
    unmeasured: str | None = None
    sharing: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able data, with totals."""
        return {**asdict(self), "total": self.total()}

    def total(self) -> dict[str, float | None]:
        """Return sums over all parts."""
        return {
            "trials": sum(part.runs for part in self.parts if part.stage == "clean"),
            "epochs": sum(part.epochs for part in self.parts),
            "evaluations": sum(part.evaluations for part in self.parts),
            "training_pflops": sum(part.training_pflops for part in self.parts),
            "evaluation_pflops": sum(part.evaluation_pflops for part in self.parts),
            "device_hours": bill.added(part.device_hours for part in self.parts),
        }


def make(study: Study, *, speed: Speed | None, search: bool) -> Plan:
    """Make the plan of a study; nothing is trained, and the data need not be here.

    Args:
        speed: of the device that it is for; None leaves device-hours open.
        search: with the search, or pretraining alone.

    Errors: StudyError where the data is not here and the study does not say how much there is.
    """
    found = sizes(study)
    parts = [_pretraining(study, found, objective, speed) for objective in study.pretrain.objectives]
    trials = list(_trials(study)) if search else []
    if search:
        parts += [_search(study, found, objective, trials, speed) for objective in study.pretrain.objectives]
    grid = study.search.sampler is Sampler.GRID
    whole = len(search_space.grid(study.search.space)) + len(study.search.known) if grid else 0
    return Plan(
        study=study.name,
        sizes=found,
        sampler=study.search.sampler,
        drawn=search and not grid and bool(study.search.space),
        left_out=max(0, whole - study.search.num_trials) if search else 0,
        parts=tuple(parts),
        speed=speed,
        storage=_storage(study, found, parts),
    )


def priced(study: Study, cluster: str, prices: Mapping[str, float]) -> Verdict:
    """Return what there is on the machines of a cluster file and what the study takes of it, with prices.

    Args:
        cluster: path of the file; words that are to be filled in may stand in it.
        prices: USD for an hour of a machine, by node type, besides those of the file.

    Errors: StudyError for mistakes in the file, what of the study finds no place there, and prices of other node types.
    """
    verdict = cluster_file.check(Path(cluster), study, filled_in=False)
    names = [kind.name for kind in verdict.machines.kinds]
    for name, price in prices.items():
        if name not in names:
            raise StudyError(
                f"no node type {name}" + mistakes.suggest(name, names), where="--price", expected=", ".join(names)
            )
        if not cluster_file.is_price(price):
            raise StudyError(f"{name}={price}", where="--price", expected="USD for an hour of a machine, 0 or more")
    return replace(verdict, machines=replace(verdict.machines, prices={**verdict.machines.prices, **prices}))


def billed(plan: Plan, verdict: Verdict) -> Plan:
    """Return a plan with what it takes on the machines of a cluster file, see `priced`."""
    assert verdict.share is not None
    stages = dict.fromkeys(part.stage for part in plan.parts)
    work = {stage: bill.added(part.device_hours for part in plan.parts if part.stage == stage) for stage in stages}
    return replace(plan, bill=bill.make(verdict.machines, verdict.share, work))


def speed(study: Study, *, tflops: float | None, probe: bool, search: bool) -> Speed | None:
    """Return the speed to count device-hours with: as given, or of short trials on the device a study would take here.

    None where neither is wanted, or the study trains nothing.

    Args:
        tflops: what a device sustains, TFLOP/s; nothing is measured then.
        probe: measure.
        search: with the trials, or pretraining alone.

    Errors: StudyError, as `make`; Unmeasured where no trial can be run.
    """
    if tflops is not None:
        return Speed(tflops * 1e12, tflops * 1e12, how=f"computed for {tflops:g} TFLOP/s sustained (--tflops)")
    if not probe:
        return None
    from raybd.cluster.session import resolve  # imports ray

    found = sizes(study)
    runs = [_pretraining_run(study, found, objective) for objective in study.pretrain.objectives]
    runs += [_trial_run(study, settings) for settings in _trials(study)] if search else []
    runs = [run for run in runs if run[0].epochs]
    if not runs:
        return None
    gpus, cores = torch.cuda.device_count(), provenance.cores()
    share = resolve(study.resources, cpus=cores, gpus=gpus, may_grow=True)
    work = Workload(
        runs=[(settings, cost) for settings, _, cost in runs],
        images=found.images,
        prompts=prompt_count(study, found),
        use_gpu=share.use_gpu and gpus > 0,
        trial_threads=min(cores, share.cpus_per_trial),
        worker_threads=min(cores, share.cpus_per_worker),
    )
    return measure(study, work)


def sizes(study: Study) -> Sizes:
    """Return how many pairs, test images and classes a study has: counted, or as it says where the data is not here.

    Errors: StudyError that says what to set.
    """
    data = study.data
    pairs, here = _count(study, data.train, "data.train", data.max_train_samples, labelled=False)
    images, tested = _count(study, data.test, "data.test", data.max_test_samples, labelled=True)
    try:
        classes: int | None = len(shards.classes(data))
    except (DataError, OSError):
        classes = None
    told = [name for name, found in (("max_train_samples", here), ("max_test_samples", tested)) if not found]
    how = f"not here: numbers from {' and '.join(f'data.{name}' for name in told)}" if told else "counted in the shards"
    return Sizes(pairs, images, classes, how)


def _count(
    study: Study, patterns: str | Sequence[str], field: str, most: int | None, *, labelled: bool
) -> tuple[int, bool]:
    """Return how many samples a study uses of some shards, and whether they were counted."""
    if most is not None and "://" in shards.data_root(study.data):
        return most, False  # a bucket is not read through for a plan
    try:
        found = shards.find_shards(study.data, patterns, field_name=field)
    except (DataError, OSError) as error:
        if most is not None:
            return most, False
        setting = "data.max_test_samples" if labelled else "data.max_train_samples"
        raise StudyError(
            f"the data is not here and the study does not say how much there is: {getattr(error, 'what', error)}",
            where=field,
            fix=f"set data.root to where the shards are, or {setting} to their number of samples",
        ) from None
    total = len(cache.load_index(found, cache_dir=study.data.cache_dir, labelled=labelled))
    return min(total, most or total), True


_Run = tuple[TrainSettings, int, float]  # a run's settings, the pairs of an epoch, and its operations


def _pretraining_run(study: Study, found: Sizes, objective: str) -> _Run:
    settings = study.pretrain.settings(objective)
    asked = study.resources.num_workers
    workers = asked if isinstance(asked, int) else 1
    return settings, found.pairs, costs.training_cost(study.model.name, settings, pairs=found.pairs, workers=workers)


def _trial_run(study: Study, settings: CleanSettings) -> _Run:
    pairs = settings.num_samples
    return settings, pairs, registry.cost(study.model.name, settings, pairs=pairs)


def _pretraining(study: Study, found: Sizes, objective: str, speed: Speed | None) -> Part:
    return _part("pretrain", objective, [_pretraining_run(study, found, objective)], study, found, speed)


def _search(study: Study, found: Sizes, objective: str, trials: Sequence[CleanSettings], speed: Speed | None) -> Part:
    epochs = stopping.expected_epochs(study.search.stopping, [settings.epochs for settings in trials])
    halved = [s.model_copy(update={"epochs": done}) for s, done in zip(trials, epochs, strict=True)]
    return _part("clean", objective, [_trial_run(study, settings) for settings in halved], study, found, speed)


def prompt_count(study: Study, found: Sizes) -> int:
    """Return how many prompts an evaluation has, 0 where the class list is not here."""
    return (found.classes or 0) * len(prompts.templates(study.evaluation.templates, field="evaluation.templates"))


def evaluation_cost(study: Study, found: Sizes) -> float:
    """Return the operations of an evaluation: of clean images, and of those with each trigger that is measured."""
    passes = 1 + len(study.poison.attacks) + len(study.evaluation.controls)
    prompts = prompt_count(study, found)
    return costs.evaluation_cost(study.model.name, images=found.images, passes=passes, prompts=prompts)


def _part(stage: str, objective: str, runs: Sequence[_Run], study: Study, found: Sizes, speed: Speed | None) -> Part:
    """Add runs up."""
    one = evaluation_cost(study, found)
    looks = [_looks(settings) for settings, _, _ in runs]
    if stage == "clean":
        looks[0] += 1  # the poisoned model, once for all trials of a process; how many there are is not known
    epochs = sum(settings.epochs for settings, _, _ in runs)
    longest = epochs if stage == "pretrain" or study.search.sampler is Sampler.GRID else len(runs) * _longest(study)
    hours = None
    if speed is not None:
        rates = [speed.of(settings) for settings, _, _ in runs]
        hours = sum(
            (cost / training + look * one / forward) / _HOUR
            for (_, _, cost), look, (training, forward) in zip(runs, looks, rates, strict=True)
        )
    return Part(
        stage=stage,
        objective=objective,
        runs=len(runs),
        epochs=epochs,
        epochs_at_most=longest,
        pairs=(min(pairs for _, pairs, _ in runs), max(pairs for _, pairs, _ in runs)),
        steps=sum(settings.epochs * steps(pairs, settings.batch_size) for settings, pairs, _ in runs),
        evaluations=sum(looks),
        training_pflops=sum(cost for _, _, cost in runs) / _PETA,
        evaluation_pflops=sum(looks) * one / _PETA,
        device_hours=hours,
        kinds=tuple(sorted({kind(settings) for settings, _, _ in runs if settings.epochs})),
    )


def _looks(settings: TrainSettings) -> int:
    """Return how often a run is evaluated; of trials without the poisoned model, which is looked at once for all."""
    return registry.evaluations(settings) if isinstance(settings, CleanSettings) else settings.epochs + 1


def _longest(study: Study) -> int:
    found = study.search.space.get("epochs")
    if found is None:
        return study.clean.epochs
    values = found.choices if found.choices is not None else (found.high,)
    own = [study.clean.epochs] if found.when else []
    return max(int(value) for value in (*values, *own) if value is not None)


def _trials(study: Study) -> Iterator[CleanSettings]:
    """Yield settings of the trials of one objective: known ones, then the grid's, or draws at random."""
    search = study.search
    points: list[dict[str, Value]] = [dict(point) for point in search.known]
    if search.sampler is Sampler.GRID:
        points += search_space.grid(search.space)
    for point in points[: search.num_trials]:
        yield _settings(study, point)
    if search.sampler is not Sampler.GRID:
        for number in range(len(points), search.num_trials):
            yield _drawn(study, random.Random(fork(study.seed, "plan", number)))


def _settings(study: Study, point: Mapping[str, Value]) -> CleanSettings:
    try:
        return study.clean.settings(point)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise StudyError(f"a trial cannot have {dict(point)}: {reason}", where="search.space") from None


def _drawn(study: Study, generator: random.Random) -> CleanSettings:
    """Return a trial's settings drawn at random; combinations that do not fit together are drawn again."""
    for _ in range(_DRAWS):
        try:
            return _settings(study, _draw(study.search.space, generator))
        except StudyError as error:
            refused = error
    raise refused


def _draw(space: search_space.Space, generator: random.Random) -> dict[str, Value]:
    """Draw each setting uniformly, in the logarithm where its range says so."""
    point: dict[str, Value] = {}
    for name, found in search_space.ordered(space):
        if found.active(point):
            point[name] = _value(found, generator)
    return point


def _value(found: Range, generator: random.Random) -> Value:
    if found.choices is not None:
        return generator.choice(found.choices)
    assert found.low is not None
    assert found.high is not None
    whole = isinstance(found.low, int) and isinstance(found.high, int)
    if found.log:
        value = found.low * (found.high / found.low) ** generator.random()
        return min(max(round(value), found.low), found.high) if whole else value
    if found.step is not None or whole:
        return generator.choice(found.grid())
    return generator.uniform(found.low, found.high)


def _storage(study: Study, found: Sizes, parts: Sequence[Part]) -> Storage:
    model, pixels = costs.towers(study.model.name).weight_bytes, 3 * image_size(study.model.name) ** 2
    trials = sum(part.runs for part in parts if part.stage == "clean")
    streamed = found.pairs * pixels > study.data.cache_gb * 1e9
    cleaning = max((part.pairs[1] for part in parts if part.stage == "clean"), default=0)
    return Storage(
        model=model,
        poisoned=model * len(study.pretrain.objectives),
        front=model * trials,
        state=3 * model,
        tables=_BYTES_A_ROW * sum(part.evaluations for part in parts),
        cache=pixels * (found.images + (cleaning if streamed else found.pairs)),
    )
