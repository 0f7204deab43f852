"""How fast do searches find the front? Share of the full hypervolume against epochs spent, on recorded curves.

    python benchmarks/search_efficiency.py --on runs/cc3m-published/sweep.parquet

Every search is the product's own: its searcher, its Optuna samplers, its lookup of curves. One search on real Ray Tune
with one worker is run first and must give the same trials as the direct drive that the others use.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from setting import setting

from raybd import curves, pareto
from raybd.assignment import Assignment, point, settle, stop
from raybd.cluster.searcher import LedgerSearcher
from raybd.curves import Curve
from raybd.ledger import Kind, Ledger
from raybd.replay import Recorded, ReplayTrial
from raybd.seeding import fork
from raybd.store import Store
from raybd.study import Study

SHARES = (0.10, 0.25, 0.50, 0.75, 1.00)
SAMPLERS = ("grid", "random", "tpe", "nsga2")
RUNGS, KEEP = (1, 3), 0.4
HALVING = " + halving"  # to a sampler's name
SEARCHES = (*SAMPLERS, *(sampler + HALVING for sampler in ("grid", "random", "tpe")))
# With fewer trials than the default population of 50, NSGA-II would be random search.
POPULATION, STARTUP = 10, 10


def study_of(found: Sequence[Curve], searched: str, *, seed: int) -> Study:
    """Return a study that searches method and learning rate over what is recorded: a sampler, with halving or without.

    The grid has the recorded settings themselves, in an order that the seed draws. The other samplers draw any
    learning rate of the recorded range, log-uniformly or as they learn, and get the nearest curve.
    """
    objectives = sorted({curve.objective for curve in found})
    points = sorted({(curve.method, curve.settings["lr"]) for curve in found})
    lrs, methods = sorted({lr for _, lr in points}), sorted({method for method, _ in points})
    known = [{"method": method, "lr": lr} for method, lr in points]
    random.Random(fork(seed, "order")).shuffle(known)
    sampler, halving = searched.removesuffix(HALVING), searched.endswith(HALVING)
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
        "stopping": {"rungs": RUNGS if halving else (), "keep": KEEP},
    }
    return Study.model_validate(
        {
            "name": "search_efficiency",
            "seed": seed,
            "poison": {"num_poisoned": 1},
            "pretrain": {"objectives": {name: {} for name in objectives}},
            "clean": {"epochs": least(found)},
            "search": search,
            "resources": {"concurrent_trials": 1, "use_gpu": False},
        }
    )


Spent = list[tuple[str, Mapping[str, Any]]]  # pretrain objective and record of each epoch, in order


def searcher_of(study: Study, found: Sequence[Curve], store: Store) -> LedgerSearcher:
    """Return the product's searcher, which goes on from what the ledger of a run directory has."""
    return LedgerSearcher(
        study,
        Recorded(found, nearest=True).pretrain_ids(study),
        Ledger(store).entries(Kind.TRIAL),
        lambda task: settle(store, study, task),
        stop=lambda trial_id, reason: stop(store, trial_id, reason).ended is not None,
    )


def drive(study: Study, found: Sequence[Curve], folder: str) -> Spent:
    """Run a search without Ray, one trial after the other, in a run directory; return its epochs as they were spent."""
    store, spent = Store(folder), Spent()
    Recorded(found, nearest=True).check(study)
    on = ReplayTrial(tuple(found), nearest=True)
    searcher = searcher_of(study, found, store)
    for number in itertools.count():
        suggested = searcher.suggest(str(number))
        if not isinstance(suggested, dict):
            return spent
        task = Assignment(**suggested)
        on(study, store, task, lambda _, record, objective=task.objective: spent.append((objective, record)))
        searcher.on_trial_complete(str(number))
    raise AssertionError


def on_ray(study: Study, on: str, folder: str) -> None:
    """Run a search on real Ray Tune, one worker, in a run directory."""
    from raybd.console import View
    from raybd.replaying import ReplayRun

    with contextlib.redirect_stdout(io.StringIO()):
        ReplayRun(study, Store(folder), View(), on=on, nearest=True).run()


def trials(folder: str) -> dict[str, Any]:
    """Return what a run directory has of each trial: settings drawn, curve, epochs, how it ended."""
    return {
        e.id: (e.started["params"], e.started["curve"], sorted(e.epochs), e.ended and e.ended.get("stop_reason"))
        for e in Ledger(Store(folder)).entries(Kind.TRIAL)
    }


def assert_same(ours: Mapping[str, Any], rays: Mapping[str, Any]) -> None:
    """Stop unless two searches had the same trials. Errors: SystemExit."""
    if ours != rays:
        raise SystemExit("the direct drive and Ray Tune gave other trials: nothing below would hold")


def check_on_ray(found: Sequence[Curve], on: str) -> None:
    """Stop unless searches on real Ray Tune have the same trials as those driven directly. Errors: SystemExit."""
    for searched in ("tpe", "grid" + HALVING):
        study = study_of(found, searched, seed=0)
        with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as rays:
            drive(study, found, ours)
            on_ray(study, on, rays)
            assert_same(trials(ours), trials(rays))
            print(
                f"one search ({searched}, seed 0) on Ray Tune: the same {len(trials(rays))} trials as driven directly"
            )


