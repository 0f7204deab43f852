"""What pydantic finds wrong with a study, told with the line of the field that it concerns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag

from raybd.errors import Misfit, dotted
from raybd.study import Study

MAX_SHOWN = 50
_MAX_CHARACTERS = 2000  # of a mistake
_MAX_VALUE = 100  # characters of a value in it
Place = tuple[str | int, ...]


def listed(problems: Sequence[tuple[str, str]], *, more: int = 0, of: str = "study") -> str:
    """Return mistakes, given as (file:line, sentence), as a text of a line for each.

    Args:
        more: how many mistakes are not among them.
        of: what they are in.
    """
    shown = sorted(problems, key=_by_line)[:MAX_SHOWN]
    lines = [f"  {cut(where, _MAX_CHARACTERS)}: {cut(what, _MAX_CHARACTERS)}" for where, what in shown]
    more += len(problems) - len(shown)
    count = len(shown) + more
    head = f"{count} mistake{'s' if count > 1 else ''} in the {of}"
    return "\n".join([head, *lines, *([f"  and {more} more"] if more else [])])


def _by_line(problem: tuple[str, str]) -> tuple[str, int, str]:
    """Sort what is said of one file together, by line; overrides come first."""
    file, _, line = problem[0].rpartition(":")
    return (file, int(line), problem[1]) if line.isdecimal() and len(line) < 10 else ("", 0, problem[1])


def cut(text: str, most: int = _MAX_VALUE) -> str:
    """Return a text, or its beginning where it is longer than a message should be."""
    return text if len(text) <= most else f"{text[:most]}…"


def explain(error: Mapping[str, Any], marks: Mapping[Place, str], source: str) -> list[tuple[str, str]]:
    """Turn one of pydantic's errors into (file:line, sentence), one for each field that it concerns."""
    given = tuple(part for part in error["loc"] if part != "[key]")
    location, _ = _walk(given)
    if error["type"] == "union_tag_invalid":
        return [_explain_tag(error, location, marks, source)]
    reason = error.get("ctx", {}).get("error")
    if isinstance(reason, Misfit):
        places = ((location + at, what) for at, what in reason.faults)
        return [(marks.get(marked(at, marks), source), f"{dotted(at)}: {what}") for at, what in places]
    known = marked(location, marks)
    # Union members that pydantic names in the path (`int`, `constrained-str`) are not fields of the file.
    if len(known) < len(location) and error["type"] not in ("missing", "extra_forbidden"):
        location = known or location
    field = dotted(location)
    kind, message, got = error["type"], error["msg"].removeprefix("Value error, "), error.get("input")
    if kind == "extra_forbidden":
        message = "unknown key" + suggest(str(given[-1]), _fields(_walk(given[:-1])[1]))
    elif kind == "missing":
        message = "missing, and it has no default"
    elif kind == "value_error":
        pass
    elif kind == "model_type":
        message = f"takes settings, as {{key: value}}, got {cut(repr(got))}"
    elif isinstance(got, str | int | float | bool) or got is None:
        message = f"{message[0].lower()}{message[1:]}, got {cut(repr(got))}"
    return [(marks.get(known, source), f"{field}: {message}" if field else message)]


def marked(location: Place, marks: Mapping[Place, str]) -> Place:
    """Return the longest part of a location that stands in the file."""
    while location and location not in marks:
        location = location[:-1]
    return location


def _explain_tag(error: Mapping[str, Any], location: Place, marks: Mapping[Place, str], source: str) -> tuple[str, str]:
    """Say that a `name` which decides what a section has is none of those that there are."""
    known = [name.strip().strip("'") for name in error["ctx"]["expected_tags"].split(",")]
    at = (*location, "name")
    where = marks.get(at, marks.get(location, source))
    return where, f"{dotted(at)}: no {cut(error['ctx']['tag'])!r}" + suggest(error["ctx"]["tag"], known)


def suggest(given: str, known: Sequence[str]) -> str:
    """Return the end of a sentence about a name that is not known: the nearest one, or all that there are."""
    close = difflib.get_close_matches(given[:_MAX_VALUE], known, n=1)
    return f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(known)})" if known else ""


def _walk(location: Place) -> tuple[Place, Any]:
    """Follow a location of pydantic's through the types of a study.

    Returns: the location without the members of unions that pydantic names in it, and the type that is there; None
    where the types say nothing.
    """
    kind: Any = Study
    path: list[str | int] = []
    for part in location:
        members = _members(kind)
        if part in members:
            kind = members[str(part)]
            continue
        path.append(part)
        kind = _inner(kind, part)
    return tuple(path), kind


def _bare(kind: Any) -> Any:
    """Return a type without annotations, and without `| None`."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        left = [one for one in get_args(kind) if one is not type(None)]
        return _bare(left[0]) if len(left) == 1 else kind
    return kind


def _members(kind: Any) -> dict[str, Any]:
    """Return the members of a union that a `name` decides between, by that name."""
    kind = _bare(kind)
    if get_origin(kind) not in (Union, UnionType):
        return {}
    return {mark.tag: get_args(one)[0] for one in get_args(kind) for mark in get_args(one)[1:] if isinstance(mark, Tag)}


def _inner(kind: Any, part: str | int) -> Any:
    """Return the type of a field, an entry or an item."""
    kind = _bare(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        return field.annotation if field else None
    arguments = get_args(kind)
    if get_origin(kind) is dict:
        return arguments[1]
    return arguments[0] if get_origin(kind) in (tuple, list) else None


def _fields(kind: Any) -> list[str]:
    kind = _bare(kind)
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []
