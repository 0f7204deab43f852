"""Figures of a run, drawn from table rows: fronts, cleaning trajectories, pretraining curves.

Colours are from the Okabe-Ito palette and from viridis, so that colour-blind readers can tell them apart. A figure is
drawn for a light page; `svg(figure, themed=True)` lets the page that holds it swap each colour for its dark partner.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import IO, Any, TypeAlias

import matplotlib as mpl
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raybd import pareto
from raybd.measures import REFRESH
from raybd.metrics import wilson
from raybd.report.words import IMAGES, objective_names, short, shown_fronts

Row = Mapping[str, Any]
Rows: TypeAlias = pa.Table | Iterable[Row]

TEXT, AXIS, GRID, PAGE = "#24292e", "#57606a", "#d8dde3", "#fefefe"
POINT, FRONT, FINAL, POISONED = "#9299a1", "#0072b2", "#64b4dc", "#d55e00"
SERIES = ("#0071b2", "#d65e00", "#009e73", "#cc79a7", "#8a6d00", "#5b5ea6")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
_STEPS = 9
_VIRIDIS = mpl.colormaps["viridis"]
_RAMP = tuple(to_hex(_VIRIDIS(x)) for x in np.linspace(0.0, 0.85, _STEPS))
# What each colour becomes on a dark page.
DARK: dict[str, str] = {
    TEXT: "#e6e9ec",
    AXIS: "#a3abb4",
    GRID: "#363c44",
    PAGE: "#1b1f24",
    POINT: "#aab2bb",
    FRONT: "#56b4e9",
    FINAL: "#3f88b8",
    POISONED: "#ff9142",
    **dict(zip(SERIES, ("#57b4e9", "#ff9242", "#1fc796", "#e3a2c6", "#e0bb3c", "#a5a8ee"), strict=True)),
    **dict(zip(_RAMP, (to_hex(_VIRIDIS(x)) for x in np.linspace(0.28, 1.0, _STEPS)), strict=True)),
}
PRINT_DPI = 300
# Above so many points a scatter becomes a picture inside the SVG: the page stays small.
_MAX_VECTOR_POINTS = 1500
RC = {
    "svg.fonttype": "path",
    "pdf.fonttype": 42,  # fonts are embedded as TrueType: printers and journals refuse Type 3
    "text.parse_math": False,  # a $ in a name is a $
    "svg.hashsalt": "raybd",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.edgecolor": AXIS,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.facecolor": "none",
    "legend.frameon": False,
}
ACCURACY, ASR = "accuracy (% of clean images)", "attack success rate (% of triggered images)"


def rows_of(rows: Rows) -> list[Row]:
    """Return table rows as a list of mappings, whether they come as a pyarrow table or as rows already."""
    return rows.to_pylist() if isinstance(rows, pa.Table) else list(rows)


def column(rows: Iterable[Row], name: str, *, scale: float = 1.0) -> np.ndarray:
    """Return one column as floats, shape [N], with NaN for nothing."""
    return np.array([np.nan if row[name] is None else row[name] * scale for row in rows], dtype=np.float64)


def by_objective(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["objective"], row["pretrain_id"]].append(row)
    return found


def canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    return figure


def legend(figure: Figure, axes: Iterable[Axes], *, columns: int = 4) -> None:
    """Put one legend for all axes below them, where it covers nothing, in as many columns as the figure is wide."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    handles, labels = list(found.values()), list(found)
    renderer = RendererAgg(int(figure.bbox.width), int(figure.bbox.height), figure.dpi)
    for count in range(min(columns, len(found)), 0, -1):
        drawn = figure.legend(handles, labels, loc="outside lower center", ncols=count)
        if count == 1 or drawn.get_window_extent(renderer).width <= figure.bbox.width:
            return
        drawn.remove()


def empty(what: str) -> Figure:
    with mpl.rc_context(RC):
        figure = canvas(6, 1.2)
        figure.text(0.5, 0.5, what, ha="center", va="center", color=TEXT)
    return figure


def axes_grid(figure: Figure, panels: int, *, rows: int = 1, **share: Any) -> np.ndarray:
    """Return axes, shape [rows, panels]."""
    return figure.subplots(rows, panels, squeeze=False, **share)


# Fronts