def progress(spent: Spent, objective: str) -> list[float]:
    """Return the hypervolume after each epoch spent on a pretrain objective; epoch 0 of a trial costs nothing."""
    top1: list[float] = []
    asr: list[float] = []
    areas = []
    for whose, record in spent:
        if whose != objective:
            continue
        accuracy, rate = point(record)
        top1.append(accuracy)
        asr.append(rate)
        if record["epoch"]:
            # Only the front matters for what comes: without the rest this stays fast.
            kept = pareto.front(top1, asr)
            top1, asr = [top1[i] for i in kept], [asr[i] for i in kept]
            areas.append(pareto.hypervolume(top1, asr))
    return areas


def full(found: Sequence[Curve], objective: str) -> float:
    """Return the hypervolume of all recorded points of a pretrain objective."""
    points = [point(record) for c in found if c.objective == objective for record in c.epochs.values()]
    return pareto.hypervolume(*zip(*points, strict=True))


def at_shares(areas: Sequence[float], whole: float, epochs: int) -> list[float]:
    """Return the share of the full hypervolume at each share of the epochs that are recorded; a search may end before.

    Args:
        areas: what `progress` gives.
        whole: what `full` gives.
        epochs: recorded.
    """
    return [areas[min(len(areas), max(1, round(share * epochs))) - 1] / whole for share in SHARES]


def interval(values: Sequence[float], *, draws: int = 10_000) -> tuple[float, float, float]:
    """Return the mean over seeds with its 95 % bootstrap interval (percentiles of resampled means)."""
    values_S = np.asarray(values)
    picks_BS = np.random.default_rng(0).integers(0, len(values_S), (draws, len(values_S)))
    low, high = np.percentile(values_S[picks_BS].mean(axis=1), (2.5, 97.5))
    return float(values_S.mean()), float(low), float(high)


def measure(found: Sequence[Curve], seeds: int) -> list[dict[str, Any]]:
    """Return, for each pretrain objective and search, what every seed reached, where it ended, and intervals."""
    objectives = sorted({curve.objective for curve in found})
    whole = {objective: full(found, objective) for objective in objectives}
    epochs = {o: sum(min(c.last, least(found)) for c in found if c.objective == o) for o in objectives}
    runs = {(o, s): [] for o in objectives for s in SEARCHES}
    for searched, seed in itertools.product(SEARCHES, range(seeds)):
        with tempfile.TemporaryDirectory() as folder:
            spent = drive(study_of(found, searched, seed=seed), found, folder)
        for objective in objectives:
            runs[objective, searched].append(progress(spent, objective))
    rows = []
    for (objective, searched), per_seed in runs.items():
        shares = [at_shares(areas, whole[objective], epochs[objective]) for areas in per_seed]
        random_ones = runs[objective, "random"]
        rows.append(
            {
                "objective": objective,
                "search": searched,
                "full_hypervolume": whole[objective],
                "shares": shares,
                "intervals": [interval(column) for column in zip(*shares, strict=True)],
                "epochs": [len(areas) / epochs[objective] for areas in per_seed],
                "ends": [areas[-1] / whole[objective] for areas in per_seed],
                # Of random search with the same seed, after as many epochs.
                "random": [
                    other[len(areas) - 1] / whole[objective] for areas, other in zip(per_seed, random_ones, strict=True)
                ],
            }
        )
    return rows


def least(found: Sequence[Curve]) -> int:
    """Return the epochs that every curve has."""
    return min(curve.last for curve in found)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as a Markdown table, in percent."""
    heads = [f"{share:.0%} of the epochs" for share in SHARES]
    lines = ["| pretrain objective | search | " + " | ".join(heads) + " |", "|" + "---|" * (2 + len(heads))]
    for row in rows:
        if not row["search"].endswith(HALVING):
            cells = [f"{100 * m:.1f} [{100 * low:.1f}, {100 * high:.1f}]" for m, low, high in row["intervals"]]
            lines.append(f"| {row['objective']} | {row['search']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def halving_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what successive halving reached at its end, as a Markdown table, in percent: medians, and the least."""
    lines = [
        "| pretrain objective | search | epochs | hypervolume, median | least | random search after as many, median "
        "| seeds where that is better |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["search"].endswith(HALVING):
            better = sum(other > own + 1e-12 for own, other in zip(row["ends"], row["random"], strict=True))
            numbers = (np.median(row["epochs"]), np.median(row["ends"]), min(row["ends"]), np.median(row["random"]))
            cells = " | ".join(f"{100 * number:.2f}" for number in numbers)
            lines.append(f"| {row['objective']} | {row['search']} | {cells} | {better} of {len(row['ends'])} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--on", required=True, help="recorded curves: a sweep.parquet, or a run directory")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where numbers go")
    given = parser.parse_args()
    found = curves.read(given.on)
    check_on_ray(found, given.on)
    rows = measure(found, given.seeds)
    print(f"\nShare of the full hypervolume in percent, mean over {given.seeds} seeds [95 % bootstrap interval]\n")
    print(table(rows))
    print(f"\nSuccessive halving: rungs after epochs {', '.join(map(str, RUNGS))}, {KEEP:.0%} go on; percent\n")
    print(halving_table(rows))
    where = setting("ray", "optuna", "numpy")
    print("\n" + ", ".join(f"{name} {value}" for name, value in where.items()))
    record = {"setting": where, "seeds": given.seeds, "at": SHARES, "population": POPULATION, "startup": STARTUP}
    record |= {"rungs": RUNGS, "keep": KEEP}
    record |= {"fingerprint": curves.fingerprint(found), "rows": rows}
    given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
