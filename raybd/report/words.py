"""How numbers, settings and points are put for a reader, on paper and in a terminal alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from raybd import tables
from raybd.fronts import ALL_METHODS, HALVES, WHOLE, objective_names
from raybd.metrics import wilson
from raybd.plain import plain

Row = Mapping[str, Any]
# How the images of each split are called.
IMAGES = {"search": "search half", "report": "report half", "all": "all images"}
# Trial columns that every table of points shows, so that `params_json` need not repeat them.
_SHOWN = ("lr", "epochs", "loss_weights.mmcl", "loss_weights.ssl")


def percent(fraction: float | None, *, digits: int = 2) -> str:
    """Return a fraction in percent, without the sign; a dash for nothing."""
    if fraction is None or not math.isfinite(fraction):
        return "–"
    return f"{100 * fraction:.{digits}f}"


def share(count: int, n: int) -> str:
    """Return a share in percent, with its 95 % Wilson interval in brackets."""
    low, high = wilson(count, n)
    return f"{percent(count / n)} [{percent(low, digits=1)}, {percent(high, digits=1)}]"


def interval(row: Row, hits: str, n: str) -> str:
    """Return the 95 % Wilson interval, in percent, of a share whose counts these columns are; empty without counts."""
    if row[hits] is None or not row[n]:
        return ""
    low, high = wilson(row[hits], row[n])
    return f"{percent(low, digits=1)}–{percent(high, digits=1)}"


def number(value: object) -> str:
    """Return a setting as a reader would write it: 1e-4 for 0.0001, no trailing zeros; a dash for nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def span(seconds: float) -> str:
    """Return a time as `1 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def short(text: str, *, most: int = 72) -> str:
    """Return a name for a figure, where a long one would leave no room for anything else: cut, on one line."""
    line = plain(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def trial_name(trial_id: str, trial: Row | None) -> str:
    """Return how a trial is called in a table: by its number, or by its id if that is not known."""
    return trial_id if trial is None or trial["number"] is None else str(trial["number"])


def epoch(point: Row) -> str:
    """Return a point's epoch; of one made without training its place on the line between two models."""
    alpha = point.get("alpha")
    return str(point["epoch"]) if alpha is None else f"α {number(float(alpha))}"


def weights(trial: Row | None) -> str:
    """Return a trial's loss weights as `mmcl / ssl`; nothing for a method that has none."""
    if trial is None:
        return "–"
    if trial["loss_weights.mmcl"] is None and trial["loss_weights.ssl"] is None:
        return ""
    return f"{number(trial['loss_weights.mmcl'])} / {number(trial['loss_weights.ssl'])}"


def other_params(trial: Row) -> str:
    """Return the searched settings of a trial that have no column of their own in a table of points."""
    params = sorted(tables.searched(trial).items())
    return ", ".join(f"{name} {number(value)}" for name, value in params if name not in _SHOWN)


def settings(trial: Row | None) -> str:
    """Return a trial's settings in one line."""
    if trial is None:
        return "–"
    parts = [
        f"lr {number(trial['lr'])}" if trial["lr"] is not None else "",
        f"epochs {number(trial['epochs_planned'])}" if trial["epochs_planned"] is not None else "",
        f"weights {weights(trial)}" if weights(trial) else "",
        other_params(trial),
    ]
    return ", ".join(part for part in parts if part)


def flat(settings: Mapping[str, Any], *, at: str = "") -> list[tuple[str, str]]:
    """Return nested settings as (dotted name, value) pairs; a dash for what is not set."""
    found = []
    for key, value in settings.items():
        name = f"{at}.{key}" if at else str(key)
        if isinstance(value, Mapping) and value:
            found += flat(value, at=name)
        elif isinstance(value, list | tuple):
            found.append((name, ", ".join(map(str, value)) or "–"))
        elif isinstance(value, bool):
            found.append((name, "yes" if value else "no"))
        else:
            found.append((name, "–" if value in (None, "", {}) else str(value)))
    return found


