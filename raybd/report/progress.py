"""How far a search is, in lines of text that fit a screen: best points, hypervolume against trials, device-hours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.cells import cell_len, set_cell_size

from raybd import failures, fronts, pareto, stopping
from raybd.ledger import State
from raybd.plain import plain
from raybd.points import Row
from raybd.report import words
from raybd.study import Stopping

WITHIN = (1, 3)  # points of accuracy lost, of those that `fronts.summarise` knows
_BLOCK = 40  # columns that an objective takes beside another
_ROWS = 4  # of a plot
_REASONS = 3
_HOUR = 3600.0


@dataclass
class SearchState:
    """Where the search of one pretrain objective stands, on the half of the images that it looks at.

    Attributes:
        name: of the objective.
        of: objective and pretraining.
        before: accuracy and ASR of the poisoned model, None before a trial has measured them.
        best: by points of accuracy lost, the front point of lowest ASR within them: trial and epoch, accuracy, ASR.
        areas: hypervolume of the front over all epochs, after each trial that ended.
    """

    name: str
    of: tuple[str, str] = ("", "")
    before: tuple[float, float] | None = None
    best: dict[int, tuple[str, float, float]] = field(default_factory=dict)
    areas: list[float] = field(default_factory=list)


@dataclass
class Meter:
    """Device-seconds that trials took, and what the others will take by the look of it.

    Args:
        rules: of stopping.
        each: trials planned for each pretrain objective; None where nobody knows.
        objectives: their number.
    """

    rules: Stopping
    each: int | None
    objectives: int
    seconds: float = 0.0
    _ended: int = 0
    _epochs: int = 0
    _planned: int = 0
    _halted: dict[str, tuple[float, int, int]] = field(default_factory=dict)

    def add(self, trial: Row, *, waited: float = 0.0) -> None:
        """Count a trial that ended or waits at a rung, in place of what was known of it.

        Args:
            trial: its row of the table `trials`.
            waited: device-seconds of one that waits.
        """
        before = self._halted.pop(trial["trial_id"], (0.0, 0, 0))
        found = (trial["device_seconds"] or waited, trial["epochs_done"] or 0, trial["epochs_planned"] or 0)
        if trial["state"] == State.RUNNING:
            self._halted[trial["trial_id"]] = found
        else:
            self._ended += 1
        self.seconds += found[0] - before[0]
        self._epochs += found[1] - before[1]
        self._planned += found[2] - before[2]

    def left(self) -> float | None:
        """Return device-seconds still to come; None before a trial has shown what an epoch takes."""
        known = self._ended + len(self._halted)
        if self.each is None or not (self.seconds and self._epochs and self._planned):
            return None
        mean = max(1, round(self._planned / known))
        if self.rules.rungs:
            epochs = self.objectives * stopping.expected_of_equals(self.rules, self.each, mean) - self._epochs
        else:
            epochs = (self.each * self.objectives - self._ended) * mean
        return max(0, epochs) * self.seconds / self._epochs


def search_states(front_rows: Iterable[Row]) -> list[SearchState]:
    """Return where searches stand by the rows of the table `fronts`: over all methods, without how they got there."""
    rows = list(front_rows)
    names, found = fronts.objective_names(rows), dict[str, SearchState]()
    for entry in fronts.summarise(row for row in rows if row["kind"] == "any_epoch" and row["split"] != "report"):
        name = names[entry["objective"], entry["pretrain_id"]]
        if name in found and entry["method"] != fronts.ALL_METHODS:
            continue
        before, best = entry["baseline"], dict[int, tuple[str, float, float]]()
        for points in WITHIN:
            if (point := entry["best_asr_within"][str(points)]) is not None:
                who = f"{point['trial_id']}:{point['epoch']}" if point["epoch"] else "poisoned"
                best[points] = (who, point["zeroshot_top1"], point["asr_top1"])
        known = np.isfinite(before["zeroshot_top1"])
        at = (before["zeroshot_top1"], before["asr_top1"]) if known else None
        found[name] = SearchState(name, (entry["objective"], entry["pretrain_id"]), at, best, [entry["hypervolume"]])
    return list(found.values())


Areas = list[tuple[str, float]]


def areas(trials: Iterable[Row], epochs: Mapping[str, Sequence[Row]]) -> dict[tuple[str, str], Areas]:
    """Return the trials that ended, in their order, with the hypervolume after each, by objective and pretraining.

    Trials that have not ended count with the last one that has; those before the first point are left out.

    Args:
        trials: rows of the table `trials`.
        epochs: rows of the table `epochs` by trial; those of the search half count, or of all images.
    """
    ordered: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for trial in sorted(trials, key=_when):
        ordered[trial["objective"], trial["pretrain_id"]].append(trial)
    return {key: _areas(own, epochs) for key, own in ordered.items()}


def _when(trial: Row) -> tuple[bool, bool, Any, str]:
    open_ = trial["state"] == State.RUNNING
    return open_, trial["ended"] is None, trial["ended"] or 0, trial["trial_id"]


def _areas(trials: Sequence[Row], epochs: Mapping[str, Sequence[Row]]) -> Areas:
    found: Areas = []
    top1, asr = np.empty(0), np.empty(0)
    for trial in trials:
        own = [row for row in epochs.get(trial["trial_id"], ()) if row["split"] != "report"]
        top1 = np.append(top1, [row["zeroshot_top1"] for row in own])
        asr = np.append(asr, [row["asr_top1"] for row in own])
        kept = pareto.front(top1, asr)
        top1, asr = top1[kept], asr[kept]
        if not len(kept):
            continue
        area = pareto.hypervolume(top1, asr)
        if trial["state"] != State.RUNNING:
            found.append((trial["trial_id"], area))
        elif found:
            found[-1] = (found[-1][0], area)
    return found


def device_line(meter: Meter) -> str:
    """Return device-hours of trials, "" before any is known."""
    if not meter.seconds:
        return ""
    left = meter.left()
    ahead = "" if left is None else f", about {_hours(left)} left" if left else ", none left"
    return f"device-hours of trials: {_hours(meter.seconds)} used{ahead}"


def _hours(seconds: float) -> str:
    return f"{seconds / _HOUR:.{2 if seconds < 100 * _HOUR else 0}f}"


def best_words(state: SearchState) -> str:
    """Return hypervolume and lowest ASR within the most points, in one line."""
    said = [f"hypervolume {state.areas[-1]:.4f}"] if state.areas else []
    for points in WITHIN[-1:]:
        if points in state.best:
            said.append(f"best ASR within {points} points {words.percent(state.best[points][2])} %")
    return ", ".join(said)


def objective_lines(found: Sequence[SearchState], *, width: int, rows: int = _ROWS, unicode: bool) -> list[str]:
    """Return a block for each pretrain objective, side by side where there is room.

    Args:
        width: columns.
        rows: of a plot; 0 for none.
        unicode: whether the screen shows more than ASCII.
    """
    beside = max(1, min(len(found), width // _BLOCK))
    own = width // beside - (2 if beside > 1 else 0)
    blocks = [_block(state, width=own, rows=rows, unicode=unicode) for state in found]
    lines = []
    for first in range(0, len(blocks), beside):
        some = blocks[first : first + beside]
        for i in range(max(map(len, some))):
            cells = [set_cell_size(block[i] if i < len(block) else "", own) for block in some]
            lines.append("  ".join(cells).rstrip())
    return lines


def _block(state: SearchState, *, width: int, rows: int, unicode: bool) -> list[str]:
    lines = [plain(state.name).replace("\n", " ")]
    if state.best or state.before is not None:
        lines[0] = f"{set_cell_size(lines[0], 12)}  ASR %  acc. %"
    if state.before is not None:
        lines.append(f"  poisoned  {_share(state.before[1])}  {_share(state.before[0])}")
    for points, (who, top1, asr) in state.best.items():
        # Above it stands the objective that the name of a trial begins with.
        lines.append(f"  {points} pt lost {_share(asr)}  {_share(top1)}  {plain(who.removeprefix(f'{state.name}-'))}")
    if areas := list(state.areas):  # a copy: the search adds to them meanwhile
        lines.append(f"  hypervolume {areas[-1]:.4f} after {len(areas)} trials")
        if rows and len(areas) > 1:
            lines += _axes(areas, width=width, rows=rows, unicode=unicode)
    return [set_cell_size(line, min(width, cell_len(line))) for line in lines]


def _share(value: float) -> str:
    return f"{100 * value:6.2f}"


def _axes(values: Sequence[float], *, width: int, rows: int, unicode: bool) -> list[str]:
    """Return a plot with the bounds of its values at its left."""
    low, high = f"{min(values):.4f}", f"{max(values):.4f}"
    edge = "┤" if unicode else "|"
    drawn = plot(values, width=max(4, min(60, width - 10)), rows=rows, unicode=unicode)
    labels = [high, *[" " * len(high)] * (rows - 2), low] if rows > 1 else [high]
    return [f"  {label}{edge}{line}" for label, line in zip(labels, drawn, strict=True)]


def plot(values: Sequence[float], *, width: int, rows: int, unicode: bool) -> list[str]:
    """Return a curve as lines of text, from the lowest value to the highest: braille, or ASCII.

    Args:
        values: one or more, of which the last of each stretch is shown where there are more than dots.
        width, rows: characters.
    """
    across, up = (2, 4) if unicode else (1, 1)
    dots, levels = width * across, rows * up
    low, high = min(values), max(values)
    shown = [values[-(-(i + 1) * len(values) // dots) - 1] for i in range(dots)]
    heights = [round((value - low) / (high - low) * (levels - 1)) if high > low else 0 for value in shown]
    cells = [[0] * width for _ in range(rows)]
    for i, height in enumerate(heights):
        before = heights[i - 1] if i else height
        for level in range(min(before, height), max(before, height) + 1) if unicode else [height]:
            row, dot = divmod(levels - 1 - level, up)
            cells[row][i // across] |= _DOTS[dot][i % across]
    return ["".join(chr(0x2800 + cell) if unicode else " *"[bool(cell)] for cell in row) for row in cells]


_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, from its top


@dataclass
class Progress:
    """A search under way.

    Attributes:
        total: trials in all.
        states: trials that ended, by state.
        running: the last epoch of each trial that runs.
        waiting: trials that wait at a rung.
        seconds: since the search began in this call.
        seconds_left: None before a trial has ended in this call.
        failed: (trial, `error_type`, `error_message`) of each trial that failed.
    """

    total: int
    searches: dict[str, SearchState]
    meter: Meter
    states: dict[str, int] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    seconds: float = 0.0
    seconds_left: float | None = None
    failed: list[tuple[str, Any, Any]] = field(default_factory=list)
    _reasons: tuple[int, Sequence[failures.Reason]] = (0, ())

    def reasons(self) -> Sequence[failures.Reason]:
        """Return why trials failed; looked at again only where more have."""
        if self._reasons[0] != len(self.failed):
            self._reasons = (len(self.failed), failures.reasons(self.failed))
        return self._reasons[1]

    @property
    def ended(self) -> int:
        """Trials that ended."""
        return sum(self.states.values())


def screen(progress: Progress, *, width: int, height: int, unicode: bool) -> list[str]:
    """Return the lines of a live view: what matters least is left out where they are too many.

    Args:
        width, height: of the screen, in characters.
        unicode: whether it shows more than ASCII.
    """
    left = "" if progress.seconds_left is None else f", about {words.span(progress.seconds_left)} left"
    head = [f"search: {progress.ended}/{progress.total} trials ended, {words.span(progress.seconds)}{left}"]
    counts = {**progress.states, "running": len(progress.running), "waiting at a rung": len(progress.waiting)}
    counts["to come"] = progress.total - progress.ended - len(progress.running) - len(progress.waiting)
    head.append("trials: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count > 0))
    why = progress.reasons()
    failed = ["  " + " ".join(plain(reason).split()) for reason in why[:_REASONS]]
    if len(why) > _REASONS:
        failed.append(f"  and {len(why) - _REASONS} other reasons")
    hours = [line] if (line := device_line(progress.meter)) else []
    found = [state for state in progress.searches.values() if state.areas]
    running = ", ".join(f"{plain(name)} epoch {epoch}" for name, epoch in sorted(progress.running.items()))
    tail = [f"running: {running}"] if running else []
    for rows in (_ROWS, 2, 0):
        best = objective_lines(found, width=width, rows=rows, unicode=unicode) if found else []
        for parts in ((head, hours, best, failed, tail), (head, hours, best, failed[:1])):
            lines = [set_cell_size(line, min(cell_len(line), width)) for part in parts for line in part]
            if len(lines) <= height:
                return lines
    return [set_cell_size(line, min(cell_len(line), width)) for line in [*head, *hours, *failed[:1], *best]][:height]
