"""A study given to a real cluster on this machine as a job of Ray's: detached, looked at, stopped, gone on with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from raybd import jobs, tables
from raybd.ledger import Kind, Ledger
from raybd.store import Store
from tests.chaos.checks import without_times

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
TINY = Path(__file__).parents[1] / "studies" / "tiny.yaml"
# Few images to look at: what is proven is how runs go, and that the numbers are the same ones.
STUDY = (str(TINY), "--set", "data.max_test_samples=120")
SECONDS = 600  # for each step, on a machine that does other things too
BIN = str(Path(sys.executable).parent)
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")},
    "PATH": f"{BIN}:{os.environ['PATH']}",
    # The driver starts in Ray's folder for the job.
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


def free_ports(count: int) -> list[int]:
    """Return ports that nobody has now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The job API of a head with a resource for drivers, in a process group of its own."""
    port, dashboard, agent, client, export = free_ports(5)
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        options = {"port": port, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent}
        options |= {"ray-client-server-port": client, "metrics-export-port": export, "num-cpus": 2}
        options |= {"temp-dir": folder, "object-store-memory": 200_000_000, "resources": '{"head": 1}'}
        given = [f"--{name}={value}" for name, value in options.items()]
        command = [f"{BIN}/ray", "start", "--head", "--block", *given]
        with (Path(folder) / "start.log").open("w+") as log:
            head = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
            try:
                where = f"http://127.0.0.1:{dashboard}"
                wait_for(lambda: answers(dashboard) or head.poll() is not None)
                assert head.poll() is None, (Path(folder) / "start.log").read_text()
                yield where
            finally:
                head.send_signal(signal.SIGTERM)  # with --block it ends what it has started
                try:
                    head.wait(timeout=60)
                finally:
                    if head.poll() is None:
                        os.killpg(head.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Store]]:
    """The study on this machine alone, without a stop, under way beside the test; called, wait for it."""
    folder = tmp_path_factory.mktemp("whole")
    command, log = [sys.executable, "-m", "raybd", "run", *STUDY, "--run-dir", str(folder / "run")], folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output)

    def done() -> Store:
        assert process.wait(timeout=SECONDS) == 0, log.read_text()
        return Store(str(folder / "run"))

    try:
        yield done
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            process.kill()


def answers(port: int) -> bool:
    """Say whether somebody listens."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def wait_for(ready: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def raybd(*arguments: str, code: int = 0) -> str:
    """Run a command as on a laptop that is then closed; return what it printed."""
    command = [sys.executable, "-m", "raybd", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def ended(address: str, id: str) -> tuple[str, int | None]:
    """Wait for the end of a job; return how it ended, and the exit code of its driver."""
    client = JobSubmissionClient(address)
    wait_for(lambda: client.get_job_status(id).is_terminal())
    info = client.get_job_info(id)
    return info.status.value, info.driver_exit_code


def test_a_run_goes_on_without_who_started_it_and_is_stopped_from_anywhere(
    whole: Callable[[], Store], address: str, tmp_path: Path
) -> None:
    run_dir = str(tmp_path / "run")
    command = ["run", *STUDY, "--run-dir", run_dir, "--address", address, "--detach"]
    store, ledger = Store(run_dir), Ledger(Store(run_dir))
    printed = raybd(*command)
    first = jobs.last(store)
    assert first is not None
    assert first.began
    assert f"job: {first.id} of {address}" in printed
    assert f"raybd stop {run_dir}" in printed
    assert f"as job {first.id}" in raybd(*command, code=3)  # a second one is refused
    assert f"as job {first.id}" in raybd("status", run_dir)
    wait_for(lambda: any(1 in entry.epochs for entry in ledger.entries(Kind.PRETRAIN)))
    stopped = raybd("stop", run_dir)
    assert "stopped; what is done is kept" in stopped
    assert f"raybd {' '.join(command)}" in stopped
    assert ended(address, first.id) == ("FAILED", 130)
    assert "it was stopped" in raybd("status", run_dir)
    raybd(*command)
    second = jobs.last(store)
    assert second is not None
    assert second.id != first.id
    assert ended(address, second.id) == ("SUCCEEDED", 0)
    assert "trials: 4 complete" in raybd("status", run_dir)
    assert "epoch 2" in raybd("logs", run_dir, "mmcl-0000")
    # What lies there is what the study gives on this machine alone, without a stop.
    alone = whole()
    for table in tables.SCHEMAS:
        assert without_times(store, table).equals(without_times(alone, table)), table
