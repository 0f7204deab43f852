"""How long does a cleaning epoch with its evaluation take, beside the published way and beside the least it can take?

    python benchmarks/cleaning_epoch.py --root SHARDS/cifar10

The product's own training loop runs a CleanCLIP trial, and after each of its epochs the other ways take their turn on
the same pairs, images and settings, in the same process with the same threads: a slow moment of the machine meets all
of them. The first round warms up and is not counted. What the ways are is said in `reference_cleaning.py`. With
`--compile` one more takes part, the floor with compiled towers, and the table is followed by what compiling took and
after how many epochs of one process it would have paid.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from reference_cleaning import Encoded, Floor, Found, Published, Ready, Task, encoded, numbers
from setting import setting

from raybd.clean import registry
from raybd.data import shards
from raybd.data.prompts import templates
from raybd.evaluate import measure
from raybd.ledger import Kind, Ledger
from raybd.model import Clip, create
from raybd.seeding import fork
from raybd.store import Store
from raybd.study import CleanSettings, Study
from raybd.study_file import load
from raybd.train.context import LedgerContext
from raybd.train.inputs import Inputs
from raybd.train.loop import Training

WAYS = ("raybd", "floor", "floor, as torch comes", "published way")
COMPILED = "floor, compiled"
# Rounding may move an image that lies between two classes.
_COUNTS_DIFFER = 0.002
_LOSS_DIFFERS = 0.01


@dataclass
class Times:
    """Seconds of each counted round."""

    train: list[float] = field(default_factory=list)
    evaluate: list[float] = field(default_factory=list)
    epoch: list[float] = field(default_factory=list)

    def add(self, train: float, evaluate: float, epoch: float) -> None:
        """Take a round."""
        self.train.append(train)
        self.evaluate.append(evaluate)
        self.epoch.append(epoch)


class Bench:
    """A study's cleaning trial, and the same work for the other ways.

    Args:
        folder: of the trial's run, empty.
        rounds: counted ones; one more warms up.
        workers: of each DataLoader of the published way.
        compiled: whether the floor is tried with compiled towers, too.

    Attributes:
        first_seconds: what each other way's first epoch took, which is not counted.
    """

    def __init__(
        self,
        study: Study,
        device: torch.device,
        *,
        folder: str,
        rounds: int,
        workers: int,
        eda_each_epoch: bool,
        compiled: bool = False,
    ) -> None:
        self.study, self.device, self.rounds = study, device, rounds
        self.inputs = Inputs(study)
        self.settings = study.clean.settings({"epochs": rounds + 1})
        if self.settings.method != "cleanclip" or not self.settings.loss_weights.ssl:
            raise SystemExit("the other ways are CleanCLIP's: set clean.method=cleanclip, clean.loss_weights.ssl=1")
        self.clip = self._new()
        self.pairs = self.inputs.cleaning_pairs(self.settings, self.clip, seed=study.seed)
        self.training = self._training(Store(folder))
        self.task = self._task(self.training)
        pairs, tests = self._encoded(list(self.pairs.images.index.keys), study.data.train), self._tests()
        ready = self._ready()
        self.floor = Floor(self._new(), self.task, ready)
        self.plain = Floor(self._new(), self.task, ready, layout=torch.contiguous_format, fused=None)
        self.published = Published(self._new(), self.task, pairs, tests, workers=workers, eda_each_epoch=eda_each_epoch)
        self.others: dict[str, Floor | Published] = dict(
            zip(WAYS[1:], (self.floor, self.plain, self.published), strict=True)
        )
        if compiled:
            self.others[COMPILED] = Floor(self._new(), self.task, ready, compiled=True)
        self.times = {way: Times() for way in ("raybd", *self.others)}
        self.first_seconds: dict[str, float] = {}
        self._losses: dict[str, float] = {}

    def _new(self) -> Clip:
        return create(self.study.model.name, seed=fork(self.study.seed, "weights"))

    def _training(self, store: Store) -> Training:
        Ledger(store).start(Kind.TRIAL, "trial", {})
        context = LedgerContext(store=store, kind=Kind.TRIAL, id="trial", device=self.device, notify=self._after_epoch)
        recipe = registry.recipe(self.settings, seed=0)
        return Training(self.clip, self.pairs, self.settings, context, self.inputs.evaluation_set, recipe=recipe)

    def _task(self, training: Training) -> Task:
        study, (probe, *_) = self.study, self.inputs.evaluation_set.probes
        made = templates(study.evaluation.templates, field="evaluation.templates")
        return Task(
            settings=self.settings,
            prompts=[[template(name) for template in made] for name in self.inputs.classes],
            attack=probe.attack,
            target=probe.target,
            seed=self.inputs.evaluation_set.seed,
            batch=study.evaluation.batch_size,
            total_steps=(self.rounds + 1) * -(-len(self.pairs) // self.settings.batch_size),
            device=self.device,
            autocast=training.autocast,
        )

    def _encoded(self, keys: Sequence[str], which: str | tuple[str, ...]) -> list[Encoded]:
        urls = shards.find_shards(self.study.data, which, field_name="data")
        return encoded((sample for url in urls for sample in shards.samples(url)), [str(key) for key in keys])

    def _tests(self) -> list[Encoded]:
        return self._encoded(list(self.inputs.evaluation_set.images.index.keys), self.study.data.test)

    def _ready(self) -> Ready:
        """Return the batches of raybd's first epoch, and its evaluation set, as the model takes them."""
        found, device = self.inputs.evaluation_set, self.device

        def pixels(images: torch.Tensor) -> torch.Tensor:
            return self.clip.normalise(images.to(device)).contiguous(memory_format=torch.channels_last)

        batches = []
        for batch in self.pairs.epoch(1, batch_size=self.settings.batch_size):
            assert batch.image_views_BCHW is not None
            assert batch.token_views_BL is not None
            images = torch.cat([batch.images_BCHW, batch.image_views_BCHW])
            batches.append((pixels(images), torch.cat([batch.tokens_BL, batch.token_views_BL]).to(device)))
        clean = torch.from_numpy(found.images.pixels(np.arange(len(found.images.index))))
        probe = found.probes[0]
        rows = np.flatnonzero(probe.triggered_N)
        seeds = [fork(found.seed, "evaluate", str(key)) for key in found.images.index.keys[rows]]
        triggered = [probe.attack.triggered(clean[i], seed=seed) for i, seed in zip(rows, seeds, strict=True)]
        tokens = self.clip.tokenizer([text for texts in self.task.prompts for text in texts]).to(device)
        labels = torch.from_numpy(found.images.index.labels).to(device)
        return Ready(batches, pixels(clean), pixels(torch.stack(triggered)), labels, tokens)

    def check_counts(self) -> None:
        """Stop unless all ways count the same with the same weights. Errors: SystemExit."""
        halves = measure(self.clip, self.inputs.evaluation_set, device=self.device, autocast=self.training.autocast)
        both = halves.counts["search"] + halves.counts["report"]
        ours = Found(both.n_clean, both.correct_clean, both.n_triggered, both.hit_target)
        for name, way in (("floor", self.floor), ("published way", self.published)):
            theirs = way.evaluate()
            if np.abs(numbers(theirs) - numbers(ours)).max() > _COUNTS_DIFFER * ours.n_clean:
                raise SystemExit(f"with the same weights raybd counts {ours}, the {name} {theirs}: not the same work")

    def run(self) -> None:
        """Let raybd train, and the others after each of its epochs. Errors: SystemExit where the work differs."""
        self.check_counts()
        self.training.run()
        floor = self._losses["floor"]
        for way in {"raybd", COMPILED} & set(self.times):
            if abs(self._losses[way] - floor) > _LOSS_DIFFERS * floor:
                raise SystemExit(
                    f"mean loss of the first epoch: {way} {self._losses[way]}, floor {floor}: not the same work"
                )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _after_epoch(self, epoch: int, record: dict[str, Any]) -> None:
        """Note raybd's epoch, all that it took with its record and its state, and let the other ways do theirs."""
        ended = self._now()
        if epoch:
            if epoch == 1:
                self._losses["raybd"] = record["loss"]
            else:
                self.times["raybd"].add(record["train_seconds"], record["evaluate_seconds"], ended - self._started)
            for way, doer in self.others.items():
                self._turn(way, doer, counted=epoch > 1)
        self._started = self._now()

    def _turn(self, way: str, doer: Floor | Published, *, counted: bool) -> None:
        began = self._now()
        loss = doer.train()
        trained = self._now()
        doer.evaluate()
        done = self._now()
        if counted:
            self.times[way].add(trained - began, done - trained, done - began)
        else:
            self._losses[way] = loss
            self.first_seconds[way] = done - began


