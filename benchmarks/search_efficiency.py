"""How fast do samplers find the front? Share of the full hypervolume against epochs spent, on recorded curves.

    python benchmarks/search_efficiency.py --on runs/cc3m-published/sweep.parquet

Every search is the product's own: its searcher, its Optuna samplers, its lookup of curves. One search on real Ray Tune
with one worker is run first and must give the same trials as the direct drive that the others use.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from raybd import curves, pareto
from raybd.assignment import Assignment, point
from raybd.cluster.searcher import LedgerSearcher
from raybd.curves import Curve
from raybd.ledger import Entry, Kind, Ledger, State
from raybd.replay import Recorded, ReplayTrial, recorded_trial
from raybd.seeding import fork
from raybd.study import Study

SHARES = (0.10, 0.25, 0.50, 0.75, 1.00)
SAMPLERS = ("grid", "random", "tpe", "nsga2")
# With fewer trials than the default population of 50, NSGA-II would be random search.
POPULATION, STARTUP = 10, 10


def study_of(found: Sequence[Curve], sampler: str, *, seed: int) -> Study:
    """Return a study that searches method and learning rate over what is recorded.

    The grid has the recorded settings themselves, in an order that the seed draws. The other samplers draw any
    learning rate of the recorded range, log-uniformly or as they learn, and get the nearest curve.
    """
    objectives = sorted({curve.objective for curve in found})
    points = sorted({(curve.method, curve.settings["lr"]) for curve in found})
    lrs, methods = sorted({lr for _, lr in points}), sorted({method for method, _ in points})
    known = [{"method": method, "lr": lr} for method, lr in points]
    random.Random(fork(seed, "order")).shuffle(known)
    grid = sampler == "grid"
    search = {
        "sampler": sampler,
        "num_trials": len(points),
        "startup_trials": STARTUP,
        "population": POPULATION,
        "space": {
            "method": {"choices": methods},
            "lr": {"choices": lrs} if grid else {"low": lrs[0], "high": lrs[-1], "log": True},
        },
        "known": known if grid else [],
    }
    return Study.model_validate(
        {
            "name": "search_efficiency",
            "seed": seed,
            "poison": {"num_poisoned": 1},
            "pretrain": {"objectives": {name: {} for name in objectives}},
            "clean": {"epochs": min(curve.last for curve in found)},
            "search": search,
            "resources": {"concurrent_trials": 1, "use_gpu": False},
        }
    )


def drive(study: Study, found: Sequence[Curve]) -> list[Entry]:
    """Run a search without Ray, one trial after the other; return what its ledger would have, in order."""
    recorded = Recorded(found, nearest=True)
    recorded.check(study)
    on, done = ReplayTrial(tuple(found), nearest=True), dict[str, Entry]()
    searcher = LedgerSearcher(
        study, recorded.pretrain_ids(study), [], lambda task: done[task.trial_id], stop=lambda *_: False
    )
    for number in range(searcher.remaining):
        task = searcher.suggest(str(number))
        assert isinstance(task, dict)
        record, epochs = recorded_trial(on, study, Assignment(**task))
        done[task["trial_id"]] = Entry(task["trial_id"], record, 1, epochs, {"state": State.COMPLETE})
        searcher.on_trial_complete(str(number))
    return list(done.values())


def on_ray(study: Study, on: str, folder: str) -> list[Entry]:
    """Run a search on real Ray Tune, one worker; return its ledger."""
    from raybd.console import View
    from raybd.replaying import ReplayRun
    from raybd.store import Store

    with contextlib.redirect_stdout(io.StringIO()):
        ReplayRun(study, Store(folder), View(), on=on, nearest=True).run()
    return Ledger(Store(folder)).entries(Kind.TRIAL)


def assert_same(ours: Sequence[Entry], rays: Sequence[Entry]) -> None:
    """Stop unless two searches had the same trials: settings drawn, curves, epochs. Errors: SystemExit."""

    def trials(entries: Sequence[Entry]) -> dict[str, Any]:
        return {e.id: (e.started["params"], e.started["curve"], sorted(e.epochs)) for e in entries}

    if trials(ours) != trials(rays):
        raise SystemExit("the direct drive and Ray Tune with one worker gave other trials: nothing below would hold")


def progress(entries: Sequence[Entry], objective: str) -> list[float]:
    """Return the hypervolume after each epoch spent on a pretrain objective; epoch 0 of a trial costs nothing."""
    top1: list[float] = []
    asr: list[float] = []
    areas = []
    for entry in entries:
        if entry.started["objective"] != objective:
            continue
        for number, record in sorted(entry.epochs.items()):
            accuracy, rate = point(record)
            top1.append(accuracy)
            asr.append(rate)
            if number:
                # Only the front matters for what comes: without the rest this stays fast.
                kept = pareto.front(top1, asr)
                top1, asr = [top1[i] for i in kept], [asr[i] for i in kept]
                areas.append(pareto.hypervolume(top1, asr))
    return areas


def full(found: Sequence[Curve], objective: str) -> float:
    """Return the hypervolume of all recorded points of a pretrain objective."""
    points = [point(record) for c in found if c.objective == objective for record in c.epochs.values()]
    return pareto.hypervolume(*zip(*points, strict=True))


def at_shares(areas: Sequence[float], whole: float) -> list[float]:
    """Return the share of the full hypervolume at each share of the epochs."""
    return [areas[max(1, round(share * len(areas))) - 1] / whole for share in SHARES]


def interval(values: Sequence[float], *, draws: int = 10_000) -> tuple[float, float, float]:
    """Return the mean over seeds with its 95 % bootstrap interval (percentiles of resampled means)."""
    values_S = np.asarray(values)
    picks_BS = np.random.default_rng(0).integers(0, len(values_S), (draws, len(values_S)))
    low, high = np.percentile(values_S[picks_BS].mean(axis=1), (2.5, 97.5))
    return float(values_S.mean()), float(low), float(high)


def measure(found: Sequence[Curve], seeds: int) -> list[dict[str, Any]]:
    """Return, for each pretrain objective and sampler, the shares at `SHARES` for every seed and their intervals."""
    objectives = sorted({curve.objective for curve in found})
    whole = {objective: full(found, objective) for objective in objectives}
    rows = {(o, s): [] for o in objectives for s in SAMPLERS}
    for sampler in SAMPLERS:
        for seed in range(seeds):
            entries = drive(study_of(found, sampler, seed=seed), found)
            for objective in objectives:
                rows[objective, sampler].append(at_shares(progress(entries, objective), whole[objective]))
    return [
        {
            "objective": objective,
            "sampler": sampler,
            "full_hypervolume": whole[objective],
            "shares": per_seed,
            "intervals": [interval(column) for column in zip(*per_seed, strict=True)],
        }
        for (objective, sampler), per_seed in rows.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as a Markdown table, in percent."""
    heads = [f"{share:.0%} of the epochs" for share in SHARES]
    lines = ["| pretrain objective | sampler | " + " | ".join(heads) + " |", "|" + "---|" * (2 + len(heads))]
    for row in rows:
        cells = [f"{100 * m:.1f} [{100 * low:.1f}, {100 * high:.1f}]" for m, low, high in row["intervals"]]
        lines.append(f"| {row['objective']} | {row['sampler']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def setting() -> dict[str, str]:
    """Return when, where and with what this runs."""
    versions = {name: metadata.version(name) for name in ("raybd", "ray", "optuna", "numpy")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = f"{cores} cores, {platform.machine()}, {platform.system()}, no GPU used"
    return {**versions, "python": sys.version.split()[0], "date": f"{datetime.now(UTC):%Y-%m-%d}", "device": device}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--on", required=True, help="recorded curves: a sweep.parquet, or a run directory")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where numbers go")
    given = parser.parse_args()
    found = curves.read(given.on)
    study = study_of(found, "tpe", seed=0)
    with tempfile.TemporaryDirectory() as folder:
        ours, rays = drive(study, found), on_ray(study, given.on, folder)
    assert_same(ours, rays)
    print(f"one search (tpe, seed 0) on Ray Tune with one worker: the same {len(rays)} trials as driven directly\n")
    rows = measure(found, given.seeds)
    print(f"Share of the full hypervolume in percent, mean over {given.seeds} seeds [95 % bootstrap interval]\n")
    print(table(rows))
    where = setting()
    print("\n" + ", ".join(f"{name} {value}" for name, value in where.items()))
    record = {"setting": where, "seeds": given.seeds, "at": SHARES, "population": POPULATION, "startup": STARTUP}
    record |= {"fingerprint": curves.fingerprint(found), "rows": rows}
    given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
