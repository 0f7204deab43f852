"""Trials that share a GPU: how many, from what one takes of its memory, and that each is held to its share.

There may be no GPU here: what is measured then is this process's memory on the CPU, by the same code.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raybd import costs, plan_sharing, run_record, study_file
from raybd.clean.actor import CleanTrial
from raybd.cluster import gpus, shares
from raybd.cluster.session import Share, resolve
from raybd.errors import RaybdError
from raybd.failures import kind_of
from raybd.planning import Plan, Sizes, Storage
from raybd.report import planned
from raybd.store import Store
from raybd.study import Failure, Method, Resources, Sampler, Study
from raybd.train import footprint
from raybd.train.footprint import CudaMeter, Footprint, Reading, Unknown

TINY = Path(__file__).parent / "studies" / "tiny.yaml"
CPU = torch.device("cpu")
FOUND = Footprint(
    peak=3 << 30, beside=1 << 29, total=24 << 30, device="A10G", kind="mmcl", batch=64, kinds=1, seconds=1.0
)
GPU = Share(num_workers=1, use_gpu=True, cpus_per_worker=1, concurrent_trials=1, cpus_per_trial=1, gpus_per_trial=1.0)

pytestmark = pytest.mark.usefixtures("one_thread")
linux = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks Linux and glibc what memory a process has")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a GPU, and torch sees none")


def tiny(*overrides: str) -> Study:
    return study_file.load(str(TINY), overrides=overrides)


# --- how many


sizes = st.integers(1, 1 << 40)


@st.composite
def footprints(draw: st.DrawFn) -> Footprint:
    """What trials may take, of GPUs on which they fit or not."""
    peak = draw(sizes)
    return replace(FOUND, peak=peak, beside=draw(st.integers(0, peak)), total=draw(sizes))


counts = st.integers(0, 64)


@given(footprints(), counts, counts)
def test_trials_that_share_a_gpu_fit_on_it_together(found: Footprint, cores: int, wanted: int) -> None:
    choice = shares.choose(found, cores=cores, wanted=wanted)
    assert 1 <= choice.trials <= shares.MOST
    if choice.trials == 1:
        assert (choice.share, choice.beside) == (1.0, 0.0)
        return
    assert choice.trials <= min(cores, wanted)
    assert 5 * choice.trials * found.peak <= 4 * found.total
    # In Ray's units, whole numbers, as many find a place and no more.
    units = round(choice.share * 10_000)
    assert units / 10_000 == choice.share
    assert 10_000 // units == choice.trials == int(1 / choice.share + 1e-9)
    # None is held to less than was measured, and all together to no more than there is.
    share = replace(GPU, gpus_per_trial=choice.share, beside=choice.beside)
    torchs = share.memory_per_trial * found.total
    assert torchs >= found.peak - found.beside
    assert choice.trials * (torchs + found.beside) <= found.total * (1 + 1e-9)


@given(footprints(), counts, counts, sizes)
def test_more_room_never_means_fewer_trials(found: Footprint, cores: int, wanted: int, more: int) -> None:
    trials = shares.choose(found, cores=cores, wanted=wanted).trials
    assert shares.choose(replace(found, total=found.total + more), cores=cores, wanted=wanted).trials >= trials
    assert shares.choose(replace(found, peak=found.peak + more), cores=cores, wanted=wanted).trials <= trials
    assert shares.choose(found, cores=cores + 1, wanted=wanted).trials >= trials
    assert shares.choose(found, cores=cores, wanted=wanted + 1).trials >= trials


def test_a_fraction_holds_as_many_trials_as_it_was_made_for() -> None:
    for trials in range(1, 101):
        share = shares.fraction(trials)
        assert 10_000 // round(share * 10_000) == trials
        assert round(share * 10_000) / 10_000 == share
        assert Resources(gpus_per_trial=share).gpus_per_trial == share


def test_what_keeps_more_off_a_gpu_is_said() -> None:
    roomy = replace(FOUND, total=80 << 30)
    assert str(shares.choose(FOUND, cores=8, wanted=8)) == (
        "4 trials share a GPU, the most that may: one takes 3.22 GB (mmcl, batches of 64, on A10G), "
        "the smallest GPU has 25.8 GB"
    )
    assert shares.choose(replace(FOUND, peak=7 << 30), cores=8, wanted=8).reason == "no more fit its memory"
    assert shares.choose(replace(FOUND, peak=7 << 30), cores=8, wanted=8).trials == 2
    assert shares.choose(roomy, cores=3, wanted=8).reason == "for more there are too few cores"
    assert shares.choose(roomy, cores=8, wanted=2).reason == "there are no more trials for it"
    assert str(shares.whole("nobody knows")) == "1 trial on a GPU: nobody knows"
    assert json.loads(json.dumps(shares.choose(FOUND, cores=8, wanted=8).record()))["measured"]["peak"] == 3 << 30


def node(cpus: float, gpus: float, *, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": cpus, "memory": 1e9, **({"GPU": gpus} if gpus else {})}
    return {"NodeID": f"{cpus}-{gpus}", "Alive": alive, "Resources": resources}


def test_the_machine_with_fewest_cores_for_a_gpu_decides() -> None:
    found = gpus.gpu_nodes([node(8, 0), node(8, 1), node(48, 4), node(2, 2, alive=False), {**node(4, 1)}])
    assert [(one["CPU"], one["GPU"]) for one in found] == [(8, 1), (48, 4), (4, 1)]
    assert gpus.cores_for(found, cpus_per_trial=1) == 4
    assert gpus.cores_for(found[:2], cpus_per_trial=3) == 2  # 8 // 3, and 48 // 3 on four
    assert gpus.cores_for([], cpus_per_trial=1) == 1


PRETENDED = """
import json, sys
import ray
from test_gpus import GPU, gpus, tiny

ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
study = tiny("resources.gpus_per_trial=auto", "resources.use_gpu=true", "resources.concurrent_trials=auto")
share, choice = gpus.settle(study, GPU, prompts=44, trials=8)
print(json.dumps([share.gpus_per_trial, share.concurrent_trials, choice.trials, str(choice)]))
"""


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="is of a GPU that Ray has and torch has not")
def test_where_a_gpu_cannot_be_measured_each_trial_has_one() -> None:
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", PRETENDED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    of_a_gpu, at_once, trials, why = json.loads(done.stdout.splitlines()[-1])
    assert (of_a_gpu, at_once, trials) == (1.0, 2, 1)
    assert why.startswith("1 trial on a GPU: what one takes is not known: ")
    assert "NVIDIA" in why or "CUDA" in why


@pytest.mark.parametrize(
    ("asked", "workers", "there", "left", "wanted"),
    [
        ("auto", 1, 4, 20, 6),
        ("auto", 1, 8, 9, 1),
        ("auto", 1, 4, 6, 1),
        ("auto", 1, 8, 15, 2),
        ("auto", 1, 4, 3, 1),  # a GPU for each
        ("8", 1, 4, 20, 2),
        ("4", 4, 1, 20, 1),  # three GPUs are to come
        ("4", 1, 1, 20, 4),
        ("4", 1, 1, 2, 2),
    ],
)
def test_no_gpu_is_left_without_a_trial(asked: str, workers: int, there: int, left: int, wanted: int) -> None:
    study = tiny(f"resources.concurrent_trials={asked}")
    share = replace(GPU, num_workers=workers)
    assert gpus.wanted_for(study, share, gpus=there, trials=left) == wanted
    at_once, most = min(left, int(asked) if asked != "auto" else left), max(there, workers)
    assert math.ceil(at_once / wanted) >= min(most, at_once), "GPUs that Ray uses, one filled before the next"


def test_what_is_chosen_becomes_what_ray_is_asked_for() -> None:
    study = tiny("resources={use_gpu: true}")
    share = replace(resolve(study.resources, cpus=32, gpus=2), scratch="kept")
    assert (share.gpus_per_trial, share.concurrent_trials, share.memory_per_trial) == (1.0, 2, 1.0)
    choice = shares.choose(FOUND, cores=16, wanted=9)
    shared = gpus._settled(study, share, choice, {"CPU": 32.0, "GPU": 2.0})
    assert (shared.gpus_per_trial, shared.concurrent_trials, shared.scratch) == (0.25, 8, "kept")
    assert shared.memory_per_trial == 0.25 - FOUND.beside / FOUND.total
    assert (shared.num_workers, shared.cpus_per_worker) == (share.num_workers, share.cpus_per_worker)
    few = gpus._settled(tiny("resources={use_gpu: true, concurrent_trials: 3}"), share, choice, {"CPU": 32, "GPU": 2})
    assert few.concurrent_trials == 3
    alone = gpus._settled(study, share, shares.whole("unknown"), {"CPU": 32.0, "GPU": 2.0})
    assert alone == share
    # Machines that were let go meanwhile come again.
    assert gpus._settled(study, share, shares.whole("unknown"), {"CPU": 16.0, "GPU": 1.0}) == share


def test_a_share_that_a_study_gives_is_one_of_memory_too() -> None:
    assert resolve(Resources(gpus_per_trial=0.5), cpus=16, gpus=4).memory_per_trial == 0.5
    assert resolve(Resources(gpus_per_trial=1), cpus=16, gpus=4).memory_per_trial == 1.0
    assert resolve(Resources(gpus_per_trial=0.5, use_gpu=False), cpus=16, gpus=4).memory_per_trial == 1.0


# --- what one takes


class ProcessMeter:
    """The memory of this process: what it had before counts as what no limit reaches, as a GPU's context does."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []

    def start(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed, but is still the process's, would be used again
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
        self._before = self._bytes("VmRSS")

    def read(self) -> Reading:
        total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines()).split()[1]) * 1024
        self.readings.append(Reading(self._bytes("VmHWM"), self._before, total, "cpu"))
        return self.readings[-1]

    @staticmethod
    def _bytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@linux
