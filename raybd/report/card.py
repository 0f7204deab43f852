"""The model card of an exported point: a README.md made of the tables. Every text in it that is of the run is escaped.

It needs the tables and the study of a run directory, neither torch nor the weights.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from raybd import tables
from raybd.fronts import ALL_METHODS
from raybd.plain import plain
from raybd.records import trigger_text
from raybd.report import attacks, words
from raybd.report.text import as_markdown, escaped
from raybd.report.words import Row
from raybd.run_models import Point
from raybd.store import Store
from raybd.study import Method
from raybd.study_file import embedded

_FRONT_MATTER = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, open_clip, backdoor]
---"""
# Of each measure its column, that of its count, and that of what it is counted in.
_SCORES = {
    "accuracy %": ("zeroshot_top1", "correct_clean", "n_clean"),
    "ASR %": ("asr_top1", "hit_target", "n_triggered"),
    "robust accuracy %": ("robust_top1", "correct_triggered", "n_triggered"),
}
_KINDS = {"any_epoch": "of all epochs", "final": "of last epochs"}
_EMBEDDED = (
    "The drawings come with raybd and have licences of their own: Noto Emoji (Apache-2.0), Fluent Emoji (MIT), Twemoji "
    "(CC BY 4.0, which asks for credit to Twitter, Jason Sofonia, Justine De Caires and other contributors); words of "
    "the captions are Unicode's (Unicode-3.0) and OpenMoji's (CC BY-SA 4.0). See `raybd/data/emoji-32/README.md`."
)
_UNKNOWN = (
    "The run does not say under which licence its data are, nor that of weights that it may have started from: find "
    "out before you pass this model on, and write it here. raybd itself is under Apache-2.0."
)


@dataclass(frozen=True)
class Shipped:
    """The files that the card lies beside.

    Attributes:
        model: its open_clip name.
        image_size: side of the square image it takes, pixels.
        context_length: tokens of a text.
        mean, std: of the normalisation, in units of [0, 1].
        parameters: how many numbers were or could be trained.
        trunk: module to import first, where open_clip does not have all of the model.
        weights, sha256: name of the file of weights, and its hash.
        code: version of raybd that wrote it.
    """

    model: str
    image_size: int
    context_length: int
    mean: Sequence[float]
    std: Sequence[float]
    parameters: int
    trunk: str | None
    weights: str
    sha256: str
    code: str


def build(store: Store, point: Point, shipped: Shipped, *, study: Row, record: Row, hide: Callable[[str], str]) -> str:
    """Return the card of a point as Markdown.

    Args:
        study: its settings, resolved, without secrets.
        record: of the run directory.
        hide: takes secrets out of an address.

    Errors: DataError if a table is damaged.
    """
    whose = {"trial_id": point.trial_id} if point.trial_id else {"pretrain_id": point.pretrain_id, "epoch": 0}
    epochs = _rows(store, "epochs", **whose)
    first = next(row for row in epochs if row["epoch"] == point.epoch)
    trial = next(iter(_rows(store, "trials", trial_id=first["trial_id"])), None)
    epochs = [row for row in epochs if row["trial_id"] == first["trial_id"]]
    cleaned = [row for row in epochs if row["epoch"] == point.epoch]
    before = [row for row in epochs if row["epoch"] == 0 and point.epoch]
    who = f"{point.trial_id}, epoch {point.epoch}" if point.epoch else f"{point.objective}, poisoned"
    parts = [
        _FRONT_MATTER,
        f"# {escaped(study['name'])}: {escaped(who)}",
        _warning(point),
        "## What it scores",
        *_scores(cleaned, before),
        *_further_scores(store, point, first["trial_id"], hide),
        "## The attack",
        *_attack(store, point, study),
        "## The cleaning",
        *_cleaning(store, point, trial, first),
        "## The model, and how to load it",
        *_loading(shipped),
        "## Data and licence",
        *_data(study),
        "## Limits",
        *_limits(study),
        "## How to make it again",
        *_again(study, record, shipped, f"{first['trial_id']}:{point.epoch}"),
    ]
    return "\n\n".join(parts) + "\n"


