"""Fronts for a terminal, and as JSON or CSV for other programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from raybd import tables
from raybd.report import words
from raybd.report.words import Front, Row


def front_tables(summaries: Iterable[Row], trials: Iterable[Row] = (), *, kind: str = "any_epoch") -> list[Table]:
    """Return one table for each pretrain objective, pretraining and method, with search and report side by side.

    Args:
        summaries: what `fronts.summarise` gives.
        trials: rows of the `trials` table, for the settings of each point.
        kind: `any_epoch` or `final`.
    """
    by_id = {row["trial_id"]: row for row in trials}
    return [_front_table(front, by_id) for front in words.pair(summaries) if front.kind == kind]


def _front_table(front: Front, trials: Mapping[str, Row]) -> Table:
    table = Table(
        title=Text(f"{front.name} cleaned by {front.method}: front of {_KIND[front.kind]}"),
        title_justify="left",
        caption=_caption(front, trials),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("\ntrial", "\nepoch", "\nlr", "mmcl/ssl\nweights", "search\nacc %", "half\nASR %"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("report\nacc %", "half\nASR %"):
        table.add_column(name, justify="right", no_wrap=True, style="bold")
    baseline = _scores(front.search["baseline"], front.report["baseline"])
    table.add_row("poisoned", "", "", "", *baseline, style="red", end_section=True)
    for searched, reported in front.points():
        trial = trials.get(searched["trial_id"])
        scores = _scores(searched, reported)
        if searched["epoch"] == 0:
            table.add_row("poisoned", "", "", "", *scores)
        elif trial is None:
            table.add_row(Text(searched["trial_id"]), str(searched["epoch"]), "–", "–", *scores)
        else:
            epoch = f"{searched['epoch']} of {words.number(trial['epochs_planned'])}"
            table.add_row(str(trial["number"]), epoch, words.number(trial["lr"]), words.weights(trial), *scores)
    return table


_KIND = {"any_epoch": "all epochs", "final": "last epochs"}


def _scores(searched: Row, reported: Row) -> tuple[str, ...]:
    return tuple(words.percent(half[name]) for half in (searched, reported) for name in ("zeroshot_top1", "asr_top1"))


def _caption(front: Front, trials: Mapping[str, Row]) -> Text:
    searched, reported = front.search["hypervolume"], front.report["hypervolume"]
    lines = [
        f"hypervolume: {searched:.4f} on the search half, {reported:.4f} on report",
        "lowest ASR by accuracy lost, chosen on search, quoted on report:",
    ]
    for points, chosen, quoted in front.within():
        given_up = f"within {points} point{'s' if points != '1' else ''}"
        if chosen is None or quoted is None:
            lines.append(f"{given_up}: none")
            continue
        trial = trials.get(chosen["trial_id"])
        who = f"trial {trial['number'] if trial else chosen['trial_id']}, epoch {chosen['epoch']}"
        lines.append(
            f"{given_up}: ASR {words.percent(quoted['asr_top1'])} at {words.percent(quoted['zeroshot_top1'])} % "
            f"({'not cleaned' if chosen['epoch'] == 0 else who})"
        )
    return Text("\n".join(lines) + "\n")


def as_json(summaries: Iterable[Row]) -> str:
    """Return the summaries as JSON; fractions, and null for what is not a finite number."""
    return json.dumps(_plain(list(summaries)), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(fronts: Iterable[Row]) -> str:
    """Return rows of the `fronts` table as CSV, with the table's columns in their order; fractions."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, tables.SCHEMAS["fronts"].names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(fronts)
    return sink.getvalue()
