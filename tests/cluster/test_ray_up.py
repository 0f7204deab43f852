"""`search_spaces/cluster/local.yaml` for real: `ray up` over ssh, a sweep that loses a host, `ray down`."""

from __future__ import annotations

import itertools
import logging
import os
import pwd
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from raybd import tables
from raybd.ledger import Kind, Ledger, State
from raybd.metrics import SPLITS
from raybd.store import Store
from tests.chaos.checks import compare
from tests.chaos.processes import PRETRAIN_WORKER, TRIAL_WORKER, titled
from tests.chaos.reader import Findings, Reader
from tests.cluster.hosts import Host, Network, network, refused
from tests.cluster_files import ROOT, config

log = logging.getLogger("cluster")

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
WITHIN = 600.0  # for each step, on a machine that may be busy
RAYLET = "raylet/raylet "
STUDY = "tests/studies/tiny.yaml"
TRIALS, EPOCHS = 3, 5  # so long that a host can be lost in the midst of one
SETTINGS = (
    "resources.num_workers=2",
    "resources.concurrent_trials=2",
    f"search.num_trials={TRIALS}",
    f"clean.epochs={EPOCHS}",
    # Little to look at, as three hosts share the cores of one machine.
    "data.max_test_samples=120",
    "poison.target_class=person",  # the largest, which models hardly trained predict: fronts have some points
)
# Seconds and milliseconds for which Ray waits, less than for machines in a data centre: a host that is silent is taken
# for lost after (1 + 4) * 4 s in place of (3 + 10) * 5 s; a host gives its head up after 5 s in place of 60; what tells
# the head that a host's Ray has ended tries for 15 s in place of 60 where there is no head.
QUICK = {
    "head": (
        "RAY_health_check_period_ms=1000",
        "RAY_health_check_timeout_ms=4000",
        "RAY_health_check_failure_threshold=4",
    ),
    "worker": ("RAY_gcs_rpc_server_reconnect_timeout_s=5", "RAY_gcs_server_request_timeout_seconds=15"),
}


