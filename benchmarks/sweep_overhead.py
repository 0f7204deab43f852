"""What does a sweep of many short trials cost beyond the trials themselves?

    python benchmarks/sweep_overhead.py
    python benchmarks/sweep_overhead.py --trials 8 --samples 1900 --set clean.epochs=5 --alone 1  # a minute each

A real search on Ray, its trials real cleanings of about three seconds each; then the very same trials, or some of them,
one after another in one process, without Ray and without a driver that writes tables and fronts.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from setting import setting

from raybd.assignment import Assignment
from raybd.clean.trial import run_trial
from raybd.console import View
from raybd.ledger import Entry, Kind, Ledger
from raybd.stages import Run, Stage
from raybd.store import Store
from raybd.study import Study
from raybd.study_file import load
from raybd.train.pretraining import weights_name


@dataclass
class Result:
    """What a sweep took.

    Attributes:
        wall_seconds: from the call of the search, on a cluster that is up, until the last trial is in the tables.
        first_trial_seconds: of these, until the first trial began: processes start and import.
        driver_cpu_seconds: of the driver's own process, meanwhile.
        inside_seconds: sum of the trials' own clocks, in the sweep.
        alone_seconds: of the same trials, one after another, each from its first to its last record; where only some
            were, as if the others took as long.
        at_once: how many trials ran side by side.
    """

    trials: int
    at_once: int
    wall_seconds: float
    first_trial_seconds: float
    driver_cpu_seconds: float
    inside_seconds: float
    alone_seconds: float

    @property
    def over_alone(self) -> float:
        """Return wall time over the least that so many processes would take, were each as fast as one alone."""
        return self.wall_seconds * self.at_once / self.alone_seconds

    @property
    def warm_over_alone(self) -> float:
        """Return the same from the first trial's beginning on: processes are there, and have imported all they need."""
        return (self.wall_seconds - self.first_trial_seconds) * self.at_once / self.alone_seconds

    @property
    def over_inside(self) -> float:
        """Return wall time over what the trials themselves say that they took, side by side."""
        return self.wall_seconds * self.at_once / self.inside_seconds

    @property
    def warm_over_inside(self) -> float:
        """Return the same from the first trial's beginning on."""
        return (self.wall_seconds - self.first_trial_seconds) * self.at_once / self.inside_seconds


class _Timed(Run):
    wall_seconds = cpu_seconds = first_trial_seconds = math.nan

    def search(self, ids: dict[str, str]) -> None:
        """Run the trials, and note what that took."""
        began, cpu, now = time.perf_counter(), _cpu_seconds(), time.time()
        super().search(ids)
        self.wall_seconds, self.cpu_seconds = time.perf_counter() - began, _cpu_seconds() - cpu
        starts = [entry.started["started"] for entry in self.ledger.entries(Kind.TRIAL)]
        self.first_trial_seconds = datetime.fromisoformat(min(starts)).timestamp() - now


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def study_of(overrides: list[str], *, trials: int, samples: int) -> Study:
    """Return a study of short trials on the embedded drawings: one pretraining epoch, trials of two."""
    search = ["search.sampler=tpe", "search.space={lr: {low: 1.0e-4, high: 1.0e-2, log: true}}"]
    own = [f"search.num_trials={trials}", f"clean.num_samples={samples}", "clean.epochs=2", "pretrain.epochs=1"]
    own += ["pretrain.objectives={mmcl: {}}", "data.max_train_samples=2000", "data.max_test_samples=240"]
    return load("small/grid", overrides=[*search, *own, "resources.use_gpu=false", *overrides])


def alone(study: Study, store: Store, entries: list[Entry], folder: str) -> list[float]:
    """Run the trials of a sweep one after another in this process; return the seconds of each."""
    torch.set_num_threads(1)
    other, took = Store(folder), []
    for name in {weights_name(entry.started["pretrain_id"]) for entry in entries}:
        other.put(name, store.get(name))
    for count, entry in enumerate([entries[0], *entries]):
        started = entry.started
        # The first one warms up, under a number of its own.
        number = study.search.trials_each if count == 0 else started["number"]
        id = f"{started['objective']}-{number:04d}"
        task = Assignment(id, number, started["objective"], started["pretrain_id"], started["params"])
        began = time.perf_counter()
        run_trial(study, other, task, device=torch.device("cpu"))
        took.append(time.perf_counter() - began)
    return took[1:]


def run(study: Study, folder: Path, *, some: int) -> tuple[Result, list[float]]:
    """Run a sweep in a new folder, then some of its trials alone. Errors: SystemExit where a trial failed."""
    store = Store(str(folder / "sweep"))
    sweep = _Timed(study, store, View())
    if sweep.run(Stage.SEARCH).failed:
        raise SystemExit(f"trials failed: see {store.uri}")
    entries = Ledger(store).entries(Kind.TRIAL)
    took = alone(study, store, entries[:some], str(folder / "alone"))
    result = Result(
        trials=len(entries),
        at_once=sweep.share.concurrent_trials,
        wall_seconds=sweep.wall_seconds,
        first_trial_seconds=sweep.first_trial_seconds,
        driver_cpu_seconds=sweep.cpu_seconds,
        inside_seconds=sum(entry.ended["device_seconds"] for entry in entries if entry.ended),
        alone_seconds=sum(took) / len(took) * len(entries),
    )
    return result, took


def table(result: Result, took: list[float]) -> str:
    """Return the result as a Markdown table."""
    rows: list[tuple[str, Any]] = [
        ("trials, side by side", f"{result.trials}, {result.at_once}"),
        ("a trial alone, median, s", f"{median(took):.2f}"),
        ("a trial in the sweep, mean, s", f"{result.inside_seconds / result.trials:.2f}"),
        ("sweep, s", f"{result.wall_seconds:.1f}"),
        ("until its first trial began, s", f"{result.first_trial_seconds:.1f}"),
        ("CPU time of the driver, s", f"{result.driver_cpu_seconds:.1f}"),
        ("sweep ÷ (trials alone ÷ side by side)", f"{result.over_alone:.2f}"),
        ("from its first trial on ÷ (trials alone ÷ side by side)", f"{result.warm_over_alone:.2f}"),
        ("sweep ÷ (trials in the sweep ÷ side by side)", f"{result.over_inside:.2f}"),
        ("from its first trial on ÷ (trials in the sweep ÷ side by side)", f"{result.warm_over_inside:.2f}"),
    ]
    return "\n".join(["| what | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--samples", type=int, default=150, help="cleaning pairs of a trial: how long it takes")
    parser.add_argument("--alone", type=int, help="how many of them are run alone, too; default: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the study")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    study = study_of(options.set, trials=options.trials, samples=options.samples)
    with tempfile.TemporaryDirectory() as folder:
        result, took = run(study, Path(folder), some=options.alone or options.trials)
    where = setting("ray", "optuna", "torch")
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(table(result, took))
    figures = {
        **asdict(result),
        "over_alone": result.over_alone,
        "warm": result.warm_over_alone,
        "over_inside": result.over_inside,
        "warm_over_inside": result.warm_over_inside,
        "took": took,
    }
    options.json.write_text(json.dumps({"setting": where, **figures}, indent=1))


if __name__ == "__main__":
    main()
