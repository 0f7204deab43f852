"""One self-contained `report.html` of a run: no request, readable on a phone and in the dark.

It needs the tables and `study.json` of a run directory, nothing else; every text in them is escaped. Its one script is
`report.js`, the same in every report: the page allows no other, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from raybd import analysis, examples, importance, run_record, tables
from raybd import fronts as front_maths
from raybd.fronts import ALL_METHODS
from raybd.ledger import reading
from raybd.metrics import ALIKE, STRONG
from raybd.plain import plain
from raybd.records import trigger_text, weak_attack
from raybd.report import attacks, drawn, figures, grids, spent, words
from raybd.report.words import Front, Grid, Row
from raybd.store import Store

NAME = "report.html"
_CAPTIONS = 3
_CREDENTIALS = re.compile(r"key|secret|token|password|@|%40", re.IGNORECASE)
_RATES = (
    ("zeroshot_top1", "correct_clean", "n_clean"),
    ("asr_top1", "hit_target", "n_triggered"),
    ("robust_top1", "correct_triggered", "n_triggered"),
)
_REMOVED = 0.05  # ASR up to which an attack counts as removed; one of `fronts.CEILINGS`
_KINDS = {"any_epoch": "every epoch of every trial competes", "final": "only the last epoch of each trial competes"}


@dataclass(frozen=True)
class _Read:
    """A run as the report needs it: its record, rows by table, and what is measured of them."""

    record: Row
    tables: Mapping[str, list[Row]]
    measured: Mapping[str, Any]
    important: Sequence[Row]

    def figures(self) -> dict[str, Figure]:
        """Draw all figures."""
        return drawn.draw(self.tables, self.measured, self.important)


def _read(store: Store, seeds: Sequence[Store]) -> _Read:
    record = run_record.read(store)
    found = {name: tables.read(store, name).to_pylist() for name in tables.SCHEMAS}
    if not found["fronts"]:
        found["fronts"] = front_maths.compute(found["epochs"], found["trials"])
    others = [
        analysis.Run(
            _location(other), tables.read(other, "epochs").to_pylist(), tables.read(other, "trials").to_pylist()
        )
        for other in seeds
    ]
    measured = analysis.analyse([analysis.Run(_location(store), found["epochs"], found["trials"]), *others])
    return _Read(record, found, measured, importance.of_run(found["epochs"], found["trials"]))


def write(store: Store, *, seeds: Sequence[Store] = (), figures_in: Path | None = None) -> str:
    """Write the report into the run directory and return its path; see `build`.

    Args:
        figures_in: a folder that its figures are written to as well, for print; see `drawn.save`.
    """
    run = _read(store, seeds)
    pictures = run.figures()
    store.put(NAME, _page(store, run, pictures, seeds))
    if figures_in:
        drawn.save(pictures, figures_in)
    return store.path(NAME)


def build(store: Store, *, seeds: Sequence[Store] = ()) -> bytes:
    """Return the report of a run as UTF-8 HTML; also of one that has only got as far as pretraining.

    Args:
        seeds: other runs of the same study, with other seeds: differences and attainment are over all of them.

    Errors: DataError if it is no run directory, or if a table is damaged.
    """
    run = _read(store, seeds)
    return _page(store, run, run.figures(), seeds)


def _page(store: Store, run: _Read, figures_by_name: Mapping[str, Figure], seeds: Sequence[Store]) -> bytes:
    record, found = run.record, run.tables
    here = Path(__file__).parent
    script = (here / "report.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=_shown,
    )
    pictures, trials = drawn.on_page(figures_by_name, found)
    page = environment.get_template("report.html.j2").render(
        record=record,
        name=record["study"].get("name", "unnamed"),
        dark=Markup("".join(f"{figures.variable(light)}:{dark};" for light, dark in figures.DARK.items())),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        created=_moment(record.get("created", "")),
        location=shlex.quote(_location(store)),
        options=_options(record),
        kept=any(row["checkpoint"] for row in found["fronts"]),
        seeds=[shlex.quote(_location(other)) for other in seeds],
        attack=_attack(record["study"], found["poison_plan"], store),
        shown=_examples(store, found),
        images=words.IMAGES,
        tried=attacks.tried(found["attacks"]),
        poisoned=_poisoned_models(found["pretrain_epochs"]),
        warnings=_warnings(found["pretrain_epochs"]),
        cleaned=_cleaned(found, trials.number, shlex.quote(_location(store))),
        measures=_measures(run),
        cost=grids.cost(spent.stages(found)),
        span=spent.span(found["trials"]),
        devices=spent.devices(found["trials"]),
        pictures=pictures,
        trials=_trials(found, trials.number),
        states=Counter(row["state"] for row in found["trials"]),
        failures=[row for row in _by_number(found["trials"]) if _went_wrong(row)],
        skipped=_skipped(found, store),
        settings=words.flat(record["study"]),
        study=yaml.safe_dump(record["study"], sort_keys=False, allow_unicode=True),
        environment=words.flat(record.get("environment", {})),
    )
    return page.encode()


def _shown(value: Any) -> Any:
    """Return a value of the template as it is put into the page: texts with nothing invisible in them."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else plain(value)


