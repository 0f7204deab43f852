"""Study files: YAML in, a `Study` out, or every mistake at once with its file and line."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raybd.errors import StudyError, dotted
from raybd.study import Study, mistakes, searchable

_CLUSTERS = "cluster"  # the folder of cluster files among the studies
_MAX_BYTES = 1_000_000
_MAX_VALUES = 100_000
_MAX_DEPTH = 8
_MAX_PARTS = 20  # of a dotted key
_NUMBERS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})


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
        if os.path.isdir(folder):
            found = {path.relative_to(folder): path for path in sorted(folder.rglob("*.yaml"))}
            return {at.with_suffix("").as_posix(): path for at, path in found.items() if at.parts[0] != _CLUSTERS}
    return {}


def descriptions() -> dict[str, str]:
    """Return the first line of each shipped study's comment, by name."""
    return {name: read_text(path).partition("\n")[0].lstrip("# ") for name, path in shipped().items()}


def locate(study: str, *, beside: Path | None = None) -> Path:
    """Return the path of a study given as a path, or as the name of one that comes with raybd.

    A name is the path below `search_spaces` (`paper/cc3m_grid`), or its last part where only one study has it.

    Args:
        beside: a folder that a relative path may start from.

    Errors: StudyError.
    """
    for path in (beside / study, beside / f"{study}.yaml") if beside else (Path(study),):
        if os.path.isfile(path):  # Path.is_file raises for a name that is too long
            return path
    known, name = shipped(), study.removesuffix(".yaml").removeprefix("search_spaces/")
    if name in known:
        return known[name]
    alike = [full for full in known if full.rpartition("/")[2] == name]
    if len(alike) == 1:
        return known[alike[0]]
    close = alike or difflib.get_close_matches(name, known, n=3)
    fix = f"did you mean {', '.join(close)}?" if close else "give the path of a YAML file, or a name such as `demo`"
    if os.path.isdir((beside or Path()) / study):
        raise StudyError("this is a folder, not a study file", where=study, fix=fix)
    raise StudyError("several studies of that name" if alike else "no such study file", where=study, fix=fix)


def load(study: str, *, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study.

    Args:
        study: path of a YAML file, or the name of a study that comes with raybd.
        overrides: `dotted.key=value` texts; the value is YAML.

    Errors: StudyError that lists every mistake, each with file and line (or the override).
    """
    path = locate(study)
    return parse(read_text(path), source=str(path), overrides=overrides)


def read_text(path: Path) -> str:
    """Return the text of a YAML file. Errors: StudyError where it is no text, or larger than such a file can be."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise StudyError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if len(content) > _MAX_BYTES:
        raise StudyError("larger than such a file can be (1 MB)", where=str(path))
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        where = f"{path}:{content.count(10, 0, error.start) + 1}"
        raise StudyError(f"not UTF-8 text: {error.reason}", where=where) from None


def parse(text: str, *, source: str, overrides: Sequence[str] = ()) -> Study:
    """Check a study given as YAML text; `source` is what its errors call it. Errors: StudyError."""
    marks: dict[mistakes.Place, str] = {}
    problems: list[tuple[str, str]] = []
    raw = _whole(text, source, marks, problems, ())
    for override in overrides:
        _override(raw, override, marks, problems)
    more = 0
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False)
        for each in found[: mistakes.MAX_SHOWN]:
            problems += mistakes.explain(each, marks, source)
        more = len(found[mistakes.MAX_SHOWN :])
    if problems:
        raise StudyError(mistakes.listed(problems, more=more), where=source, fix="correct them and call again")
    return study


def _whole(
    text: str, source: str, marks: dict[mistakes.Place, str], problems: list[tuple[str, str]], below: tuple[str, ...]
) -> dict[str, Any]:
    """Return a study's text as data, on top of the study that its key `extends` names. Errors: StudyError.

    Mappings are merged, everything else is replaced; so are the mappings of `_REPLACED`, whose keys belong together.

    Args:
        below: the files that extend this one.
    """
    raw = read_yaml(text, (), source, marks, problems)
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
    base_marks: dict[mistakes.Place, str] = {}
    base = _whole(read_text(path), str(path), base_marks, problems, chain)
    _merge(base, raw, (), base_marks)
    marks |= {at: line for at, line in base_marks.items() if at not in marks}
    return base


