"""Tables for a terminal whose texts may be anybody's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
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


class Sheet(PlainTable):
    """A table with a line below the heads, and no others.

    Where its columns fit side by side, as they mostly do, it is drawn line by line: rich lays every cell out as if it
    were a page, which takes longer than to measure a run. What comes out is the same.
    """

    def __init__(self, title: str, caption: str = "") -> None:
        super().__init__(title, caption, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield what is to be shown, as rich asks for it."""
        heads = [str(column.header).split("\n") for column in self.columns]
        cells = [[*map(str, column.cells)] for column in self.columns]
        last = len(cells) - 1
        widths = [
            max(map(cell_len, (*head, *own))) + (place < last) or 1
            for place, (head, own) in enumerate(zip(heads, cells, strict=True))
        ]
        whole = sum(widths) + last + 2
        if not cells or whole > options.max_width or options.ascii_only or options.legacy_windows or self._folds(cells):
            yield from super().__rich_console__(console, options)
            return
        page = options.update(width=whole, height=None, justify="left", highlight=False)
        yield from console.render(self.title or "", page) if self.title else ()
        for text, styles in self._lines(console, heads, cells, widths):
            if styles is None or console.color_system is None:
                yield Segment("".join(text))
            else:
                yield from map(Segment, text, styles)
            yield Segment.line()
        yield from console.render(self.caption, page) if self.caption else ()

    def _folds(self, cells: Sequence[Sequence[str]]) -> bool:
        """Say whether a cell may take more than a line, or has a form that this class does not know."""
        known = all(column.no_wrap and column.justify in ("left", "right") for column in self.columns)
        return not known or any("\n" in cell or "\t" in cell for own in cells for cell in own)

    def _lines(
        self, console: Console, heads: Sequence[Sequence[str]], cells: Sequence[Sequence[str]], widths: Sequence[int]
    ) -> Iterator[tuple[list[str], list[Style | None] | None]]:
        """Yield lines as texts, each with its style; with None where there are no styles."""
        height = max(map(len, heads))
        own = [console.get_style(column.style or "") for column in self.columns]
        bold = [console.get_style(self.header_style or "")] * len(own)
        yield [box.SIMPLE_HEAD.get_top(widths)], None
        for line in range(height):
            # A head of fewer lines stands at the bottom.
            shown = [head[line - height] if line >= height - len(head) else None for head in heads]
            yield self._line(shown, widths, bold)
        yield [box.SIMPLE_HEAD.get_row(widths, "head")], None
        for place, row in enumerate(self.rows):
            style = console.get_style(row.style or "")
            yield self._line([column[place] for column in cells], widths, [column + style for column in own])
            if row.end_section and place + 1 < len(self.rows):
                yield [box.SIMPLE_HEAD.get_row(widths, "row")], None
        yield [box.SIMPLE_HEAD.get_bottom(widths)], None

    def _line(
        self, cells: Sequence[str | None], widths: Sequence[int], styles: Sequence[Style]
    ) -> tuple[list[str], list[Style | None]]:
        """Return a line of cells beside each other, and what stands between them."""
        texts: list[str] = [" "]
        found: list[Style | None] = [None]
        for place, (column, cell, width, style) in enumerate(zip(self.columns, cells, widths, styles, strict=True)):
            if cell is None:
                texts += [" " * width, " "]
                found += [style, None]
                continue
            between = place + 1 < len(widths)
            right = column.justify == "right"
            cell = cell.rstrip() if right else cell
            blank = " " * (width - between - cell_len(cell))
            texts += [blank + cell if right else cell + blank, *[" "] * between, " "]
            found += [style, *[style] * between, None]
        return texts, found


def _text(value: object) -> Text:
    return Text(plain(value))
