"""What a reader can point at in a figure: points with their settings, and the trajectory of the trial that each is of.

It is SVG laid over a figure: it needs no script, and a page's script needs nothing but it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from raybd.plain import plain
from raybd.report import words
from raybd.report.figures import by_objective
from raybd.report.words import Row

# More points than these would make the page slow: then only trials with a point on a front can be pointed at.
_MOST = 6000
_POINTS_AN_INCH = 72
_PERCENT = 100.0


class Trials:
    """How the trials of a run are called in a page: by a number in its markup, in words for its readers.

    Args:
        trials: rows of the `trials` table.
        fronts: rows of the `fronts` table; their points can be reached with the keyboard.
    """

    def __init__(self, trials: Iterable[Row], fronts: Iterable[Row]) -> None:
        self._rows = {row["trial_id"]: row for row in trials}
        self.number = {trial_id: number for number, trial_id in enumerate(self._rows)}
        shown = words.shown_fronts([row for row in fronts if row["kind"] == "any_epoch"])
        self.on_front = {(row["trial_id"], row["epoch"]) for row in shown}

    def label(self, trial_id: str) -> str:
        """Return a trial in words: its number and its settings."""
        row = self._rows[trial_id]
        name = f"trial {words.trial_name(trial_id, row)}, {row['method']}"
        return f"{name}: {words.settings(row)}" if words.settings(row) else name

    def pointed_at(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """Return rows of the `epochs` table by trial, in order; those with a point on a front last, to lie on top."""
        found: dict[str, list[Row]] = defaultdict(list)
        for row in sorted(rows, key=lambda row: row["epoch"]):
            if row["trial_id"] in self._rows:
                found[row["trial_id"]].append(row)
        best = {trial_id for trial_id, _ in self.on_front}
        order = sorted(found, key=lambda trial_id: (trial_id in best, self.number[trial_id]))
        return {trial_id: found[trial_id] for trial_id in order if len(rows) <= _MOST or trial_id in best}


def on_fronts(drawn: str, figure: Figure, rows: Iterable[Row], trials: Trials, *, prefix: str) -> str:
    """Return the SVG of a front figure (`figures.front_figure`) with its points and their trajectories over it.

    Args:
        drawn: the figure as SVG; it must have been drawn last.
        rows: the rows of the `epochs` table that it shows.
        prefix: of all ids.
    """
    panels = by_objective(rows)
    parts = []
    for number, (axis, key) in enumerate(zip(figure.axes, words.objective_names(_all(panels)), strict=False)):
        place = _Place(figure, axis)
        clip = f"{prefix}-part-{number}"
        groups = [f'<clipPath id="{clip}">{place.frame()}</clipPath>']
        for trial_id, own in trials.pointed_at(panels[key]).items():
            line = place.line([_PERCENT * row["asr_top1"] for row in own], _rates(own, "zeroshot_top1"))
            dots = [_dot(row, place, trials.on_front) for row in own]
            path = f'<polyline class="path" clip-path="url(#{clip})" points="{line}"/>'
            groups.append(_group(trials, trial_id, path + "".join(dots)))
        parts.append("".join(groups))
    return _over(drawn, parts)


def on_trajectories(drawn: str, figure: Figure, rows: Iterable[Row], trials: Trials) -> str:
    """Return the SVG of a trajectory figure (`figures.trajectory_figure`) with a line of each trial over its own."""
    panels = by_objective(rows)
    names = list(words.objective_names(_all(panels)))
    parts = []
    for number, axis in enumerate(figure.axes[: 2 * len(names)]):
        measure, place = ("zeroshot_top1", "asr_top1")[number // len(names)], _Place(figure, axis)
        for trial_id, own in trials.pointed_at(panels[names[number % len(names)]]).items():
            line = place.line([row["epoch"] for row in own], _rates(own, measure))
            parts.append(_group(trials, trial_id, f'<polyline class="path near" points="{line}"/>'))
    return _over(drawn, parts)


def _all(panels: Mapping[tuple[str, str], Sequence[Row]]) -> Iterable[Row]:
    return (row for rows in panels.values() for row in rows)


def _rates(rows: Sequence[Row], name: str) -> list[float]:
    return [_PERCENT * row[name] for row in rows]


class _Place:
    """Where values of a panel are in the SVG of its figure, as it was last drawn."""

    def __init__(self, figure: Figure, axis: Axes) -> None:
        self._size = np.array(figure.get_size_inches()) * _POINTS_AN_INCH
        self._of_values = axis.transData + figure.transFigure.inverted()
        self._limits = axis.viewLim
        self._frame: Bbox = axis.get_position()

    def of(self, x: Sequence[float], y: Sequence[float]) -> np.ndarray:
        """Return values as points of the SVG, shape [N, 2], with y downwards."""
        part_N2 = self._of_values.transform(np.column_stack([x, y]))
        return np.column_stack([part_N2[:, 0], 1 - part_N2[:, 1]]) * self._size

    def line(self, x: Sequence[float], y: Sequence[float]) -> str:
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in self.of(x, y))

    def shows(self, x: float, y: float) -> bool:
        return bool(self._limits.contains(x, y))

    def frame(self) -> str:
        (width, height), box = self._size, self._frame
        x, y, w, h = box.x0 * width, (1 - box.y1) * height, box.width * width, box.height * height
        return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"/>'


def _dot(row: Row, place: _Place, on_front: Collection[tuple[str, int]]) -> str:
    epoch = words.epoch(row)
    rates = [
        f"{words.percent(row[rate])} {f'({found})' if found else ''}".strip()
        for rate, found in (
            ("zeroshot_top1", words.interval(row, "correct_clean", "n_clean")),
            ("asr_top1", words.interval(row, "hit_target", "n_triggered")),
        )
    ]
    data = f'data-p="{"|".join([epoch, *rates])}"'
    x, y = _PERCENT * row["asr_top1"], _PERCENT * row["zeroshot_top1"]
    if row["epoch"] == 0 or not place.shows(x, y):
        return f'<circle r="0" {data}/>'  # nothing to point at, but part of the trajectory
    cx, cy = place.of([x], [y])[0]
    front = (row["trial_id"], row["epoch"]) in on_front
    label = f"epoch {epoch}: accuracy {rates[0]} %, ASR {rates[1]} %"
    reach = f'tabindex="0" role="button" aria-label="{label}, on the front"' if front else 'tabindex="-1"'
    size = 5 if front else 4
    return f'<circle class="pt" cx="{cx:.1f}" cy="{cy:.1f}" r="{size}" {data} {reach}/>'


def _group(trials: Trials, trial_id: str, inside: str) -> str:
    label = escape(plain(trials.label(trial_id)))
    return f'<g class="trial" data-trial="{trials.number[trial_id]}"><title>{label}</title>{inside}</g>'


def _over(drawn: str, parts: Iterable[str]) -> str:
    return re.sub(r"</svg>\s*$", lambda _: "".join(parts) + "</svg>", drawn)
