"""What this machine has, and whether raybd can work on it: everything is looked at, nothing is assumed."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import raybd
from raybd import provenance
from raybd.study import Data, Resources

# Those that a run does not start without, and that may be installed and still not load; torch first, others need it.
_LOADED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "open-clip-torch": "open_clip",
    "ray": "ray",
    "optuna": "optuna",
}
_SESSION = "raybd.cluster.session"
_RAY_FULL = 0.95  # of a disk, and of memory: Ray's `local_fs_capacity_threshold` and `memory_usage_threshold`
_SOCKET_BYTES = 107  # that the path of a socket may have
_SOCKET = "session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # Ray's, with the longest process id
_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


class State(StrEnum):
    """How something stands."""

    OK = "ok"
    WARNING = "warning"  # raybd works, with less than it could have
    PROBLEM = "problem"  # raybd does not work
    UNKNOWN = "unknown"  # it cannot be found out here


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        found: what is there, in words.
        fix: what to do about it; empty where nothing is to be done.
    """

    what: str
    state: State
    found: str
    fix: str = ""


def examine() -> Iterator[Finding]:
    """Yield what there is to know of this machine. It loads torch and ray, which takes seconds, and starts nothing."""
    try:
        about = metadata.metadata("raybd")
        required = metadata.requires("raybd") or []
    except metadata.PackageNotFoundError:
        why = "raybd is not installed, so what it requires is not known"
        yield Finding("packages", State.UNKNOWN, why, "pip install -e . where pyproject.toml lies")
    else:
        yield python(str(about["Requires-Python"]))
        yield from packages(required)
        yield extras(required)
    devices = gpus(Path("/proc/driver/nvidia/version"))
    yield from devices
    yield cores(provenance.cores(), Path("/sys/fs/cgroup"))
    yield _memory(sum(finding.what != "gpus" for finding in devices))
    yield from disks()
    yield shared_memory(Path("/dev/shm"))
    yield clock(newest=Path(raybd.__file__).stat().st_mtime)


def python(required: str) -> Finding:
    """Compare this Python with the versions that are required, given as in package metadata."""
    here = f"{platform.python_version()}, {sys.executable}"
    if SpecifierSet(required).contains(platform.python_version(), prereleases=True):
        return Finding("python", State.OK, here)
    return Finding("python", State.PROBLEM, f"{here}; raybd needs {required}", "install into another Python")


def packages(required: list[str]) -> Iterator[Finding]:
    """Compare what is installed with what is required, as in package metadata, and load what a run does not go without.

    What raybd loads has a line each, all others have one together.
    """
    needs: dict[str, Requirement] = {
        canonicalize_name(need.name): need for need in map(Requirement, required) if not _extra(need)
    }
    faults = {name: fault for name, need in needs.items() if (fault := _mismatch(need))}
    install = "pip install {}"
    for name, module in _LOADED.items():
        need = needs.get(name)
        if need is None:
            continue
        if name in faults:
            yield Finding(name, State.PROBLEM, faults[name], install.format(f'"{need}"'))
        elif fault := _unloadable(module):
            yield Finding(name, State.PROBLEM, f"{metadata.version(name)} does not load: {fault}", "install it anew")
        else:
            yield Finding(name, State.OK, f"{metadata.version(name)} (required: {need.specifier})")
    others = {name: fault for name, fault in faults.items() if name not in _LOADED}
    if others:
        wanted = " ".join(f'"{needs[name]}"' for name in others)
        told = ", ".join(f"{name} {fault}" for name, fault in others.items())
        yield Finding("other packages", State.PROBLEM, told, install.format(wanted))
    elif left := len(needs.keys() - _LOADED.keys()):
        yield Finding("other packages", State.OK, f"all {left} as required")


def extras(required: list[str]) -> Finding:
    """Say which extras are installed: raybd works without them, on local disks and without synonyms."""
    lacking: dict[str, str] = {}
    names = set()
    for need in map(Requirement, required):
        if extra := _extra(need):
            names.add(extra)
            if fault := _mismatch(need):
                lacking[extra] = f"{need.name} {fault}"
    there = sorted(names - lacking.keys())
    told = [f"{name} installed" for name in there] + [f"{name}: {fault}" for name, fault in sorted(lacking.items())]
    what = "s3: shards on buckets; text: synonyms; dashboard: raybd dashboard; mlflow, wandb: record.trackers"
    fix = f'if wanted ({what}): pip install "raybd[{",".join(sorted(lacking))}]"'
    return Finding("extras", State.OK, "; ".join(told) or "there are none", fix if lacking else "")


def _extra(need: Requirement) -> str:
    """Return the extra that a requirement belongs to, "" if it is of raybd itself."""
    _, _, extra = str(need.marker or "").partition("extra == ")
    return extra.strip("\"'")


