"""All that lasts longer than a round: the cluster, the bucket, the marks by which processes are found again."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.bucket import CREDENTIALS, Bucket, free_port
from tests.chaos.cluster import ClusterProcess
from tests.chaos.driver import COMPLETE, Driver
from tests.chaos.processes import MARK, Process, kill_all, marked, start, wait_until_gone, workers_left
from tests.chaos.reader import Findings
from tests.chaos.storage import BucketFolder, Folder, Storage

log = logging.getLogger("chaos")

_WORKERS_GONE_WITHIN = 60.0
# Ray's agents notice within a minute that what they served is gone.
_ALL_GONE_WITHIN = 90.0


class Watching:
    """A reader in a process of its own."""

    def __init__(self, uri: str, environment: dict[str, str], log: Path) -> None:
        self._log = log
        self._process = start("tests.chaos.reader", uri, environment=environment, log=log)

    def findings(self) -> Findings:
        """End it, after one more look, and return what it saw."""
        printed, _ = self._process.communicate(timeout=120)
        if self._process.returncode:
            raise RuntimeError(f"the reader ended with code {self._process.returncode}: see {self._log}")
        return Findings(**json.loads(printed))

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()


class Scene:
    """A cluster that lasts, and what is run on it.

    Args:
        study: file of the study.
        extra: further arguments of `raybd run`.
        scratch: folder of the harness, of a short name: Ray's sockets lie below it.
    """

    def __init__(self, study: str, extra: Sequence[str], scratch: Path) -> None:
        self._study, self._extra, self.scratch = study, list(extra), scratch
        self._mark, self._port = scratch.name, free_port()
        # Those who watch have no mark: it is for what raybd and Ray start.
        self._plain = {"RAYBD_CACHE": str(scratch / "cache"), **os.environ, **CREDENTIALS, "OMP_NUM_THREADS": "1"}
        self._environment = {
            **self._plain,
            MARK: self._mark,
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": str(scratch),
            "TMPDIR": str(scratch / "tmp"),
            "RAY_USAGE_STATS_ENABLED": "0",
            # How long processes wait for a head that is gone; Ray's own minute would take up most of a round.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
        }
        (scratch / "tmp").mkdir()
        self._bucket: Bucket | None = None
        self._cluster: ClusterProcess | None = None

    @property
    def cluster(self) -> ClusterProcess:
        """The cluster that runs now."""
        if self._cluster is None:
            self._cluster = ClusterProcess(self._port, self._environment, self.scratch / "cluster.log")
        return self._cluster

    def renew_cluster(self) -> None:
        """End the cluster and make another, at the same address."""
        if self._cluster is not None:
            self._cluster.stop()
        self._cluster = None
        assert self.cluster.nodes

    def processes(self) -> list[Process]:
        """Return what runs now of raybd and Ray."""
        return marked(self._mark)

    def driver(self, storage: Storage) -> Driver:
        """Return the command for a run directory, not called yet."""
        arguments = ["run", self._study, *self._extra, "--run-dir", storage.uri, "--address", self.cluster.address]
        return Driver(arguments, self._environment, self.scratch / "driver.log")

    @contextmanager
    def reader(self, storage: Storage) -> Iterator[Watching]:
        """Let a reader poll a run directory for the length of a `with`."""
        watching = Watching(
            storage.reader_uri, {**self._plain, "PYTHONWARNINGS": "ignore"}, self.scratch / "reader.log"
        )
        try:
            yield watching
        finally:
            watching.kill()

    def bucket_folder(self, name: str) -> BucketFolder:
        """Return a folder of the bucket, whose server is started at the first call."""
        if self._bucket is None:
            os.environ.update(CREDENTIALS)
            self._bucket = Bucket(self._plain, self.scratch / "bucket.log")
        return BucketFolder(self._bucket, name)

    def reference(self) -> str:
        """Run the study without a fault and return its run directory."""
        folder = Folder(self.scratch / "reference")
        driver, began = self.driver(folder), time.monotonic()
        driver.start()
        if driver.process.wait(timeout=1200) != COMPLETE:
            raise RuntimeError(f"the study ends with code {driver.code} without any fault:\n{driver.printed()}")
        log.info("reference without a fault: %.0f s", time.monotonic() - began)
        return folder.uri

    def orphans(self) -> list[Process]:
        """Return the workers that outlive the driver that they worked for."""
        return wait_until_gone(lambda: workers_left(self._mark), seconds=_WORKERS_GONE_WITHIN)

    def close(self) -> list[Process]:
        """End cluster and bucket; return processes that would stay. None is left when it returns."""
        if self._bucket is not None:
            self._bucket.close()
        if self._cluster is not None:
            self._cluster.stop()
        left = wait_until_gone(self.processes, seconds=_ALL_GONE_WITHIN)
        kill_all(self._mark)
        return left