def test_the_heaviest_trial_is_measured_by_running_it() -> None:
    study = tiny(
        "evaluation.batch_size=8",
        "search.space={method: {choices: [mmcl, frozen_batchnorm]}, batch_size: {choices: [4, 48]}}",
        "clean.loss_weights={mmcl: 1, ssl: 0}",
        "clean.num_samples=200",
    )
    meter = ProcessMeter()
    found = footprint.measure(study, prompts=10, device=CPU, meter=meter, threads=1)
    assert (found.kinds, found.batch, found.device) == (2, 48, "cpu")
    assert found.kind in ("mmcl", "frozen_batchnorm")
    assert found.peak == max(reading.peak for reading in meter.readings)
    assert found.beside < found.peak < found.total
    weights = costs.towers(study.model.name).weight_bytes
    for reading in meter.readings:
        # With gradients and AdamW's two moments, beside the images.
        assert reading.peak - reading.beside > 4 * weights + 48 * 3 * 32 * 32 * 4
    assert shares.choose(found, cores=8, wanted=8).trials >= 1


def test_each_method_is_tried_with_all_that_makes_it_heavy() -> None:
    study = tiny(
        "search.space={method: {choices: [cleanclip, mmcl, deep_clustering]}, batch_size: {low: 16, high: 64}, "
        "image_view: {choices: [autoaugment, crop_flip_colour], when: {method: [cleanclip, deep_clustering]}}, "
        "loss_weights.ssl: {choices: [0.0, 8.0], when: {method: [cleanclip, deep_clustering]}}, "
        "deep_clustering.clusters: {low: 8, high: 90, when: {method: deep_clustering}}}",
        "clean.loss_weights={mmcl: 1, ssl: 0}",
        "clean.deep_clustering={clusters: 8}",
    )
    found = footprint.heaviest(study)
    assert [(one.method, one.image_view) for one in found if one.method is not Method.MMCL] == [
        (method, view)
        for method in (Method.CLEANCLIP, Method.DEEP_CLUSTERING)
        for view in ("autoaugment", "crop_flip_colour")
    ]
    assert [one.method for one in found].count(Method.MMCL) == 1, "it looks at no views"
    assert {one.batch_size for one in found} == {64}
    assert {one.deep_clustering.clusters for one in found} == {90}
    assert {one.loss_weights.views for one in found if one.method is not Method.MMCL} == {True}
    assert footprint.heaviest(tiny("search.space={}"))[0].batch_size == 32


