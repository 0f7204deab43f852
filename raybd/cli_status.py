"""Commands that look at a run, also one under way: how far it is, and what happened to a trial."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from raybd import cli_complete
from raybd.cli_echo import echo
from raybd.errors import RaybdError

if TYPE_CHECKING:
    from raybd.store import Store  # imports pyarrow

RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="run directory: a path or s3://…", autocompletion=cli_complete.runs),
]


def status(
    run: RunArgument,
    watch: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="look again every so often, say what changed", min=0.1),
    ] = None,
) -> None:
    """Say how far a run is: driver, pretraining, trials by state, why some failed, device-hours, best points."""
    from raybd import jobs
    from raybd.report import status as found
    from raybd.store import Store

    store = Store(run)
    if not store.names(jobs.FOLDER):  # a job's driver may be still to come
        require_run(store)

    def look() -> list[str]:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
        return list(found.lines(store, width=width, unicode=(sys.stdout.encoding or "").lower().startswith("utf")))

    if watch is None:
        for line in look():
            echo(line)
        return
    before: list[str] = []
    with contextlib.suppress(KeyboardInterrupt):  # nothing is broken off but looking
        while True:
            if (lines := look()) != before:
                for line in (datetime.now().astimezone().isoformat(" ", timespec="seconds"), *lines):
                    echo(line)
            before = lines
            time.sleep(watch)


def logs(
    run: RunArgument,
    id: Annotated[str, typer.Argument(metavar="ID", help="of a trial or a pretraining run, as `raybd status` has it")],
) -> None:
    """Say what happened to one trial or pretraining run, epoch by epoch, with the tracebacks of its failures."""
    from raybd.report import life
    from raybd.store import Store

    store = Store(run)
    require_run(store)
    for line in life.lines(store, id):
        echo(line)


def require_run(store: Store) -> None:
    """Raise RaybdError where a folder is no run directory."""
    if not store.exists("study.json"):
        raise RaybdError("not a run directory", where=store.uri, fix="give the folder that `raybd run` made")
