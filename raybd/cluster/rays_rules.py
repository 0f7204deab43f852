"""What Ray says of a cluster file: its schema, told key by key, and what `ray up` checks before it asks a cloud."""

from __future__ import annotations

import copy
import difflib
import io
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from importlib import resources
from typing import Any

from raybd.study.mistakes import Place, cut, suggest

_TYPES = {
    "object": "{key: value}",
    "array": "a list",
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "nothing",
}
# Ray lets any key into `provider`, whatever the cloud: these it reads, beside those of its schema.
_PROVIDER_KEYS = ("aws_credentials", "key_pair", "coordinator_address")
_NEAR = 0.8  # so much alike are a key and its misspelling


def schema() -> dict[str, Any]:
    """Return the schema that Ray checks cluster files with."""
    found = json.loads((resources.files("ray.autoscaler") / "ray-schema.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def providers() -> list[str]:
    """Return the providers that Ray knows."""
    from ray.autoscaler._private.providers import _NODE_PROVIDERS

    return sorted(name for name, found in _NODE_PROVIDERS.items() if found is not None)


def broken(config: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yield what Ray's schema says against a file: where, a sentence that shows keys but no values."""
    from jsonschema import Draft7Validator

    rules = schema()
    told = set()
    for error in Draft7Validator(rules).iter_errors(config):
        for place, what in _sentences(error, rules):
            if (place, what) not in told:
                told.add((place, what))
                yield place, what
    provider = config.get("provider")
    if isinstance(provider, dict):
        yield from _provider(provider, rules["properties"]["provider"]["properties"])


def _sentences(error: Any, rules: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    place: Place = tuple(error.absolute_path)
    wanted, got = error.validator_value, error.instance
    if error.validator == "additionalProperties":
        known = sorted(error.schema["properties"])
        for key in got:
            if key not in known:
                yield (*place, key), f"unknown key{_elsewhere(key, place, rules) or suggest(key, known)}"
    elif error.validator == "required":
        for key in wanted:
            if key not in got:
                yield (*place, key), "missing"
    elif error.validator == "type":
        kinds = [wanted] if isinstance(wanted, str) else wanted
        yield place, f"takes {' or '.join(_TYPES[kind] for kind in kinds)}, got {_kind(got)}"
    elif error.validator == "minimum":
        yield place, f"takes {wanted} or more, got {cut(str(got))}"
    elif error.validator == "enum":
        yield place, f"takes one of {', '.join(map(str, wanted))}"
    else:
        yield place, f"not as Ray takes it ({error.validator})"


def _elsewhere(key: str, place: Place, rules: Mapping[str, Any]) -> str:
    """Return where else a key belongs that stands beside the node types."""
    own = rules["properties"]["available_node_types"]["patternProperties"][".*"]["properties"]
    return f": it belongs into a node type, available_node_types.NAME.{key}" if not place and key in own else ""


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "{key: value}"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else f"a {type(value).__name__}")


def _provider(provider: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yield keys of `provider` that Ray would silently leave unread, as they are nearly one of those that it reads."""
    known = [*schema, *_PROVIDER_KEYS]
    for key in provider:
        close = difflib.get_close_matches(key[:100], known, n=1, cutoff=_NEAR)
        if key not in known and close:
            yield ("provider", key), f"unknown key{suggest(key, known)}"
    kind = provider.get("type")
    if isinstance(kind, str) and kind not in providers():
        yield ("provider", "type"), f"no provider {cut(kind)!r}{suggest(kind, providers())}"


def refusal(config: Mapping[str, Any]) -> str:
    """Return why Ray would refuse a file, "" where it takes it. Nothing is asked of any cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    # What it remarks on the way is no mistake.
    log = logging.getLogger("ray.autoscaler")
    level = log.level
    log.setLevel(logging.CRITICAL)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            prepared = prepare_config(copy.deepcopy(dict(config)))
            validate_config(prepared)
            json.dumps(prepared, sort_keys=True)  # so it names the configuration
        except Exception as error:  # whatever Ray trips over
            said = (getattr(error, "message", None) or str(error) or type(error).__name__).strip()
            return cut(said.splitlines()[0], 300)
        finally:
            log.setLevel(level)
    return ""
