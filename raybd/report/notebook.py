"""Figures and tables of a run, shown in a notebook. Needs IPython."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from rich.console import Console

from raybd.report import figures, text
from raybd.report.words import Grid

_DPI = 110


def show(figure: Figure | None, title: str = "") -> None:
    """Show a figure, under a title where one is given; nothing where there is nothing to draw."""
    if figure is None:
        return
    if title:
        display(Markdown(f"**{text.escaped(title)}**"))
    display(Image(figures.png(figure, dpi=_DPI)))


def print_grids(grids: Iterable[Grid]) -> None:
    """Print what was measured as tables."""
    console = Console()
    for grid in grids:
        console.print(text.rendered(grid))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Show a table; every text in it stands for itself."""
    display(Markdown(text.as_markdown(heads, rows)))
