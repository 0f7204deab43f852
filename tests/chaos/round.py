"""One round: a study run to its end under faults at random moments, then looked at."""

from __future__ import annotations

import logging
import random
import signal
import time
from collections.abc import Iterator

from raybd.store import Store
from tests.chaos import checks
from tests.chaos.driver import COMPLETE
from tests.chaos.kinds import SHARES, Kind
from tests.chaos.processes import PRETRAIN_WORKER, SERVANTS, TRIAL_WORKER, Process, below, kill, titled
from tests.chaos.scene import Scene
from tests.chaos.storage import Storage
from tests.chaos.tally import Harm, Tally

log = logging.getLogger("chaos")

_TICK = 0.25
_STUCK_AFTER = 300.0
_WRONG_ENDS = 3
_TROUBLE = (2.0, 15.0)  # how long storage fails, in seconds: well within the minute that raybd waits for it


class _Pace:
    """When the next fault comes: after some new records, and a moment more; or with none, in the midst of recovery."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.next(0)

    def next(self, records: int) -> None:
        """Draw when the next one comes."""
        self._wanted = records + self._rng.choice((0, 0, 1, 1, 2, 3))
        self._at: float | None = None

    def due(self, records: int) -> bool:
        """Say whether it is time."""
        if self._at is None and records >= self._wanted:
            self._at = time.monotonic() + self._rng.uniform(0.0, 4.0)
        return self._at is not None and time.monotonic() >= self._at


class Round:
    """A study that runs in a storage on a scene.

    Args:
        rng: draws kinds, victims and moments.
        most: so many faults are struck, then the study is left in peace.
        allowed: kinds to draw from.
    """

    def __init__(
        self, scene: Scene, storage: Storage, rng: random.Random, tally: Tally, *, most: int, allowed: frozenset[Kind]
    ) -> None:
        self._scene, self._storage, self._rng, self._tally = scene, storage, rng, tally
        self._left, self._allowed = most, allowed
        self._driver = scene.driver(storage)
        self._store = Store(storage.reader_uri)
        self._trouble_ends: float | None = None
        self._excused = False

    def run(self, reference: Store) -> None:
        """Run the study to its end under faults, and count what went wrong."""
        with self._scene.reader(self._storage) as reader:
            ended = self._carry_out()
            self._end_trouble()
            found = reader.findings()
        tally = self._tally
        tally.rounds, tally.calls = tally.rounds + 1, tally.calls + self._driver.calls
        tally.polls, tally.records = tally.polls + found.polls, tally.records + found.records
        harms: list[checks.Finding] = [(Harm.WRONG_END, what) for what in self._driver.wrong_ends]
        harms += [(Harm.BROKEN, what) for what in found.broken]
        harms += [(Harm.LOST, what) for what in found.lost]
        harms += [(Harm.CHANGED, what) for what in found.changed]
        harms += [(Harm.DOUBLED, what) for what in found.again]
        harms += [(Harm.WEIGHTLESS, what) for what in found.weightless]
        if ended:
            harms += checks.compare(self._store, reference)
        else:
            harms.append((Harm.STUCK, f"{self._driver.printed()[-2000:]}"))
        harms += [(Harm.ORPHANS, f"{left.pid} {left.title}") for left in self._scene.orphans()]
        for harm, what in harms:
            log.error("%s: %s", harm, what)
            tally.found[harm].append(f"round {tally.rounds}: {what}")

    def _carry_out(self) -> bool:
        """Call the command until it has come to its end; say whether it has."""
        self._driver.start()
        pace, records, since = _Pace(self._rng), 0, time.monotonic()
        while True:
            time.sleep(_TICK)
            if self._trouble_ends is not None:
                self._storage.hold()
                if time.monotonic() >= self._trouble_ends:
                    self._end_trouble()
            if self._driver.code is not None:
                if self._driver.code == COMPLETE:
                    return True
                if not self._excused:
                    self._driver.ended_by_itself()
                if len(self._driver.wrong_ends) >= _WRONG_ENDS:
                    return False
                self._driver.start()
            self._excused = False
            found = len(self._store.names("ledger"))
            if found != records:
                records, since = found, time.monotonic()
            elif time.monotonic() - since > _STUCK_AFTER:
                self._driver.kill()
                return False
            if self._left and pace.due(records) and self._strike_one():
                self._left -= 1
                pace.next(records)
                since = time.monotonic()

    def _strike_one(self) -> bool:
        """Strike with a kind that has had less than its share; say whether any hit anybody."""
        hits = self._tally.hits
        kinds = [kind for kind in self._kinds() if kind in self._allowed]
        had = {kind: (hits[kind] + self._rng.random()) / SHARES[kind] for kind in kinds}
        kind = next((kind for kind in sorted(had, key=had.__getitem__) if self._strike(kind)), None)
        if kind is None:
            return False
        hits[kind] += 1
        log.info("%3d  %s", hits.total(), kind)
        self._excused = self._driver.code is not None
        return True

    def _kinds(self) -> Iterator[Kind]:
        """Yield the kinds that would find a victim now."""
        processes = self._scene.processes()
        if titled(processes, TRIAL_WORKER):
            yield Kind.TRIAL_WORKER
        if titled(processes, PRETRAIN_WORKER):
            yield Kind.PRETRAIN_WORKER
        yield from (Kind.RAYLET, Kind.NODE, Kind.DRIVER)
        # While storage fails the driver cannot promise how it ends.
        if self._trouble_ends is None:
            yield from (Kind.TERMINATE, Kind.HEAD, *self._storage.kinds)

    def _strike(self, kind: Kind) -> bool:
        processes = self._scene.processes()
        if kind is Kind.TRIAL_WORKER:
            return self._kill_one(titled(processes, TRIAL_WORKER))
        if kind is Kind.PRETRAIN_WORKER:
            return self._kill_one(titled(processes, PRETRAIN_WORKER))
        if kind in (Kind.RAYLET, Kind.NODE):
            return self._kill_node(processes, whole=kind is Kind.NODE)
        if kind is Kind.DRIVER:
            return self._driver.kill()
        if kind is Kind.TERMINATE:
            return self._driver.terminate()
        if kind is Kind.HEAD:
            return self._kill_head()
        if not self._storage.begin(kind):
            return False
        if kind is Kind.DISK_STAYS_FULL:
            self._driver.end_without_disk(self._storage.hold)
            self._storage.end()
        else:
            self._trouble_ends = time.monotonic() + self._rng.uniform(*_TROUBLE)
        return True

    def _kill_one(self, victims: list[Process]) -> bool:
        return bool(victims) and kill(self._rng.choice(victims).pid)

    def _kill_node(self, processes: list[Process], *, whole: bool) -> bool:
        """Kill a raylet, of a node that works if there is one; a new node joins as an autoscaler would bring it."""
        nodes = {node.raylet: below(processes, node.raylet) for node in self._scene.cluster.nodes}
        busy = [
            raylet
            for raylet, workers in nodes.items()
            if any(w.title.startswith("ray::") and not w.title.startswith(SERVANTS) for w in workers)
        ]
        raylet = self._rng.choice(busy or list(nodes))
        hit = kill(raylet)
        for process in nodes[raylet] if whole else ():
            kill(process.pid)
        self._scene.cluster.replace_node(raylet)
        return hit

    def _kill_head(self) -> bool:
        """Kill GCS and raylet of the head; all else of the cluster ends with it, and another one is made."""
        head = self._scene.cluster.head
        assert head.gcs is not None
        hit = kill(head.gcs, signal.SIGKILL) and kill(head.raylet)
        self._driver.end_without_head()
        self._scene.renew_cluster()
        return hit

    def _end_trouble(self) -> None:
        if self._trouble_ends is not None:
            self._storage.end()
            self._trouble_ends = None
