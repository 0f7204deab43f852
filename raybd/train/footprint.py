"""How much of a device's memory the trials of a study take at most, found out by short trials as heavy as they get.

The trials are the real ones' code: training loop, method, augmented views, evaluation with triggers and prompts, in
batches as large as the study allows, on images at random. What grows with the number of samples is added by arithmetic.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Protocol

import open_clip
import torch

from raybd import failures
from raybd.clean import registry
from raybd.errors import RaybdError
from raybd.model import create
from raybd.study import CleanSettings, Failure, Method, Study
from raybd.study.agreement import methods, values
from raybd.study.methods import users
from raybd.train import short_trials
from raybd.train.loop import Training
from raybd.train.probe import kind

_AT_ONCE = 512  # `raybd.data.pairs` augments the images of so many pairs together, or of a batch
_TEXTS = 1024  # `raybd.evaluate` encodes so many prompts together
_POINTS = 16_384  # `raybd.clean.kmeans` compares so many rows with all centroids together
_COMPANY_SECONDS = 120.0
_CLUSTERED = (Method.DEEP_CLUSTERING, Method.PSEUDO_LABELS)


@dataclass(frozen=True)
class Reading:
    """What a meter shows, in bytes.

    Attributes:
        peak: the most that this process had of the device at one time, `beside` included.
        beside: of it what torch does not manage: context, kernels, libraries' own memory.
        total: that the device has.
        device: its name.
    """

    peak: int
    beside: int
    total: int
    device: str


class Meter(Protocol):
    """Tells how much of a device's memory this process takes."""

    def start(self) -> None:
        """Count the peak from now on."""

    def read(self) -> Reading:
        """Return the peak since `start`."""


@dataclass(frozen=True)
class CudaMeter:
    """Memory of a GPU that nobody else is on: what others take counts as this process's own.

    Torch says how much it has reserved. The rest of what is in use on the device is looked at after the work: kernels
    are loaded when they are first called.
    """

    device: torch.device

    def start(self) -> None:
        torch.cuda.init()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> Reading:
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        beside = max(0, total - free - torch.cuda.memory_reserved(self.device))
        peak = torch.cuda.max_memory_reserved(self.device) + beside
        return Reading(peak, beside, total, torch.cuda.get_device_name(self.device))


@dataclass(frozen=True)
class Footprint:
    """What the heaviest trial of a study takes of a device, in bytes.

    Attributes:
        peak, beside, total, device: see `Reading`; `peak` with what was added by arithmetic.
        kind, batch: of the heaviest.
        kinds: how many were tried.
        seconds: that it took.
    """

    peak: int
    beside: int
    total: int
    device: str
    kind: str
    batch: int
    kinds: int
    seconds: float


class Unknown(RaybdError):
    """What a trial takes could not be measured."""


def measure(study: Study, *, prompts: int, device: torch.device, meter: Meter, threads: int) -> Footprint:
    """Run a short trial of each kind that the study has, each as heavy as it gets, and return what the heaviest took.

    Args:
        prompts: of an evaluation.
        threads: of torch.

    Errors: Unknown where a trial does not fit the device, fails, or would have to fetch a model first, and where no
        second process can be on the GPU.
    """
    if Method.PSEUDO_LABELS in methods(study.clean, study.search.space):
        raise Unknown("a trial with pseudo-labels would fetch its labeller")
    started = time.perf_counter()
    found: list[tuple[int, CleanSettings, Reading]] = []
    tried = heaviest(study)
    with short_trials.threads(threads):
        for settings in tried:
            reading = _taken(study, settings, prompts=prompts, device=device, meter=meter)
            peak = reading.peak + left_out(study, settings, prompts=prompts)
            found.append((peak, settings, reading))
    if device.type == "cuda":
        require_company(device)
    peak, settings, reading = max(found, key=lambda one: one[0])
    return Footprint(
        peak=peak,
        beside=max(reading.beside for _, _, reading in found),
        total=reading.total,
        device=reading.device,
        kind=kind(settings),
        batch=_batch(settings),
        kinds=len(tried),
        seconds=time.perf_counter() - started,
    )


