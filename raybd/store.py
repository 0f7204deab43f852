"""A run directory on any filesystem that pyarrow knows: whole files in and out, nothing half-written visible.

A disk or bucket that fails is tried again for a while: what a run has done is worth more than a minute.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from raybd import pulse
from raybd.errors import DataError, StorageError

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
_SIDE_BY_SIDE = 16  # files of a bucket that are fetched, or wait to be taken, at once
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")
# No waiting mends these.
_HOPELESS = (PermissionError, NotADirectoryError, IsADirectoryError)
# In front of a bucket a number after the colon is no port.
_BUCKETS = "|".join(rf"(?<=\b{scheme})" for scheme in ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"))
_HALVES = re.compile("[\ud800-\udfff]")  # of characters: bytes of a name that are not UTF-8
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)

T = TypeVar("T")


def credentials_form(ends: str = "") -> re.Pattern[str]:
    """Return the form of what in an address is a key or a password, ://KEY:SECRET@.

    Args:
        ends: characters, as within a regular expression's brackets, that no address has where it stands in a text.
    """
    name = rf"[^/:@?#{ends}]*"
    return re.compile(rf"(?:(?:{_BUCKETS})://{name}:|://{name}:(?!\d+(?:[/?#{ends}]|$)))[^@{ends}]*@")


_CREDENTIALS = credentials_form()


class Store:
    """A run directory, local or `s3://…`. It may come from a stranger: no name in it, and no link, leads out of it.

    Args:
        uri: a path, or a URI that `pyarrow.fs.FileSystem.from_uri` takes, without credentials: it is printed, and
            written into the run directory.
        patience: seconds for which an operation that fails is tried again.

    Errors: DataError where it is no path and no such URI; every method raises StorageError where the disk or bucket
        still fails when patience is at its end.
    """

    def __init__(self, uri: str, *, patience: float = PATIENCE_SECONDS) -> None:
        self.uri, self.patience = uri, patience
        if "\0" in uri or _HALVES.search(uri):
            raise DataError("no name of a run directory", where=repr(uri)[1:-1], expected="a path in UTF-8, or s3://…")
        if _CREDENTIALS.search(uri):
            raise DataError(
                "the address of a run directory holds credentials",
                where=_CREDENTIALS.sub("://…@", uri),
                fix="leave them to the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN), to a "
                "profile or to the machine's role: addresses are printed, and stored",
            )
        if "://" in uri:
            try:
                self.fs, self.root = fs.FileSystem.from_uri(uri)
            except (pa.ArrowException, ValueError) as error:
                raise DataError(f"no run directory: {error}", where=uri, expected="a path, or s3://…") from None
        else:
            self.uri = self.root = str(Path(uri).expanduser().absolute())
            self.fs = fs.LocalFileSystem()
        self.local = isinstance(self.fs, fs.LocalFileSystem)

    def __reduce__(self) -> tuple[object, ...]:
        return (_reopen, (self.uri, self.patience))

    def path(self, name: str) -> str:
        """Return the full path of a file in the run directory. Errors: DataError on a name that leads out of it."""
        parts = name.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise DataError(
                f"no name of a file in a run directory: {name!r}",
                where=self.uri,
                expected="names without `..` and empty parts; raybd makes no others",
            )
        if self.local:
            for length in range(1, len(parts) + 1):
                self._refuse_link("/".join([self.root, *parts[:length]]))
        return f"{self.root}/{name}"

    def _refuse_link(self, path: str) -> None:
        """Raise DataError on a link: what it leads to may be anything, and is not ours to write or to remove."""
        if os.path.islink(path):
            raise DataError(
                "a link in a run directory is not followed",
                where=path,
                fix="put what it leads to in its place; the run directory itself may be a link",
            )

    def put(self, name: str, content: bytes) -> None:
        """Write a whole file: readers see the old one or the new one, never a part."""
        if self.local:
            self.patiently("write", name, lambda: self._write(name, content, os.replace))
        else:
            self.patiently("write", name, lambda: self._upload(name, content))

    def put_new(self, name: str, content: bytes) -> bool:
        """Write a file that is not there yet; return whether it was written. One that is there stays as it is."""
        if self.local:
            try:
                self.patiently("write", name, lambda: self._write(name, content, os.link), answers=(FileExistsError,))
            except FileExistsError:
                return False
            return True
        if self.exists(name):
            return False
        self.put(name, content)
        return True

    def get(self, name: str) -> bytes:
        """Return a file's bytes. Errors: DataError if it is not there."""
        try:
            return self.patiently("read", name, lambda: self._read(name), answers=(FileNotFoundError,))
        except FileNotFoundError:
            raise DataError("no such file in the run directory", where=self.path(name)) from None

    def get_each(self, names: Sequence[str]) -> Iterator[bytes]:
        """Yield the bytes of files, in the order of their names.

        Each file of a bucket costs a wait for its answer, so some are fetched ahead, side by side; no more than
        `_SIDE_BY_SIDE` are held. A local disk answers at once, and its files are read one by one.

        Errors: as of `get`, when it is the turn of the file that has them.
        """
        if self.local or len(names) < 2:
            yield from map(self.get, names)
            return
        pool = ThreadPoolExecutor(_SIDE_BY_SIDE, thread_name_prefix="raybd-read")
        ahead: deque[tuple[str, Future[bytes]]] = deque()
        try:
            for name in names:
                ahead.append((name, pool.submit(self._read, name)))
                if len(ahead) == _SIDE_BY_SIDE:
                    yield self._awaited(*ahead.popleft())
            while ahead:
                yield self._awaited(*ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _awaited(self, name: str, fetched: Future[bytes]) -> bytes:
        if isinstance(fetched.exception(), OSError):
            return self.get(name)  # who waits for the storage, or tells of the failure, is here
        return fetched.result()

    def _read(self, name: str) -> bytes:
        with self.fs.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read())

    def exists(self, name: str) -> bool:
        """Say whether a file is there."""
        found = self.patiently("look for", name, lambda: self.fs.get_file_info(self.path(name)))
        return bool(found.type == fs.FileType.File)

    def names(self, folder: str, *, suffix: str = "") -> list[str]:
        """Return the files below a folder, relative to the run directory, sorted; none if the folder is not there."""
        where = self.path(folder) if folder else self.root
        if self.local:
            listed = self.patiently("list", folder, lambda: list(self._local_names(where)))
            return sorted(name for name in listed if name.endswith(suffix))
        selector = fs.FileSelector(where, recursive=True, allow_not_found=True)
        found = []
        for info in self.patiently("list", folder, lambda: self.fs.get_file_info(selector)):
            hidden = info.base_name.startswith(".")
            if info.type == fs.FileType.File and not hidden and info.path.endswith(suffix):
                found.append(info.path.removeprefix(self.root).lstrip("/"))
        return sorted(found)

    def _local_names(self, folder: str) -> Iterator[str]:
        """Yield the files below a folder. pyarrow would follow links, round in circles too."""

        def complain(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        for parent, folders, files in os.walk(folder, onerror=complain):
            for name in (*folders, *files):
                self._refuse_link(f"{parent}/{name}")
            yield from (f"{parent}/{name}".removeprefix(f"{self.root}/") for name in files if not name.startswith("."))

    def delete(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.patiently("remove", name, lambda: self.fs.delete_file(self.path(name)), answers=(FileNotFoundError,))

    def remove_temporaries(self, folders: tuple[str, ...], *, files: tuple[str, ...]) -> None:
        """Remove what writers that were killed left of these files, and in these folders.

        A writer that still lives writes its file anew. Nothing else is looked at: a run directory may lie among files
        that are none of ours.
        """
        if not self.local:
            return
        _, _, beside = next(os.walk(self.root), ("", [], []))
        left = [f"{self.root}/{name}" for name in beside if name.startswith(tuple(f".{file}." for file in files))]
        for top in folders:
            left += [f"{folder}/{name}" for folder, _, found in os.walk(self.path(top)) for name in found]
        for path in left:
            if _TEMPORARY.fullmatch(os.path.basename(path)):
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _upload(self, name: str, content: bytes) -> None:
        # One write of ready bytes: an exception inside the stream would commit a truncated object.
        with self.fs.open_output_stream(self.path(name)) as stream:
            stream.write(content)

    def _write(self, name: str, content: bytes, place: Callable[[Path, Path], None]) -> None:
        """Write a hidden file and put it into place as a whole: `os.replace`, or `os.link` for one that is new."""
        target = Path(self.path(name))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target.parent)) from None
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            try:
                place(temporary, target)
            except OSError as error:
                if place is os.link and os.stat(temporary).st_nlink > 1:
                    return  # it was done, and the answer got lost, as happens over a network
                if place is not os.link or error.errno not in _NO_LINKS:
                    raise
                # A filesystem without links: here two writers at the same moment could both be told that theirs is new.
                if target.exists():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
                os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def patiently(self, verb: str, name: str, action: Callable[[], T], *, answers: tuple[type[OSError], ...] = ()) -> T:
        """Do something with a file, again and again while the storage fails.

        Args:
            verb: what is done, for messages.
            answers: errors that are no failure of the storage: they are passed on at once.
        """
        pause, began = _FIRST_PAUSE, time.monotonic()
        while True:
            try:
                return action()
            except answers:
                raise
            except OSError as error:
                waited = time.monotonic() - began
                hopeless = isinstance(error, _HOPELESS) or error.errno == errno.ENAMETOOLONG
                if hopeless or waited >= self.patience:
                    raise self._error(verb, name, error, waited=waited) from error
                if pause == _FIRST_PAUSE:
                    log.warning("cannot %s %s/%s: %s; trying again", verb, self.root, name, _reason(error))
            pulse.beat()  # to wait for the storage is not to hang
            time.sleep(min(pause, self.patience - waited))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _error(self, verb: str, name: str, error: OSError, *, waited: float) -> StorageError:
        """Return what to tell the user of a failure that lasts."""
        what = f"cannot {verb} it: {_reason(error)}"
        if waited >= 1:
            what += f", for {waited:.0f} s"
        if self.local and (free := _free(self.root)):
            what += f" ({free})"
        if error.errno in _FULL:
            fix = "make room"
        elif error.errno in _CLOSED or isinstance(error, PermissionError):
            fix = "make it writable"
        else:
            fix = "see that the disk or bucket answers"
        fix += ", then call the same command again: it goes on, and nothing that was finished is lost"
        return StorageError(what, where=f"{self.root}/{name}", fix=fix)


def _reopen(uri: str, patience: float) -> Store:
    return Store(uri, patience=patience)


def _reason(error: OSError) -> str:
    """Return the reason of a failure in few words: the system's, or a bucket's first line."""
    if error.errno:
        return os.strerror(error.errno).lower()
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def _free(root: str) -> str:
    """Return how much room a local disk has, in words; empty where it does not say."""
    try:
        found = shutil.disk_usage(root)
    except OSError:
        return ""
    return f"{found.free / 1e9:.2f} of {found.total / 1e9:.2f} GB free"
