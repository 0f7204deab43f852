"""Figures of what `raybd.analysis` measures: methods, instability, blind choices, differences, attainment.

Each takes what the analysis gives and returns None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raybd.fronts import ALL_METHODS, objective_names
from raybd.importance import OBJECTIVES
from raybd.report import figures, words
from raybd.report.figures import ACCURACY, ASR, FRONT, MARKERS, PAGE, POINT, POISONED, RC, SERIES, STYLES
from raybd.report.grids import MEASURES, RULES
from raybd.report.words import Front, Row

_LINES = tuple(colour for colour in SERIES if colour != SERIES[1])  # that is the poisoned model's, nearly


def _panels(names: Sequence[str], *, share: bool = True) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel for each poisoned model, of accuracy against ASR."""
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = figures.canvas(max(5.0, 4.4 * columns), 0.8 + 3.7 * lines)
    axes = figures.axes_grid(figure, columns, rows=lines, sharex=share, sharey=share)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel(ACCURACY)
    for axis in axes[-1]:
        axis.set_xlabel(ASR)
    found = list(axes.flat[: len(names)])
    for axis, name in zip(found, names, strict=True):
        axis.set_title(words.short(name), loc="left")
        axis.set_xlim(-2, 102)
    return figure, found


def _border(points: Iterable[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return ASR and accuracy, in percent, of the steps round what (accuracy, ASR) points dominate."""
    ordered = np.array(sorted(points, key=lambda point: (point[1], point[0])), dtype=np.float64).reshape(-1, 2)
    if not len(ordered):
        return np.zeros(0), np.zeros(0)
    reach = np.maximum.accumulate(ordered[:, 0])
    asr = np.append(ordered[:, 1], max(1.0, ordered[-1, 1]))
    return 100 * asr, 100 * np.append(reach, reach[-1])


def _step(axis: Axes, points: Iterable[Sequence[float]], **style: Any) -> None:
    """Draw the border of what (accuracy, ASR) points dominate."""
    axis.step(*_border(points), where="post", **style)


def _band(axis: Axes, outer: Iterable[Sequence[float]], inner: Iterable[Sequence[float]]) -> None:
    """Shade what the first points dominate and the second do not."""
    (outer_asr, outer_top1), (inner_asr, inner_top1) = _border(outer), _border(inner)
    if not len(outer_asr) or not len(inner_asr):
        return
    asr = np.union1d(outer_asr, inner_asr)

    def reach(at: np.ndarray, top1: np.ndarray) -> np.ndarray:
        return top1[np.maximum(np.searchsorted(at, asr, side="right") - 1, 0)]

    heights = reach(inner_asr, inner_top1), reach(outer_asr, outer_top1)
    axis.fill_between(asr, *heights, step="post", color=FRONT, alpha=0.13, linewidth=0, label="between best and worst")


def _points(entry: Row) -> list[tuple[float, float]]:
    return [(row["zeroshot_top1"], row["asr_top1"]) for row in entry["front"]]


def _every_epoch(summaries: Iterable[Row]) -> list[Front]:
    return [front for front in words.pair(summaries) if front.kind == "any_epoch"]


def _fronts_side_by_side(panels: Mapping[str, Mapping[str, Front]]) -> Figure:
    """Draw fronts into panels, each with the name of its line, which has one colour in all panels."""
    labels = sorted({label for fronts in panels.values() for label in fronts})
    with mpl.rc_context(RC):
        figure, axes = _panels([*panels])
        for axis, fronts in zip(axes, panels.values(), strict=True):
            for label, front in fronts.items():
                i = labels.index(label)
                # Colours come round again after five: then the line is another.
                style = {"color": _LINES[i % len(_LINES)], "linestyle": STYLES[i // len(_LINES) % len(STYLES)]}
                _step(axis, _points(front.report), label=words.short(label), linewidth=1.7, **style)
            for i, front in enumerate(fronts.values()):
                baseline = front.report["baseline"]
                if baseline not in [before.report["baseline"] for before in [*fronts.values()][:i]]:
                    figures.mark_poisoned(axis, baseline)
        figures.legend(figure, axes)
    return figure


def method_figure(summaries: Sequence[Row]) -> Figure | None:
    """Draw the front of each cleaning method, one panel for each poisoned model that has several methods.

    Args:
        summaries: what `fronts.summarise` gives.
    """
    fronts = _every_epoch(summaries)
    panels: dict[str, dict[str, Front]] = {front.name: {} for front in fronts if front.method == ALL_METHODS}
    for front in fronts:
        if front.method != ALL_METHODS and front.name in panels:
            panels[front.name][front.method] = front
    return _fronts_side_by_side(panels) if panels else None


def run_figure(summaries: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Draw the front of each run, one panel for each pretrain objective, of all methods where there are several.

    Args:
        summaries: for each run what `fronts.summarise` gives.
    """
    panels: dict[str, dict[str, Front]] = {}
    for run, found in summaries.items():
        for front in words.shown_fronts(_every_epoch(found)):
            panels.setdefault(front.name, {})[run] = front
    return _fronts_side_by_side(panels) if panels else None


def instability_figure(entries: Sequence[Row]) -> Figure | None:
    """Draw unstable steps, rebound and the place of the best point, a line for each poisoned model and method.

    Args:
        entries: `instability` of `analysis.of_run`.
    """
    if not entries:
        return None
    names = objective_names(entries)
    labels = [f"{names[e['objective'], e['pretrain_id']]}, {words.method_name(e['method'])}" for e in entries]
    rows = np.arange(len(entries))[::-1]
    with mpl.rc_context(RC):
        figure = figures.canvas(10.2, 1.2 + 0.32 * len(entries))
        axes = figures.axes_grid(figure, 3, sharey=True)[0]
        for axis, measure in ((axes[0], "unstable_share"), (axes[1], "rebound")):
            values = [100 * (entry[measure] or 0.0) for entry in entries]
            axis.barh(rows, values, height=0.55, color=FRONT)
            axis.set_xlim(0, max(1.0, 1.15 * max(values)))
        for row, entry in zip(rows, entries, strict=True):
            places = [trial["best_at"] for trial in entry["by_trial"]]
            axes[2].plot(places, np.full(len(places), row), linestyle="", marker="o", markersize=4, color=POINT)
            axes[2].plot(entry["best_at"], row, linestyle="", marker="D", markersize=6, color=FRONT)
        axes[0].set_yticks(rows, [*map(words.short, labels)])
        axes[0].set_ylim(-0.6, len(entries) - 0.4)
        axes[0].set_xlabel("unstable steps (%)")
        axes[1].set_xlabel("rebound of ASR (points)")
        axes[2].set_xlabel("best point (share of the trial's epochs)")
        axes[2].set_xlim(-0.04, 1.04)
    return figure


def defender_figure(entries: Sequence[Row], summaries: Sequence[Row]) -> Figure | None:
    """Draw what each blind rule takes beside the front, one panel for each poisoned model.

    Args:
        entries: `defender` of `analysis.of_run`.
        summaries: its `fronts`.
    """
    shown = words.shown_fronts(_every_epoch(summaries))
    choices = {(e["objective"], e["pretrain_id"], e["method"]): e["choices"] for e in entries}
    shown = [f for f in shown if any(choices.get((f.objective, f.pretrain_id, f.method), {}).values())]
    if not shown:
        return None
    with mpl.rc_context(RC):
        figure, axes = _panels([f"{front.title}: {words.IMAGES[front.splits[-1]]}" for front in shown])
        for axis, front in zip(axes, shown, strict=True):
            _step(axis, _points(front.report), color=FRONT, linewidth=2.0, label="front of all epochs")
            for i, (rule, point) in enumerate(choices[front.objective, front.pretrain_id, front.method].items()):
                if point is None:
                    continue
                score = point["scores"][front.splits[-1]]
                axis.plot(
                    100 * score["asr_top1"],
                    100 * score["zeroshot_top1"],
                    linestyle="",
                    marker=MARKERS[i],
                    markersize=(12, 9, 7)[i],  # where two rules take the same point, both show
                    color=SERIES[i + 1],
                    markeredgecolor=PAGE,
                    label=RULES[rule],
                    zorder=4,
                    clip_on=False,
                )
            figures.mark_poisoned(axis, front.report["baseline"])
        figures.legend(figure, axes, columns=3)
    return figure


def _interval_figure(entries: Sequence[Row], value: str, names: Sequence[str], *, zero: bool) -> Figure | None:
    """Draw values with their intervals, one panel for each measure, one line for each name.

    Args:
        entries: with `measure`, `low`, `high` and the value.
        names: of each entry's line.
        zero: whether 0 is marked.
    """
    known = [pair for pair in zip(entries, names, strict=True) if pair[0][value] is not None]
    known = [pair for pair in known if pair[0]["low"] is not None]
    if not known:
        return None
    lines = list(dict.fromkeys(name for _, name in known))
    with mpl.rc_context(RC):
        figure = figures.canvas(10.2, 1.2 + 0.36 * len(lines))
        axes = figures.axes_grid(figure, len(MEASURES), sharey=True)[0]
        for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
            if zero:
                axis.axvline(0, color=POISONED, linewidth=1.0, linestyle="--")
            here = [pair for pair in known if pair[0]["measure"] == measure]
            if not here:
                axis.text(0.5, 0.5, "no point qualifies", ha="center", va="center", transform=axis.transAxes)
                axis.tick_params(axis="x", labelcolor="none", length=0)
            for entry, name in here:
                row = len(lines) - 1 - lines.index(name)
                axis.plot([100 * entry["low"], 100 * entry["high"]], [row, row], color=FRONT, linewidth=2.2)
                axis.plot(100 * entry[value], row, linestyle="", marker="o", markersize=6, color=FRONT)
            axis.set_xlabel(label)
        axes[0].set_yticks(range(len(lines)), [*map(words.short, reversed(lines))])
        axes[0].set_ylim(-0.6, len(lines) - 0.4)
    return figure


def difference_figure(entries: Sequence[Row]) -> Figure | None:
    """Draw each difference between pretrain objectives or runs with its interval, one panel for each measure.

    Args:
        entries: `differences` of `analysis.analyse`, or what `analysis.between_runs` gives.
    """
    names = [
        ", ".join([f"{entry['first']} − {entry['second']}", *_objective(entry), words.method_name(entry["method"])])
        for entry in entries
    ]
    return _interval_figure(entries, "difference", names, zero=True)


def worth_figure(entries: Sequence[Row]) -> Figure | None:
    """Draw what each run's fronts are worth with its interval, one panel for each measure.

    Args:
        entries: what `analysis.worths` gives.
    """
    names = [", ".join([entry["run"], *_objective(entry), words.method_name(entry["method"])]) for entry in entries]
    return _interval_figure(entries, "value", names, zero=False)


def _objective(entry: Row) -> list[str]:
    return [entry["objective"]] if "objective" in entry else []


def attainment_figure(entries: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw the best, median and worst attainment surfaces over several runs, one panel for each objective and method.

    Args:
        entries: `attainment` of `analysis.analyse`.
    """
    if not entries:
        return None
    with mpl.rc_context(RC):
        titles = [f"{entry['objective']} cleaned by {words.method_name(entry['method'])}" for entry in entries]
        figure, axes = _panels(titles)
        for axis, entry in zip(axes, entries, strict=True):
            levels = list(entry["levels"].values())
            _band(axis, levels[0]["points"], levels[-1]["points"])
            for i, (name, level) in enumerate(entry["levels"].items()):
                label = f"{name}: attained by {level['attained_by']} of {entry['runs']} runs"
                _step(axis, level["points"], color=SERIES[i], linestyle=STYLES[i], linewidth=1.8, label=label)
        figures.legend(figure, axes)
    return figure


def importance_figure(entries: Sequence[Row]) -> Figure | None:
    """Draw the importance of each setting for both search objectives, with what chance brings as a dashed line.

    Args:
        entries: what `importance.of_run` gives.
    """
    if not entries:
        return None
    names = objective_names(entries)
    labels = [f"{names[entry['objective'], entry['pretrain_id']]}: {entry['setting']}" for entry in entries]
    rows = np.arange(len(entries))[::-1]
    with mpl.rc_context(RC):
        figure = figures.canvas(10.2, 1.4 + 0.32 * len(entries))
        axes = figures.axes_grid(figure, len(OBJECTIVES), sharex=True, sharey=True)[0]
        for axis, (measure, label) in zip(axes, OBJECTIVES.items(), strict=True):
            axis.barh(rows, [100 * entry[measure]["share"] for entry in entries], height=0.55, color=FRONT)
            chance = [100 * entry[measure]["chance"] for entry in entries]
            axis.vlines(chance, rows - 0.42, rows + 0.42, color=POISONED, linestyle=(0, (2, 1)), label="by chance")
            axis.set_xlabel(f"{label}: share of variance explained (%)")
            axis.set_xlim(0, 100)
        axes[0].set_yticks(rows, [*map(words.short, labels)])
        axes[0].set_ylim(-0.6, len(entries) - 0.4)
        figures.legend(figure, axes)
    return figure
