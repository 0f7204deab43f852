"""Commands for whoever writes a study: one to start from, and the schema that editors check it by."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from raybd.cli_echo import echo
from raybd.errors import DataError, StudyError


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="study to write")] = Path("mine.yaml"),
    data: Annotated[str | None, typer.Option(help="your shards: a folder, or s3://…")] = None,
    model: Annotated[str | None, typer.Option(help="open_clip name  [default: RN50]")] = None,
    start: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="file of a model to clean as it is; nothing is pretrained")
    ] = None,
    target_class: Annotated[str | None, typer.Option(help="class that the attack aims at")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a file that is there")] = False,  # noqa: FBT002
) -> None:
    """Write a commented study to start from, and say what is left to fill in."""
    from raybd import study_schema, study_template

    pairs, uncounted = _counted(data)
    known = study_template.Known(data=data, pairs=pairs, model=model, start=start, target_class=target_class)
    text = study_template.write(known, name=file.stem, schema=study_schema.path())
    try:
        with file.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise StudyError("there is such a file", where=str(file), fix="give another name, or --force") from None
    except OSError as error:
        raise StudyError(f"cannot be written: {error.strerror}", where=str(file)) from None
    echo(f"{file}: written")
    for blank in study_template.blanks(text):
        echo(f"  to fill in, line {blank.line}: {blank.setting}: {blank.meaning}")
    if uncounted:
        echo(f"  training pairs were not counted: {uncounted}; clean.num_samples may be no more than there are")
    echo(f"then: raybd validate {shlex.quote(str(file))}")


def _counted(data: str | None) -> tuple[int | None, str]:
    """Return how many training pairs there are, or why that is not known: the data may not be here yet."""
    from raybd import study_template
    from raybd.data import counts

    if data is None:
        return None, ""
    try:
        found = counts.training_pairs(data, most=study_template.ENOUGH)
    except DataError as error:
        return None, error.what
    return found, "a bucket is not read through for this" if found is None else ""


def schema() -> None:
    """Print the JSON Schema of study files, by which editors complete and check them."""
    from raybd import study_schema

    echo(study_schema.text(), nl=False)
