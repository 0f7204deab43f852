"""What every command that drives a run does: it holds the run directory, and an interruption says how to go on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from raybd.console import View
from raybd.lock import only_driver
from raybd.store import Store
from raybd.study import Study

INTERRUPTED = 130


@contextmanager
def driving(study: Study, run_dir: str, view: View) -> Iterator[Store]:
    """Return the run directory of a study, held against other drivers for the length of a `with`.

    Errors: LockedError where another driver holds it; typer.Exit where the block was interrupted.
    """
    store = Store(run_dir, patience=study.resources.storage_patience)
    try:
        with only_driver(store):
            yield store
    except KeyboardInterrupt:
        view.line(f"\ninterrupted; what is done is kept. To go on:\n  {shlex.join(['raybd', *sys.argv[1:]])}")
        raise typer.Exit(INTERRUPTED) from None