def _moment(iso: str) -> str:
    try:
        return f"{datetime.fromisoformat(iso):%Y-%m-%d %H:%M %Z}".strip()
    except (ValueError, TypeError):
        return str(iso)


def _location(store: Store) -> str:
    """Return how to name the run directory on a command line; never the key that a URI may carry."""
    if not store.local:
        query = store.uri.partition("?")[2]  # such as the endpoint and the region, without which it is not found
        kept = f"?{query}" if query and not _CREDENTIALS.search(query) else ""
        return f"{store.uri.split('://')[0]}://{store.root}{kept}"
    path = Path(store.root)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _options(record: Row) -> str:
    """Return the options that an import or a replay was called with, as they follow its arguments on a command line."""
    given: list[str] = []
    only, baseline, on = (record.get(name) for name in ("only", "baseline", "on"))
    if isinstance(only, Mapping):
        given += [part for column, value in only.items() for part in ("--only", f"{column}={value}")]
    if isinstance(baseline, Mapping) and "name" in baseline:
        given += ["--baseline", str(baseline["name"])]
    if isinstance(on, Mapping) and on.get("nearest"):
        given.append("--nearest")
    return "".join(f" {shlex.quote(part)}" for part in given)


def _rate(row: Row, rate: str, hits: str, n: str) -> dict[str, str]:
    """Return one measured share for a reader: percent, Wilson interval, counts."""
    if row[hits] is None or not row[n]:
        return {"percent": words.percent(row[rate]), "interval": "", "counts": ""}
    counts = f"{row[hits]} of {row[n]}"
    return {"percent": words.percent(row[rate]), "interval": words.interval(row, hits, n), "counts": counts}


# What was attacked, and the poisoned models


def _attack(study: Row, plan: Sequence[Row], store: Store) -> dict[str, Any]:
    poison = study.get("poison", {})
    planted = attacks.planted(plan)
    preview = store.get("preview.png") if store.exists("preview.png") else b""
    return {
        "target_class": poison.get("target_class") or (plan[0]["target_class"] if plan else ""),
        "trigger": dict(words.flat(poison.get("trigger", {}))),
        "several": planted if len(planted) > 1 else [],
        "planned": len(plan),
        "rate": poison.get("poison_rate"),
        "captions": plan[:_CAPTIONS],
        "preview": f"data:image/png;base64,{base64.b64encode(preview).decode()}" if examples.is_png(preview) else "",
    }


