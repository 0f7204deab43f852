"""Signals end a command that drives a run: at once, with the command that goes on, and without a traceback."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raybd.cli import app

WAIT = "time.sleep(60)"
COMMAND = """
import sys, time
from raybd import signals
from raybd.cli import main
from raybd.stages import Run
signals.GRACE_SECONDS = {grace}

def run(self, until):
    try:
        print("under way", flush=True)
        {wait}
    finally:
        print("going down", flush=True)
        time.sleep({down})
        open(f"{{sys.argv[-1]}} went down", "w").close()
Run.__init__ = lambda self, *_, **__: None
Run.run = run
sys.argv = ["raybd", "run", "demo", "--run-dir", sys.argv[1]]
main()
"""


def start(run_dir: Path, *, down: float, grace: float = 600, wait: str = WAIT) -> subprocess.Popen[bytes]:
    """Start a command whose work is to wait, and which takes so many seconds to go down; return it under way."""
    run_dir.with_name("command.py").write_text(COMMAND.format(down=down, grace=grace, wait=wait))
    process = subprocess.Popen(
        [sys.executable, "-m", "command", str(run_dir)],  # as `python -m raybd` is called
        cwd=run_dir.parent,
        bufsize=0,  # nothing is read ahead that `communicate` would not see
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(process, b"under way")
    return process


def wait_for(process: subprocess.Popen[bytes], line: bytes) -> str:
    """Return what a process printed up to a line."""
    assert process.stdout is not None
    printed = b""
    while line not in printed:
        printed += (found := process.stdout.readline())
        assert found, printed
    return printed.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_ends_a_command_alike_and_a_second_changes_nothing(tmp_path: Path, number: int) -> None:
    process = start(tmp_path / "run", down=0.5)
    process.send_signal(number)
    printed = wait_for(process, b"going down")
    for again in (number, signal.SIGINT, signal.SIGTERM):
        process.send_signal(again)
        time.sleep(0.05)
    printed += process.communicate(timeout=120)[0].decode()
    assert process.returncode == 130, printed
    assert f"To go on:\n  raybd run demo --run-dir {tmp_path}/run" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_a_signal_while_a_text_is_executed_ends_a_command_no_other_way(tmp_path: Path) -> None:
    """As imports do for each dataclass: Python notes that it was interrupted there, and would end by SIGINT."""
    process = start(tmp_path / "run", down=0.1, wait="exec('print(1, flush=True); time.sleep(60)')")
    wait_for(process, b"1")
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 130, printed


def test_a_command_that_does_not_go_down_when_it_is_stopped_is_ended_in_time(tmp_path: Path) -> None:
    process = start(tmp_path / "run", down=600, grace=3)
    began = time.monotonic()
    asked = CliRunner().invoke(app, ["stop", str(tmp_path / "run")])  # as SIGTERM does
    printed = process.communicate(timeout=120)[0].decode()
    assert time.monotonic() - began > 2.5
    assert process.returncode == 130
    assert "To go on:" in printed
    assert "asked to stop by process" in printed
    assert asked.exit_code == 0, asked.output
    assert f"asked to stop: process {process.pid} on " in asked.output
    assert f"stopped; what is done is kept. To go on:\n  raybd run demo --run-dir {tmp_path}/run" in asked.output
    assert not list((tmp_path / "run").glob("stop/*"))


def test_a_terminal_that_is_closed_ends_a_command(tmp_path: Path) -> None:
    """Writing to it is an error from then on."""

    def in_the_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # Whoever runs these tests may have asked not to be ended so.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    master, slave = pty.openpty()
    code = COMMAND.format(down=0, grace=600, wait=WAIT) + "\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=in_the_terminal,
    )
    os.close(slave)
    seen = b""
    while b"under way" not in seen:
        seen += os.read(master, 1000)
    os.close(master)
    try:
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "run went down").exists()
    assert not (tmp_path / "run").exists()
