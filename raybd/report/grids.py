"""What `raybd.analysis` measures, as grids of texts for a terminal of 100 columns and for the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raybd.fronts import ALL_METHODS, objective_names
from raybd.importance import OBJECTIVES
from raybd.report import words
from raybd.report.words import Column, Grid, Row

RULES = {
    "lowest_loss": "lowest training loss",
    "highest_top1": "highest clean accuracy",
    "last_epoch": "last epoch",
}
MEASURES = {
    "hypervolume_share": "hypervolume, % of rectangle",
    "best_top1_at_asr_0.05": "accuracy % at ASR ≤ 5 %",
    "best_asr_within_1": "ASR % at ≤ 1 point lost",
}


def _numbers(*heads: str) -> list[Column]:
    return [Column(head, number=True) for head in heads]


def of_run(found: Mapping[str, Any], trials: Iterable[Row]) -> list[Grid]:
    """Return instability, blind choices and BatchNorm baseline of one run (`analysis.of_run`); none that is empty."""
    return [*stability(found), *blind(found, trials)]


def stability(found: Mapping[str, Any]) -> list[Grid]:
    """Return how steady the trials of one run are (`analysis.of_run`); nothing if none was trained."""
    return [_instability(found["instability"])] if found["instability"] else []


def blind(found: Mapping[str, Any], trials: Iterable[Row]) -> list[Grid]:
    """Return blind choices and BatchNorm baseline of one run (`analysis.of_run`); none that is empty."""
    names = {row["trial_id"]: words.trial_name(row["trial_id"], row) for row in trials}
    made = _defender(found["defender"], names), _refresh(found["batchnorm_refresh"], names)
    return [grid for grid in made if grid.rows]


def between(found: Mapping[str, Any]) -> list[Grid]:
    """Return differences between objectives and attainment over runs (`analysis.analyse`); none that is empty."""
    return [grid for grid in (_differences(found["differences"]), _attainment(found["attainment"])) if grid.rows]


def methods(summaries: Iterable[Row], *, kind: str = "any_epoch") -> list[Grid]:
    """Return one row for each cleaning method of each poisoned model; nothing if no model has several methods."""
    fronts = [front for front in words.pair(summaries) if front.kind == kind]
    if not any(front.method == ALL_METHODS for front in fronts):
        return []
    rows = []
    for front in fronts:
        own, lost = front.report, front.report["best_top1_at_asr"]["0.05"]
        within = own["best_asr_within"]["1"]
        cells = (
            front.name,
            words.method_name(front.method),
            f"{own['hypervolume']:.4f}",
            words.percent(own["hypervolume_share"], digits=1),
            words.percent(within and within["asr_top1"]),
            words.percent(lost and lost["zeroshot_top1"]),
            words.percent(lost and lost["share_lost"], digits=1),
        )
        rows.append(("strong" if front.method == ALL_METHODS else "", cells))
    heads = ("hyper-\nvolume", "share\n%", "ASR % at\n≤ 1 point", "acc. % at\nASR ≤ 5 %", "lost, % of\npoisoned")
    columns = [Column("\npoisoned model"), Column("\nmethod"), *_numbers(*heads)]
    columns[2] = Column(heads[0], number=True, alone="hypervolume")
    return [
        Grid(
            f"cleaning methods: {words.quoted_on(fronts[0].splits)}",
            "share: hypervolume as a share of the poisoned model's rectangle",
            columns,
            rows,
        ),
    ]


def _who(entries: Sequence[Row]) -> list[tuple[str, str]]:
    """Return each entry's poisoned model and method in words."""
    names = objective_names(entries)
    return [(names[e["objective"], e["pretrain_id"]], words.method_name(e["method"])) for e in entries]


