"""What does more of it cost? More trials, a larger cleaning set, more classes and prompts.

    python benchmarks/scaling.py

Trials are replayed on made-up curves: the product's own searcher, ledger, tables and fronts, one trial after the other
without Ray, so that what is timed is what the driver of a sweep does for each. `--ray` replays some on Ray Tune too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ray.tune.search import Searcher
from search_efficiency import on_ray, searcher_of
from setting import setting

from raybd.assignment import Assignment
from raybd.console import View
from raybd.curves import Curve, epoch_record
from raybd.evaluate import class_embeddings, evaluating, make_set
from raybd.ledger import Kind, Ledger
from raybd.model import create
from raybd.replay import ReplayTrial
from raybd.store import Store
from raybd.study import Evaluation, Study
from raybd.study_directory import StudyDirectory
from raybd.study_file import load
from raybd.train.context import LedgerContext
from raybd.train.inputs import inputs_for
from raybd.train.loop import Training

EPOCHS, IMAGES = 10, 5000
LRS, SSL, DECAYS = 16, (0.0, 1.0, 4.0, 8.0), (0.01, 0.1, 1.0)
CPU = torch.device("cpu")
Row = dict[str, Any]


def made_up() -> list[Curve]:
    """Return a curve for each combination: cleanings that cost accuracy and ASR, the more the larger their rate."""
    draw, found = random.Random(0), []
    for place, ssl, decay in itertools.product(range(LRS), SSL, DECAYS):
        epochs = {}
        for epoch in range(EPOCHS + 1):
            done = epoch / EPOCHS * (place + 1) / LRS
            top1, asr = 0.6 - 0.3 * done, 0.99 * 0.01**done
            if epoch:
                top1, asr = top1 + draw.gauss(0, 0.01), min(1.0, max(0.0, asr + draw.gauss(0, 0.01)))
            counted = {"n_clean": IMAGES, "n_triggered": IMAGES, "correct_triggered": 0}
            counted |= {"correct_clean": round(top1 * IMAGES), "hit_target": round(asr * IMAGES)}
            epochs[epoch] = epoch_record({"epoch": epoch}, {"search": counted, "report": counted})
        settings = {"lr": 10 ** (-6 + 4 * place / LRS), "loss_weights.ssl": ssl, "weight_decay": decay}
        found.append(Curve(f"mmcl-{len(found):04d}", "mmcl", "cleanclip", "mmcl-0", settings, epochs))
    return found


def study_of(trials: int, sampler: str) -> Study:
    """Return a study of so many replayed trials."""
    return Study.model_validate(
        {
            "name": "scaling",
            "poison": {"num_poisoned": 1},
            "pretrain": {"objectives": {"mmcl": {}}},
            "clean": {"epochs": EPOCHS},
            "search": {
                "sampler": sampler,
                "num_trials": trials,
                "space": {
                    "lr": {"low": 1e-6, "high": 1e-2, "log": True},
                    "loss_weights.ssl": {"choices": SSL},
                    "weight_decay": {"choices": DECAYS},
                },
            },
            "resources": {"concurrent_trials": 2, "use_gpu": False},
        }
    )


class _Clock:
    """Adds up the time of the parts of a loop."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def start(self) -> None:
        self._last = time.perf_counter()

    def note(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


def with_trials(study: Study, folder: Path, milestones: Sequence[int]) -> list[Row]:
    """Drive a search, and say at each number of trials what the last of them cost and what has come together."""
    store, found, rows = Store(str(folder)), made_up(), list[Row]()
    store.put("study.json", json.dumps({"study": study.resolved(), "hash": study.hash()}).encode())
    on, clock, last = ReplayTrial(tuple(found), nearest=True), _Clock(), 0
    directory = StudyDirectory(study, store, View())
    searcher = searcher_of(study, found, store)
    for number in range(milestones[-1]):
        clock.start()
        task = Assignment(**_asked(searcher, str(number)))
        clock.note("suggest")
        entry = on(study, store, task, lambda epoch, record: None)
        clock.note("trial")
        searcher.on_trial_complete(str(number))
        clock.note("tell")
        directory.add_trial(entry)
        clock.note("tables")
        if number + 1 in milestones:
            each = {f"{part}_ms": 1000 * spent / (number + 1 - last) for part, spent in clock.seconds.items()}
            there = _has(folder, number + 1)
            rows.append({"trials": number + 1, **each, **there, **_again(study, folder, found)})
            clock, last = _Clock(), number + 1
    return rows


def _asked(searcher: Searcher, trial_id: str) -> dict[str, Any]:
    suggested = searcher.suggest(trial_id)
    assert isinstance(suggested, dict)
    return suggested


def _has(folder: Path, trials: int) -> Row:
    """Return how much memory this process has, and what the run directory holds of each of so many trials."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    of_tables, of_ledger = ([p.stat().st_size for p in (folder / name).rglob("*.*")] for name in ("tables", "ledger"))
    return {
        "memory_mb": pages * resource.getpagesize() / 1e6,
        "tables_kb_per_trial": sum(of_tables) / 1e3 / trials,
        "ledger_kb_per_trial": sum(of_ledger) / 1e3 / trials,
        "files_per_trial": (len(of_tables) + len(of_ledger)) / trials,
    }


def _again(study: Study, folder: Path, found: Sequence[Curve]) -> Row:
    """Return how long it takes to go on with a run directory, and to print its fronts (CPU time)."""
    began = time.perf_counter()
    store = Store(str(folder))
    searcher_of(study, found, store)
    StudyDirectory(study, store, View()).load_tables()
    resumed = time.perf_counter() - began
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "raybd", "pareto", str(folder)], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"resume_s": resumed, "pareto_cpu_s": cpu}


def with_ray(study: Study, on: str, folder: Path) -> Row:
    """Replay a study on Ray Tune, two at a time; return wall time for each trial, starting Ray included and not."""
    began = time.perf_counter()
    on_ray(study, on, str(folder))
    wall = time.perf_counter() - began
    starts = sorted(entry.started["started"] for entry in Ledger(Store(str(folder))).entries(Kind.TRIAL))
    span = datetime.fromisoformat(starts[-1]) - datetime.fromisoformat(starts[0])
    return {"trials": len(starts), "wall_s": wall, "trial_ms": 1000 * span.total_seconds() / (len(starts) - 1)}


def with_cleaning_sets(sizes: Sequence[int], folder: Path) -> list[Row]:
    """Return what an epoch of a cleaning trial costs, by number of pairs: training alone, and with all else."""
    rows = []
    for size in sizes:
        settings = [f"clean.num_samples={size}", "clean.epochs=3", "data.max_test_samples=240"]
        study = load("small/grid", overrides=[*settings, "resources.use_gpu=false"])
        inputs, chosen = inputs_for(study), study.clean.settings({})
        clip = create(study.model.name, seed=0)
        store = Store(str(folder / str(size)))
        Ledger(store).start(Kind.TRIAL, "t", {})
        began = time.perf_counter()
        pairs = inputs.cleaning_pairs(chosen, clip, seed=1)
        ready = time.perf_counter() - began
        context = LedgerContext(store=store, kind=Kind.TRIAL, id="t", device=CPU)
        Training(clip, pairs, chosen, context, inputs.evaluation_set).run()
        records = Ledger(store).entry(Kind.TRIAL, "t").epochs
        # The first one warms up.
        trained = median(records[epoch]["train_seconds"] for epoch in (2, 3))
        rows.append({"pairs": size, "ready_s": ready, "epoch_s": trained, "ms_per_pair": 1000 * trained / size})
    return rows


def with_prompts(classes: Sequence[int], templates: Sequence[int]) -> list[Row]:
    """Return how long class embeddings take, by number of classes and of templates."""
    rows, clip = [], create("resnet-tiny-32", seed=0)
    study = load("small/grid", overrides=["data.max_test_samples=240", "resources.use_gpu=false"])
    inputs = inputs_for(study)
    for many, each in itertools.product(classes, templates):
        names = [*inputs.classes, *(f"thing number {i}" for i in range(many))][: max(many, len(inputs.classes))]
        evaluation = Evaluation(templates=tuple(f"picture {i} of a {{}}." for i in range(each)))
        found = make_set(inputs.evaluation_set.images, classes=names, plan=inputs.plan, evaluation=evaluation, seed=1)
        with evaluating(clip.net), torch.inference_mode():
            took = []
            for _ in range(3):
                began = time.perf_counter()
                class_embeddings(clip, found, device=CPU)
                took.append(time.perf_counter() - began)
        prompts = len(found.prompts)
        # The first time they are made into tokens.
        rows.append(
            {
                "classes": len(names),
                "templates": each,
                "first_s": took[0],
                "again_s": median(took[1:]),
                "ms_per_prompt": 1000 * median(took[1:]) / prompts,
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else f"{value:,}" for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print tables, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="*", default=[100, 1000, 2000, 4000, 10_000], help="to measure at")
    parser.add_argument("--sampler", nargs="*", default=["tpe", "random"])
    parser.add_argument("--ray", type=int, nargs="*", default=[], help="numbers of trials to replay on Ray Tune")
    parser.add_argument("--pairs", type=int, nargs="*", default=[250, 500, 1000, 2000])
    parser.add_argument("--classes", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--templates", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = setting("ray", "optuna", "torch")
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    figures: dict[str, list[Row]] = {}

    def show(name: str, rows: list[Row]) -> None:
        figures[name] = rows
        if rows:
            print(f"\n{name}\n\n{table(rows)}", flush=True)
        options.json.write_text(json.dumps({"setting": where, **figures}, indent=1))

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if options.trials:
            for sampler in options.sampler:
                study = study_of(options.trials[-1], sampler)
                show(f"trials, {sampler}", with_trials(study, root / sampler, options.trials))
        if options.ray:
            with_trials(study_of(200, "random"), root / "on", [200])
            found = [with_ray(study_of(n, "random"), str(root / "on"), root / f"ray-{n}") for n in options.ray]
            show("trials on Ray Tune", found)
        if options.pairs:
            show("pairs of the cleaning set", with_cleaning_sets(options.pairs, root / "pairs"))
        if options.classes:
            show("classes and prompts", with_prompts(options.classes, options.templates))


if __name__ == "__main__":
    main()
