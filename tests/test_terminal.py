"""Tables in a terminal: what is drawn line by line is what rich draws cell by cell."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
from rich import box
from rich.console import Console

from raybd.report.terminal import PlainTable, Sheet

WORDS = ["", "7.31", "–", "hypervolume, % of rectangle", "日本語", "  lowest", "é ", "[bold]", ":smile:", "🙂", "t-001"]
SHAPE = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}


def filled(table: PlainTable, seed: int) -> PlainTable:
    """Return a table with columns and rows as results have them, with odd texts."""
    dice = random.Random(seed)
    count = dice.choice([1, 2, 5, 9])
    for _ in range(count):
        head = dice.choice(["one", "\ntrial", "report\nASR %", "", "長い"])
        style = dice.choice([None, "bold"])
        justify: Any = dice.choice(["left", "right"])
        table.add_column(head, justify=justify, no_wrap=dice.random() < 0.97, style=style)
    for _ in range(dice.choice([0, 1, 7])):
        cells = [dice.choice([*WORDS, *(["a\tb", "a\nb"] if dice.random() < 0.05 else [])]) for _ in range(count)]
        style = dice.choice([None, "red", "bold"])
        table.add_row(*cells[: dice.randint(1, count)], style=style, end_section=dice.random() < 0.2)
    return table


def printed(table: PlainTable, **console: Any) -> str:
    sink = io.StringIO()
    Console(file=sink, highlight=False, **console).print(table)
    return sink.getvalue()


@pytest.mark.parametrize("colours", [None, "truecolor"])
@pytest.mark.parametrize("seed", range(60))
def test_sheets_are_drawn_as_rich_draws_them(seed: int, colours: Any) -> None:
    title = ["a title", "", "a title of so many words that no small table is as wide as it is " * 2][seed % 3]
    caption = ["", "a note\n", "one of many words, which goes on and on, and is wider than the table " * 3][
        seed % 4 % 3
    ]
    for width in (30, 100):
        options = {"width": width, "color_system": colours, "force_terminal": colours is not None}
        rich = filled(PlainTable(title, caption, **SHAPE), seed)
        assert printed(filled(Sheet(title, caption), seed), **options) == printed(rich, **options)


def test_most_sheets_are_drawn_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so without rich's way of drawing cells."""
    monkeypatch.setattr("rich.table.Table._render", None)
    table = Sheet("title", "caption")
    for head in ("\ntrial", "report\nASR %"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_row("t-1", "0.50", style="red", end_section=True)
    table.add_row("t-2")
    assert printed(table, width=100).splitlines() == [
        "title          ",
        "               ",
        "        report ",
        " trial   ASR % ",
        " ───────────── ",
        "   t-1    0.50 ",
        "               ",
        "   t-2         ",
        "               ",
        "caption        ",
    ]
