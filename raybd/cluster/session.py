"""Ray for the length of a study: a local cluster or one that is running, and what the study may use of it."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from raybd import failures, provenance, signals
from raybd.errors import ClusterError
from raybd.study import Resources

# Read when ray is imported: quiet output, short polls (a report waits for one), no GPU visible to who asked for none.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 * 1024**2
_LEAVE_SECONDS = 10.0  # that the main thread may take to break off
_HEAD_SECONDS = 20.0  # without an answer of the head, after which the cluster is gone


@dataclass(frozen=True)
class Share:
    """What a study takes of the cluster, nothing left to `auto`.

    Attributes:
        beside: share of a GPU's memory that a trial's process takes where no limit on torch's memory reaches.
        missing: what the cluster does not have now, in words.
        scratch: a folder on the driver's machine for what Ray keeps of its own; gone when the session ends. Nothing
            reads it: a run goes on from its ledger, and Ray's files are pickles, which a run directory must not hold.
        own: this driver has started the cluster, which ends with it.
    """

    num_workers: int
    use_gpu: bool
    cpus_per_worker: int
    concurrent_trials: int
    cpus_per_trial: int
    gpus_per_trial: float
    beside: float = 0.0
    missing: tuple[str, ...] = ()
    scratch: str = ""
    own: bool = False

    @property
    def memory_per_trial(self) -> float:
        """Share of a GPU's memory that torch may have in a trial, 1 where nobody else is on the GPU."""
        return self.gpus_per_trial - self.beside if 0 < self.gpus_per_trial < 1 else 1.0


def resolve(wanted: Resources, *, cpus: int, gpus: int, may_grow: bool = False) -> Share:
    """Settle every `auto` for a cluster of so many CPUs and GPUs, and refuse what can never be placed.

    A trial whose share is not measured yet has a GPU for itself; see `raybd.cluster.gpus`.

    Args:
        may_grow: the cluster may add nodes, so what is missing now is not refused.

    Errors: ClusterError.
    """
    use_gpu = gpus > 0 if wanted.use_gpu == "auto" else wanted.use_gpu
    gpus_each = 1.0 if wanted.gpus_per_trial == "auto" else wanted.gpus_per_trial
    workers = (max(1, gpus) if use_gpu else 1) if wanted.num_workers == "auto" else wanted.num_workers
    cpus_each = max(1, cpus // workers) if wanted.cpus_per_worker == "auto" else wanted.cpus_per_worker
    if use_gpu and wanted.cpus_per_worker == "auto":
        cpus_each = max(1, min(8, cpus // workers))
    if wanted.concurrent_trials != "auto":
        trials = wanted.concurrent_trials
    else:
        trials = max(1, cpus // wanted.cpus_per_trial)
        if use_gpu:
            # A trial has its share of one GPU: what is left over on several adds up to nothing.
            trials = max(1, min(trials, gpus * int(1 / gpus_each + 1e-9)))
    share = Share(
        num_workers=workers,
        use_gpu=use_gpu,
        cpus_per_worker=cpus_each,
        concurrent_trials=trials,
        cpus_per_trial=wanted.cpus_per_trial,
        gpus_per_trial=gpus_each if use_gpu else 0.0,
    )
    missing = _missing(share, cpus=cpus, gpus=gpus)
    if missing and not may_grow:
        where, what = missing[0]
        raise ClusterError(
            what,
            where=where,
            fix="lower it, set resources.use_gpu=false to run on CPUs, or use a larger cluster (--address)",
        )
    return replace(share, missing=tuple(f"{where}: {what}" for where, what in missing))


def _missing(share: Share, *, cpus: int, gpus: int) -> list[tuple[str, str]]:
    """Return (field, sentence) for what is asked for and not there."""
    wanted = (
        ("CPUs for pretraining", share.num_workers * share.cpus_per_worker, cpus, "resources.num_workers"),
        ("GPUs for pretraining", share.num_workers if share.use_gpu else 0, gpus, "resources.num_workers"),
        ("CPUs for a trial", share.cpus_per_trial, cpus, "resources.cpus_per_trial"),
        ("GPUs for a trial", share.gpus_per_trial, gpus, "resources.gpus_per_trial"),
    )
    return [(field, f"{need:g} {what} asked for, {have} there") for what, need, have, field in wanted if need > have]


@contextmanager
def session(wanted: Resources, *, address: str | None = None) -> Iterator[Share]:
    """Connect to Ray, or start it on this machine, for the length of a `with`; nothing is left running.

    Args:
        address: of a running cluster (`auto` for the one on this machine); None starts a local one.

    Errors: ClusterError where there is no such cluster, the study does not fit, or the head goes while it runs.
    """
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # Never a bare init: the address file of some other cluster would hijack it.
            ray.init(
                address="local",
                num_cpus=provenance.cores(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
            )
    except SystemExit:
        # While it starts Ray answers SIGTERM itself. What it has started dies with this process.
        signals.interrupt()
        raise
    except Exception as error:  # a machine too busy to start Ray in time gives no class of its own
        if address:
            fix = "start the cluster with `ray up cluster.yaml`, or leave --address out to run on this machine"
        else:
            fix = (
                "call the same command again when this machine is less busy; Ray's logs are in /tmp/ray/session_latest"
            )
        raise ClusterError(
            f"cannot {'reach' if address else 'start'} Ray: {failures.message_of(error)}",
            where=f"--address {address}" if address else "",
            fix=fix,
        ) from None
    finally:
        signals.arm()
    with tempfile.TemporaryDirectory(prefix="raybd-", ignore_cleanup_errors=True) as scratch:
        try:
            have = ray.cluster_resources()
            cpus, gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
            share = resolve(wanted, cpus=cpus, gpus=gpus, may_grow=address is not None)
            with watched_head(ray.get_runtime_context().gcs_address):
                yield replace(share, scratch=scratch, own=address is None)
        finally:
            ray.shutdown()
            signals.arm()


@contextmanager
def watched_head(address: str, *, seconds: float = _HEAD_SECONDS) -> Iterator[None]:
    """Break off the block, which the main thread runs, when the head of the cluster has been gone for so long.

    Ray waits a minute for its head, and then ends the whole process with a message of its own.

    Args:
        address: host:port of the head's control service.

    Errors: ClusterError, out of the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    host, _, port = address.rpartition(":")
    done, gone = threading.Event(), threading.Event()

    def watch() -> None:
        seen = time.monotonic()
        while not done.wait(min(2.0, seconds / 5)):
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                seen = time.monotonic()
            except OSError:
                if time.monotonic() - seen > seconds:
                    gone.set()
                    signals.interrupt_main()
                    # Within a call of Ray that waits for the head no signal reaches Python, until Ray ends the process.
                    if not done.wait(_LEAVE_SECONDS):
                        log.error("%s", error)
                        os._exit(error.exit_code)
                    return

    error = ClusterError(
        f"the head of the Ray cluster does not answer any more, for {seconds:.0f} s",
        where=address,
        fix="start the cluster again, then call the same command: each trial goes on after its last finished epoch",
    )
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not gone.is_set():
            raise
        raise error from None
    finally:
        done.set()
        thread.join()


def uninterrupted(function: Callable[[], Any]) -> Any:
    """Call a blocking function of Ray in a thread and return its result, so that Ctrl-C ends the wait at once.

    In the main thread Ray Train takes the signal for itself and leaves with exit code 0.
    """
    outcome: dict[str, Any] = {}

    def call() -> None:
        try:
            outcome["result"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
