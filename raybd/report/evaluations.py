"""Rows of the `evaluations` table for a terminal, and as JSON or CSV for other programs."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence

from rich.table import Table

from raybd import tables
from raybd.metrics import wilson
from raybd.report import text
from raybd.report.terminal import Sheet
from raybd.report.words import Row, share
from raybd.tables import RECALL_AT

# Measure → columns of its count and of what it is counted in.
_ZEROSHOT = {
    "zeroshot_top1": ("correct_clean", "n_clean"),
    "asr_top1": ("hit_target", "n_triggered"),
    "robust_top1": ("correct_triggered", "n_triggered"),
}
_RETRIEVAL = {
    "image_to_text": ("image to text", "n_images"),
    "text_to_image": ("text to image", "n_texts"),
    "retrieval_asr": ("poison, triggered", "n_triggered"),
    "retrieval_control": ("poison, clean", "n_triggered"),
}


def _counts(row: Row) -> dict[str, tuple[int, int]]:
    """Return (count, of how many) of each measure of a row."""
    if row["task"] == "zeroshot":
        found = _ZEROSHOT
    else:
        found = {f"{name}_at_{k}": (f"{name}_hits_at_{k}", n) for name, (_, n) in _RETRIEVAL.items() for k in RECALL_AT}
    return {name: (row[count], row[total]) for name, (count, total) in found.items()}


def evaluation_tables(rows: Iterable[Row]) -> list[Table]:
    """Return one table for each attack, with a 95 % Wilson interval beside each share."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["data"], row["split"], row["role"], row["trigger"], row["target_class"]].append(row)
    return [_table(group) for group in groups.values()]


def _table(rows: Sequence[Row]) -> Table:
    first = rows[0]
    role = "" if first["role"] == "planted" else " (not planted: a control)"
    trigger = json.loads(first["trigger"])["name"]
    table = Sheet(f"{first['task']} on {first['data']}: {trigger} → {first['target_class']}{role}", _caption(first))
    table.add_column("model")
    if first["task"] == "zeroshot":
        for name in ("accuracy %", "ASR %", "robust accuracy %"):
            table.add_column(name, justify="right")
        for row in rows:
            cells = [f"{share(count, n)}\n{count} of {n}" for count, n in _counts(row).values()]
            table.add_row(_name(row), *cells)
        return table
    for name in ("", *(f"@{k} %" for k in RECALL_AT), "of"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        counts = _counts(row)
        for name, (label, n) in _RETRIEVAL.items():
            cells = [share(*counts[f"{name}_at_{k}"]) for k in RECALL_AT]
            model = _name(row) if name == "image_to_text" else ""
            table.add_row(model, label, *cells, row[n], end_section=name == "retrieval_control")
    return table


def _name(row: Row) -> str:
    if row["trial_id"]:
        return f"{row['trial_id']}, epoch {row['epoch']}"
    return f"{row['objective']}, poisoned" if row["pretrain_id"] else str(row["checkpoint"])


def _caption(row: Row) -> str:
    lines = ["in brackets: 95 % Wilson interval"]
    if row["split"] == "report":
        lines.append("images that the search looked at are not counted")
    if row["task"] == "retrieval":
        lines.append("poison: a caption of the poison is among the first k, of images whose captions do not name the")
        lines.append("target; clean images are the control")
    return "\n".join(lines)


def as_json(rows: Iterable[Row]) -> str:
    """Return rows as JSON: fractions with counts, `intervals` with the 95 % Wilson interval of each measure.

    What is not a finite number is null.
    """
    found = []
    for row in rows:
        intervals = {name: wilson(count, n) for name, (count, n) in _counts(row).items()}
        found.append({**{name: value for name, value in row.items() if value is not None}, "intervals": intervals})
    return text.as_json(found)


def as_csv(rows: Iterable[Row]) -> str:
    """Return rows as CSV, with the table's columns in their order; fractions."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, tables.SCHEMAS["evaluations"].names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()