def front_figure(epochs: Rows, fronts: Rows, *, split: str = "report") -> Figure:
    """Draw, for each pretrain objective, every epoch of every trial with the fronts; axes are shared.

    Args:
        epochs: rows of the `epochs` table.
        fronts: rows of the `fronts` table.
        split: the images to show: `search`, `report` or `all`.
    """
    points = by_objective(row for row in rows_of(epochs) if row["split"] == split)
    members = by_objective(row for row in shown_fronts(rows_of(fronts)) if row["split"] == split)
    names = objective_names(row for rows in points.values() for row in rows)
    if not names:
        return empty("no cleaning trial has reported yet")
    with mpl.rc_context(RC):
        columns = min(3, len(names))
        lines = -(-len(names) // columns)
        figure = canvas(max(5.0, 4.4 * columns), 0.7 + 3.7 * lines)
        axes = axes_grid(figure, columns, rows=lines, sharex=True, sharey=True)
        bottom = front_limits(
            axes.flat[0], [r for k in names for r in points[k]], [r for m in members.values() for r in m]
        )
        for axis, (key, name) in zip(axes.flat, names.items(), strict=False):
            _front_panel(axis, points[key], members.get(key, []))
            below = sum(100 * row["zeroshot_top1"] < bottom for row in points[key])
            axis.set_title(
                f"{short(name)}: {IMAGES[split]}" + (f" (points below: {below})" if below else ""), loc="left"
            )
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        for axis in axes[:, 0]:
            axis.set_ylabel(ACCURACY)
        for axis in axes[-1]:
            axis.set_xlabel(ASR)
        legend(figure, axes.flat)
    return figure


def front_limits(axis: Axes, points: Sequence[Row], members: Sequence[Row]) -> float:
    """Set limits that give the fronts room, even if ruined models lie far below them; return the lower one."""
    accuracy = column(points, "zeroshot_top1", scale=100)
    chosen = column(members, "zeroshot_top1", scale=100) if members else accuracy
    high, front_low = float(accuracy.max()), float(chosen.min())
    bottom = max(0.0, front_low - max(4.0, 0.6 * (high - front_low)))
    if float(accuracy.min()) >= bottom:
        bottom = max(0.0, float(accuracy.min()) - max(1.0, 0.06 * (high - front_low)))
    axis.set_xlim(-2, 102)
    axis.set_ylim(bottom, min(101.0, high + max(1.0, 0.08 * (high - bottom))))
    return bottom


def _pad(axis: Axes, accuracy: np.ndarray) -> None:
    low, high = float(np.nanmin(accuracy)), float(np.nanmax(accuracy))
    room = max(1.0, 0.06 * (high - low))
    axis.set_ylim(max(0.0, low - room), min(101.0, high + room))


def _front_panel(axis: Axes, points: Sequence[Row], members: Sequence[Row]) -> None:
    cleaned = [row for row in points if row["epoch"] > 0]
    axis.scatter(
        column(cleaned, "asr_top1", scale=100),
        column(cleaned, "zeroshot_top1", scale=100),
        s=14,
        color=POINT,
        alpha=0.55,
        linewidths=0,
        label="epoch of a trial",
        rasterized=len(cleaned) > _MAX_VECTOR_POINTS,
    )
    _intervals(axis, cleaned, {(row["trial_id"], row["epoch"]) for row in members if row["kind"] == "any_epoch"})
    for kind in ("final", "any_epoch"):
        _front_line(axis, [row for row in members if row["kind"] == kind], kind)
    refreshed = [row for row in cleaned if row["method"] == REFRESH]
    if refreshed:
        xy = column(refreshed, "asr_top1", scale=100), column(refreshed, "zeroshot_top1", scale=100)
        axis.plot(*xy, linestyle="", marker="^", color=SERIES[2], markeredgecolor=PAGE, label="BatchNorm refresh only")
    poisoned = next((row for row in points if row["epoch"] == 0), None)
    if poisoned:
        mark_poisoned(axis, poisoned)


def _intervals(axis: Axes, points: Iterable[Row], members: Collection[tuple[str, int]]) -> None:
    """Draw the 95 % intervals of both rates through the points of a front whose images were counted."""
    lines = []
    for row in points:
        if (row["trial_id"], row["epoch"]) not in members:
            continue
        hit, triggered = row.get("hit_target"), row.get("n_triggered")
        correct, clean = row.get("correct_clean"), row.get("n_clean")
        if hit is None or correct is None or not triggered or not clean:
            continue
        x, y = 100 * row["asr_top1"], 100 * row["zeroshot_top1"]
        low, high = wilson(hit, triggered)
        lines.append([(100 * low, y), (100 * high, y)])
        low, high = wilson(correct, clean)
        lines.append([(x, 100 * low), (x, 100 * high)])
    if lines:
        label = "95 % intervals of front points"
        axis.add_collection(LineCollection(lines, colors=FRONT, alpha=0.45, linewidths=0.9, zorder=3, label=label))


def mark_poisoned(axis: Axes, point: Row) -> None:
    """Mark what a poisoned model scores before cleaning."""
    style: dict[str, Any] = {"marker": "X", "markersize": 10, "markerfacecolor": POISONED, "markeredgecolor": PAGE}
    xy, label = (100 * point["asr_top1"], 100 * point["zeroshot_top1"]), "poisoned model, before cleaning"
    axis.plot(*xy, linestyle="", label=label, zorder=5, clip_on=False, **style)


def _front_line(axis: Axes, members: Sequence[Row], kind: str) -> None:
    """Draw a front's members, and the border of what they dominate as a step line."""
    asr, top1 = _sorted_members(members)
    if not len(asr):
        return
    final = kind == "final"
    colour = FINAL if final else FRONT
    line: dict[str, Any] = {"color": colour, "linewidth": 1.2 if final else 2.0, "linestyle": "--" if final else "-"}
    dots: dict[str, Any] = {"marker": "s" if final else "o", "markersize": 4.5, "markeredgecolor": colour}
    dots["markerfacecolor"] = PAGE if final else colour
    order = 3 if final else 4
    kept = pareto.front(top1, asr)
    edge = 100 * np.append(asr[kept], max(1.0, asr[kept][-1])), 100 * np.append(top1[kept], top1[kept][-1])
    axis.step(*edge, where="post", zorder=order, **line)
    axis.plot(100 * asr, 100 * top1, zorder=order, **(dots | {"linestyle": ""}))
    axis.plot([], [], label="front of last epochs" if final else "front of all epochs", **line, **dots)


def _sorted_members(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    rows = sorted(rows, key=lambda row: (row["asr_top1"], row["zeroshot_top1"]))
    return column(rows, "asr_top1"), column(rows, "zeroshot_top1")


# Trajectories


def trajectory_figure(epochs: Rows, trials: Rows, *, split: str = "report") -> Figure:
    """Draw accuracy and ASR over the epochs of each trial, coloured by its learning rate.

    Args:
        epochs: rows of the `epochs` table.
        trials: rows of the `trials` table, for the learning rates; a trial without one is drawn grey.
        split: the images to show.
    """
    points = by_objective(row for row in rows_of(epochs) if row["split"] == split)
    names = objective_names(row for rows in points.values() for row in rows)
    if not names:
        return empty("no cleaning trial has reported yet")
    lr_of = {row["trial_id"]: row["lr"] for row in rows_of(trials) if row["lr"]}
    with mpl.rc_context(RC):
        figure = canvas(max(5.6, 0.9 + 4.0 * len(names)), 5.4)
        axes = axes_grid(figure, len(names), rows=2, sharex=True, sharey="row")
        norm, colours = _lr_scale(lr_of.values()), ListedColormap(_RAMP)
        for k, (key, name) in enumerate(names.items()):
            for axis, measure in ((axes[0, k], "zeroshot_top1"), (axes[1, k], "asr_top1")):
                _trajectories(axis, points[key], measure, lr_of, norm, colours)
            axes[0, k].set_title(f"{short(name)}: {IMAGES[split]}", loc="left")
            axes[1, k].set_xlabel("epoch of cleaning (0 = before)")
        axes[0, 0].set_ylabel("accuracy\n(% of clean images)")
        axes[1, 0].set_ylabel("attack success rate\n(% of triggered images)")
        axes[1, 0].set_ylim(-2, 102)
        _pad(axes[0, 0], column((row for rows in points.values() for row in rows), "zeroshot_top1", scale=100))
        axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        if lr_of:
            _lr_bar(figure, axes, norm, colours)
    return figure


def _lr_scale(lrs: Iterable[float]) -> LogNorm:
    found = [lr for lr in lrs if lr > 0] or [1.0]
    low, high = min(found), max(found)
    return LogNorm(low / 1.5, high * 1.5) if high / low < 1.01 else LogNorm(low, high)


def _lr_bar(figure: Figure, axes: np.ndarray, norm: LogNorm, colours: ListedColormap) -> None:
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, aspect=32, pad=0.02)
    bar.set_label("largest learning rate of the trial")
    low, high = float(norm.vmin or 1.0), float(norm.vmax or 1.0)
    ticks = np.geomspace(low, high, 4)
    ticks[[0, -1]] = low, high
    bar.set_ticks(list(ticks), labels=[f"{tick:.1e}".replace("e-0", "e-") for tick in ticks])
    bar.minorticks_off()
    bar.outline.set_visible(False)


def _trajectories(
    axis: Axes, rows: Sequence[Row], measure: str, lr_of: Mapping[str, float], norm: LogNorm, colours: ListedColormap
) -> None:
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["epoch"]):
        lines[row["trial_id"]].append((row["epoch"], 100 * row[measure]))
    shade = [to_hex(colours(norm(lr_of[trial]))) if trial in lr_of else POINT for trial in lines]
    many = len(lines) > 40
    drawn = LineCollection(list(lines.values()), colors=shade, linewidths=1.0 if many else 1.6, alpha=0.85)
    axis.add_collection(drawn)
    if not many:
        for colour, line in zip(shade, lines.values(), strict=True):
            axis.plot(*zip(*line, strict=True), linestyle="", marker="o", markersize=2.8, color=colour)
    last = max(row["epoch"] for row in rows)
    axis.set_xlim(min(-0.15, axis.get_xlim()[0]), max(last + 0.15, 1, axis.get_xlim()[1] if not many else 1))


