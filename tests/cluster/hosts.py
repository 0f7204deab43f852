"""Hosts on this machine: sets of Linux namespaces on a network of their own, which are reached by ssh alone.

Each has its own address, name, processes, /tmp, /dev/shm, /run and home; all else of the machine's files they share, as
machines do that mount one folder. Nothing of them is seen on the machine: the network, too, is one of namespaces, and
all ends with the first process of each.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.processes import Process, kill, running

_NETWORK = "10.77.0"
_STARTS_WITHIN = 60.0
_UNSHARE = ("unshare", "--net", "--mount", "--propagation=private", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
# What a host has of its own. `read` is the shell's: it gives the number by which the machine knows this process.
_BOOT = """
set -eu
read -r pid _ < /proc/self/stat
hostname {name}
mount -t proc proc /proc
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount --bind {own}/passwd /etc/passwd
mount --bind {own}/hosts /etc/hosts
mount --bind {own}/home {home}
mkdir /run/sshd /run/tmp-of-all
mount --rbind /tmp /run/tmp-of-all
mount --bind {own}/tmp /tmp
{shown}
umount --lazy /run/tmp-of-all
{sshd} -D -e -f {own}/sshd_config 2> {own}/sshd.log &
echo "$pid" > {own}/pid.new
mv {own}/pid.new {own}/pid
wait
"""
_SSHD_CONFIG = """
HostKey {own}/host_key
AuthorizedKeysFile {base}/key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""
# As Debian's installer writes it: a host's own name leads to nobody but itself.
_HOSTS = "127.0.0.1 localhost\n127.0.1.1 {name}\n"


@dataclass(frozen=True)
class Host:
    """A running host.

    Attributes:
        pid: its first process; all others end with it.
        namespace: of its processes, as Linux calls it: it says whose they are, also once the first one is gone.
        folder: what it has of its own, as the machine sees it: `home`, `tmp`.
        cable: name of the end of its cable at the switch, on the operator's machine.
    """

    name: str
    address: str
    pid: int
    namespace: str
    folder: Path
    cable: str

    def command(self, *words: str) -> list[str]:
        """Return the command that runs another one on the host, as somebody who sits there would."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--ipc", "--pid", *words]

    def processes(self) -> list[Process]:
        """Return what runs on the host."""
        return running(lambda folder: os.readlink(folder / "ns" / "pid") == self.namespace)


@dataclass(frozen=True)
class Network:
    """A machine of the operator's, whose ports are the switch, and hosts.

    Attributes:
        base: folder that all machines see under this name.
        home: folder of the user on every machine, which is each one's own.
        key: file of the private key by which the hosts let in.
    """

    base: Path
    home: Path
    key: Path
    operator: Host
    hosts: tuple[Host, ...]

    @property
    def shared(self) -> Path:
        """A folder that all machines mount."""
        return self.base / "shared"

    def cut(self, host: Host) -> None:
        """Take a host away as a power cut does: its peers hear nothing more of it, not even that it went."""
        _ip(self.operator, "link", "set", host.cable, "down")
        kill(host.pid)


def refused() -> str:
    """Return why there can be no hosts on this machine; empty if there can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [name for name in ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "rsync") if not shutil.which(name)]
    missing += [] if _sshd() else ["sshd"]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2, util-linux, openssh-client, openssh-server, rsync)"
    tried = subprocess.run(
        [*_UNSHARE, "sh", "-c", "mount -t proc proc /proc && ip link add br0 type bridge"],
        capture_output=True,
        text=True,
    )
    return f"this machine makes no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def network(count: int) -> Iterator[Network]:
    """Have an operator's machine and so many hosts for the length of a `with`; nothing of them is left."""
    base, started = Path(tempfile.mkdtemp(prefix="raybd-hosts-")), list[subprocess.Popen[bytes]]()
    try:
        for name in ("home", "shared"):
            (base / name).mkdir()
        _keygen(base / "key")
        machines = []
        for number in range(count + 1):
            name = f"host{number}" if number else "operator"
            own = _furnish(base, name)
            with open(own / "boot.log", "wb") as log:
                started.append(subprocess.Popen([*_UNSHARE, "bash", str(own / "boot")], stdout=log, stderr=log))
            pid = _booted(own, started[-1])
            namespace = os.readlink(f"/proc/{pid}/ns/pid")
            machines.append(Host(name, f"{_NETWORK}.{number + 1}", pid, namespace, own, f"port{number}"))
        operator, *hosts = machines
        _wire(operator, hosts)
        yield Network(base, base / "home", base / "key", operator, tuple(hosts))
    finally:
        for process in started:
            process.kill()  # its child, the first process of the host, is killed with it
        for process in started:
            process.wait()
        _remove(base)


