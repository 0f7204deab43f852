"""Who is running: processes found in /proc by a mark in their environment, which all that they start inherit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "RAYBD_CHAOS"

TRIAL_WORKER, PRETRAIN_WORKER = "ray::ImplicitFunc", "ray::RayTrainWorker"
# Ray's own, there for as long as a cluster is: workers waiting for work, agents of nodes, the actor through which Ray
# Train asks for nodes, and the one that tidies up after a dead driver: that asks the dashboard who is dead, and stays
# where a cluster has none, as ours.
SERVANTS = (
    "ray::IDLE",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
    "ray::_AutoscalingCoordinatorActor",
    "ray::PlacementGroupCleaner",
)


@dataclass(frozen=True)
class Process:
    """A process that carries the mark; its title is its command line."""

    pid: int
    parent: int
    title: str


def start(module: str, argument: str, *, environment: dict[str, str], log: Path) -> subprocess.Popen[str]:
    """Start a module of the harness in a process and a session of its own; what it complains of goes to a file."""
    with open(log, "ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", module, argument],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )


def running(chosen: Callable[[Path], bool]) -> list[Process]:
    """Return the living processes whose folder in /proc is chosen."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if chosen(folder):
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    found.append(Process(int(folder.name), int(parent), title))
    return found


def marked(mark: str) -> list[Process]:
    """Return the living processes that carry a mark."""
    wanted = f"{MARK}={mark}".encode()
    return running(lambda folder: wanted in (folder / "environ").read_bytes().split(b"\0"))


def titled(processes: Iterable[Process], title: str) -> list[Process]:
    """Return those whose title begins so."""
    return [process for process in processes if process.title.startswith(title)]


def below(processes: Collection[Process], pid: int) -> list[Process]:
    """Return all descendants of a process."""
    found = [process for process in processes if process.parent == pid]
    return found + [other for process in found for other in below(processes, process.pid)]


def workers_left(mark: str) -> list[Process]:
    """Return worker processes of Ray that do or did work for a study: none once its driver has ended."""
    return [process for process in titled(marked(mark), "ray::") if not process.title.startswith(SERVANTS)]


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal; say whether there was anybody to get it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_all(mark: str) -> None:
    """Kill every process with a mark, until none is left."""
    for _ in range(100):
        left = marked(mark)
        if not left:
            return
        for process in left:
            kill(process.pid)
        time.sleep(0.1)


def wait_until_gone(find: Callable[[], list[Process]], *, seconds: float) -> list[Process]:
    """Wait until nothing is found; return what is still there after so long."""
    deadline = time.monotonic() + seconds
    while (left := find()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left