def filled_in(net: Network) -> dict[str, Any]:
    """Return the file as the owner of these hosts would have it, whose environment is on all of them already."""
    found, (head, *workers) = config("local"), net.hosts
    found["metadata"]["storage_path"] = str(net.shared)
    found["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address for worker in workers]}
    found["auth"] = {"ssh_user": pwd.getpwuid(os.geteuid()).pw_name, "ssh_private_key": str(net.key)}
    found["setup_commands"] = [
        f"ln -sfn {shlex.quote(sys.prefix)} ~/venv",
        "echo 'export PYTHONPATH=$HOME/raybd' >> ~/.bashrc",
        *(command for command in found["setup_commands"] if "pip" not in command),
    ]
    # The cores of this machine are not each host's own.
    for kind, cpus in (("head", 0), ("worker", 1)):
        commands = found[f"{kind}_start_ray_commands"]
        options = f"--num-cpus={cpus} --object-store-memory={80 * 1024**2}"
        commands[-1] = commands[-1].replace("ray start ", f"ray start {options} ")
        commands[-1] = f"{shlex.join(['export', *QUICK[kind]])}; {commands[-1]}"
    return found


class Operator:
    """Who sits at the operator's machine, before a checkout of the repository and the cluster's file."""

    def __init__(self, net: Network) -> None:
        self._net, self._checkout = net, net.base / "checkout"
        self.file, self._log = net.base / "cluster.yaml", net.base / "log"
        self.file.write_text(yaml.safe_dump(filled_in(net)))
        left_out = ("--exclude=.git", "--exclude=.venv", "--filter=dir-merge,- .gitignore")
        subprocess.run(["rsync", "-a", *left_out, f"{ROOT}/", self._checkout], check=True)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command there; what it prints goes to the log."""
        environment = {
            "HOME": str(self._net.home),
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(self._checkout),
            "LANG": "C.UTF-8",
            "TERM": "dumb",  # lines in the log, in place of a display
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        line = f"$ {shlex.join(words)}\n"
        log.info("%s", line.strip())
        with open(self._log, "ab") as output:
            output.write(line.encode())
            output.flush()
            return subprocess.Popen(
                self._net.operator.command("env", f"--chdir={self._checkout}", *words),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def run(self, *commands: Sequence[str]) -> None:
        """Run commands there side by side, to their end; they must do well."""
        for started in [self.start(*words) for words in commands]:
            assert started.wait(timeout=WITHIN) == 0, self.printed()[-5000:]

    def printed(self) -> str:
        """Return what has been printed so far."""
        return self._log.read_text(errors="replace")


def at_work(host: Host) -> list[str]:
    """Return the command lines of what runs on a host beside its first process and sshd."""
    found = [process.title for process in host.processes() if process.pid != host.pid]
    return [title for title in found if not title.startswith("sshd: ")]


def wait_until(condition: Callable[[], object], state: Callable[[], str]) -> None:
    deadline = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < deadline, state()[-5000:]
        time.sleep(0.5)


@dataclass
class Watch:
    """What is seen of a sweep while it runs and loses a host.

    Attributes:
        pretrained_on: names of the hosts that had workers for pretraining.
        struck: the trials that ran when the host was lost, one of them on it.
    """

    reader: Reader
    pretrained_on: set[str] = field(default_factory=set)
    struck: set[str] = field(default_factory=set)

    def look(self, net: Network, lost: Host, store: Store) -> None:
        """Look once; take the host away if it has ended a trial and both of two that run have come to something."""
        self.pretrained_on |= {host.name for host in net.hosts if titled(host.processes(), PRETRAIN_WORKER)}
        trials = Ledger(store).entries(Kind.TRIAL)
        done_there = any(trial.ended and trial.ended["node"] == lost.name for trial in trials)
        # Not at their last epoch: none of them may end before the host is away.
        under_way = {
            trial.id for trial in trials if not trial.ended and 0 <= max(trial.epochs, default=-1) < EPOCHS - 1
        }
        if not self.struck and done_there and len(under_way) == 2 and titled(lost.processes(), TRIAL_WORKER):
            net.cut(lost)
            self.struck = under_way
            log.info("%s is cut off, with one of %s", lost.name, sorted(under_way))
        self.reader.poll()


@pytest.fixture
def net() -> Iterator[Network]:
    if reason := refused():
        pytest.skip(f"ray up was not tried: {reason}")
    interfaces = os.listdir("/sys/class/net")
    with network(3) as found:
        yield found
    assert not found.base.exists()
    # With their first processes all others were killed, which takes a moment.
    machines = (found.operator, *found.hosts)
    wait_until(
        lambda: not any(machine.processes() for machine in machines),
        lambda: str([machine.processes() for machine in machines]),
    )
    assert os.listdir("/sys/class/net") == interfaces


def test_a_sweep_over_own_machines_survives_the_loss_of_one(net: Network) -> None:
    operator, (head, kept, lost) = Operator(net), net.hosts
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    operator.run(
        ("ray", "get-auth-token", "--generate"),
        ("raybd", "validate", str(operator.file), "--study", STUDY, *settings),
    )
    operator.run(("ray", "up", "--yes", str(operator.file)))
    wait_until(lambda: all(any(RAYLET in title for title in at_work(host)) for host in net.hosts), operator.printed)
    log.info("a head and two workers are up")

    store = Store(str(net.shared / "run"), patience=0)
    command = f"cd ~/raybd && raybd run {STUDY} --address auto --run-dir {store.uri} {shlex.join(settings)}"
    watch, driver = Watch(Reader(store)), operator.start("ray", "exec", str(operator.file), command)

    def has_ended() -> bool:
        watch.look(net, lost, store)
        return driver.poll() is not None

    wait_until(has_ended, operator.printed)
    assert driver.returncode == 0, operator.printed()[-5000:]
    assert watch.struck
    assert watch.pretrained_on == {kept.name, lost.name}
    assert not lost.processes()
    assert_whole(store, watch, survivor=kept)

    operator.run(("ray", "down", "--yes", str(operator.file)))
    wait_until(lambda: not at_work(head) and not at_work(kept), lambda: str(at_work(head) + at_work(kept)))
    log.info("nothing of Ray runs any more")
    log.debug("all that was printed:\n%s", operator.printed())


def assert_whole(store: Store, watch: Watch, *, survivor: Host) -> None:
    """All that was planned is there, whole and once, and what the lost host was at was done by another."""
    # With itself, as there is no run without a fault to compare it with: an epoch that is lost is looked for below.
    assert list(compare(store, store)) == []
    seen = watch.reader.found
    assert seen == Findings(polls=seen.polls, records=seen.records)
    trials, epochs = (tables.read(store, name).to_pylist() for name in ("trials", "epochs"))
    log.info("trials: %s", [(trial["trial_id"], trial["node"], trial["attempt"]) for trial in trials])
    assert len(trials) == 2 * TRIALS
    assert {trial["state"] for trial in trials} == {State.COMPLETE}
    measured = Counter((row["trial_id"], row["split"], row["epoch"]) for row in epochs)
    planned = itertools.product((trial["trial_id"] for trial in trials), SPLITS, range(EPOCHS + 1))
    assert measured == Counter(planned)
    again = [trial for trial in trials if trial["attempt"] > 1]
    assert {trial["trial_id"] for trial in again} < watch.struck
    assert [trial["node"] for trial in again] == [survivor.name]
    assert len({trial["node"] for trial in trials}) == 2