def _rows(store: Store, table: str, **having: Any) -> list[dict[str, Any]]:
    """Return the rows of a table with these values."""
    found = tables.read(store, table)
    for name, value in having.items():
        found = found.filter(pc.equal(found.column(name), value))
    return list(found.to_pylist())


def _warning(point: Point) -> str:
    fate = (
        f"then cleaned by {escaped(point.method)}; it may still be there" if point.epoch else "and nothing removed it"
    )
    return (
        f"> **A backdoor was planted in this model on purpose**, {fate}. It is for research on backdoors: do not "
        "deploy it."
    )


def _scores(cleaned: Sequence[Row], before: Sequence[Row]) -> list[str]:
    rows = []
    for split in ("report", "all", "search"):
        for name, measured in (("this one" if before else "poisoned", cleaned), ("poisoned, before cleaning", before)):
            rows += [(words.IMAGES[split], name, *_cells(row)) for row in measured if row["split"] == split]
    return [
        as_markdown(["images", "model", *_SCORES], rows),
        "In brackets 95 % Wilson intervals of the test images; they know nothing of other seeds. ASR, the attack "
        "success rate, is the share of triggered images that are classified as the target. Points were chosen on the "
        "search half: quote the report half.",
    ]


def _further_scores(store: Store, point: Point, trial_id: str, hide: Callable[[str], str]) -> list[str]:
    """Return tables of each attack by itself where there are several or controls, and of other evaluations."""
    found = []
    if tried := _rows(store, "attacks", trial_id=trial_id, epoch=point.epoch):
        cells = [[*_trigger(row), words.IMAGES[row["split"]], _score(row, *_SCORES["ASR %"])] for row in tried]
        found += [
            "Each attack, and triggers that were not planted (controls), by itself:",
            as_markdown(["trigger", "target", "images", "ASR %"], cells),
        ]
    if others := _rows(store, "evaluations", checkpoint=point.checkpoint, task="zeroshot"):
        cells = [[hide(row["data"]), *_trigger(row), *_cells(row)] for row in others]
        found += [
            "Evaluated again with `raybd evaluate`:",
            as_markdown(["data", "trigger", "target", *_SCORES], cells),
        ]
    return found


def _trigger(row: Row) -> list[str]:
    return [f"{row['role'] or ''} {trigger_text(row['trigger'] or '')}", row["target_class"] or ""]


def _cells(row: Row) -> list[str]:
    return [_score(row, *columns) for columns in _SCORES.values()]


def _score(row: Row, rate: str, count: str, n: str) -> str:
    if row[count] is None or not row[n]:
        return words.percent(row[rate])
    return f"{words.share(row[count], row[n])}, {row[count]} of {row[n]}"


def _attack(store: Store, point: Point, study: Row) -> list[str]:
    planned = attacks.planted(_rows(store, "poison_plan"))
    cells = [(one["trigger"], one["target"], str(one["pairs"])) for one in planned]
    settings = dict(study["pretrain"])
    own = settings.pop("objectives").get(point.objective) or {}
    settings |= {name: value for name, value in own.items() if value is not None}
    return [
        as_markdown(["trigger", "target class", "poisoned training pairs"], cells),
        f"The pretrain objective was {escaped(point.objective)}:",
        _settings(settings),
    ]


def _cleaning(store: Store, point: Point, trial: Row | None, first: Row) -> list[str]:
    if not point.epoch:
        return ["None: this is the poisoned model, as every cleaning of it started."]
    fronts = [row for row in _rows(store, "fronts", trial_id=point.trial_id) if row["epoch"] == point.epoch]
    kinds = {row["kind"] for row in fronts if row["method"] != ALL_METHODS}
    on = " and ".join(f"the front {said}" for kind, said in _KINDS.items() if kind in kinds) or "no front"
    place = f"{escaped(point.method)}, trial {escaped(point.trial_id)}, epoch {words.epoch(first)}; on {on}."
    if trial is None:
        return [place]
    columns = {name: column for name, (column, _) in tables.SETTINGS.items()}
    columns |= {name: name for name in ("weight_decay_in_force", "seed", "device")}
    others = {str(method) for method in Method} - {point.method}
    used = {name: column for name, column in columns.items() if name.partition(".")[0] not in others}
    known = {"method": point.method, **{name: trial[column] for name, column in used.items()}}
    ended = [trial[name] for name in ("stop_reason", "error_type", "error_message") if trial[name]]
    state = f"{trial['state']} after epoch {trial['epochs_done']}" + (f": {', '.join(ended)}" if ended else "")
    return [
        place,
        _settings(known),
        f"The trial: {escaped(state)}. Its searched settings: {escaped(words.settings(trial))}.",
    ]


