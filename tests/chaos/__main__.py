"""`make chaos`: faults at random moments, until so many have hit; see README.md beside this file."""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from raybd.store import Store
from tests.chaos.kinds import STORAGE, Kind
from tests.chaos.round import Round
from tests.chaos.scene import Scene
from tests.chaos.storage import Disk, Folder, Storage, may_mount
from tests.chaos.tally import Harm, Tally

log = logging.getLogger("chaos")

_IN_NAMESPACE = "RAYBD_CHAOS_NAMESPACE"
_BUCKET_EVERY = 4  # every so many rounds run in a bucket, the others on a disk


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=100, help="so many must hit")
    parser.add_argument("--per-round", type=int, default=18, help="at most so many while one study runs")
    parser.add_argument("--kinds", default=",".join(kind.name.lower() for kind in Kind), help="to draw from")
    parser.add_argument("--study", default=str(Path(__file__).with_name("study.yaml")))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to raybd")
    parser.add_argument("--reference", help="run directory of the study without a fault; default: it is made")
    parser.add_argument("--json", type=Path, default=Path("chaos.json"), help="where the tally goes")
    return parser.parse_args()


def _enter_namespace() -> None:
    """Go on in a mount namespace, whose disks nobody else sees; or as before where there can be none."""
    if _IN_NAMESPACE in os.environ:
        return
    options = ["-m"] if os.geteuid() == 0 else ["-U", "-r", "-m"]
    os.environ[_IN_NAMESPACE] = "1"
    if shutil.which("unshare") and not subprocess.run(["unshare", *options, "true"], capture_output=True).returncode:
        os.execvp("unshare", ["unshare", *options, sys.executable, "-m", "tests.chaos", *sys.argv[1:]])


def _storage(scene: Scene, number: int, *, disks: bool, bucket: bool) -> Storage:
    """Return where the study of a round runs."""
    if bucket and (number % _BUCKET_EVERY == _BUCKET_EVERY - 1 or not disks):
        return scene.bucket_folder(f"round-{number}")
    folder = scene.scratch / f"round-{number}"
    return Disk(folder) if disks else Folder(folder)


def main() -> int:
    """Run rounds until enough faults have hit; return 0 if they did no harm."""
    asked = _arguments()
    _enter_namespace()
    # Ended from outside, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    allowed = frozenset(Kind[name.upper()] for name in asked.kinds.split(","))
    scratch = Path(tempfile.mkdtemp(prefix="chaos-"))
    tally, rng = Tally(asked.seed), random.Random(asked.seed)
    refused = may_mount(scratch / "probe")
    disks = not refused and bool(allowed & set(Disk.kinds))
    if refused and allowed & set(Disk.kinds):
        tally.skipped.append(f"{', '.join(Disk.kinds)}: this machine lets nobody mount a disk: {refused.strip()}")
    bucket = bool((allowed & STORAGE) - set(Disk.kinds))
    scene = Scene(asked.study, [word for setting in asked.set for word in ("--set", setting)], scratch)
    try:
        reference = Store(asked.reference or scene.reference())
        while (left := asked.faults - tally.hits.total()) > 0 and not tally.found[Harm.STUCK]:
            storage = _storage(scene, tally.rounds, disks=disks, bucket=bucket)
            log.info("round %d in %s", tally.rounds + 1, storage.uri)
            most = min(left, asked.per_round)
            Round(scene, storage, rng, tally, most=most, allowed=allowed).run(reference)
            tally.write(asked.json)
            storage.close()
    finally:
        left_over = scene.close()
    tally.found[Harm.ORPHANS] += [f"at the end: {process.pid} {process.title}" for process in left_over]
    tally.write(asked.json)
    tally.show()
    if tally.clean:
        pass
    else:
        log.error("what it left is in %s", scratch)
    return 0 if tally.clean else 1


if __name__ == "__main__":
    sys.exit(main())