def _examples(store: Store, found: Mapping[str, list[Row]]) -> dict[str, Any] | None:
    """Return pictures of test images, and what each model says of them; None where nobody asked the models."""
    read = examples.read(store)
    if read is None:
        return None
    trials = {row["trial_id"]: row for row in found["trials"]}
    points = {(row["trial_id"], row["epoch"]): row for row in found["epochs"]}
    names = words.objective_names([*found["pretrain_epochs"], *(vars(model) for model in read.models)])
    models = []
    for model in read.models:
        name, trial = names[model.objective, model.pretrain_id], trials.get(model.trial_id or "")
        who, how = f"{name}, before cleaning", ""
        if model.trial_id is not None:
            epoch = words.epoch(points.get((model.trial_id, model.epoch), {"epoch": model.epoch}))
            who = f"{name}, cleaned: trial {words.trial_name(model.trial_id, trial)}, epoch {epoch}"
            how = words.settings(trial) if trial else ""
        models.append({"who": who, "how": how, "clean": model.clean, "triggered": model.triggered})
    images = [{**vars(image), "trigger": trigger_text(image.trigger)} for image in read.images]
    return {"images": images, "models": models, "templates": read.templates, "of_templates": read.of_templates}


def _last_epochs(pretrain_epochs: Iterable[Row]) -> dict[tuple[str, str], Row]:
    last: dict[tuple[str, str], Row] = {}
    for row in sorted(pretrain_epochs, key=lambda row: (row["objective"], row["pretrain_id"], row["epoch"])):
        last[row["objective"], row["pretrain_id"]] = row
    return last


def _poisoned_models(pretrain_epochs: Sequence[Row]) -> list[dict[str, Any]]:
    last = _last_epochs(pretrain_epochs)
    names = words.objective_names(last.values())
    return [
        {"name": names[key], "row": row, "rates": [_rate(row, *columns) for columns in _RATES]}
        for key, row in last.items()
    ]


def _warnings(pretrain_epochs: Sequence[Row]) -> list[str]:
    last = _last_epochs(pretrain_epochs)
    names = words.objective_names(last.values())
    asr = {names[key]: row["asr_top1"] for key, row in last.items() if row["asr_top1"] is not None}
    found = []
    if asr and max(asr.values()) - min(asr.values()) > ALIKE:
        low, high = min(asr, key=lambda name: asr[name]), max(asr, key=lambda name: asr[name])
        found.append(
            f"The attack works better on {high} ({words.percent(asr[high])} %) than on {low} "
            f"({words.percent(asr[low])} %). Cleanings of models that differ by more than "
            f"{100 * ALIKE:.0f} points before cleaning compare little."
        )
    trained = {names[key]: row["epoch"] > 0 for key, row in last.items()}
    found += [weak_attack(name, share, trained=trained[name]) for name, share in asr.items() if share < STRONG]
    return found


# Cleaned models


def _cleaned(found: Mapping[str, list[Row]], numbers: Mapping[str, int], location: str) -> list[dict[str, Any]]:
    trials = {row["trial_id"]: row for row in found["trials"]}
    measured = {(row["trial_id"], row["epoch"], row["split"]): row for row in found["epochs"]}
    groups: dict[tuple[str, str], list[Front]] = defaultdict(list)
    for front in words.shown_fronts(words.pair(front_maths.summarise(found["fronts"]))):
        groups[front.name, front.method].append(front)
    return [
        {
            "name": name,
            "title": kinds[0].title,
            "splits": tuple(reversed(kinds[0].splits)),
            "chosen": words.quoted_on(kinds[0].splits),
            "baseline": {split: kinds[0].half(split)["baseline"] for split in kinds[0].splits},
            "fronts": [_front(front, trials, measured, numbers, location) for front in kinds],
        }
        for (name, _), kinds in groups.items()
    ]


