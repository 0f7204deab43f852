"""What is counted: faults that hit, and what they broke."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.kinds import Kind


class Harm(StrEnum):
    """What must never happen, and is counted where it does."""

    LOST = "trials or epochs lost"
    DOUBLED = "trials or epochs doubled"
    CHANGED = "numbers changed"
    BROKEN = "half-written files seen"
    WEIGHTLESS = "front points without weights"
    RUNNING = "Optuna trials that run for ever"
    FAILED = "trials failed"
    ORPHANS = "orphaned processes"
    WRONG_END = "wrong ends of the driver"
    STUCK = "rounds without an end"
    REMAINS = "files left behind"


@dataclass
class Tally:
    """Of all rounds.

    Attributes:
        hits: faults that found a victim, by kind.
        found: what went wrong, in words.
        skipped: why some kinds could not be tried.
    """

    seed: int
    rounds: int = 0
    calls: int = 0
    polls: int = 0
    records: int = 0
    hits: Counter[Kind] = field(default_factory=Counter)
    found: dict[Harm, list[str]] = field(default_factory=lambda: {harm: [] for harm in Harm})
    skipped: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def clean(self) -> bool:
        """Whether nothing went wrong."""
        return not any(self.found.values())

    def write(self, path: Path) -> None:
        """Write all of it as JSON."""
        found = {
            "seed": self.seed,
            "minutes": round((time.monotonic() - self.began) / 60, 1),
            "rounds": self.rounds,
            "driver_calls": self.calls,
            "reader_polls": self.polls,
            "records_watched": self.records,
            "faults": self.hits.total(),
            "faults_by_kind": {kind: self.hits[kind] for kind in Kind},
            "found": {harm: len(what) for harm, what in self.found.items()},
            "what": {harm: what for harm, what in self.found.items() if what},
            "skipped": self.skipped,
        }
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    def show(self) -> None:
        """Print it as a table, and in words what was found."""
        console = Console(highlight=False, width=100)
        table = Table("", "count", title=f"chaos, seed {self.seed}")
        table.columns[1].justify = "right"
        for kind in Kind:
            table.add_row(kind.value, str(self.hits[kind]))
        table.add_section()
        table.add_row("faults that hit", str(self.hits.total()))
        table.add_row("rounds", str(self.rounds))
        table.add_row("calls of the driver", str(self.calls))
        table.add_row("readings of everything", str(self.polls))
        table.add_row("records watched", str(self.records))
        table.add_row("minutes", f"{(time.monotonic() - self.began) / 60:.1f}")
        table.add_section()
        for harm in Harm:
            table.add_row(harm.value, str(len(self.found[harm])), style="bold red" if self.found[harm] else None)
        console.print(table)
        for harm, what in self.found.items():
            for line in what[:20]:
                console.print(f"{harm}: {line}", markup=False)
        for reason in self.skipped:
            console.print(f"SKIPPED: {reason}", markup=False)