def worth(times: Mapping[str, Times], *, first: float) -> tuple[float, float]:
    """Return what compiling took, seconds, and after how many epochs in one process it pays (infinite: never).

    Args:
        first: seconds of the compiled way's first epoch.
    """
    plain, compiled = (median(times[way].epoch) for way in ("floor", COMPILED))
    took = first - compiled
    return took, took / (plain - compiled) if compiled < plain else math.inf


def ratio(times: Mapping[str, Times], way: str, to: str) -> float:
    """Return the median over rounds of what one way took against another in the same round."""
    return median(a / b for a, b in zip(times[way].epoch, times[to].epoch, strict=True))


def table(times: Mapping[str, Times]) -> str:
    """Return the results as a Markdown table: medians in seconds, and ratios within rounds."""
    lines = [
        "| way | training, s | evaluation, s | epoch, s | × floor | × published way |",
        "|---|---|---|---|---|---|",
    ]
    for way, own in times.items():
        seconds = [f"{median(part):.2f}" for part in (own.train, own.evaluate, own.epoch)]
        ratios = [f"{ratio(times, way, to):.3f}" for to in ("floor", "published way")]
        lines.append(f"| {' | '.join([way, *seconds, *ratios])} |")
    return "\n".join(lines)


def _given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--study", default="cifar10")
    parser.add_argument("--root", help="folder of the study's shards")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `raybd run`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: a thread for each core")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of the published way")
    parser.add_argument("--eda", choices=("once", "epoch"), default="once", help="when the published way draws EDA")
    parser.add_argument("--compile", action="store_true", help="try the floor with compiled towers as well")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where numbers go")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    given = _given()
    torch.set_num_threads(given.threads or len(os.sched_getaffinity(0)))
    device = torch.device(given.device)
    study = load(given.study, overrides=[*given.set, *([f"data.root={given.root}"] if given.root else [])])
    how = {
        "rounds": given.rounds,
        "workers": given.workers,
        "eda_each_epoch": given.eda == "epoch",
        "compiled": given.compile,
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(study, device, folder=folder, **how)
        bench.run()
    settings: CleanSettings = bench.settings
    found = bench.inputs.evaluation_set
    triggered = int(found.probes[0].triggered_N.sum())
    print(
        f"{study.model.name}: an epoch of {len(bench.pairs)} pairs in batches of {settings.batch_size}, then "
        f"{len(found.images.index)} clean and {triggered} triggered images, {len(found.prompts)} prompts; "
        f"medians of {given.rounds} rounds\n"
    )
    print(table(bench.times))
    if given.compile:
        took, pays = worth(bench.times, first=bench.first_seconds[COMPILED])
        print(f"\ncompiling took {took:.1f} s, which pays after {pays:.0f} epochs of one process")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU used"
    where: dict[str, Any] = setting("torch", "torchvision", "open_clip_torch", "pillow", device=name)
    where["threads"] = torch.get_num_threads()
    print("\n" + ", ".join(f"{name} {value}" for name, value in where.items()))
    record = {"setting": where, "study": study.model_dump(mode="json"), "workers": given.workers, "eda": given.eda}
    record["seconds"] = {way: vars(times) for way, times in bench.times.items()}
    record["first_seconds"] = bench.first_seconds
    record["ratios"] = {
        to: {way: ratio(bench.times, way, to) for way in bench.times} for to in ("floor", "published way")
    }
    given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