def _instability(entries: Sequence[Row]) -> Grid:
    rows = [
        (
            "",
            (
                *who,
                str(entry["trials"]),
                str(entry["steps"]),
                words.percent(entry["unstable_share"], digits=1),
                words.percent(entry["rebound"], digits=1),
                f"{entry['best_at']:.2f}",
                f"{entry['best_at_median']:.2f}",
            ),
        )
        for entry, who in zip(entries, _who(entries), strict=True)
    ]
    heads = ("\ntrials", "\nsteps", "unstable\n%", "rebound\npoints", "best at\nmean", "best at\nmedian")
    columns = [Column("\npoisoned model"), Column("\nmethod"), *_numbers(*heads)]
    points, rises = 100 * entries[0]["top1_tolerance"], 100 * entries[0]["asr_tolerance"]
    return Grid(
        f"instability over epochs, {words.IMAGES[entries[0]['split']]}",
        f"unstable: share of steps from epoch to epoch with accuracy down by more than {points:g} points "
        f"and ASR up by more than {rises:g}; rebound: last minus lowest ASR, mean over trials; "
        "best at: where in a trial the largest accuracy × (1 − ASR) lies, 0 before cleaning, 1 last epoch",
        columns,
        rows,
    )


_REGRETS = {"regret_asr": "regret\nASR", "regret_asr_within_1": "regret\n≤ 1 pt", "regret_top1": "regret\nacc"}
_REGRET = _numbers(*_REGRETS.values())


def _point_cells(point: Row, splits: Sequence[str], names: Mapping[str, str]) -> list[str]:
    trial = names.get(point["trial_id"], point["trial_id"])
    scored = [point["scores"][split] for split in splits]
    rates = [words.percent(half[name]) for half in scored for name in ("zeroshot_top1", "asr_top1")]
    return [trial, str(point["epoch"]), *rates, *(words.percent(scored[-1][n]) for n in _REGRETS)]


def _defender(entries: Sequence[Row], names: Mapping[str, str]) -> Grid:
    rows: list[tuple[str, Sequence[str]]] = []
    splits: list[str] = []
    several = {(e["objective"], e["pretrain_id"]) for e in entries if e["method"] == ALL_METHODS}
    for entry, who in zip(entries, _who(entries), strict=True):
        # Among several methods a defender takes one model; what each method alone would have given is in the JSON.
        if entry["method"] != ALL_METHODS and (entry["objective"], entry["pretrain_id"]) in several:
            continue
        rows.append(("head", (", ".join(who),)))
        for rule, point in entry["choices"].items():
            splits = list(point["scores"]) if point else splits
            rows.append(("", [f"  {RULES[rule]}", *(_point_cells(point, splits, names) if point else ["none"])]))
    return Grid(
        f"taken without knowing the trigger: {words.quoted_on(splits)}",
        "regret in points: ASR above what the front offers at that accuracy, and at one point of accuracy less; "
        "accuracy below what it offers at that ASR; losses of other methods or weights are sums of other terms",
        [Column("\nchosen by"), *_numbers("\ntrial", "\nepoch"), *words.score_columns(splits), *_REGRET],
        rows if splits else [],
    )


def _refresh(entries: Sequence[Row], names: Mapping[str, str]) -> Grid:
    rows: list[tuple[str, Sequence[str]]] = []
    splits = list(entries[0]["baseline"]) if entries else []
    for entry, (name, _) in zip(entries, _who(entries), strict=True):
        before = [words.percent(entry["baseline"][s][rate]) for s in splits for rate in ("zeroshot_top1", "asr_top1")]
        rows.append(("base", (name, "poisoned", "0", *before)))
        rows.append(("", ("", *_point_cells(entry["points"][0], splits, names))))
    return Grid(
        f"baseline, BatchNorm statistics refreshed and nothing trained: {words.quoted_on(splits)}",
        "regret in points: ASR above what the front offers at that accuracy, and at one point of accuracy less; "
        "accuracy below what it offers at that ASR",
        [Column("\npoisoned model"), *_numbers("\ntrial", "\nepoch"), *words.score_columns(splits), *_REGRET],
        rows,
    )


