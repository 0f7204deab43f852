"""How near are the hours that a dry run tells to those that the run then takes?

    python benchmarks/prediction.py

The short trials of `raybd run STUDY --dry-run` first; then the study itself on Ray, into a folder of its own. What was
predicted for the settings that each run then had stands beside its own clocks, by kind of run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from setting import setting

from raybd import costs, planning
from raybd.clean import registry
from raybd.console import View
from raybd.ledger import Entry, Kind, Ledger
from raybd.stages import Run, Stage
from raybd.store import Store
from raybd.study import CleanSettings, Study, TrainSettings
from raybd.study_file import load
from raybd.train.probe import Speed, kind

_SHARED = 0.01  # seconds, below which an evaluation is one that another trial of the process has done
SMALL = ("search.num_trials=12", "clean.num_samples=1500", "pretrain.epochs=2", "resources.use_gpu=false")


@dataclass
class Seconds:
    """What runs of one kind were predicted to take, and took.

    Attributes:
        runs, epochs, looks: how many; looks are evaluations.
        training, evaluation: (predicted, real) seconds, over all runs.
        whole: the same of whole runs, from start to end, with records, states and weights: of trials only.
    """

    runs: int = 0
    epochs: int = 0
    looks: int = 0
    training: tuple[float, float] = (0.0, 0.0)
    evaluation: tuple[float, float] = (0.0, 0.0)
    whole: tuple[float, float] = (0.0, 0.0)


class Comparison:
    """Adds up what runs were predicted to take, and took.

    Args:
        speed: that the dry run measured.
    """

    def __init__(self, study: Study, speed: Speed) -> None:
        self._study, self._speed = study, speed
        self._sizes = planning.sizes(study)
        self._look = planning.evaluation_cost(study, self._sizes)
        self.kinds: dict[str, Seconds] = {}

    def add(self, entry: Entry, settings: TrainSettings) -> None:
        """Take a run that ended."""
        model, cleaning = self._study.model.name, isinstance(settings, CleanSettings)
        if isinstance(settings, CleanSettings):
            cost = registry.cost(model, settings, pairs=settings.num_samples)
        else:
            cost = costs.training_cost(model, settings, pairs=self._sizes.pairs)
        training, forward = self._speed.of(settings)
        records = list(entry.epochs.values())
        real = [sum(record[name] for record in records) for name in ("train_seconds", "evaluate_seconds")]
        looks = sum(record["evaluate_seconds"] > _SHARED for record in records)
        predicted = [cost / training, looks * self._look / forward]
        found = self.kinds.setdefault(kind(settings), Seconds())
        found.runs, found.epochs = found.runs + 1, found.epochs + settings.epochs
        found.looks += looks
        found.training = _plus(found.training, (predicted[0], real[0]))
        found.evaluation = _plus(found.evaluation, (predicted[1], real[1]))
        if cleaning and entry.ended:
            found.whole = _plus(found.whole, (sum(predicted), entry.ended["device_seconds"]))


def _plus(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]


def run(study: Study, folder: str) -> tuple[Comparison, Speed]:
    """Predict, then carry the study out. Errors: SystemExit where a trial failed."""
    speed = planning.speed(study, tflops=None, probe=True, search=True)
    assert speed is not None
    store = Store(folder)
    if Run(study, store, View()).run(Stage.SEARCH).failed:
        raise SystemExit(f"trials failed: see {store.uri}")
    found = Comparison(study, speed)
    for entry in Ledger(store).entries(Kind.PRETRAIN):
        found.add(entry, study.pretrain.settings(entry.started["objective"]))
    for entry in Ledger(store).entries(Kind.TRIAL):
        found.add(entry, study.clean.settings(entry.started["params"]))
    return found, speed


def table(kinds: dict[str, Seconds]) -> str:
    """Return the results as a Markdown table: means for an epoch, an evaluation and a trial."""
    head = ("kind of run", "runs", "training epoch, s", "×", "evaluation, s", "×", "trial, s", "×")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, found in kinds.items():
        cells = [name, str(found.runs)]
        parts = ((found.training, found.epochs), (found.evaluation, found.looks), (found.whole, found.runs))
        for (predicted, real), count in parts:
            if predicted:
                cells += f"{predicted / count:.2f} → {real / count:.2f}", f"{real / predicted:.2f}"
            else:  # a method that trains nothing, or a whole run that is not compared
                cells += (f"0 → {real / count:.2f}" if real else "–"), "–"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="small/methods")
    parser.add_argument("--whole", action="store_true", help="the study as it is; default: " + ", ".join(SMALL))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the study")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    study = load(options.study, overrides=[*([] if options.whole else SMALL), *options.set])
    with tempfile.TemporaryDirectory() as folder:
        found, speed = run(study, folder)
    where: dict[str, Any] = setting("ray", "torch", device=speed.how)
    measured = {name: asdict(seconds) for name, seconds in found.kinds.items()}
    record = {"setting": where, "study": study.model_dump(mode="json"), "probe": asdict(speed), "kinds": measured}
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"short trials: {speed.seconds:.0f} s; predicted → real, × is real ÷ predicted\n")
    print(table(found.kinds))


if __name__ == "__main__":
    main()
