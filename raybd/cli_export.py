"""The command that makes a model of a run ready to be passed on."""

from __future__ import annotations

from typing import Annotated

import typer

from raybd.cli_echo import echo
from raybd.cli_status import RunArgument


def export(
    run: RunArgument,
    point: Annotated[
        str, typer.Argument(metavar="POINT", help="TRIAL:EPOCH of a front, or TRIAL where one epoch is kept")
    ],
    out: Annotated[str | None, typer.Option(help="folder to write  [default: exports/STUDY-TRIAL-EPOCH]")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export that lies there")] = False,  # noqa: FBT002
) -> None:
    """Write a front point as a folder that open_clip loads: weights, configuration, model card, hashes."""
    from raybd import exporting
    from raybd.store import Store

    folder = exporting.export(Store(run), point, out=out, force=force)
    echo(str(folder))
    echo(f'load it: open_clip.create_model_and_transforms("local-dir:{folder}")', err=True)
