"""What the shell offers at <TAB>: studies that come along, study files, run directories. It loads nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator


def studies(incomplete: str) -> list[str]:
    """Return studies that come along and YAML files whose names begin so."""
    from raybd import study_file

    named = [name for name in study_file.shipped() if name.startswith(incomplete)]
    return named + _paths(incomplete, wanted=_is_yaml)


def files(incomplete: str) -> list[str]:
    """Return YAML files whose names begin so."""
    return _paths(incomplete, wanted=_is_yaml)


def runs(incomplete: str) -> list[str]:
    """Return run directories whose paths begin so; those in `runs` where nothing is given yet."""
    return _paths(incomplete or "runs/", wanted=_is_run)


def _is_yaml(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith((".yaml", ".yml")) and entry.is_file()


def _is_run(entry: os.DirEntry[str]) -> bool:
    return os.path.isfile(os.path.join(entry.path, "study.json"))


def _paths(incomplete: str, *, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    """Return what is wanted of a folder, and its folders, which end with /.

    A shell ends the word after the only completion there is: of a folder that is the only one its contents are given.
    """
    found = sorted(_entries(incomplete, wanted))
    if len(found) == 1 and found[0].endswith("/"):
        return _paths(found[0], wanted=wanted) or found
    return found


def _entries(incomplete: str, wanted: Callable[[os.DirEntry[str]], bool]) -> Iterator[str]:
    folder, begun = os.path.split(incomplete)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            for entry in entries:
                if not entry.name.startswith(begun) or (entry.name.startswith(".") and not begun):
                    continue
                if wanted(entry):
                    yield os.path.join(folder, entry.name)
                elif entry.is_dir():
                    yield os.path.join(folder, entry.name, "")
    except OSError:
        return
