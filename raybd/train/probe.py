"""How fast this machine's device is on a study: a short trial of each kind that it has, on images drawn at random.

The trials are the real ones' code: training loop, method, augmented views, evaluation with triggers and prompts. What
they take is told for an operation, so that it holds for other batch sizes and lengths; see `raybd.costs`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raybd import costs
from raybd.clean import registry
from raybd.errors import RaybdError
from raybd.model import create
from raybd.study import CleanSettings, Method, Study, TrainSettings
from raybd.train import short_trials
from raybd.train.loop import Training

_SECONDS = 40.0  # for all kinds together; the one under way then still ends
_SECONDS_A_KIND = 4.0
_EPOCHS = 3  # the first warms up
_SLOW = 1.5  # seconds of an epoch above which one is timed in place of two
_MOST_PAIRS = 4096
_FEW_OPERATIONS = 2e10  # a second, on a slow core


@dataclass(frozen=True)
class Timed:
    """What a short trial of one kind took.

    Attributes:
        kind: see `kind`.
        batch, step_seconds: pairs of an optimizer step, and what it took, its share of the epoch's other work in it.
        steps: timed.
        image_seconds: of an evaluation, for each image clean or with a trigger, with its share of the prompts.
        training, forward: operations a second, of training and of evaluation.
    """

    kind: str
    batch: int
    step_seconds: float
    steps: int
    image_seconds: float
    training: float
    forward: float


@dataclass(frozen=True)
class Speed:
    """What a device sustains, in operations a second, and how that is known.

    Attributes:
        training, forward: of kinds that were not measured by themselves.
        kinds: those that were.
        failed: kinds that could not be measured, with the reason.
        seconds: that measuring took.
    """

    training: float
    forward: float
    how: str
    kinds: tuple[Timed, ...] = ()
    failed: tuple[str, ...] = ()
    seconds: float = 0.0

    def of(self, settings: TrainSettings) -> tuple[float, float]:
        """Return operations a second of a run's training and evaluation."""
        found = next((timed for timed in self.kinds if timed.kind == kind(settings)), None)
        return (found.training, found.forward) if found else (self.training, self.forward)


@dataclass(frozen=True)
class Workload:
    """What is to be measured.

    Attributes:
        runs: settings of each, with its operations: of a kind that takes more, more depends.
        images, prompts: of an evaluation; the short trial keeps their proportion.
        use_gpu: on the GPU rather than the CPU.
        trial_threads, worker_threads: of torch, for a trial and for a pretraining worker.
    """

    runs: Sequence[tuple[TrainSettings, float]]
    images: int
    prompts: int
    use_gpu: bool
    trial_threads: int
    worker_threads: int


class Unmeasured(RaybdError):
    """No kind of run could be measured."""


def kind(settings: TrainSettings) -> str:
    """Return what a run's step is made of: its method, and whether it looks at augmented views."""
    method = settings.method.value if isinstance(settings, CleanSettings) else "pretraining"
    return method + (" with views" if settings.loss_weights.views else "")


def measure(study: Study, work: Workload) -> Speed:
    """Time a short trial of each kind of run, the kinds that the study spends most on first.

    Bounded: once 40 s have gone, kinds that are left are taken for as fast, by operations, as those that were measured.
    So are trials with pseudo-labels, whose labeller would have to be fetched. Reading and decoding data is no part of
    it.

    Errors: Unmeasured where not even one kind can be measured.
    """
    started = time.perf_counter()
    device = torch.device("cuda" if work.use_gpu else "cpu")
    found: list[Timed] = []
    failed: list[RaybdError] = []
    rate = 0.0
    for settings in _representatives(work.runs):
        if found and time.perf_counter() - started > _SECONDS:
            break
        threads = work.trial_threads if isinstance(settings, CleanSettings) else work.worker_threads
        with short_trials.threads(threads):
            try:
                rate = rate or _first_rate(study.model.name, device)
                found.append(_timed(study, settings, work, device, rate))
            except torch.OutOfMemoryError:
                failed.append(RaybdError("does not fit this device", where=kind(settings)))
            except RaybdError as error:
                failed.append(error)
    if not found:
        reasons = dict.fromkeys(f"{error.where}: {error.what}" if error.where else error.what for error in failed)
        what = "; ".join(reasons) or "a trial with pseudo-labels would fetch its labeller"
        raise Unmeasured(what, fix="give --no-probe or --tflops")
    name = torch.cuda.get_device_name(device) if work.use_gpu else f"cpu, {work.trial_threads} threads a trial"
    return Speed(
        training=_mean(timed.training for timed in found),
        forward=_mean(timed.forward for timed in found),
        how=f"measured on {name}",
        kinds=tuple(found),
        failed=tuple(str(error) for error in failed),
        seconds=time.perf_counter() - started,
    )


def _mean(rates: Iterable[float]) -> float:
    """Return the rate of as many operations at each of some rates."""
    given = list(rates)
    return len(given) / sum(1 / rate for rate in given)