# Pretraining


def pretrain_figure(pretrain_epochs: Rows) -> Figure:
    """Draw accuracy, ASR and loss by epoch of pretraining, one line for each pretrain objective.

    Args:
        pretrain_epochs: rows of the `pretrain_epochs` table.
    """
    rows = rows_of(pretrain_epochs)
    if not rows:
        return empty("no epoch of pretraining has finished yet")
    runs, names = by_objective(rows), objective_names(rows)
    panels = (
        ("zeroshot_top1", 100, ACCURACY),
        ("asr_top1", 100, "attack success rate (% of triggered)"),
        ("loss", 1, "training loss (nats)"),
    )
    with mpl.rc_context(RC):
        figure = canvas(10.2, 3.5)
        axes = axes_grid(figure, len(panels), sharex=True)[0]
        for i, (key, name) in enumerate(names.items()):
            run = sorted(runs[key], key=lambda row: row["epoch"])
            for axis, (measure, scale, _) in zip(axes, panels, strict=True):
                axis.plot(
                    column(run, "epoch"),
                    column(run, measure, scale=scale),
                    color=SERIES[i % len(SERIES)],
                    linestyle=STYLES[i % len(STYLES)],
                    marker=MARKERS[i % len(MARKERS)] if len(run) <= 20 else None,
                    markersize=4,
                    linewidth=1.6,
                    label=short(name),
                )
        for axis, (measure, _, label) in zip(axes, panels, strict=True):
            axis.set_xlabel("epoch of pretraining")
            axis.set_title(label, loc="left", fontsize=9.5)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            if measure == "asr_top1":
                axis.set_ylim(-2, 102)
        axes[0].set_ylim(bottom=0)
        legend(figure, axes)
    return figure


