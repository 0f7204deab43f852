"""How many trials share a GPU, given what one takes of its memory: arithmetic, without Ray."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from raybd.report.planned import size

if TYPE_CHECKING:
    from raybd.train.footprint import Footprint  # imports torch

# Trials at once on one GPU, however small: they share its time, and what that costs is not measured.
MOST = 4
# Of a GPU's memory no trial is counted on a fifth: real captions and images are not those that were measured on.
_COUNTED, _OF = 4, 5
_UNITS = 10_000  # Ray counts GPUs in ten-thousandths


@dataclass(frozen=True)
class Choice:
    """How many trials share a GPU, and why.

    Attributes:
        trials: at once on a GPU.
        share: of a GPU that each of them asks for.
        beside: share of a GPU's memory that each process takes where no limit on torch's memory reaches.
        reason: what keeps more from sharing one, in words.
        measured: what it was chosen from; None where nothing could be measured.
    """

    trials: int
    share: float
    beside: float
    reason: str
    measured: Footprint | None = None

    def __str__(self) -> str:
        at_once = "1 trial on a GPU" if self.trials == 1 else f"{self.trials} trials share a GPU"
        if self.measured is None:
            return f"{at_once}: {self.reason}"
        found = self.measured
        return (
            f"{at_once}, {self.reason}: one takes {size(found.peak)} ({found.kind}, batches of {found.batch}, "
            f"on {found.device}), the smallest GPU has {size(found.total)}"
        )

    def record(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self)


def fraction(trials: int) -> float:
    """Return the largest share of a GPU that so many trials can have: Ray counts in ten-thousandths."""
    return _UNITS // trials / _UNITS


def for_each_gpu(concurrent: int | Literal["auto"], *, trials: int, gpus: int) -> int:
    """Return how many trials may share a GPU so that none is left without one: Ray fills a GPU before the next.

    Args:
        concurrent: `resources.concurrent_trials`, on all GPUs.
        trials: that there are to run.
    """
    at_once = trials if concurrent == "auto" else min(concurrent, trials)
    return max(1, at_once if gpus <= 1 else (at_once - 1) // (gpus - 1))


def whole(reason: str) -> Choice:
    """Return the choice where nothing could be measured: a GPU for each trial."""
    return Choice(1, 1.0, 0.0, reason)


def choose(found: Footprint, *, cores: int, wanted: int) -> Choice:
    """Return how many trials share a GPU: as many as fit four fifths of its memory and its cores, at most `MOST`.

    Args:
        found: what the heaviest trial takes; its `total` is that of the smallest GPU.
        cores: trials that the cores beside a GPU are enough for.
        wanted: trials that there are for a GPU at most.
    """
    bounds = {
        "no more fit its memory": found.total * _COUNTED // _OF // max(1, found.peak),
        "for more there are too few cores": cores,
        "there are no more trials for it": wanted,
        "the most that may": MOST,
    }
    trials = max(1, min(bounds.values()))
    reason = next(words for words, bound in bounds.items() if bound <= trials)
    if trials == 1:
        return Choice(1, 1.0, 0.0, reason, found)
    return Choice(trials, fraction(trials), found.beside / found.total, reason, found)