def _front(
    front: Front, trials: Mapping[str, Row], measured: Mapping[Any, Row], numbers: Mapping[str, int], location: str
) -> dict[str, Any]:
    def point(searched: Row | None) -> dict[str, Any] | None:
        if searched is None:
            return None
        trial_id, epoch = searched["trial_id"], searched["epoch"]
        trial = trials.get(trial_id)
        halves = {split: measured[trial_id, epoch, split] for split in front.splits}
        settings = words.settings(trial)
        if front.method == ALL_METHODS and trial and "method" not in tables.searched(trial):
            settings = f"{trial['method']}, {settings}"
        return {
            "cleaned": epoch > 0,
            "place": numbers.get(trial_id) if epoch else None,
            "export": f"raybd export {location} {shlex.quote(f'{trial_id}:{epoch}')}" if searched["checkpoint"] else "",
            "trial": "–" if epoch == 0 else words.trial_name(trial_id, trial),
            "epoch": words.epoch(searched),
            "settings": "poisoned model, not cleaned" if epoch == 0 else settings,
            "checkpoint": searched["checkpoint"] or "",
            "halves": {split: [_rate(row, *columns) for columns in _RATES[:2]] for split, row in halves.items()},
        }

    chosen = front.chosen()
    return {
        "kind": front.kind,
        "meaning": _KINDS.get(front.kind, ""),
        "hypervolume": [f"{front.half(s)['hypervolume']:.4f} on {words.IMAGES[s]}" for s in reversed(front.splits)],
        "share": words.percent(front.report["hypervolume_share"], digits=1),
        "chosen": [
            {
                "rule": rule,
                "point": point(searched),
                "lost": words.percent(quoted["share_lost"] if quoted else None, digits=1),
            }
            for rule, searched, quoted in chosen
        ],
        "best": point(front.search["best_asr_within"]["1"]),
        "harmless": front.search["baseline"]["asr_top1"] <= _REMOVED,
        "removed": point(front.search["best_top1_at_asr"][str(_REMOVED)]),
        "points": [
            {**(point(searched) or {}), "contribution": f"{searched['hv_contribution']:.4f}"}
            for searched, _ in front.points()
        ],
    }


def _measures(run: _Read) -> list[Grid]:
    """Return the grids of all measures."""
    trials, measured = run.tables["trials"], run.measured
    important = [grids.importance(run.important)] if run.important else []
    made = grids.methods(front_maths.summarise(run.tables["fronts"]))
    return [*made, *important, *grids.of_run(measured["runs"][0], trials), *grids.between(measured)]


# Trials, what failed, what was skipped


def _by_number(trials: Iterable[Row]) -> list[Row]:
    def place(row: Row) -> tuple[Any, ...]:
        number = row["number"]
        return row["objective"], row["pretrain_id"], math.inf if number is None else number, row["trial_id"]

    return sorted(trials, key=place)


def _went_wrong(trial: Row) -> bool:
    return trial["state"] in ("failed", "stopped") or bool(trial["error_type"])


def _trials(found: Mapping[str, list[Row]], numbers: Mapping[str, int]) -> list[dict[str, Any]]:
    names = words.objective_names(found["trials"])
    best = importance.best_epochs(found["epochs"])
    listed = []
    for row in _by_number(found["trials"]):
        point = best.get(row["trial_id"])
        listed.append(
            {
                "name": names[row["objective"], row["pretrain_id"]],
                "row": row,
                "place": numbers[row["trial_id"]],
                "number": words.trial_name(row["trial_id"], row),
                "settings": words.settings(row),
                "best": point and {**point, "epoch": words.epoch(point)},
            }
        )
    return listed


def _skipped(found: Mapping[str, list[Row]], store: Store) -> list[dict[str, Any]]:
    """Return how many samples could not be used: those found beforehand by reason, then the most in any one epoch."""
    rows: list[dict[str, Any]] = []
    if store.exists("skipped.json"):
        with reading(store.path("skipped.json")):
            reasons = Counter(skip["reason"].partition(":")[0] for skip in json.loads(store.get("skipped.json")))
        rows += [{"stage": f"reading shards: {reason}", "broken": count} for reason, count in reasons.most_common()]
    for name, run in words.objective_names(found["pretrain_epochs"]).items():
        broken = [r["broken"] or 0 for r in found["pretrain_epochs"] if (r["objective"], r["pretrain_id"]) == name]
        rows.append({"stage": f"pretraining {run}", "broken": max(broken)})
    for name, run in words.objective_names(found["epochs"]).items():
        broken = [r["broken"] or 0 for r in found["epochs"] if (r["objective"], r["pretrain_id"]) == name]
        rows.append({"stage": f"cleaning {run}", "broken": max(broken)})
    return rows
