"""A JSON Schema of study files, from the settings themselves: editors complete and check studies by it.

`study.schema.json` is what `text` gives. What a study must keep beyond the kinds of its values, above all how settings
go together, is for `raybd validate` to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from raybd.study import PretrainObjective, Study, TrainSettings, searchable
from raybd.study.base import Section

_DIALECT = "http://json-schema.org/draft-07/schema#"  # the one that all editors know
_EXTENDS = "a study to stand on, by name or path: this file says what differs; sections are merged, key by key"


class _Generator(GenerateJsonSchema):
    """Pydantic's, without titles: they repeat the names of the settings."""

    schema_dialect = _DIALECT

    def generate(self, schema: Any, mode: JsonSchemaMode = "validation") -> dict[str, Any]:
        found = super().generate(schema, mode)
        found["definitions"] = found.pop("$defs")
        return found

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def path() -> Path:
    """Return where the schema lies that comes with raybd."""
    return Path(str(resources.files("raybd") / "study.schema.json"))


def text() -> str:
    """Return the schema as the text of a file."""
    return json.dumps(make(), indent=1, ensure_ascii=False) + "\n"


def make() -> dict[str, Any]:
    """Return the JSON Schema (draft 7) of study files."""
    found: dict[str, Any] = {
        "$schema": _DIALECT,
        **Study.model_json_schema(ref_template="#/definitions/{model}", schema_generator=_Generator),
        "title": "raybd study",
    }
    definitions = found["definitions"]
    _tell(found, Study)
    for section in _sections(Section):
        if section.__name__ in definitions:
            _tell(definitions[section.__name__], section)
    for properties in [found["properties"], *(each.get("properties", {}) for each in definitions.values())]:
        for field in properties.values():
            _shorten(field, definitions)
    _name_triggers(definitions)
    _name_searched(definitions)
    found["properties"] = {"extends": {"type": "string", "description": _EXTENDS}, **found["properties"]}
    found["anyOf"] = [{"required": ["extends"]}, {"required": found.pop("required")}]
    return found


def _sections(kind: type[Section]) -> Iterator[type[Section]]:
    for each in kind.__subclasses__():
        yield each
        yield from _sections(each)


def _tell(schema: dict[str, Any], section: type[Section]) -> None:
    """Describe each field of a section; one that has no description of its own has that of what it stands in for."""
    above = [TrainSettings] if section is PretrainObjective else [k for k in section.__mro__ if issubclass(k, Section)]
    for name, field in schema["properties"].items():
        told = (kind.model_fields[name].description for kind in above if name in kind.model_fields)
        if description := next(filter(None, told), None):
            field["description"] = description


def _shorten(field: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Leave out of a section's default what each of its settings says itself."""
    if "$ref" not in field or not isinstance(field.get("default"), dict):
        return
    own = referred(field, definitions)["properties"]
    default = {k: v for k, v in field.pop("default").items() if v != own[k].get("default", v)}
    if default := {k: v for k, v in default.items() if not isinstance(v, dict)}:
        field["default"] = default


def referred(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the definition that a field refers to, or the field."""
    return definitions[field["$ref"].rpartition("/")[2]] if "$ref" in field else field


def _name_triggers(definitions: dict[str, Any]) -> None:
    """Require the name that tells triggers apart, of all but the one that is meant where none is given."""
    field = definitions["Poison"]["properties"]["trigger"]
    for member in field["oneOf"]:
        trigger = referred(member, definitions)
        if trigger["properties"]["name"]["const"] != field["default"]["name"]:
            trigger["required"] = ["name"]


def _name_searched(definitions: dict[str, Any]) -> None:
    """Name the settings that a search may draw, wherever they are keys, with the values that each may have."""
    values = {name: _value(name, definitions) for name in searchable()}
    definitions["Range"]["properties"]["when"] |= {
        "additionalProperties": False,
        "properties": {name: {"anyOf": [value, {"type": "array", "items": value}]} for name, value in values.items()},
    }
    search = definitions["Search"]["properties"]
    search["known"]["items"] = {"type": "object", "additionalProperties": False, "properties": values}
    search["space"] |= {
        "additionalProperties": False,
        "properties": {
            name: {
                **({"description": value["description"]} if "description" in value else {}),
                "allOf": [
                    {"$ref": "#/definitions/Range"},
                    {"properties": {"low": value, "high": value, "choices": {"items": value}}},
                ],
            }
            for name, value in values.items()
        },
    }


def _value(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the values of a searched setting: as under `clean`, but never null."""
    section, _, leaf = name.rpartition(".")
    clean = definitions["Clean"]["properties"]
    field = referred(clean[section], definitions)["properties"][leaf] if section else clean[name]
    found = {key: value for key, value in field.items() if key != "default"}
    for member in found.pop("anyOf", []):
        if member != {"type": "null"}:
            found |= member
    return found