@dataclass(frozen=True)
class Front:
    """One front with what its points score on both halves: entries of `fronts.summarise` that belong together.

    Where every image was counted once, there is one half only, `all`, and `search` and `report` are the same entry.
    """

    name: str
    objective: str
    pretrain_id: str
    method: str
    kind: str
    search: Row
    report: Row

    @property
    def splits(self) -> tuple[str, ...]:
        """The halves that there are, the one that points were chosen on first."""
        return WHOLE if self.search is self.report else HALVES

    def half(self, split: str) -> Row:
        """Return the front as scored on one half."""
        return self.search if split == self.splits[0] else self.report

    def points(self) -> list[tuple[Row, Row]]:
        """Return the members, each as scored on the search and on the report half, by rising accuracy on the first."""
        found = {(row["trial_id"], row["epoch"]): row for row in self.report["front"]}
        return [(row, found[row["trial_id"], row["epoch"]]) for row in self.search["front"]]

    def chosen(self) -> list[tuple[str, Row | None, Row | None]]:
        """Return (rule in words, the point it chooses on the search half, the same on the report half)."""
        return [
            *self._chosen("best_asr_within", lambda n: f"best ASR at ≤ {n} point{'s' * (n != '1')} lost"),
            *self._chosen("best_top1_at_asr", lambda share: f"best accuracy at ASR ≤ {100 * float(share):g} %"),
        ]

    def _chosen(self, rule: str, say: Callable[[str], str]) -> list[tuple[str, Row | None, Row | None]]:
        other = self.report[rule]
        return [(say(limit), row, other[limit]) for limit, row in self.search[rule].items()]

    @property
    def title(self) -> str:
        """What was cleaned, and how."""
        return f"{self.name} cleaned by {method_name(self.method)}"


FrontOrRow = TypeVar("FrontOrRow", Front, Row)


def method_name(method: str) -> str:
    """Return how a cleaning method is called in a sentence."""
    return "any method" if method == ALL_METHODS else method


def shown_fronts(fronts: Iterable[FrontOrRow]) -> list[FrontOrRow]:
    """Return the fronts that are shown in full: of models cleaned by several methods, those over all methods.

    Args:
        fronts: `Front`s, or rows of the `fronts` table.
    """

    def key(front: FrontOrRow) -> tuple[str, str, str]:
        if isinstance(front, Front):
            return front.objective, front.pretrain_id, front.method
        return front["objective"], front["pretrain_id"], front["method"]

    found = list(fronts)
    several = {key(front)[:2] for front in found if key(front)[2] == ALL_METHODS}
    return [front for front in found if key(front)[2] == ALL_METHODS or key(front)[:2] not in several]


@dataclass(frozen=True)
class Column:
    """A column of a `Grid`.

    Attributes:
        head: its heading, in two lines.
        number: whether it holds numbers.
        strong: whether it is what matters.
        alone: the heading, in two lines, where it does not need the column beside it to be understood; default `head`.
    """

    head: str
    number: bool = False
    strong: bool = False
    alone: str = ""

    @property
    def lines(self) -> list[str]:
        """The lines of the heading by itself."""
        return (self.alone or self.head).strip().split("\n")


@dataclass(frozen=True)
class Grid:
    """A table of texts, for a terminal and for a page alike.

    Attributes:
        title: what it shows, and of which images.
        note: how to read it.
        columns: left to right.
        rows: cells of each row, which may be fewer than columns, after its kind: `base` for the poisoned model, `head`
            for the name of the rows that follow, `strong`, or nothing.
    """

    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[str]]]


def score_columns(splits: Iterable[str]) -> list[Column]:
    """Return columns of accuracy and ASR for each half; those of the half that is quoted are strong."""
    splits = tuple(splits)
    return [
        Column(f"{part}\n{rate}", number=True, strong=split == splits[-1], alone=f"{IMAGES[split]}\n{rate}")
        for split in splits
        for part, rate in zip(IMAGES[split].split(), ("acc %", "ASR %"), strict=True)
    ]


def quoted_on(splits: Iterable[str]) -> str:
    """Say on which images points were chosen and are quoted."""
    if tuple(splits) == WHOLE:
        return "chosen and quoted on the same images, all of them"
    return "chosen on the search half, quoted on the report half"


def pair(summaries: Iterable[Row]) -> list[Front]:
    """Put the search and the report half of each front together, in the order they come."""
    found: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in summaries:
        key = (row["objective"], row["pretrain_id"], row["method"], row["kind"])
        found.setdefault(key, {})[row["split"]] = row
    names = objective_names({"objective": key[0], "pretrain_id": key[1]} for key in found)
    fronts = []
    for key, halves in found.items():
        splits = next((s for s in (HALVES, WHOLE) if set(s) <= set(halves)), None)
        if splits:
            fronts.append(Front(names[key[:2]], *key, search=halves[splits[0]], report=halves[splits[-1]]))
    return fronts