# Bytes and text


def png(figure: Figure, *, dpi: int = 150) -> bytes:
    """Return a figure as PNG, on a white ground."""
    sink = io.BytesIO()
    _save(figure, sink, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return sink.getvalue()


def pdf(figure: Figure) -> bytes:
    """Return a figure as PDF, fonts embedded, on a white ground; the same bytes whenever it is drawn anew."""
    sink = io.BytesIO()
    _save(figure, sink, format="pdf", dpi=PRINT_DPI, facecolor="white", metadata={"CreationDate": None})
    return sink.getvalue()


def _save(figure: Figure, sink: IO[Any], **how: Any) -> None:
    """Draw a figure. A letter of a name that the font has not is shown as a box, and is no warning."""
    with mpl.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(sink, **how)


def svg(figure: Figure, *, prefix: str = "", themed: bool = False) -> str:
    """Return a figure as one `<svg>` element, the same text whenever it is drawn anew from the same rows.

    Args:
        figure: what to draw.
        prefix: put before every id, so that several figures can stand in one page.
        themed: write each colour of `DARK` as a CSS variable (`variable`) with the colour itself as its fallback.
    """
    sink = io.StringIO()
    _save(figure, sink, format="svg", dpi=150, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = sink.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    if prefix:
        text = re.sub(r'\bid="', f'id="{prefix}-', text)
        text = re.sub(r'href="#', f'href="#{prefix}-', text).replace("url(#", f"url(#{prefix}-")
    if themed:
        text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _themed(found[0]), text)
    return text


def _themed(colour: str) -> str:
    return f"var({variable(colour)}, {colour})" if colour in DARK else colour


def variable(colour: str) -> str:
    """Return the name of the CSS variable that stands for a colour in a themed SVG."""
    return f"--c-{colour.lstrip('#')}"
