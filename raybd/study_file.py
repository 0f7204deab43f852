"""Study files: YAML in, a `Study` out, or every mistake at once with its file and line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError

from raybd.errors import StudyError
from raybd.study import Study, searchable

_MAX_BYTES = 1_000_000
_MAX_VALUES = 100_000
_MAX_DEPTH = 8
Path_ = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats, so that `1e-7` is a number."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def shipped() -> dict[str, Path]:
    """Return the studies that come with raybd by name: the path below `search_spaces`, without its suffix."""
    for folder in (Path(__file__).parent / "search_spaces", Path(__file__).parents[1] / "search_spaces"):
        if folder.is_dir():
            found = sorted(folder.rglob("*.yaml"))
            return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}
    return {}


def descriptions() -> dict[str, str]:
    """Return the first line of each shipped study's comment, by name."""
    return {name: _text(path).partition("\n")[0].lstrip("# ") for name, path in shipped().items()}


def locate(study: str, *, beside: Path | None = None) -> Path:
    """Return the path of a study given as a path, or as the name of one that comes with raybd.

    A name is the path below `search_spaces` (`paper/cc3m_grid`), or its last part where only one study has it.

    Args:
        beside: a folder that a relative path may start from.

    Errors: StudyError.
    """
    for path in (beside / study, beside / f"{study}.yaml") if beside else (Path(study),):
        if path.is_file():
            return path
    known, name = shipped(), study.removesuffix(".yaml").removeprefix("search_spaces/")
    if name in known:
        return known[name]
    alike = [full for full in known if full.rpartition("/")[2] == name]
    if len(alike) == 1:
        return known[alike[0]]
    close = alike or difflib.get_close_matches(name, known, n=3)
    fix = f"did you mean {', '.join(close)}?" if close else "give the path of a YAML file, or a name such as `demo`"
    raise StudyError("several studies of that name" if alike else "no such study file", where=study, fix=fix)


