"""What `raybd.analysis` measures, as tables for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from raybd.fronts import objective_names
from raybd.report import words
from raybd.report.text import add_score_columns, table_of
from raybd.report.words import Row

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


def run_tables(found: Mapping[str, Any], trials: Sequence[Row]) -> list[Table]:
    """Return tables of instability, defender's choice and BatchNorm baseline of one run (`analysis.of_run`)."""
    numbers = {row["trial_id"]: row["number"] for row in trials}
    made = [_instability(found["instability"]), _defender(found["defender"], numbers)]
    return [table for table in (*made, _refresh(found["batchnorm_refresh"], numbers)) if table]


def _who(entries: Sequence[Row]) -> list[tuple[str, str]]:
    """Return each entry's poisoned model and method in words."""
    names = objective_names(entries)
    return [(names[e["objective"], e["pretrain_id"]], words.method_name(e["method"])) for e in entries]


def _instability(entries: Sequence[Row]) -> Table | None:
    if not entries:
        return None
    points, rises = 100 * entries[0]["top1_tolerance"], 100 * entries[0]["asr_tolerance"]
    table = table_of(
        f"instability over epochs, {words.IMAGES[entries[0]['split']]}",
        f"unstable: accuracy falls by more than {points:g} points and ASR rises by more than {rises:g}\n"
        "rebound: last minus lowest ASR, mean; best at: where the best point lies, 0 start, 1 end of a trial",
    )
    for name in ("\npoisoned model", "\nmethod"):
        table.add_column(name, no_wrap=True)
    for name in ("\ntrials", "\nsteps", "unstable\n%", "rebound\npoints", "best at\nmean", "best at\nmedian"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry, who in zip(entries, _who(entries), strict=True):
        table.add_row(
            *who,
            str(entry["trials"]),
            str(entry["steps"]),
            words.percent(entry["unstable_share"], digits=1),
            words.percent(entry["rebound"], digits=1),
            f"{entry['best_at']:.2f}",
            f"{entry['best_at_median']:.2f}",
        )
    return table


def _point_cells(point: Row, splits: Sequence[str], numbers: Mapping[str, Any]) -> list[str]:
    trial = str(numbers.get(point["trial_id"], point["trial_id"]))
    scored = [point["scores"][split] for split in splits]
    rates = [words.percent(half[name]) for half in scored for name in ("zeroshot_top1", "asr_top1")]
    return [trial, str(point["epoch"]), *rates, *(words.percent(scored[-1][n]) for n in ("regret_asr", "regret_top1"))]


def _defender(entries: Sequence[Row], numbers: Mapping[str, Any]) -> Table | None:
    points = [point for entry in entries for point in entry["choices"].values() if point]
    if not points:
        return None
    splits = list(points[0]["scores"])
    table = table_of(
        f"what a defender who does not know the trigger would take: {words.quoted_on(splits)}",
        "regret: ASR above, and accuracy below, what the front offers at that accuracy and at that ASR",
    )
    table.add_column("\nchosen by", no_wrap=True)
    for name in ("\ntrial", "\nepoch"):
        table.add_column(name, justify="right", no_wrap=True)
    add_score_columns(table, splits)
    for name in ("regret\nASR", "regret\nacc"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry, who in zip(entries, _who(entries), strict=True):
        table.add_row(", ".join(who), style="bold")
        for rule, point in entry["choices"].items():
            cells = _point_cells(point, splits, numbers) if point else ["none"]
            table.add_row(f"  {RULES[rule]}", *cells)
    return table


def _refresh(entries: Sequence[Row], numbers: Mapping[str, Any]) -> Table | None:
    if not entries:
        return None
    splits = list(entries[0]["baseline"])
    table = table_of(
        f"baseline: BatchNorm statistics refreshed, nothing trained: {words.quoted_on(splits)}",
        "regret: how far the front is ahead of it, in ASR at its accuracy and in accuracy at its ASR",
    )
    table.add_column("\npoisoned model", no_wrap=True)
    for name in ("\ntrial", "\nepoch"):
        table.add_column(name, justify="right", no_wrap=True)
    add_score_columns(table, splits)
    for name in ("regret\nASR", "regret\nacc"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry, (name, _) in zip(entries, _who(entries), strict=True):
        before = [words.percent(entry["baseline"][s][rate]) for s in splits for rate in ("zeroshot_top1", "asr_top1")]
        table.add_row(name, "poisoned", "0", *before, style="red")
        table.add_row("", *_point_cells(entry["points"][0], splits, numbers))
    return table


def between_tables(found: Mapping[str, Any]) -> list[Table]:
    """Return tables of differences between objectives and of attainment over runs (`analysis.analyse`)."""
    return [table for table in (_differences(found["differences"]), _attainment(found["attainment"])) if table]


def _differences(entries: Sequence[Row]) -> Table | None:
    if not entries:
        return None
    runs, level = entries[0]["runs"], 100 * entries[0]["level"]
    drawn = "trials" if runs == 1 else f"{runs} runs and their trials"
    table = table_of(
        "differences between pretrain objectives, first minus second",
        f"{level:g} % bootstrap interval: {drawn} drawn anew with replacement; resampling can only lose\n"
        "good trials, so it says how far a difference hangs on single ones and is no test",
    )
    for name in ("method", "first − second", "measure"):
        table.add_column(name, overflow="fold")
    for name in ("first", "second", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("interval", no_wrap=True)
    last = None
    for entry in entries:
        pair = (words.method_name(entry["method"]), f"{entry['first']} − {entry['second']}")
        low, high = words.percent(entry["low"], digits=1), words.percent(entry["high"], digits=1)
        table.add_row(
            *(("", "") if pair == last else pair),
            MEASURES[entry["measure"]],
            *(words.percent(entry[name]) for name in ("first_value", "second_value", "difference")),
            f"{low} to {high}",
        )
        last = pair
    return table


def _attainment(entries: Sequence[Row]) -> Table | None:
    if not entries:
        return None
    table = table_of(
        f"attainment over {entries[0]['runs']} runs: hypervolume of what so many of them reach",
        "best: at least one run, median: at least half of them, worst: every run",
    )
    for name in ("pretrain objective", "method"):
        table.add_column(name, no_wrap=True)
    for name in entries[0]["levels"]:
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        areas = [f"{level['hypervolume']:.4f}" for level in entry["levels"].values()]
        table.add_row(entry["objective"], words.method_name(entry["method"]), *areas)
    return table
