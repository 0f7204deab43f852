"""All figures of a run by name: as SVG for the page, and as files for print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from raybd import fronts as front_maths
from raybd.errors import DataError, StorageError
from raybd.report import figures, measure_figures, targets
from raybd.report.words import Row


def draw(
    found: Mapping[str, Sequence[Row]], measured: Mapping[str, Any], important: Sequence[Row]
) -> dict[str, Figure]:
    """Return the figures of a run; those without data are left out.

    Args:
        found: rows by table.
        measured: what `analysis.analyse` gives, this run the first.
        important: what `importance.of_run` gives.
    """
    drawn: dict[str, Figure | None] = {}
    if found["epochs"]:
        splits = front_maths.halves(found["epochs"])
        for split in reversed(splits):
            drawn[f"front-{split}"] = figures.front_figure(found["epochs"], found["fronts"], split=split)
        drawn["trajectories"] = figures.trajectory_figure(found["epochs"], found["trials"], split=splits[-1])
        run = measured["runs"][0]
        drawn["attainment"] = measure_figures.attainment_figure(measured["attainment"])
        drawn["methods"] = measure_figures.method_figure(run["fronts"])
        drawn["importance"] = measure_figures.importance_figure(important)
        drawn["instability"] = measure_figures.instability_figure(run["instability"])
        drawn["defender"] = measure_figures.defender_figure(run["defender"], run["fronts"])
        drawn["differences"] = measure_figures.difference_figure(measured["differences"])
    if any(row["epoch"] for row in found["pretrain_epochs"]):  # a model that was given has no course
        drawn["pretraining"] = figures.pretrain_figure(found["pretrain_epochs"])
    return {name: figure for name, figure in drawn.items() if figure}


def on_page(
    drawn: Mapping[str, Figure], found: Mapping[str, Sequence[Row]]
) -> tuple[dict[str, Markup], targets.Trials]:
    """Return figures as SVG elements, with what can be pointed at, and how the page calls the trials."""
    trials = targets.Trials(found["trials"], found["fronts"])
    quoted = front_maths.halves(found["epochs"])[-1]
    rows = [row for row in found["epochs"] if row["split"] == quoted]
    # Our own drawing, its texts turned to outlines: nothing in it can be markup from elsewhere.
    pictures = {name: figures.svg(figure, prefix=name, themed=True) for name, figure in drawn.items()}
    for name, figure in drawn.items():
        # On a phone a wide figure is looked at piece by piece: shrunk to the screen nothing of it could be read. One
        # that is not wide is not blown up to the page's width.
        width = figure.get_figwidth()
        size = f"min-width:{4.2 * width:.0f}rem;max-width:{min(58.0, 7 * width):.0f}rem"
        pictures[name] = pictures[name].replace("<svg ", f'<svg style="{size}" ', 1)
    front = f"front-{quoted}"
    if front in pictures:
        pictures[front] = targets.on_fronts(pictures[front], drawn[front], rows, trials, prefix=front)
        pictures["trajectories"] = targets.on_trajectories(
            pictures["trajectories"], drawn["trajectories"], rows, trials
        )
    return {name: Markup(picture) for name, picture in pictures.items()}, trials


def save(drawn: Mapping[str, Figure], folder: Path) -> None:
    """Write each figure into a folder as NAME.png, 300 dots an inch, and NAME.pdf.

    Errors: DataError where there is no figure; StorageError where the folder cannot be written.
    """
    if not drawn:
        raise DataError("nothing to draw yet", where=str(folder), fix="let `raybd run` go on")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            (folder / f"{name}.png").write_bytes(figures.png(figure, dpi=figures.PRINT_DPI))
            (folder / f"{name}.pdf").write_bytes(figures.pdf(figure))
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(folder), fix="give another") from None