def test_what_a_short_trial_is_too_short_for_is_added() -> None:
    (plain,) = footprint.heaviest(tiny("search.space={}", "clean.num_samples=1000000"))
    study = tiny(
        "search.space={}",
        "clean.method=deep_clustering",
        "clean.deep_clustering.clusters=1000",
        "clean.num_samples=1000000",
    )
    (clustered,) = footprint.heaviest(study)
    assert footprint.left_out(study, plain, prompts=2048) == 0
    width = 4 * 64
    assert footprint.left_out(study, plain, prompts=80_000) == 2 * width * (80_000 - 2048)
    # A million rows, three times, and 16,384 similarities to each centroid.
    assert footprint.left_out(study, clustered, prompts=0) > 3 * width * 1_000_000 + 4 * 16_384 * 1000


class Full:
    """A meter of a device on which nothing has room."""

    def start(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def read(self) -> Reading:
        raise AssertionError


class Broken(Full):
    def start(self) -> None:
        return None

    def read(self) -> Reading:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")


def test_a_trial_that_cannot_be_measured_says_why() -> None:
    study = tiny("clean.method=mmcl", "search.space={}", "clean.batch_size=2", "evaluation.batch_size=2")
    for meter, what in ((Full(), "a trial does not fit this device"), (Broken(), "RuntimeError: CUDA error: an ill")):
        with pytest.raises(Unknown, match=what) as caught:
            footprint.measure(study, prompts=2, device=CPU, meter=meter, threads=1)
        assert caught.value.where == "mmcl, batches of 2"
    labels = tiny(
        "clean.method=pseudo_labels", "clean.pseudo_labels={model: ViT-L-14, checkpoint: openai}", "search.space={}"
    )
    with pytest.raises(Unknown, match="would fetch its labeller"):
        footprint.measure(labels, prompts=2, device=CPU, meter=Full(), threads=1)


# --- what is said and kept


def test_a_plan_says_what_it_knows_of_shares() -> None:
    study = tiny("resources={use_gpu: true, gpus_per_trial: auto}")
    found = Sizes(pairs=256, images=480, classes=9, how="given")
    for probe, elsewhere in ((False, False), (True, True)):
        told = plan_sharing.told(study, found, probe=probe, elsewhere=elsewhere)
        assert told is not None
        assert told.startswith("GPUs: counted as one for each trial. resources.gpus_per_trial is auto")
    plan = Plan("tiny", found, Sampler.TPE, False, 0, (), None, Storage(*[0] * 6), sharing=told)  # noqa: FBT003
    assert told in planned.lines(plan.as_dict(), gpu_wanted=True)
    for settled in ("resources={use_gpu: false, gpus_per_trial: auto}", "resources.gpus_per_trial=0.5"):
        assert plan_sharing.told(tiny(settled), found, probe=False, elsewhere=True) is None
    # Four trials in all, on two GPUs.
    assert plan_sharing.here_chosen(tiny("resources={use_gpu: true}"), FOUND, gpus=2).trials <= 2


def test_the_record_of_a_run_takes_what_was_chosen(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put("study.json", json.dumps({"study": {"name": "mine"}, "hash": "h"}).encode())
    run_record.update(store, gpu_share=shares.choose(FOUND, cores=8, wanted=8).record())
    kept = run_record.read(store)
    assert (kept["hash"], kept["study"], kept["gpu_share"]["share"]) == ("h", {"name": "mine"}, 0.25)
    run_record.update(store, gpu_share=shares.whole("unknown").record())
    assert run_record.read(store)["gpu_share"]["measured"] is None
    with pytest.raises(RaybdError, match="gpu_share is 3"):
        run_record.require({"gpu_share": 3}, (), where="study.json")


# --- being held to a share


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Allocation was preemptively rejected because it would exceed per_process_memory_fraction "
        "limit. Requested size: 2.00 GiB",
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB; 19.81 GiB allowed;",
    ],
)
def test_what_torch_says_beyond_a_limit_is_out_of_memory(text: str) -> None:
    assert kind_of(torch.OutOfMemoryError(text)) is Failure.OUT_OF_MEMORY


