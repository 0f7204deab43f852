"""What every command that drives a run does: it holds the run directory, and an interruption says how to go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from raybd import jobs, signals
from raybd.console import View
from raybd.errors import LockedError
from raybd.lock import only_driver
from raybd.store import Store
from raybd.study import Study


@contextmanager
def driving(study: Study, run_dir: str, view: View) -> Iterator[Store]:
    """Return the run directory of a study, held against other drivers for the length of a `with`.

    Errors: LockedError where another driver holds it; ClusterError where it is not the one of this job; typer.Exit
        where the block was interrupted.
    """

    def how_to_go_on() -> None:
        with contextlib.suppress(OSError):
            view.line(f"\ninterrupted; what is done is kept. To go on:\n  {jobs.command()}")

    store = Store(run_dir, patience=study.resources.storage_patience)
    try:
        with signals.interruptible(how_to_go_on), only_driver(store):
            yield store
    except LockedError:
        raise
    except (KeyboardInterrupt, Exception) as error:
        # On the way down much may fail: Ray, for one, may have had the signal too.
        if not signals.received():
            if not isinstance(error, KeyboardInterrupt):
                raise
            how_to_go_on()
        raise typer.Exit(signals.INTERRUPTED) from None
