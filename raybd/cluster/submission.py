"""A study as a job of Ray's: what is brought to the cluster, what is run there, and whether its driver has begun.

Of this machine the study goes there, with every setting resolved, the command that the user gave, and nothing else:
neither the folder that one stands in nor credentials. Data, checkpoints and class files stay where they are; their
paths are part of the study, and a copy in Ray's own folders would make another study of it with each cluster.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from raybd import failures, jobs, lock, signals
from raybd.cluster import credentials
from raybd.errors import ClusterError, LockedError, StudyError
from raybd.store import Store
from raybd.study import Study

# Of the head's custom resource: many drivers may share a head, and Ray gives a job up that waits 15 minutes for it.
_HEAD, _HEAD_SHARE = "head", 0.01
_RUN = "raybd_run"  # the run directory, in a job's metadata
_POLL_SECONDS = 1.0
_OVERRIDE = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_CHATTY = (
    *("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"),
    "ray._private.runtime_env.packaging",
)

T = TypeVar("T")


def entrypoint(study: Study, run_dir: str, *, allow_code_change: bool) -> str:
    """Return the command that drives a study on the cluster; it is called where `study_text` lies as a file."""
    more = ["--allow-code-change"] if allow_code_change else []
    # A shell in between would get signals meant for the driver.
    return "exec " + shlex.join(["raybd", "run", file_name(study), "--run-dir", run_dir, "--address", "auto", *more])


def file_name(study: Study) -> str:
    """Return what the study is called on the cluster."""
    return f"{study.name}.yaml"


def study_text(study: Study) -> str:
    """Return a study file with every setting resolved, which stands on no other one."""
    # JSON is YAML; characters beyond 16 bits are not, where they are escaped as JSON does it.
    return json.dumps(study.resolved(), indent=1, ensure_ascii=False)


def runtime_env(folder: str, *, id: str, command: str) -> dict[str, Any]:
    """Return the runtime environment of a job.

    Args:
        folder: on this machine, with nothing in it but the study.
        id: of the job.
        command: the one that the user gave, which goes on with the run.
    """
    # How long `ray job stop` waits before it kills: Ray's 3 seconds are too few to shut a search down.
    wait = str(round(signals.GRACE_SECONDS) + 10)
    return {
        "working_dir": folder,
        "env_vars": {jobs.JOB: id, jobs.COMMAND: command, "RAY_JOB_STOP_WAIT_TIME_S": wait},
    }


def head_resources(nodes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return what a driver asks for, of the resources of each node, so that it runs on the head."""
    # Where no node has it Ray puts jobs on the head by itself.
    return {_HEAD: _HEAD_SHARE} if any(_HEAD in node for node in nodes) else {}


def check(study: Study, store: Store, *, address: str, command: str) -> None:
    """Refuse what a job cannot be made of. Errors: StudyError."""
    if address != "auto" and not address.startswith(("http://", "https://")):
        raise StudyError(
            "a detached run is given to the cluster's job API, which answers at the dashboard's address",
            where=f"--address {address}",
            expected="http://HEAD:8265, or auto on a machine of the cluster",
            fix="from elsewhere: `ray dashboard cluster.yaml`, then --address http://localhost:8265",
        )
    shown = {"study": study.resolved(), "run_dir": store.uri, "address": address, "command": command}
    for place, kind, _ in credentials.found(shown):
        raise StudyError(
            f"{kind}: whoever reaches the cluster reads what a job is made of",
            where=".".join(map(str, place)),
            fix="let the cluster's machines have rights of their own, or an environment with the secret",
        )


