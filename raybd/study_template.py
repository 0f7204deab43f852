"""A study to start from: the settings that a newcomer decides on, each with what it means, as the schema says it."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybd import study_schema

_WIDTH = 118
_FILL = "TO FILL IN: "
_CLEANING = 10_000  # pairs, where there are more than so many
_SHARE = 0.95  # of the training pairs: the rest is left to the poison, and to images that cannot be decoded
ENOUGH = math.ceil(_CLEANING / _SHARE)  # training pairs; it makes no difference how many more there are


@dataclass(frozen=True)
class Blank:
    """A setting that only the user can know.

    Attributes:
        line: of the file, from 1.
        setting: its dotted name.
        meaning: what goes there.
    """

    line: int
    setting: str
    meaning: str


@dataclass(frozen=True)
class Known:
    """What is known of the user's case; None is left to be filled in, or to the template.

    Attributes:
        data: root of the shards.
        pairs: that there are to train on, `ENOUGH` or more standing for any larger number.
        model: name of the model.
        start: a checkpoint that is suspected: it is cleaned as it is, and nothing is pretrained.
        target_class: of the attack.
    """

    data: str | None = None
    pairs: int | None = None
    model: str | None = None
    start: str | None = None
    target_class: str | None = None


def write(known: Known, *, name: str, schema: Path) -> str:
    """Return a commented study as YAML text.

    Args:
        name: of the study; what a name cannot have becomes _.
        schema: file that editors check the study by.
    """
    name = re.sub(r"\W", "_", name, flags=re.ASCII)[:100]
    name = name if name.strip("_") else "mine"
    lines = [
        f"# yaml-language-server: $schema={schema.as_uri()}",
        "# A study of raybd. What is not said has its default; an editor that reads the line above shows them all.",
        f"# Lines that begin with #: are more settings to choose from. Lines with {_FILL.strip(': ')} need a value.",
    ]
    schemas = study_schema.make()
    for section, settings in _sections(known, name):
        about = schemas["properties"][section]
        inner = study_schema.referred(about, schemas["definitions"])
        if not isinstance(settings, list):
            lines.append(_line(section, settings, about.get("description", ""), indent=""))
            continue
        lines += ["", *_wrapped(inner["description"].partition("\n\n")[0], indent=""), f"{section}:"]
        for key, value in settings:
            field = inner["properties"][key.lstrip("#: ")]
            told = study_schema.referred(field, schemas["definitions"]).get("description", "")
            more = _why(known) if key == "num_samples" else ""
            lines += _setting(key, value, field.get("description", told) + more)
    return "\n".join(lines) + "\n"


def blanks(text: str) -> list[Blank]:
    """Return what is left to fill in of a study that `write` made."""
    found, section = [], ""
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.match(r"(\w+):", line):
            section = match[1]
        if match := re.match(rf"  (\w+): +# {_FILL}(.*)", line):
            found.append(Blank(number, f"{section}.{match[1]}", match[2]))
    return found


_Settings = list[tuple[str, Any]]


def _sections(known: Known, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the sections with their settings; `#: key` is one more to choose, None one to fill in."""
    yield "name", name
    yield "seed", 0
    yield "data", [("root", known.data), ("#: max_train_samples", 200_000), ("#: classes", "imagenet")]
    start: _Settings = [("start", known.start)] if known.start else [("#: start", "model.safetensors")]
    yield "model", [("name", known.model or "RN50"), *start, ("#: pretrained", "openai")]
    tiny = (known.model or "").endswith("-tiny-32")  # raybd's own: small images, and faster steps than the paper's
    trigger = {"name": "badnet", "size": 4 if tiny else 16, "pattern": "noise", "placement": "random"}
    # A suspect checkpoint is poisoned already: the plan only keeps a pair out of the cleaning set.
    amount: _Settings = [("num_poisoned", 1)] if known.start else [("poison_rate", 0.01), ("#: num_poisoned", 1500)]
    yield "poison", [("trigger", trigger), ("target_class", known.target_class), *amount]
    if known.start:
        yield "pretrain", [("epochs", 0), ("objectives", {"suspect": {}})]
    else:
        objectives = {
            "mmcl": {"loss_weights": {"mmcl": 1, "ssl": 0}},
            "mmcl_ssl": {"loss_weights": {"mmcl": 1, "ssl": 1}},
        }
        batch = [("batch_size", 256), ("lr", 2e-3 if tiny else 5e-4), ("warmup_steps", 50 if tiny else 1000)]
        yield "pretrain", [("epochs", 30), *batch, ("objectives", objectives)]
    samples = ("num_samples", _num_samples(known))
    yield "clean", [("method", "cleanclip"), samples, ("batch_size", 64), ("#: leaked_poison", 5)]
    space = {
        "lr": {"low": 5e-4, "high": 2e-2, "log": True} if tiny else {"low": 1e-6, "high": 1e-3, "log": True},
        "loss_weights.ssl": {"choices": [0, 1, 4]},
        "epochs": {"low": 5, "high": 20},
    }
    yield "search", [("num_trials", 20), ("sampler", "tpe"), ("space", space)]
    yield "resources", [("use_gpu", "auto"), ("#: concurrent_trials", 2), ("#: gpus_per_trial", 0.5)]


def _num_samples(known: Known) -> int:
    """Return how many cleaning pairs to begin with: no more than the data has."""
    return _CLEANING if known.pairs is None else max(1, min(_CLEANING, int(_SHARE * known.pairs)))


def _why(known: Known) -> str:
    """Return why so many cleaning pairs, to follow what the setting means."""
    if known.pairs is None:
        return "; the data was not counted: no more than it has"
    if known.pairs >= ENOUGH:
        return "; the data has more"
    return f"; {_SHARE:.0%} of the {known.pairs} that the data has, the rest is left to the poison"


def _setting(key: str, value: Any, meaning: str) -> Iterator[str]:
    """Yield the lines of one setting below a section."""
    if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
        indent = "  #: " if key.startswith("#") else "  "
        yield _line(key.lstrip("#: "), value, meaning, indent=indent)
        return
    yield f"  {key}: # {meaning}"
    for name, each in value.items():
        yield f"    {name}: {_value(each)}"


def _line(key: str, value: Any, meaning: str, *, indent: str) -> str:
    """Return `key: value # meaning`, the meaning above where both together are too long for a line."""
    if value is None:
        return f"{indent}{key}: # {_FILL}{meaning}"
    given = f"{indent}{key}: {_value(value)}"
    if not meaning:
        return given
    if len(given) + len(meaning) + 3 <= _WIDTH:
        return f"{given} # {meaning}"
    return "\n".join([*_wrapped(meaning, indent="  "), given])


def _wrapped(text: str, *, indent: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
    )


def _value(value: Any) -> str:
    """Return a value as YAML in a line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        # JSON's strings are YAML's. Words need no quotes, but those that YAML takes for another kind.
        plain = re.fullmatch(r"[A-Za-z_][\w-]*", value, flags=re.ASCII)
        words = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
        return value if plain and value.lower() not in words else json.dumps(value, ensure_ascii=False)
    text = json.dumps(value)
    # Readers of YAML 1.1 take 1e-06 for a text.
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text