def _differences(entries: Sequence[Row]) -> Grid:
    rows: list[tuple[str, Sequence[str]]] = []
    last = None
    for entry in entries:
        pair = (words.method_name(entry["method"]), f"{entry['first']} − {entry['second']}")
        low, high = words.percent(entry["low"], digits=1), words.percent(entry["high"], digits=1)
        cells = (
            MEASURES[entry["measure"]],
            *(words.percent(entry[name]) for name in ("first_value", "second_value", "difference")),
            "–" if entry["low"] is None else f"{low} to {high}",
        )
        if pair != last:
            rows.append(("head", (f"{pair[1]}, cleaned by {pair[0]}",)))
        rows.append(("", (f"  {cells[0]}", *cells[1:])))
        last = pair
    columns = [Column("measure"), *_numbers("first", "second", "difference"), Column("interval")]
    if not entries:
        return Grid("differences", "", columns, [])
    runs, level = entries[0]["runs"], 100 * entries[0]["level"]
    drawn = "trials" if runs == 1 else f"{runs} runs and their trials"
    return Grid(
        "differences between pretrain objectives, first minus second",
        f"{level:g} % bootstrap interval: {drawn} drawn anew with replacement. Resampling can only lose good trials: "
        "the interval says how far a difference hangs on single ones, and is no test",
        columns,
        rows,
    )


def _attainment(entries: Sequence[Row]) -> Grid:
    rows = [
        (
            "",
            (
                entry["objective"],
                words.method_name(entry["method"]),
                *(f"{level['hypervolume']:.4f}" for level in entry["levels"].values()),
            ),
        )
        for entry in entries
    ]
    levels = list(entries[0]["levels"]) if entries else []
    return Grid(
        f"attainment over {entries[0]['runs'] if entries else 0} runs: hypervolume of what so many of them reach",
        "best: at least one run, median: at least half of them, worst: every run",
        [Column("pretrain objective"), Column("method"), *_numbers(*levels)],
        rows,
    )


def importance(entries: Sequence[Row]) -> Grid:
    """Return one row for each setting of each poisoned model (`importance.of_run`); those beyond chance are strong."""
    names = objective_names(entries)
    rows = []
    for entry in entries:
        shares = [entry[measure] for measure in OBJECTIVES]
        cells = [words.percent(found[part], digits=1) for found in shares for part in ("share", "chance")]
        who = names[entry["objective"], entry["pretrain_id"]], entry["setting"]
        beyond = any(found["share"] > found["chance"] for found in shares)
        rows.append(("strong" if beyond else "", (*who, str(entry["trials"]), str(entry["groups"]), *cells)))
    heads = ("\ntrials", "\ngroups", "accuracy\n%", "by chance\n< %", "ASR\n%", "by chance\n< %")
    return Grid(
        "importance of each searched setting, for each search objective",
        "share of the variance of ranks, over the best epoch of each trial, that lies between groups of trials with "
        "alike values of that setting alone (Kruskal-Wallis η²); by chance: 19 of 20 permutations of the trials stay "
        "below; what is not above it says nothing. Settings that work only together show little, and a search that "
        "draws settings where it found good ones makes them less than independent",
        [Column("\npoisoned model"), Column("\nsetting"), *_numbers(*heads)],
        rows,
    )


def cost(entries: Sequence[Row]) -> Grid:
    """Return what each stage took (`spent.stages`)."""
    rows = [
        (
            "strong" if entry["stage"] == "in all" else "",
            (
                entry["stage"],
                str(entry["runs"]),
                str(entry["epochs"]),
                "–" if entry["samples"] is None else f"{entry['samples']:,}".replace(",", "\u202f"),
                *("–" if entry[name] is None else words.span(entry[name]) for name in _SPANS),
            ),
        )
        for entry in entries
    ]
    heads = ("\nruns", "\nepochs", "pairs\nseen", "device\ntime", "of it\ntraining", "of it\nevaluation")
    return Grid(
        "cost",
        "device time of trials from start to end, each on its device or its share of one; of pretraining the time of "
        "training and evaluation, on all its workers at once",
        [Column("\nstage"), *_numbers(*heads)],
        rows,
    )


_SPANS = ("seconds", "train_seconds", "evaluate_seconds")