def _furnish(base: Path, name: str) -> Path:
    """Make what a machine has of its own, and the script that boots it; return its folder."""
    own, home, user = base / name, base / "home", pwd.getpwuid(os.geteuid())
    for folder in ("home", "tmp"):
        (own / folder).mkdir(parents=True)
    (own / "tmp").chmod(0o1777)
    lines = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith(f"{user.pw_name}:")]
    lines.insert(0, f"{user.pw_name}:x:{user.pw_uid}:{user.pw_gid}::{home}:/bin/bash")
    (own / "passwd").write_text("\n".join(lines) + "\n")
    (own / "hosts").write_text(_HOSTS.format(name=name))
    _keygen(own / "host_key")
    (own / "sshd_config").write_text(_SSHD_CONFIG.format(own=own, base=base))
    # Whatever of the environment lies in the machine's /tmp, which the host's own hides.
    root = Path(__file__).parents[2]
    needed = {path.resolve() for path in (base, root, Path(sys.prefix), Path(sys.base_prefix))}
    shown = [
        f"mkdir -p {shlex.quote(str(path))}\n"
        f"mount --rbind /run/tmp-of-all/{shlex.quote(str(path.relative_to('/tmp')))} {shlex.quote(str(path))}"
        for path in sorted(needed)
        if path.is_relative_to("/tmp")
    ]
    (own / "boot").write_text(_BOOT.format(own=own, home=home, name=name, shown="\n".join(shown), sshd=_sshd()))
    return own


def _booted(own: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait until a machine is up; return its first process as this machine numbers it."""
    deadline = time.monotonic() + _STARTS_WITHIN
    while not (own / "pid").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{own.name} does not start: {(own / 'boot.log').read_text()}")
        time.sleep(0.05)
    return int((own / "pid").read_text())


def _wire(operator: Host, hosts: Sequence[Host]) -> None:
    """Join all machines by a switch, which is the operator's; whoever asks for the way out is sent there."""
    _ip(operator, "link", "set", "lo", "up")
    _ip(operator, "link", "add", "switch", "type", "bridge")
    _ip(operator, "addr", "add", f"{operator.address}/24", "dev", "switch")
    _ip(operator, "link", "set", "switch", "up")
    for host in hosts:
        peer = ("peer", "name", "lan0", "netns", str(host.pid))
        _ip(operator, "link", "add", host.cable, "type", "veth", *peer)
        _ip(operator, "link", "set", host.cable, "master", "switch", "up")
        _ip(host, "link", "set", "lo", "up")
        _ip(host, "addr", "add", f"{host.address}/24", "dev", "lan0")
        _ip(host, "link", "set", "lan0", "up")
        _ip(host, "route", "add", "default", "via", operator.address)


def _ip(host: Host, *words: str) -> None:
    """Call `ip` within a host's network, where processes are numbered as on this machine."""
    subprocess.run(["nsenter", f"--target={host.pid}", "--net", "ip", *words], check=True)


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def _sshd() -> str | None:
    # By its whole path, as it starts itself anew for each login.
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _remove(base: Path) -> None:
    """Remove a folder that processes just killed may still write to."""
    for _ in range(50):
        shutil.rmtree(base, ignore_errors=True)
        if not base.exists():
            return
        time.sleep(0.1)
    shutil.rmtree(base)