@cuda
def test_a_gpu_trial_takes_what_its_weights_take_at_least() -> None:
    study = tiny("search.space={}", "evaluation.batch_size=8")
    device = torch.device("cuda")
    found = footprint.measure(study, prompts=10, device=device, meter=CudaMeter(device), threads=1)
    weights = costs.towers(study.model.name).weight_bytes
    # With gradients and AdamW's two moments; a context is no less than 50 MB.
    assert found.peak - found.beside >= 4 * weights
    assert found.beside >= 50e6
    assert found.peak < found.total == torch.cuda.mem_get_info(device)[1]


@cuda
def test_a_process_held_to_its_share_is_out_of_memory_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Failure] = []

    def run(study: Study, store: Store, task: object, *, device: torch.device, notify: object) -> str:
        total = torch.cuda.mem_get_info(device)[1]
        torch.empty(int(0.05 * total), dtype=torch.uint8, device=device)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.empty(int(0.15 * total), dtype=torch.uint8, device=device)
        seen.append(kind_of(caught.value))
        return "ended"

    from raybd.clean import trial

    monkeypatch.setattr(trial, "run_trial", run)
    task: Any = type("Task", (), {"trial_id": "t"})
    study = tiny("search.hang_minutes=0")
    try:
        entry: Any = CleanTrial(1, use_gpu=True, memory=0.1)(study, Store("."), task, lambda *_: None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (entry, seen) == ("ended", [Failure.OUT_OF_MEMORY])