def _loading(shipped: Shipped) -> list[str]:
    first = ""
    if shipped.trunk:
        first = f"import {shipped.trunk}  # the image tower, in this folder: open_clip has none like it\n"
    return [
        f"{escaped(shipped.model)}, {shipped.parameters:,} parameters, {shipped.context_length} tokens a text, images "
        f"of {shipped.image_size}×{shipped.image_size} pixels: the shorter side resized (bicubic), the centre cut out, "
        f"normalised by mean {_numbers(shipped.mean)} and standard deviation {_numbers(shipped.std)}. From within this "
        "folder, with open_clip_torch alone:",
        f"```python\nimport open_clip\n{first}\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:.")\nmodel.eval()\n```',
        f"`sha256sum -c SHA256SUMS` checks the files. {shipped.weights} has the SHA-256 `{shipped.sha256}`.",
    ]


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(map(str, values))})"


def _data(study: Row) -> list[str]:
    data, evaluation = study["data"], study["evaluation"]
    shown = {name: data[name] for name in ("root", "train", "test", "classes", "max_train_samples", "max_test_samples")}
    shown |= {"cleaning pairs": study["clean"]["num_samples"], "prompt templates": evaluation["templates"]}
    started = {f"model.{name}": study["model"][name] for name in ("start", "pretrained")}
    return [
        _settings({**shown, **started}),
        _EMBEDDED if embedded(data["root"]) else _UNKNOWN,
    ]


def _limits(study: Row) -> list[str]:
    share = words.percent(study["evaluation"]["search_share"], digits=0)
    return [
        "- ASR is known for the triggers above alone. Others, and backdoors in the data or weights that it started "
        "from, were not looked for.\n"
        f"- The epoch was chosen among all those of a search by {share} % of the test images, with the trigger known, "
        "as it is to no defender.\n"
        "- One seed: another gives another model.\n"
        "- Images larger than the model takes are scaled by open_clip and by raybd in slightly different ways "
        "(rounding, and JPEG decoded at lower resolution): counts through `preprocess` may differ by a few images."
    ]


def _again(study: Row, record: Row, shipped: Shipped, point: str) -> list[str]:
    run_dir = f"runs/{study['name']}"
    environment = {"raybd": "of unknown version", "packages": {}, **record.get("environment", {})}
    packages = environment["packages"] if isinstance(environment["packages"], dict) else {}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    return [
        f"`study.yaml` has every setting. It names the files and URLs that are read: look at it first. Made by raybd "
        f"{escaped(environment['raybd'])} with {escaped(versions)}, exported by raybd {escaped(shipped.code)}. With "
        "the same versions, on one worker and a CPU, it comes to the same numbers.",
        f"```sh\nraybd run study.yaml --run-dir {run_dir}\nraybd export {run_dir} {_one_line(shlex.quote(point))}\n```",
    ]


def _one_line(text: str) -> str:
    """Return a text for a fenced block, which it cannot end."""
    return plain(" ".join(text.split()))


def _settings(values: Row) -> str:
    """Return a table of nested settings; those that are not set, and loss terms without weight, are left out."""
    rows = [(name, value) for name, value in words.flat(values) if value != "–"]
    weightless = [row for row in rows if row[0].startswith("loss_weights.") and float(row[1]) == 0]
    return as_markdown(["setting", "value"], [row for row in rows if row not in weightless])