class Submitted:
    """A job that was submitted, on the cluster that has it.

    Args:
        address: as of `check`.
        command: see `runtime_env`.
        shared: the run directory was given as one that other machines may see, so that a cluster of several will do.

    Errors: ClusterError where the cluster does not answer or refuses; LockedError where another driver works on the run
        directory, or a job is to; StudyError as of `check`, or on a cluster of several machines if not shared.
    """

    def __init__(
        self, study: Study, store: Store, *, address: str, command: str, allow_code_change: bool, shared: bool
    ) -> None:
        check(study, store, address=address, command=command)
        if (holder := lock.holder(store)) is not None:
            raise lock.locked(store, holder, fix=f"wait for it, or `raybd stop {shlex.quote(store.uri)}`")
        self.store, self.address, self._client = store, address, _client(address)
        nodes = self._asked(lambda: _nodes(address))
        if not shared and len(nodes) > 1:
            raise StudyError(
                f"a folder of this machine, which {len(nodes)} machines of the cluster do not see",
                where=f"--run-dir {store.uri}",
                expected="s3://…, or the absolute path of a folder that all machines mount",
            )
        self._refuse_second()
        self.id = f"raybd-{study.name}-{uuid.uuid4().hex[:8]}"
        try:
            jobs.submitted(store, self.id, address=address, command=command)
            self._submit(study, nodes, command=command, allow_code_change=allow_code_change)
        except BaseException:  # Ctrl-C too: a job that was taken after all finds no record, and ends
            jobs.forget(store, self.id)
            raise

    def _submit(self, study: Study, nodes: list[dict[str, float]], *, command: str, allow_code_change: bool) -> None:
        with tempfile.TemporaryDirectory(prefix="raybd-") as folder:
            (Path(folder) / file_name(study)).write_text(study_text(study), encoding="utf-8")
            job = {
                "entrypoint": entrypoint(study, self.store.uri, allow_code_change=allow_code_change),
                "submission_id": self.id,
                "runtime_env": runtime_env(folder, id=self.id, command=command),
                "metadata": {_RUN: self.store.uri},
                "entrypoint_resources": head_resources(nodes),
            }
            self._asked(lambda: self._client.submit_job(**job))

    def _refuse_second(self) -> None:
        """Refuse where a job waits to drive the run. One that has begun, and drives it no more, is about to end."""
        for job in self._asked(self._client.list_jobs):
            if (job.metadata or {}).get(_RUN) != self.store.uri:
                continue
            if job.status.is_terminal():
                jobs.failed(self.store, job.submission_id, _reason(job))
                continue
            found = jobs.read(self.store, job.submission_id)
            if found is None or not found.began:
                raise LockedError(
                    f"job {job.submission_id} is to drive this run directory already ({job.status.value})",
                    where=self.store.uri,
                    fix=f"wait for it, or `{jobs.end_command(self.address, job.submission_id)}`",
                )

    def begun(self, *, seconds: float) -> bool:
        """Wait until the driver holds the run directory, for so long at most; return whether it does.

        Errors: ClusterError where the job has failed by then.
        """
        until = time.monotonic() + seconds
        while True:
            info = self._asked(lambda: self._client.get_job_info(self.id))
            if info.status.is_terminal() and info.driver_exit_code != 0:
                jobs.failed(self.store, self.id, _reason(info))
                raise ClusterError(
                    f"{self.id} has ended ({info.status.value}): {info.message or 'no reason given'}",
                    where=f"--address {self.address}",
                    fix="see above; raybd must be installed on the cluster's machines, in the PATH of `ray start`",
                )
            found = jobs.read(self.store, self.id)
            if found and found.began:
                return True
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_SECONDS)

    def _asked(self, question: Callable[[], T]) -> T:
        return _answer(question, self.address)


def _reason(info: Any) -> str:
    """Return how a job ended, in one line, as Ray's job API has it."""
    return f"{info.status.value}: {(info.message or 'no reason given').partition(chr(10))[0]}"


def _client(address: str) -> Any:
    if address != "auto":
        for name in _OVERRIDE:  # what Ray would put in the place of the address that the user gives
            os.environ.pop(name, None)
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY:  # what it uploads is no news to anybody
        logging.getLogger(name).setLevel(logging.ERROR)
    return _answer(lambda: JobSubmissionClient(address), address)


def _nodes(address: str) -> list[dict[str, float]]:
    """Return the resources of each machine that is up."""
    from ray.util.state import list_nodes

    return [node.resources_total for node in list_nodes(address, filters=[("state", "=", "ALIVE")])]


def _answer(question: Callable[[], T], address: str) -> T:
    """Ask the job API. Errors: ClusterError, whatever it was that Ray raised."""
    try:
        return question()
    except Exception as error:  # of Ray, of requests, or none of a class of its own
        raise ClusterError(
            f"Ray's job API: {failures.message_of(error)}",
            where=f"--address {address}",
            fix="give the dashboard's address, which `ray dashboard cluster.yaml` brings to this machine, and hold the "
            "cluster's token: RAY_AUTH_MODE=token, ~/.ray/auth_token",
        ) from None
