"""The command that checks a file, of a study or of a cluster, and starts nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from raybd import cli_complete
from raybd.cli_echo import echo
from raybd.errors import StudyError


def validate(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="study, by file or name; or a cluster file of `ray up`",
            autocompletion=cli_complete.studies,
        ),
    ],
    study: Annotated[
        str | None,
        typer.Option(help="with a cluster file: the study that it is for", autocompletion=cli_complete.studies),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting of the study")
    ] = None,
) -> None:
    """Check a study or a cluster file without starting anything; every mistake is shown with its line."""
    from raybd import study_file

    if study is None and not (os.path.isfile(file) and _is_cluster_file(file)):
        found = study_file.load(file, overrides=set_ or [])
        objectives = len(found.pretrain.objectives)
        trials = found.search.trials_each * objectives
        echo(f"{file}: fine ({_counted(objectives, 'pretrain objective')}, {_counted(trials, 'trial')})")
        return
    if set_ and study is None:
        raise StudyError("--set is of studies", where="--set", fix="say which one this cluster is for, with --study")
    from raybd.cluster import cluster_file

    wanted = study_file.load(study, overrides=set_ or []) if study is not None else None
    verdict = cluster_file.check(Path(file), wanted)
    echo(f"{file}: fine")
    for line in verdict.lines:
        echo(f"  {line}")
    for note in verdict.notes:
        echo(f"  note: {note}")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _is_cluster_file(file: str) -> bool:
    from raybd import study_file
    from raybd.cluster import cluster_file

    return cluster_file.is_one(study_file.read_text(Path(file)))