_REPLACED = {("search", "space"), ("pretrain", "objectives"), ("poison", "trigger")}


def _merge(
    base: dict[str, Any], own: Mapping[str, Any], at: mistakes.Place, base_marks: dict[mistakes.Place, str]
) -> None:
    """Put a study's own settings on top of those that it extends, in place."""
    for key, value in own.items():
        path, before = (*at, key), base.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and path not in _REPLACED:
            _merge(before, value, path, base_marks)
            continue
        base[key] = value
        for replaced in [known for known in base_marks if known[: len(path)] == path]:
            del base_marks[replaced]


def read_yaml(
    text: str, at: mistakes.Place, source: str, marks: dict[mistakes.Place, str], problems: list[tuple[str, str]]
) -> Any:
    """Return YAML text as data, None if it is empty.

    Args:
        at: the place of the text among the settings.
        marks: takes the file:line of each place.
        problems: takes (file:line, sentence) of keys given twice and of values that cannot be read.

    Errors: StudyError where it is not YAML.
    """
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
    node: yaml.Node,
    at: mistakes.Place,
    loader: _Loader,
    source: str,
    marks: dict[mistakes.Place, str],
    problems: list[tuple[str, str]],
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
                problems.append((line, f"{dotted((*at, key))}: given twice"))
                continue
            marks[(*at, key)] = line
            found[key] = _plain(value_node, (*at, key), loader, source, marks, problems)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*at, i), loader, source, marks, problems) for i, child in enumerate(node.value)]
    try:
        if node.tag in _NUMBERS and ":" in node.value:
            raise ValueError("a number to the base 60: put it in quotes")
        value = loader.construct_object(node, deep=True)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("a whole number of more than 64 bits")
        return value
    except (ValueError, OverflowError, LookupError, AttributeError, yaml.YAMLError) as error:
        # PyYAML lets whatever its constructors trip over through: `!!bool x` is a KeyError.
        reason = getattr(error, "problem", None) or error
        problems.append((f"{source}:{node.start_mark.line + 1}", f"cannot read the value: {reason}"))
        return None


def _override(
    raw: dict[str, Any], override: str, marks: dict[mistakes.Place, str], problems: list[tuple[str, str]]
) -> None:
    """Put `dotted.key=value` into the raw study. Errors: StudyError."""
    where = f"--set {mistakes.cut(override)}"
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise StudyError("not of the form key=value", where=where, expected="--set data.root=/path")
    path = _split(key)
    if len(path) > _MAX_PARTS:
        raise StudyError("no setting has so many dots", where=where)
    own_marks: dict[mistakes.Place, str] = {}
    own_problems: list[tuple[str, str]] = []
    try:
        value = read_yaml(text, path, where, own_marks, own_problems)
    except StudyError as error:
        raise StudyError(f"the value is wrong: {error.what}", where=where) from None
    inner = raw
    for part in path[:-1]:
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
        if not isinstance(inner, dict):
            raise StudyError(f"{mistakes.cut(part)!r} is not a section", where=where)
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
    if labels.checkpoint and os.path.isfile(Path(labels.checkpoint).expanduser()):  # else it is one of open_clip's tags
        labels = labels.model_copy(update={"checkpoint": absolute(labels.checkpoint)})
    clean = study.clean.model_copy(update={"pseudo_labels": labels})
    return study.model_copy(update={"data": data, "model": model, "clean": clean})


def local_paths(study: Study) -> dict[str, str]:
    """Return what a study reads from disks, path by setting, of one whose paths are `anchored`."""
    data, model, labels = study.data, study.model, study.clean.pseudo_labels
    own = {"data.root": "" if embedded(data.root) else data.root, "data.classes": data.classes}
    own |= {f"data.{name}": shards for name in ("train", "test") if isinstance(shards := getattr(data, name), str)}
    own |= {"model.start": model.start or "", "clean.pseudo_labels.checkpoint": labels.checkpoint or ""}
    return {name: path for name, path in own.items() if path.startswith("/")}


def embedded(name: str) -> Path | None:
    """Return the folder of a data set that comes with raybd, None if there is none of that name."""
    folder = Path(str(resources.files("raybd") / "data" / name))
    return folder if name and "/" not in name and os.path.isfile(folder / "classes.json") else None
