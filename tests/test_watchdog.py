"""Processes that hang are ended, whatever holds them, and those that only take long are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from raybd.assignment import Assignment, start_record
from raybd.ledger import Kind, Ledger
from raybd.store import Store
from raybd.study import Study

SECONDS = 2.4
STUDY = Study.model_validate({"name": "made", "poison": {"num_poisoned": 1}})
HANGS = {
    # In Python, in C with the interpreter's lock held, and stopped by a signal.
    "python": "threading.Event().wait()",
    "lock_held": "ctypes.PyDLL(None).sleep(100)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "stopped_while_waiting": "with watchdog.waiting(): os.kill(os.getpid(), signal.SIGSTOP)",
}
LIVES = {
    "beats": "[(pulse.beat(), time.sleep(0.1)) for _ in range(60)]",
    "waits_for_another": "with watchdog.waiting(): time.sleep(6)",
    "not_watched": "watchdog.__exit__(None, None, None); time.sleep(6)",
}


def task_of(name: str) -> Assignment:
    return Assignment(name, 0, "mmcl", "mmcl-aaaa", {})


def start(store: Store, name: str, act: str, *, part: str = "") -> subprocess.Popen[bytes]:
    """Start a process that does something under a watchdog, as a trial that has begun."""
    Ledger(store).start(Kind.TRIAL, name, start_record(STUDY, task_of(name)))
    script = f"""
        import ctypes, os, signal, threading, time
        from raybd import pulse
        from raybd.ledger import Kind
        from raybd.store import Store
        from raybd.watchdog import Watchdog
        def hang_here(watchdog):
            {act}
        with Watchdog(Store({store.uri!r}), Kind.TRIAL, {name!r}, seconds={SECONDS}, part={part!r}) as watchdog:
            hang_here(watchdog)
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])


def test_what_hangs_is_ended_and_what_lives_is_not(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    processes = {name: start(store, name, act, part="-rank1") for name, act in {**HANGS, **LIVES}.items()}
    codes = {name: process.wait(timeout=120) for name, process in processes.items()}
    assert codes == {**dict.fromkeys(HANGS, -signal.SIGKILL), **dict.fromkeys(LIVES, 0)}
    for name in HANGS:
        entry = Ledger(store).entry(Kind.TRIAL, name)
        assert [(found["kind"], found["message"]) for found in entry.failures] == [
            ("hung", "no finished step, batch or epoch for 0.04 minutes")
        ]
        assert entry.ended is None  # whether it is tried again is for the driver to say
        assert "in hang_here" in store.get(f"errors/{name}-rank1.txt").decode(), name
    for name in LIVES:
        assert Ledger(store).entry(Kind.TRIAL, name).failures == ()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the watching process in /proc")
def test_the_watching_process_ends_with_the_one_that_it_watches(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    process = start(store, "killed", "[(pulse.beat(), time.sleep(0.1)) for _ in range(400)]")
    deadline = time.monotonic() + 60
    while not (watching := _children(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in watching):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert Ledger(store).entry(Kind.TRIAL, "killed").failures == ()


def _children(pid: int) -> list[str]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(name)
        except OSError:
            continue
    return found