def _mismatch(need: Requirement) -> str:
    """Return why an installed package is not what is required, "" if it is."""
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return "is not installed"
    return "" if need.specifier.contains(version, prereleases=True) else f"{version}, not {need.specifier}"


def _unloadable(module: str) -> str:
    """Return why a module cannot be imported, in a line, "" if it can."""
    try:
        # Ray through raybd's own module: what that sets in the environment has to be there before.
        importlib.import_module(_SESSION if module == "ray" else module)
    except Exception as error:  # a broken installation raises whatever it likes
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


def gpus(driver: Path) -> list[Finding]:
    """Return the GPUs as torch sees them, a line each.

    Args:
        driver: file that is there where NVIDIA's driver is loaded.
    """
    if _unloadable("torch"):
        return [Finding("gpus", State.UNKNOWN, "torch, which would tell, does not load")]
    import torch

    if torch.cuda.is_available():
        return [_gpu(number) for number in range(torch.cuda.device_count())]
    if driver.exists():
        fix = "install a torch built for CUDA and this driver; see CUDA_VISIBLE_DEVICES"
        return [Finding("gpus", State.WARNING, "there is an NVIDIA driver, but torch sees no GPU", fix)]
    return [Finding("gpus", State.OK, "torch sees none: models are trained on the cores")]


def _gpu(number: int) -> Finding:
    import torch

    name = torch.cuda.get_device_name(number)
    try:
        free, total = torch.cuda.mem_get_info(number)
    except RuntimeError as error:
        told = f"{name} cannot be used: {str(error).splitlines()[0]}"
        return Finding(f"gpu {number}", State.PROBLEM, told, "see that nobody else has it, and nvidia-smi")
    return Finding(f"gpu {number}", State.OK, f"{name}, {_gb(free)} of {_gb(total)} free")


def cores(count: int, cgroup: Path) -> Finding:
    """Compare the cores that this process may use with the time that its container has on them.

    Args:
        cgroup: folder of the control groups, version 2 or 1.
    """
    v1 = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"
    given = _text(cgroup / "cpu.max").split() or " ".join(_text(cgroup / name) for name in v1).split()
    quota = int(given[0]) if len(given) == 2 and given[0].isdecimal() else 0  # else "max", -1, or no container
    if not quota or quota >= count * int(given[1]):
        return Finding("cores", State.OK, f"{count}")
    worth = quota / int(given[1])
    fix = f"raybd would use {count} at a time: set resources.concurrent_trials={max(1, int(worth))}"
    return Finding("cores", State.WARNING, f"{count}, but this container has the time of {worth:g}", fix)


def _memory(gpus: int) -> Finding:
    found = available_memory(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))
    if found is None:
        return Finding("memory", State.UNKNOWN, "this system does not say in /proc/meminfo")
    trials = provenance.cores()
    if not _unloadable("ray"):
        from raybd.cluster import session

        trials = session.resolve(Resources(), cpus=provenance.cores(), gpus=gpus).concurrent_trials
    return memory(*found, process=_own_memory(), trials=trials)