def _representatives(runs: Sequence[tuple[TrainSettings, float]]) -> list[TrainSettings]:
    """Return a run of each kind to measure, of its median batch size: a trial first, then by what they cost in all."""
    kinds: dict[str, list[tuple[TrainSettings, float]]] = {}
    for run in runs:
        if not (isinstance(run[0], CleanSettings) and run[0].method is Method.PSEUDO_LABELS):
            kinds.setdefault(kind(run[0]), []).append(run)
    groups = sorted(kinds.values(), key=lambda group: -sum(cost for _, cost in group))
    first = next((group for group in groups if isinstance(group[0][0], CleanSettings)), None)
    groups.sort(key=lambda group: group is not first)  # the others stay in their order
    return [sorted((s for s, _ in group), key=lambda s: s.batch_size)[len(group) // 2] for group in groups]


def _first_rate(model: str, device: torch.device) -> float:
    """Return about how many operations a second a model's forward and backward pass do: enough to choose sizes by."""
    clip, cost = create(model, seed=0), costs.towers(model)
    net = clip.net.to(device, memory_format=torch.channels_last).train()
    batch = max(2, min(32, int(_FEW_OPERATIONS / cost.pair_training)))
    images_BCHW = torch.zeros((batch, 3, clip.image_size, clip.image_size), device=device)
    tokens_BL = clip.tokenize([short_trials.CAPTION.format("dog")] * batch).to(device)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        image_BD, text_BD, *_ = net(images_BCHW, tokens_BL)
        (image_BD.sum() + text_BD.sum()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        if seconds[-1] > _SLOW:
            break
    return batch * cost.pair_training / min(seconds)


def _timed(study: Study, settings: TrainSettings, work: Workload, device: torch.device, rate: float) -> Timed:
    """Run a short trial: as large batches as the study's, where they are not too slow or too large for the device."""
    batch = settings.batch_size
    while True:
        try:
            return _short_trial(study, settings, work, device, rate, batch)
        except torch.OutOfMemoryError:
            if batch <= 2:
                raise
            batch //= 2
            torch.cuda.empty_cache()


def _short_trial(
    study: Study, settings: TrainSettings, work: Workload, device: torch.device, rate: float, batch: int
) -> Timed:
    """Run a short trial in batches of `batch` pairs at most, as many as about a third of a kind's time allows."""
    cost = costs.towers(study.model.name)
    affordable = rate * _SECONDS_A_KIND / (2 * _EPOCHS)
    batch = max(2, min(batch, int(affordable / _epoch_cost(study, settings, batch) * batch)))
    pairs = batch * max(1, min(_MOST_PAIRS // batch, int(affordable / _epoch_cost(study, settings, batch))))
    passes = 1 + len(study.poison.attacks) + len(study.evaluation.controls)
    prompts_each = work.prompts / max(1, work.images)
    image_cost = passes * cost.image_forward + prompts_each * cost.text_forward
    images = max(4, min(work.images, _MOST_PAIRS, int(affordable / image_cost)))
    prompts = len(short_trials.CLASSES) * max(1, round(prompts_each * images / len(short_trials.CLASSES)))
    short = short_trials.shortened(settings, pairs, epochs=_EPOCHS + 1)
    # What warms up takes seconds whatever the model: little of an epoch that takes long by its operations alone.
    long = _epoch_cost(study, short, pairs) / rate > _SLOW
    clip = create(study.model.name, seed=0)
    notes = short_trials.Notes(device)
    evaluation_set = short_trials.evaluation_set(study, clip.image_size, images, prompts)
    recipe = registry.recipe(short, seed=0) if isinstance(short, CleanSettings) else None
    training = Training(
        clip,
        short_trials.pairs(study, short, clip, pairs),
        short,
        notes,
        evaluation_set,
        recipe=recipe,
        halt=lambda epoch: _enough(notes.records, epoch, warm=long),
    )
    training.run()
    timed = notes.records[2:] or notes.records[1:]
    train = sum(record["train_seconds"] for record in timed) / len(timed)
    looks = sum(record["evaluate_seconds"] for record in timed) / len(timed)
    looked_at = images + sum(int(probe.triggered_N.sum()) for probe in evaluation_set.probes)
    return Timed(
        kind=kind(settings),
        batch=batch,
        step_seconds=train * batch / pairs,
        steps=len(timed) * pairs // batch,
        image_seconds=looks / looked_at,
        training=_epoch_cost(study, short, pairs) / train,
        forward=(looked_at * cost.image_forward + prompts * cost.text_forward) / looks,
    )


def _enough(records: Sequence[dict[str, Any]], epoch: int, *, warm: bool) -> bool:
    """Say whether the epochs up to this one are enough; the one after the last is never begun.

    Args:
        warm: the first one counts.
    """
    return epoch >= _EPOCHS or (epoch == 1 and warm) or (epoch == 2 and records[-1]["train_seconds"] > _SLOW)


def _epoch_cost(study: Study, settings: TrainSettings, pairs: int) -> float:
    """Return the operations of one epoch on so many pairs, without what a run does once."""

    def cost(epochs: int) -> float:
        given = settings.model_copy(update={"epochs": epochs})
        if isinstance(given, CleanSettings):
            return registry.cost(study.model.name, given, pairs=pairs)
        return costs.training_cost(study.model.name, given, pairs=pairs)

    return cost(2) - cost(1)
