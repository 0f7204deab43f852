"""Tables for a terminal whose texts may be anybody's."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from raybd.plain import plain


class PlainTable(Table):
    """A table in which every text stands for itself: neither rich's markup nor what steers terminals works in it.

    Args:
        title: above it.
        caption: below it; nothing if empty.
        style: further arguments of rich's table.
    """

    def __init__(self, title: str, caption: str = "", **style: Any) -> None:
        super().__init__(
            title=_text(title),
            title_justify="left",
            caption=_text(caption) if caption else None,
            caption_justify="left",
            **style,
        )

    def add_column(self, header: Any = "", *args: Any, **options: Any) -> None:
        """Add a column, as rich does."""
        super().add_column(_text(header), *args, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row, as rich does; every cell is shown as text, and so is one that is missing."""
        cells = (*cells, *[""] * (len(self.columns) - len(cells)))
        super().add_row(*map(_text, cells), **options)


def sheet(title: str, caption: str = "") -> PlainTable:
    """Return an empty table as results are shown in: a line below the heads, and no others."""
    return PlainTable(title, caption, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def _text(value: object) -> Text:
    return Text(plain(value))
