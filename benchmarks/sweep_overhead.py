"""What does a sweep cost beside the work of its trials? Many short trials on Ray, against the same ones run plainly.

    python benchmarks/sweep_overhead.py --trials 64 --seconds 2

The plain way is two processes that have everything ready and do nothing but train and evaluate: no Ray, no ledger, no
files. The sweep is the product's own, from the moment the cluster is up until fronts and tables are written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from search_efficiency import setting

from raybd import study_file
from raybd.assignment import Assignment, start_record
from raybd.console import View
from raybd.ledger import Kind, Ledger
from raybd.stages import Run, Stage
from raybd.store import Store
from raybd.study import Study

OBJECTIVE = "mmcl"


def study_of(*, trials: int, workers: int, epochs: int) -> Study:
    """Return a study of short trials on the embedded drawings: a model of 32 pixels, one thread for each trial."""
    settings = {
        "pretrain.objectives": "{mmcl: {}}",
        "pretrain.epochs": "1",
        "data.max_train_samples": "1500",
        "data.max_test_samples": "500",
        "clean.num_samples": "500",
        "clean.epochs": str(epochs),
        "clean.warmup_steps": "1",
        "search.sampler": "random",
        "search.num_trials": str(trials),
        "search.space": "{lr: {low: 1.0e-4, high: 1.0e-3, log: true}}",
        "search.known": "[]",
        "resources.concurrent_trials": str(workers),
    }
    return study_file.load("demo", overrides=[f"{name}={value}" for name, value in settings.items()])


@dataclass
class _Nowhere:
    """A training context that keeps nothing."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def report(self, epoch: int, record: dict[str, Any], weights: Callable[[], bytes], state: Any = None) -> None:
        """Forget."""

    def last_epoch(self) -> int:
        """Return that nothing was done."""
        return -1

    def load_state(self) -> None:
        """Return nothing."""

    def progress(self, progress: object) -> None:
        """Forget."""


_ready: dict[str, Any] = {}


def _prepare(text: str, weights: str) -> None:
    """Make all ready that trials share, in a process of the plain way."""
    from raybd import checkpoint
    from raybd.train.inputs import inputs_for

    torch.set_num_threads(1)
    study = Study.model_validate_json(text)
    inputs = inputs_for(study)
    inputs.check()
    _ready.update(study=study, inputs=inputs, weights=checkpoint.read(weights))
    _plain(Assignment("warm", 0, OBJECTIVE, "", {"lr": 1e-4}))


def _plain(task: Assignment) -> float:
    """Train and evaluate as a trial does; return the seconds that it took."""
    from raybd.clean import registry
    from raybd.model import create, load_weights
    from raybd.train.loop import Training

    began, study, inputs = time.perf_counter(), _ready["study"], _ready["inputs"]
    settings, seed = study.clean.settings(task.params), start_record(study, task)["seed"]
    clip = create(study.model.name, seed=0)
    load_weights(clip, _ready["weights"], where="")
    pairs = inputs.cleaning_pairs(settings, clip, seed=seed)
    recipe = registry.recipe(settings, seed=seed)
    Training(clip, pairs, settings, _Nowhere(), inputs.evaluation_set, recipe=recipe).run()
    return time.perf_counter() - began


def plainly(study: Study, weights: str, tasks: list[Assignment], *, workers: int) -> tuple[float, float]:
    """Return wall seconds of the plain way once its processes are ready, and the sum over trials of their seconds."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _prepare, (study.model_dump_json(), weights)) as pool:
        list(pool.map(_plain, tasks[:workers]))
        began = time.perf_counter()
        work = sum(pool.map(_plain, tasks))
        return time.perf_counter() - began, work


class _Clock(View):
    """Notes when the search began and when its first trial reported."""

    def __init__(self) -> None:
        super().__init__()
        self.began = self.first = 0.0

    def stage(self, name: str) -> None:
        if name.startswith("search:"):
            self.began = time.perf_counter()

    def line(self, text: str, *, style: str | None = None) -> None:
        if " epoch " in text and not self.first and self.began:
            self.first = time.perf_counter()


def swept(study: Study, store: Store) -> tuple[float, float]:
    """Return wall seconds of the product's sweep once the cluster is up, and those until the first epoch's line."""
    view = _Clock()
    with contextlib.redirect_stdout(io.StringIO()):
        run = Run(study, store, view)
        run.run()
    return time.perf_counter() - view.began, view.first - view.began


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="about so long a trial works")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where numbers go")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"{folder}/run")
        one = study_of(trials=given.trials, workers=given.workers, epochs=1)
        with contextlib.redirect_stdout(io.StringIO()):
            Run(one, store, View()).run(Stage.PRETRAIN)
        (pretrain_id,) = (entry.id for entry in Ledger(store).entries(Kind.PRETRAIN))
        weights = store.path(f"pretrained/{pretrain_id}.safetensors")
        task = Assignment("probe", 0, OBJECTIVE, pretrain_id, {"lr": 2e-4})
        _, short = plainly(one, weights, [task], workers=1)
        longer = study_of(trials=given.trials, workers=given.workers, epochs=2)
        _, long = plainly(longer, weights, [task], workers=1)
        epochs = max(1, 1 + round((given.seconds - short) / (long - short)))
        study = study_of(trials=given.trials, workers=given.workers, epochs=epochs)
        tasks = [
            Assignment(f"{OBJECTIVE}-{n:04d}", n, OBJECTIVE, pretrain_id, {"lr": 2e-4}) for n in range(given.trials)
        ]
        wall, work = plainly(study, weights, tasks, workers=given.workers)
        sweep, first = swept(study, Store(f"{folder}/sweep"))
    rows = {
        "trials": given.trials,
        "workers": given.workers,
        "epochs of a trial": epochs,
        "seconds of a trial, plainly": work / given.trials,
        "work of all ÷ workers, s": work / given.workers,
        "wall, plainly, s": wall,
        "wall, sweep, s": sweep,
        "  of it until the first epoch was done, s": first,
        "sweep ÷ (work ÷ workers)": sweep * given.workers / work,
    }
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:.3f} |" if isinstance(value, float) else f"| {name} | {value} |")
    where = setting()
    print("\n" + ", ".join(f"{name} {value}" for name, value in where.items()))
    given.json.write_text(json.dumps({"setting": where, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