def available_memory(meminfo: Path, cgroup: Path) -> tuple[int, int] | None:
    """Return (free, total) bytes of memory, those of the container where it has less; None where it is not said.

    Args:
        meminfo: file of the kernel's, of the whole machine.
        cgroup: folder of the control groups, version 2 or 1.
    """
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        kilobytes = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if rest}
        free, total = 1024 * kilobytes["MemAvailable"], 1024 * kilobytes["MemTotal"]
    except (OSError, ValueError, LookupError):
        return None
    v1 = cgroup / "memory"
    for limit, used, stat, key in (
        (cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat", "inactive_file"),
        (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes", v1 / "memory.stat", "total_inactive_file"),
    ):
        if (most := _text(limit).strip()).isdecimal() and (now := _text(used).strip()).isdecimal():
            # Files that were read count as used until somebody else needs the memory: shards would fill it.
            files = dict(line.split() for line in _text(stat).splitlines()).get(key, "0")
            return min(free, max(0, int(most) - int(now) + int(files))), min(total, int(most))
    return free, total


def _text(path: Path) -> str:
    """Return what a file of the kernel's says, "" where it is not there."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def memory(free: int, total: int, *, process: int, trials: int) -> Finding:
    """Compare free memory with what processes take, all in bytes.

    Args:
        process: what one takes that has loaded everything and holds no model yet.
        trials: processes at a time.
    """
    told = f"{_gb(free)} of {_gb(total)} free; a process with torch and ray loaded takes {_gb(process)}"
    if free < process or free < (1 - _RAY_FULL) * total:
        why = f"{told}; Ray ends processes where more than {_RAY_FULL:.0%} is used"
        return Finding("memory", State.PROBLEM, why, "end what takes the memory, or use another machine")
    if free < process * trials:
        fits = max(1, free // process)
        fix = f"{trials} trials at a time do not fit: set resources.concurrent_trials={fits} or less"
        return Finding("memory", State.WARNING, told, fix)
    return Finding("memory", State.OK, told)


def _own_memory() -> int:
    """Return the largest memory that this process has had, bytes."""
    import resource

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found


def disks() -> Iterator[Finding]:
    """Yield the folders that runs write to: decoded images, temporary files, Ray's own."""
    from raybd.data import cache
    from raybd.errors import RaybdError

    try:
        yield folder("cache", cache.folder(None), fix="set RAYBD_CACHE", wanted=int(Data().cache_gb * 1e9))
    except (RaybdError, OSError) as error:
        yield Finding("cache", State.PROBLEM, str(error), "set RAYBD_CACHE to a folder of yours")
    yield folder("temporary files", Path(os.environ.get("TMPDIR") or tempfile.gettempdir()), fix="set TMPDIR")
    linux = os.environ.get("TMPDIR") if sys.platform == "linux" else None
    rays = Path(os.environ.get("RAY_TMPDIR") or linux or "/tmp") / "ray"
    length = len(os.fsencode(rays / _SOCKET))
    if length > _SOCKET_BYTES:
        told = f"{rays}: Ray's sockets in it would have paths of {length} bytes, {_SOCKET_BYTES} are possible"
        yield Finding("ray's files", State.PROBLEM, told, "set RAY_TMPDIR to a shorter path, such as /tmp")
        return
    yield folder("ray's files", rays, fix="set RAY_TMPDIR")


def folder(what: str, path: Path, *, fix: str, wanted: int = 0) -> Finding:
    """Write and remove a file in a folder, or where it would be made, and compare its disk with what is wanted.

    Args:
        fix: the setting that names another folder.
        wanted: bytes.
    """
    there = next((above for above in (path, *path.parents) if above.exists()), path)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"raybd")
            file.flush()
        disk = shutil.disk_usage(there)
    except OSError as error:
        told = f"{path}: cannot be written to: {(error.strerror or str(error)).lower()}"
        return Finding(what, State.PROBLEM, told, f"{fix} to a folder that can be written to")
    told = f"{path}: {_gb(disk.free)} of {_gb(disk.total)} free"
    if disk.free < wanted:
        told += f", less than the {_gb(wanted)} that data.cache_gb allows"
        return Finding(what, State.WARNING, told, f"{fix} to a larger disk, or lower data.cache_gb")
    if disk.free < (1 - _RAY_FULL) * disk.total:
        return Finding(what, State.WARNING, f"{told}: nearly full", f"make room, or {fix} to another disk")
    return Finding(what, State.OK, told)


def shared_memory(path: Path) -> Finding:
    """Compare /dev/shm with what raybd has Ray take of it."""
    try:
        found = shutil.disk_usage(path)
    except OSError:
        return Finding("shared memory", State.UNKNOWN, f"there is no {path}: Ray uses its temporary folder")
    told = f"{path}: {_gb(found.free)} of {_gb(found.total)} free"
    if _unloadable("ray"):
        return Finding("shared memory", State.UNKNOWN, f"{told}; ray, which would use it, does not load")
    from raybd.cluster import session

    wanted = session.OBJECT_STORE_BYTES
    if found.free < wanted:
        fix = "start the container with --shm-size=1g"
        return Finding("shared memory", State.WARNING, f"{told}; Ray uses a disk instead of {_gb(wanted)}", fix)
    return Finding("shared memory", State.OK, told)


def clock(*, newest: float) -> Finding:
    """Say what time it is, and whether that can be: buckets refuse a clock that is wrong by more than minutes.

    Args:
        newest: a time that has passed, seconds since 1970.
    """
    now = time.time()
    told = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < newest:
        passed = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(newest))
        return Finding("clock", State.PROBLEM, f"{told}, but raybd was installed at {passed}", "set the clock")
    synchronised = _synchronised()
    if synchronised is None:
        return Finding("clock", State.UNKNOWN, f"{told}; whether it is synchronised cannot be found out")
    if not synchronised:
        fix = "if runs go to a bucket, see that it is right: chrony, systemd-timesyncd"
        return Finding("clock", State.WARNING, f"{told}; the kernel does not call it synchronised", fix)
    return Finding("clock", State.OK, f"{told}, synchronised")


def _synchronised() -> bool | None:
    """Return whether the kernel calls its clock synchronised; None where it does not say."""
    ask: Callable[[object], int] | None = getattr(ctypes.CDLL(None), "adjtimex", None)
    if ask is None:
        return None
    state = ask(ctypes.create_string_buffer(512))  # a `struct timex` of zeros changes nothing
    return None if state < 0 else state != _UNSYNCHRONISED


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
