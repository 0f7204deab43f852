"""The command that opens optuna-dashboard on a run."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from raybd.cli_echo import echo
from raybd.cli_status import RunArgument, require_run


def dashboard(
    run: RunArgument,
    port: Annotated[int, typer.Option(help="where it listens; 0: any that is free", min=0, max=65535)] = 8080,
    host: Annotated[
        str, typer.Option(help="whom it answers; 0.0.0.0: every machine that reaches this one")
    ] = "127.0.0.1",
    every: Annotated[
        float, typer.Option(metavar="SECONDS", help="look for new epochs and trials so often", min=0.1)
    ] = 5.0,
) -> None:
    """Open optuna-dashboard on a run's searches, also one under way; Ctrl-C closes it, and nothing is written."""
    from raybd.dashboard import serving
    from raybd.store import Store

    store = Store(run)
    require_run(store)
    with serving(store, host=host, port=port, every=every) as server:
        echo(f"optuna-dashboard: http://{host}:{server.server_port}/dashboard/ (Ctrl-C closes it)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