def require_company(device: torch.device) -> None:
    """Have another process use a device that this one is on. Errors: Unknown: a GPU may be set to one process."""
    code = f"import torch; torch.zeros(1, device={str(device)!r})"
    try:
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=_COMPANY_SECONDS)
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        what = next((line for line in reversed(said) if "Error" in line), str(error))
        raise Unknown(f"no second process can use the GPU: {failures.one_line(what)}") from None


def heaviest(study: Study) -> list[CleanSettings]:
    """Return the settings that take most memory, of each method and image view that trials may have.

    Whatever is searched is as large as it gets, whether or not a trial can have all of it.
    """
    clean, space = study.clean, study.search.space
    names = ["batch_size", "num_samples", "deep_clustering.clusters", *(n for n in space if n.startswith("loss_w"))]
    most = {name: max(values(clean, space, name), key=float) for name in names}
    found: dict[tuple[Method, object], CleanSettings] = {}
    for method in sorted(methods(clean, space)):
        for view in values(clean, space, "image_view"):
            settings = clean.settings({**most, "method": method, "image_view": view})
            seen = settings.loss_weights.views and method in users("image_view")
            found.setdefault((method, view if seen else None), settings)
    return list(found.values())


def left_out(study: Study, settings: CleanSettings, *, prompts: int) -> int:
    """Return bytes that a trial takes and a short one does not: rows of all prompts, and of all images it clusters."""
    row = 4 * int(open_clip.get_model_config(study.model.name)["embed_dim"])
    # In parts, and joined.
    of_prompts = 2 * row * max(0, prompts - 2 * _TEXTS)
    if settings.method not in _CLUSTERED:
        return of_prompts
    images, clusters = settings.num_samples, settings.deep_clustering.clusters
    # In parts, joined, in order, with labels; a chunk's similarities, or which centroid each of its rows has.
    return of_prompts + images * (3 * row + 32) + min(images, _POINTS) * clusters * 12


def _batch(settings: CleanSettings) -> int:
    return min(settings.batch_size, settings.num_samples)


def _taken(study: Study, settings: CleanSettings, *, prompts: int, device: torch.device, meter: Meter) -> Reading:
    """Run an epoch of a few steps and an evaluation, and return what that took."""
    batch = _batch(settings)
    pairs = batch * (1 - -_AT_ONCE // batch if settings.loss_weights.views else 2)
    short = short_trials.shortened(settings, pairs, epochs=1)
    assert isinstance(short, CleanSettings)
    # All points take the same.
    alphas = short.interpolation.model_copy(update={"alphas": short.interpolation.alphas[:1]})
    short = short.model_copy(update={"interpolation": alphas})
    try:
        _forget(device)
        meter.start()
        _run(study, short, pairs, texts=min(prompts, 2 * _TEXTS), device=device)
        return meter.read()
    except Exception as error:  # CUDA and its libraries raise what they like
        full = failures.kind_of(error) is Failure.OUT_OF_MEMORY
        what = "a trial does not fit this device" if full else failures.message_of(error)
        raise Unknown(what, where=f"{kind(settings)}, batches of {batch}") from None
    finally:
        _forget(device)


def _run(study: Study, settings: CleanSettings, pairs: int, *, texts: int, device: torch.device) -> None:
    clip = create(study.model.name, seed=0)
    images = 3 * study.evaluation.batch_size  # one at work, two on their way
    each = len(short_trials.CLASSES)
    Training(
        clip,
        short_trials.pairs(study, settings, clip, pairs),
        settings,
        short_trials.Notes(device),
        short_trials.evaluation_set(study, clip.image_size, images, max(each, texts // each * each)),
        recipe=registry.recipe(settings, seed=0),
        start_counts={"counts": {}},  # the evaluation after training takes more
    ).run()


def _forget(device: torch.device) -> None:
    """Give back what earlier work left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