def load(study: str, *, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study.

    Args:
        study: path of a YAML file, or the name of a study that comes with raybd.
        overrides: `dotted.key=value` texts; the value is YAML.

    Errors: StudyError that lists every mistake, each with file and line (or the override).
    """
    path = locate(study)
    return parse(_text(path), source=str(path), overrides=overrides)


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_BYTES:
        raise StudyError("larger than a study can be (1 MB)", where=str(path))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StudyError(f"not UTF-8 text: {error}", where=str(path)) from None


def parse(text: str, *, source: str, overrides: Sequence[str] = ()) -> Study:
    """Check a study given as YAML text; `source` is what its errors call it. Errors: StudyError."""
    marks: dict[Path_, str] = {}
    problems: list[tuple[str, str]] = []
    raw = _whole(text, source, marks, problems, ())
    for override in overrides:
        _override(raw, override, marks, problems)
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        problems += [_explain(found, marks, source) for found in error.errors(include_url=False)]
    if problems:
        lines = "\n".join(f"  {where}: {what}" for where, what in sorted(problems, key=_by_line))
        count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        raise StudyError(f"{count} in the study\n{lines}", where=source, fix="correct them and call again")
    return study


def _whole(
    text: str, source: str, marks: dict[Path_, str], problems: list[tuple[str, str]], below: tuple[str, ...]
) -> dict[str, Any]:
    """Return a study's text as data, on top of the study that its key `extends` names. Errors: StudyError.

    Mappings are merged, everything else is replaced; so are the mappings of `_REPLACED`, whose keys belong together.

    Args:
        below: the files that extend this one.
    """
    raw = _read(text, (), source, marks, problems)
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise StudyError("a study is a mapping of settings", where=f"{source}:1", expected="`name: …` and so on")
    if "extends" not in raw:
        return raw
    name, where = raw.pop("extends"), marks.pop(("extends",))
    if not isinstance(name, str) or not name:
        raise StudyError("extends takes a study", where=where, expected="a name that comes with raybd, or a path")
    try:
        path = locate(name, beside=Path(source).parent)
    except StudyError as error:
        raise StudyError(f"extends: {error.what}: {name}", where=where, fix=error.fix) from None
    chain = (*below, str(Path(source).resolve()))
    if str(path.resolve()) in chain:
        raise StudyError(f"extends: {name} extends this study in turn", where=where)
    if len(chain) > _MAX_DEPTH:
        raise StudyError(f"extends: more than {_MAX_DEPTH} studies on top of each other", where=where)
    base_marks: dict[Path_, str] = {}
    base = _whole(_text(path), str(path), base_marks, problems, chain)
    _merge(base, raw, (), base_marks)
    marks |= {at: line for at, line in base_marks.items() if at not in marks}
    return base


_REPLACED = {("search", "space"), ("pretrain", "objectives"), ("poison", "trigger")}


def _merge(base: dict[str, Any], own: Mapping[str, Any], at: Path_, base_marks: dict[Path_, str]) -> None:
    """Put a study's own settings on top of those that it extends, in place."""
    for key, value in own.items():
        path, before = (*at, key), base.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and path not in _REPLACED:
            _merge(before, value, path, base_marks)
            continue
        base[key] = value
        for replaced in [known for known in base_marks if known[: len(path)] == path]:
            del base_marks[replaced]


def _by_line(problem: tuple[str, str]) -> tuple[str, int, str]:
    """Sort what is said of one file together, by line; overrides come first."""
    file, _, line = problem[0].rpartition(":")
    return (file, int(line), problem[1]) if line.isdecimal() else ("", 0, problem[1])


def _read(text: str, at: Path_, source: str, marks: dict[Path_, str], problems: list[tuple[str, str]]) -> Any:
    """Return YAML text as data, None if it is empty; see `_plain`. Errors: StudyError where it is not YAML."""
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        where = f"{source}:{text.count(chr(10), 0, error.position) + 1}"
        raise StudyError(f"not valid YAML: character U+{error.character:04X}: {error.reason}", where=where) from None
    try:
        node = loader.get_single_node()
        return _plain(node, at, loader, source, marks, problems) if node else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise StudyError(f"not valid YAML: {getattr(error, 'problem', None) or error}", where=where) from None
    except RecursionError:
        raise StudyError("nested too deeply", where=source) from None
    finally:
        loader.dispose()


def _plain(
    node: yaml.Node, at: Path_, loader: _Loader, source: str, marks: dict[Path_, str], problems: list[tuple[str, str]]
) -> Any:
    """Turn a YAML node into data; note the line of each path, and each key that is given twice."""
    marks.setdefault(at, f"{source}:{node.start_mark.line + 1}")
    if len(marks) > _MAX_VALUES:
        raise StudyError(f"more than {_MAX_VALUES} values, aliases followed", where=source)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            line = f"{source}:{key_node.start_mark.line + 1}"
            if key in found:
                problems.append((line, f"{'.'.join(map(str, (*at, key)))}: given twice"))
                continue
            marks[(*at, key)] = line
            found[key] = _plain(value_node, (*at, key), loader, source, marks, problems)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*at, i), loader, source, marks, problems) for i, child in enumerate(node.value)]
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, OverflowError, LookupError, AttributeError, yaml.YAMLError) as error:
        # PyYAML lets whatever its constructors trip over through: `!!bool x` is a KeyError.
        reason = getattr(error, "problem", None) or error
        problems.append((f"{source}:{node.start_mark.line + 1}", f"cannot read the value: {reason}"))
        return None


def _override(raw: dict[str, Any], override: str, marks: dict[Path_, str], problems: list[tuple[str, str]]) -> None:
    """Put `dotted.key=value` into the raw study. Errors: StudyError."""
    where = f"--set {override}"
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise StudyError("not of the form key=value", where=where, expected="--set data.root=/path")
    path = _split(key)
    own_marks: dict[Path_, str] = {}
    own_problems: list[tuple[str, str]] = []
    try:
        value = _read(text, path, where, own_marks, own_problems)
    except StudyError as error:
        raise StudyError(f"the value is wrong: {error.what}", where=where) from None
    inner = raw
    for part in path[:-1]:
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
        if not isinstance(inner, dict):
            raise StudyError(f"{part!r} is not a section", where=where)
    inner[path[-1]] = value
    for replaced in [known for known in marks if known[: len(path)] == path]:
        del marks[replaced]
    marks |= dict.fromkeys([path, *own_marks], where)
    for length in range(1, len(path)):
        marks.setdefault(path[:length], where)
    problems += [(where, what) for _, what in own_problems]


