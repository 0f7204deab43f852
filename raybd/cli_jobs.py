"""Drivers that are elsewhere: a run given to a cluster as a job of Ray's, and the end of a driver, wherever it is."""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raybd.cli_echo import echo
from raybd.cli_status import RunArgument, require_run
from raybd.errors import RaybdError, StudyError

if TYPE_CHECKING:
    from raybd.store import Store  # imports pyarrow

_BEGIN_SECONDS = 60.0

DetachOption = Annotated[
    bool,
    typer.Option("--detach", help="give the study to the cluster as a job and return; --address is its dashboard's"),
]


def detach(
    study: str, overrides: list[str] | None, run_dir: str | None, address: str | None, *, allow_code_change: bool
) -> None:
    """Submit a study to a cluster as a job of Ray's; say what drives it, and how to look at it."""
    if address is None:
        raise StudyError("on which cluster?", where="--detach", expected="--address http://HEAD:8265, or auto")
    from raybd import jobs, study_file
    from raybd.store import Store

    found = study_file.anchored(study_file.load(study, overrides=overrides or []))
    store = Store(run_dir or f"runs/{found.name}", patience=found.resources.storage_patience)
    from raybd.study_directory import StudyDirectory

    StudyDirectory.record(found, store)  # refuses a run directory of another study, before the cluster is asked
    from raybd.cluster.submission import Submitted

    job = Submitted(
        found,
        store,
        address=address,
        command=jobs.command(),
        allow_code_change=allow_code_change,
        shared=not store.local or (run_dir or "").startswith(("/", "~", "file:")),
    )
    echo(f"job: {job.id} of {address}")
    echo(f"run directory: {store.uri}")
    mounted = study_file.local_paths(found) | ({"--run-dir": store.uri} if store.local else {})
    for name, path in mounted.items():
        echo(f"warning: {name}: {path} must be there on all machines of the cluster", err=True)
    if job.begun(seconds=_BEGIN_SECONDS):
        echo("its driver has begun; this machine may go. From any machine that sees the run directory:")
    else:
        echo("it waits for its place; this machine may go. From any machine that sees the run directory:")
    where = shlex.quote(store.uri)
    for command in (f"raybd status {where} --watch 10", f"raybd logs {where} TRIAL", f"raybd stop {where}"):
        echo(f"  {command}")
    echo("what the driver prints, from where the cluster is in reach:")
    echo(f"  {shlex.join(['ray', 'job', 'logs', '--address', address, '--follow', job.id])}")


def stop(
    run: RunArgument,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="how long to wait for its end", min=0)] = 180.0,
) -> None:
    """Stop the driver of a run, wherever it works, as Ctrl-C does: what is done is kept, the same command goes on."""
    from raybd import jobs, lock
    from raybd import stop as request
    from raybd.store import Store

    store, until = Store(run), time.monotonic() + wait
    while (holder := lock.holder(store)) == {} and time.monotonic() < until:
        _pause(store)
    known = jobs.recorded(store)
    # What holds the run directory may not have said yet that it has begun.
    waiting = [job for job in known if job.waits and job.id != (holder or {}).get("job")]
    for job in waiting:
        request.ask(store, job.id)
        echo(f"job {job.id} has no driver yet; if one comes, it stops at once. To end the job now:")
        echo(f"  {jobs.end_command(job.address, job.id)}")
    if holder is None:
        if not known:
            require_run(store)
        if not waiting:
            echo(f"no driver works on {store.uri}")
        return
    asked = holder.get("nonce")
    if not isinstance(asked, str):
        raise RaybdError(f"it takes no requests: {lock.described(holder)}", where=store.uri, fix="send it SIGTERM")
    request.ask(store, asked)
    echo(f"asked to stop: {lock.described(holder)}")
    while _works(store, asked):
        if time.monotonic() >= until:
            raise RaybdError(
                f"still at work after {wait:g} s; it stops when it sees the request",
                where=store.uri,
                fix="look again with `raybd status`; a driver that died on a bucket is taken for dead after 2 minutes",
            )
        _pause(store)
    request.withdraw(store, asked)  # one that had to be ended did not
    echo(f"stopped; what is done is kept. To go on:\n  {holder['command']}")


def _works(store: Store, nonce: str) -> bool:
    from raybd import lock

    holder: dict[str, Any] | None = lock.holder(store)
    return holder is not None and holder.get("nonce") == nonce


def _pause(store: Store) -> None:
    time.sleep(0.2 if store.local else 3.0)
