"""Fronts for a terminal, and as JSON or CSV for other programs."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.table import Table

from raybd import tables
from raybd.fronts import ALL_METHODS
from raybd.plain import plain
from raybd.report import words
from raybd.report.terminal import Sheet
from raybd.report.words import Front, Grid, Row


def front_tables(summaries: Iterable[Row], trials: Iterable[Row] = (), *, kind: str = "any_epoch") -> list[Table]:
    """Return two tables for each pretrain objective and pretraining: the front, and the points that rules choose.

    Where a model was cleaned by several methods, the front is the one over all of them, with each point's method.

    Args:
        summaries: what `fronts.summarise` gives.
        trials: rows of the `trials` table, for the settings of each point.
        kind: `any_epoch` or `final`.
    """
    by_id = {row["trial_id"]: row for row in trials}
    found = []
    for front in words.shown_fronts(words.pair(summaries)):
        if front.kind == kind:
            found += [_front_table(front, by_id), _choices_table(front, by_id)]
    return found


def rendered(grid: Grid) -> Table:
    """Return a grid as a table for a terminal."""
    table = Sheet(grid.title, f"{grid.note}\n" if grid.note else "")
    for column in grid.columns:
        justify: Literal["left", "right"] = "right" if column.number else "left"
        table.add_column(column.head, justify=justify, no_wrap=True, style="bold" if column.strong else None)
    for kind, cells in grid.rows:
        table.add_row(*cells, style=_STYLES.get(kind))
    return table


_STYLES = {"base": "red", "head": "bold", "strong": "bold"}


def _add_score_columns(table: Table, front: Front) -> None:
    for column in words.score_columns(front.splits):
        table.add_column(column.head, justify="right", no_wrap=True, style="bold" if column.strong else None)


def _front_table(front: Front, trials: Mapping[str, Row]) -> Table:
    shares = [f"{front.half(s)['hypervolume']:.4f} on {words.IMAGES[s]}" for s in front.splits]
    parts = f"{words.percent(front.report['hypervolume_share'], digits=1)} % of the poisoned model's rectangle"
    caption = f"hypervolume: {', '.join(shares)}; {parts}"
    table = Sheet(f"{front.title}: front of {_KIND[front.kind]}", f"{caption}\n")
    table.add_column("\ntrial", justify="right", no_wrap=True)
    if front.method == ALL_METHODS:
        table.add_column("\nmethod", no_wrap=True)
    for name in ("\nepoch", "\nlr", "mmcl/ssl\nweights"):
        table.add_column(name, justify="right", no_wrap=True)
    _add_score_columns(table, front)
    blank = [""] * (4 if front.method == ALL_METHODS else 3)
    baseline = _scores(front, front.search["baseline"], front.report["baseline"])
    table.add_row("poisoned", *blank, *baseline, style="red", end_section=True)
    for searched, reported in front.points():
        trial = trials.get(searched["trial_id"])
        scores = _scores(front, searched, reported)
        if searched["epoch"] == 0:
            table.add_row("poisoned", *blank, *scores)
            continue
        method = [trial["method"] if trial else "–"] if front.method == ALL_METHODS else []
        if trial is None:
            table.add_row(searched["trial_id"], *method, str(searched["epoch"]), "–", "–", *scores)
            continue
        planned, epoch = trial["epochs_planned"], words.epoch(searched)
        if planned is not None and searched.get("alpha") is None:
            epoch = f"{epoch} of {planned}"
        who = words.trial_name(searched["trial_id"], trial)
        table.add_row(who, *method, epoch, words.number(trial["lr"]), words.weights(trial), *scores)
    return table


_KIND = {"any_epoch": "all epochs", "final": "last epochs"}


def _scores(front: Front, searched: Row, reported: Row) -> list[str]:
    scored = [searched, reported][-len(front.splits) :]
    return [words.percent(half[name]) for half in scored for name in ("zeroshot_top1", "asr_top1")]


def _choices_table(front: Front, trials: Mapping[str, Row]) -> Table:
    table = Sheet(f"{front.name}: {words.quoted_on(front.splits)}")
    table.add_column("\nbest", no_wrap=True)
    for name in ("\ntrial", "\nepoch"):
        table.add_column(name, justify="right", no_wrap=True)
    _add_score_columns(table, front)
    table.add_column("share\nlost %", justify="right", no_wrap=True)
    for rule, chosen, quoted in front.chosen():
        if chosen is None or quoted is None:
            table.add_row(rule.removeprefix("best "), "none")
            continue
        trial = trials.get(chosen["trial_id"])
        who = "poisoned" if chosen["epoch"] == 0 else words.trial_name(chosen["trial_id"], trial)
        lost = words.percent(quoted["share_lost"], digits=1)
        table.add_row(rule.removeprefix("best "), who, words.epoch(chosen), *_scores(front, chosen, quoted), lost)
    return table


def as_json(found: Any) -> str:
    """Return what was measured as JSON; fractions, and null for what is not a finite number."""
    return json.dumps(_plain(found), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(fronts: Mapping[str, Iterable[Row]]) -> str:
    """Return rows of `fronts` tables by run as CSV, with the table's columns in their order after `run`; fractions."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, ["run", *tables.SCHEMAS["fronts"].names], lineterminator="\n")
    writer.writeheader()
    for run, rows in fronts.items():
        writer.writerows({"run": run, **row} for row in rows)
    return sink.getvalue()


def as_markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, for a notebook; every text stands for itself: no tag, link or picture in it works."""
    lines = [heads, ["---"] * len(heads), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: object) -> str:
    """Return a text for Markdown, on one line, that stands for itself: no tag, link, picture or emphasis works."""
    return _MARKUP.sub(r"\\\g<0>", plain(" ".join(str(text).split())))


# What Markdown takes for more than itself (not _ within a word); addresses become links by themselves in some dialects.
_MARKUP = re.compile(r"[\\`*\[\]<>&|$!~:@#]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.", re.IGNORECASE)
