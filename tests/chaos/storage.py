"""Where a run directory lies, and how its storage is made to fail: a small disk of its own, a bucket, or a folder."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tests.chaos.bucket import BUCKET, Bucket, Trouble
from tests.chaos.kinds import Kind

DISK_MEGABYTES = 768
_TROUBLE = {
    Kind.BUCKET_SLOW: Trouble.SLOW,
    Kind.BUCKET_ERRORS: Trouble.ERRORS,
    Kind.BUCKET_DROPS: Trouble.DROPS,
}


class Storage(Protocol):
    """A place for a run directory.

    Attributes:
        uri: of the run directory, for `raybd run`.
        reader_uri: the same for who watches: what fails for the study does not fail for it.
        kinds: the faults that it can have.
    """

    uri: str
    reader_uri: str
    kinds: tuple[Kind, ...]

    def begin(self, kind: Kind) -> bool:
        """Begin to fail; say whether it does."""

    def hold(self) -> None:
        """Keep failing: called again and again until the end."""

    def end(self) -> None:
        """Work again."""

    def close(self) -> None:
        """Remove it with all that it holds."""


class Folder:
    """A plain folder, which does not fail: where nothing may be mounted."""

    kinds: tuple[Kind, ...] = ()

    def __init__(self, path: Path) -> None:
        self._path = path
        self.uri = self.reader_uri = str(path / "run")

    def begin(self, kind: Kind) -> bool:
        """Say that it cannot fail."""
        return False

    def hold(self) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._path, ignore_errors=True)


class Disk:
    """A small disk in memory, of this mount namespace: it can be full, and it can be read-only."""

    kinds: tuple[Kind, ...] = (Kind.DISK_FULL, Kind.DISK_STAYS_FULL, Kind.READ_ONLY)

    def __init__(self, path: Path) -> None:
        self._path, self._filler = path, path / "filler"
        self._full = self._covered = False
        path.mkdir(parents=True)
        mount("-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "chaos", str(path))
        self.uri = self.reader_uri = str(path / "run")

    def begin(self, kind: Kind) -> bool:
        """Fill the disk, or make it read-only as a disk with errors becomes."""
        if kind is Kind.READ_ONLY:
            self._cover()
        else:
            self._full = True
            self.hold()
        return True

    def _cover(self) -> None:
        """Mount the disk once more above itself, read-only: the kernel refuses that of one on which files are open."""
        while not self._covered:
            mount("--bind", str(self._path), str(self._path))
            try:
                mount("-o", "remount,ro,bind", str(self._path))
                self._covered = True
            except subprocess.CalledProcessError:  # somebody opened a file in between
                unmount(self._path)

    def hold(self) -> None:
        """Fill what others have set free, to the last page."""
        if not self._full:
            return
        for size in (1024**2, 4096):
            with suppress(OSError), open(self._filler, "ab", buffering=0) as file:
                while file.write(bytes(size)) == size:
                    pass

    def end(self) -> None:
        """Free what was filled, and let writers in."""
        if self._covered:
            unmount(self._path)
        self._full = self._covered = False
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount, also under files that someone has open."""
        unmount(self._path)
        self._path.rmdir()


class BucketFolder:
    """A folder of a bucket, reached through a proxy that makes trouble; who watches goes past it."""

    kinds: tuple[Kind, ...] = (Kind.BUCKET_SLOW, Kind.BUCKET_ERRORS, Kind.BUCKET_DROPS)

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name = bucket, name
        self.uri, self.reader_uri = (
            f"s3://{BUCKET}/{name}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
            for port in (bucket.proxy_port, bucket.port)
        )

    def begin(self, kind: Kind) -> bool:
        """Let the proxy delay requests, answer with errors, or hang up."""
        self._bucket.trouble = _TROUBLE[kind]
        return True

    def hold(self) -> None:
        """Do nothing: the proxy goes on."""

    def end(self) -> None:
        """Let everything pass."""
        self._bucket.trouble = Trouble.NONE

    def close(self) -> None:
        """Leave what is there: it lies in the memory of a server that ends with the harness."""


def mount(*arguments: str) -> None:
    """Call mount. Errors: CalledProcessError."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def unmount(path: Path) -> None:
    """Take away the uppermost mount of a path, also under files that someone has open."""
    subprocess.run(["umount", "--lazy", str(path)], check=True, capture_output=True)


def may_mount(scratch: Path) -> str:
    """Return why this process may not mount a disk; empty where it may."""
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        mount("-t", "tmpfs", "-o", "size=1m", "chaos", str(scratch))
        unmount(scratch)
    except (OSError, subprocess.CalledProcessError) as error:
        return str(getattr(error, "stderr", b"") or error)
    return ""
