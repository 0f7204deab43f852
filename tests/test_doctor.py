"""`raybd doctor`: what is there and what is amiss, found on real folders, packages and files of the kernel's form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raybd import doctor
from raybd.cli import app
from raybd.doctor import Finding, State

LOOKED_AT = {
    "python",
    "torch",
    "torchvision",
    "open-clip-torch",
    "ray",
    "optuna",
    "other packages",
    "extras",
    "cores",
    "memory",
    "cache",
    "temporary files",
    "ray's files",
    "shared memory",
    "clock",
}
GB = 10**9


def run_doctor(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raybd", "doctor", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )


def test_a_machine_that_can_work(tmp_path: Path) -> None:
    done = run_doctor("-f", "json", RAYBD_CACHE=str(tmp_path / "not" / "yet"))
    found = {row["what"]: row for row in json.loads(done.stdout)}
    assert [row for row in found.values() if row["state"] == "problem"] == []
    assert done.returncode == 0
    assert set(found) >= LOOKED_AT
    assert any(what.startswith("gpu") for what in found)
    assert found["torch"]["found"].startswith(metadata.version("torch"))
    assert str(tmp_path) in found["cache"]["found"]
    assert not (tmp_path / "not").exists(), "nothing is made"


def test_a_machine_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("RAYBD_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{'x' * 60}")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 3
    lines = done.stdout.splitlines()
    problems = [(lines[i].split()[1], lines[i + 1]) for i in range(len(lines)) if lines[i].startswith("problem")]
    assert [what for what, _ in problems] == ["cache", "ray's"]
    assert [fix.strip() for _, fix in problems] == [
        "→ set RAYBD_CACHE to a folder that can be written to",
        "→ set RAY_TMPDIR to a shorter path, such as /tmp",
    ]
    assert len(lines) <= 40, "one screen"


def states(findings: list[Finding]) -> dict[str, State]:
    return {finding.what: finding.state for finding in findings}


def test_versions_are_compared_with_what_is_required() -> None:
    assert doctor.python(">=3.0").state is State.OK
    assert doctor.python(">=3.11,<3.11").state is State.PROBLEM
    right = list(doctor.packages(["optuna>=1", "numpy>=1", 'no-such-package; extra == "s3"']))
    assert states(right) == {"optuna": State.OK, "other packages": State.OK}
    wrong = list(doctor.packages(["optuna>=99", "numpy<1", "no-such-package>=1"]))
    assert states(wrong) == {"optuna": State.PROBLEM, "other packages": State.PROBLEM}
    assert wrong[0].found == f"{metadata.version('optuna')}, not >=99"
    assert wrong[0].fix == 'pip install "optuna>=99"'
    assert wrong[1].fix == 'pip install "numpy<1" "no-such-package>=1"'
    assert "no-such-package is not installed" in wrong[1].found


def test_a_package_that_is_there_and_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "optuna").mkdir()
    (tmp_path / "optuna" / "__init__.py").write_text("raise OSError('libfoo.so: cannot open\\nmore')", encoding="utf-8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = doctor.packages(["optuna>=1"])
    assert found.state is State.PROBLEM
    assert found.found.endswith("does not load: OSError: libfoo.so: cannot open")


def test_extras_say_what_to_install() -> None:
    found = doctor.extras(["numpy", 'numpy>=1; extra == "text"', 'no-such-package>=1; extra == "s3"'])
    assert (found.state, found.found) == (State.OK, "text installed; s3: no-such-package is not installed")
    assert found.fix.endswith('pip install "raybd[s3]"')
    assert doctor.extras(['numpy>=1; extra == "text"']).fix == ""


def test_a_driver_without_a_gpu_that_torch_sees(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    assert states(doctor.gpus(tmp_path / "none")) == {"gpus": State.OK}
    (tmp_path / "version").write_text("NVRM version: …", encoding="utf-8")
    assert states(doctor.gpus(tmp_path / "version")) == {"gpus": State.WARNING}


def test_cores_and_the_time_on_them(tmp_path: Path) -> None:
    assert doctor.cores(8, tmp_path).state is State.OK
    for quota, state in (("max 100000", State.OK), ("800000 100000", State.OK), ("150000 100000", State.WARNING)):
        (tmp_path / "cpu.max").write_text(f"{quota}\n", encoding="ascii")
        found = doctor.cores(8, tmp_path)
        assert found.state is state
    assert "the time of 1.5" in found.found
    assert found.fix.endswith("resources.concurrent_trials=1")
    v1 = tmp_path / "v1" / "cpu"
    v1.mkdir(parents=True)
    (v1 / "cpu.cfs_period_us").write_text("100000\n", encoding="ascii")
    for quota, state in (("-1", State.OK), ("150000", State.WARNING)):
        (v1 / "cpu.cfs_quota_us").write_text(f"{quota}\n", encoding="ascii")
        assert doctor.cores(8, v1.parent).state is state


def test_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert doctor.available_memory(meminfo, tmp_path) is None
    meminfo.write_text("MemTotal:  4000 kB\nMemFree: 10 kB\nMemAvailable:  3000 kB\nHugePages_Total: 0\n", "ascii")
    assert doctor.available_memory(meminfo, tmp_path) == (3000 * 1024, 4000 * 1024)
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("1000\n", encoding="ascii")
    assert doctor.available_memory(meminfo, tmp_path) == (3000 * 1024, 4000 * 1024)
    (tmp_path / "memory.max").write_text("5000\n", encoding="ascii")
    assert doctor.available_memory(meminfo, tmp_path) == (4000, 5000)
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 700\n", encoding="ascii")
    assert doctor.available_memory(meminfo, tmp_path) == (4700, 5000), "files that were read can go"
    v1 = tmp_path / "v1" / "memory"
    v1.mkdir(parents=True)
    (v1 / "memory.usage_in_bytes").write_text("1000\n", encoding="ascii")
    for limit, expected in (("5000", (4000, 5000)), (str(2**63 - 4096), (3000 * 1024, 4000 * 1024))):
        (v1 / "memory.limit_in_bytes").write_text(f"{limit}\n", encoding="ascii")
        assert doctor.available_memory(meminfo, v1.parent) == expected


def test_memory_is_measured_by_what_a_process_takes() -> None:
    assert doctor.memory(10 * GB, 20 * GB, process=GB, trials=8).state is State.OK
    few = doctor.memory(10 * GB, 20 * GB, process=GB, trials=16)
    assert (few.state, few.fix.endswith("concurrent_trials=10 or less")) == (State.WARNING, True)
    assert doctor.memory(GB - 1, 2 * GB, process=GB, trials=1).state is State.PROBLEM
    assert doctor.memory(2 * GB, 100 * GB, process=GB, trials=1).state is State.PROBLEM, "above Ray's threshold"


def test_folders(tmp_path: Path) -> None:
    assert doctor.folder("cache", tmp_path / "a" / "b", fix="set X").state in (State.OK, State.WARNING)
    small = doctor.folder("cache", tmp_path, fix="set X", wanted=10**18)
    assert (small.state, "data.cache_gb" in small.found) == (State.WARNING, True)
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert doctor.folder("cache", tmp_path / "file", fix="set X").state is State.PROBLEM
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left"


def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    found = doctor.shared_memory(tmp_path / "shm")
    assert found.state is State.UNKNOWN


def test_a_clock_before_a_time_that_has_passed_is_wrong() -> None:
    assert doctor.clock(newest=time.time() + 3600).state is State.PROBLEM
    assert doctor.clock(newest=0).state in (State.OK, State.WARNING, State.UNKNOWN)