def _split(key: str) -> tuple[str, ...]:
    """Split a dotted key; a searched setting below `search.space` keeps its own dots."""
    for name in searchable():
        for head in (f"search.space.{name}",):
            if "." in name and (key == head or key.startswith(f"{head}.")):
                rest = key[len(head) :].strip(".")
                return ("search", "space", name, *(rest.split(".") if rest else ()))
    return tuple(key.split("."))


def _explain(error: Mapping[str, Any], marks: Mapping[Path_, str], source: str) -> tuple[str, str]:
    """Turn one of pydantic's errors into (file:line, sentence)."""
    given = tuple(part for part in error["loc"] if part != "[key]")
    location, _ = _walk(given)
    if error["type"] == "union_tag_invalid":
        return _explain_tag(error, location, marks, source)
    known = location
    while known and known not in marks:
        known = known[:-1]
    # Union members that pydantic names in the path (`int`, `constrained-str`) are not fields of the file.
    if len(known) < len(location) and error["type"] not in ("missing", "extra_forbidden"):
        location = known or location
    field = ".".join(str(part) for part in location)
    kind, message, got = error["type"], error["msg"].removeprefix("Value error, "), error.get("input")
    if kind == "extra_forbidden":
        message = "unknown key" + _suggest(str(given[-1]), _fields(_walk(given[:-1])[1]))
    elif kind == "missing":
        message = "missing, and it has no default"
    elif kind == "value_error":
        pass
    elif kind == "model_type":
        message = f"takes settings, as {{key: value}}, got {got!r}"
    elif isinstance(got, str | int | float | bool) or got is None:
        message = f"{message[0].lower()}{message[1:]}, got {got!r}"
    return marks.get(known, source), f"{field}: {message}" if field else message


def _explain_tag(error: Mapping[str, Any], location: Path_, marks: Mapping[Path_, str], source: str) -> tuple[str, str]:
    """Say that a `name` which decides what a section has is none of those that there are."""
    known = [name.strip().strip("'") for name in error["ctx"]["expected_tags"].split(",")]
    at = (*location, "name")
    where = marks.get(at, marks.get(location, source))
    return where, f"{'.'.join(map(str, at))}: no {error['ctx']['tag']!r}" + _suggest(error["ctx"]["tag"], known)


def _suggest(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(known)})" if known else ""


def _walk(location: Path_) -> tuple[Path_, Any]:
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


def anchored(study: Study) -> Study:
    """Return a study whose local paths no longer depend on the working directory: workers have others."""

    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().absolute())

    data, model = study.data, study.model
    if not embedded(data.root):
        data = data.model_copy(update={"root": absolute(data.root)})
    if data.cache_dir:
        data = data.model_copy(update={"cache_dir": absolute(data.cache_dir)})
    if model.start:
        model = model.model_copy(update={"start": absolute(model.start)})
    labels = study.clean.pseudo_labels
    if labels.checkpoint and Path(labels.checkpoint).expanduser().is_file():  # else it is one of open_clip's tags
        labels = labels.model_copy(update={"checkpoint": absolute(labels.checkpoint)})
    clean = study.clean.model_copy(update={"pseudo_labels": labels})
    return study.model_copy(update={"data": data, "model": model, "clean": clean})


def embedded(name: str) -> Path | None:
    """Return the folder of a data set that comes with raybd, None if there is none of that name."""
    folder = Path(str(resources.files("raybd") / "data" / name))
    return folder if name and "/" not in name and (folder / "classes.json").is_file() else None
