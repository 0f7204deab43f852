"""A run directory on any filesystem that pyarrow knows: whole files in and out, nothing half-written visible."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs

from raybd.errors import DataError


class Store:
    """A run directory, local or `s3://…`. It may come from a stranger: no name in it, and no link, leads out of it.

    Args:
        uri: a path, or a URI that `pyarrow.fs.FileSystem.from_uri` takes.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        if "://" in uri:
            self.fs, self.root = fs.FileSystem.from_uri(uri)
        else:
            self.uri = self.root = str(Path(uri).expanduser().absolute())
            self.fs = fs.LocalFileSystem()
        self.local = isinstance(self.fs, fs.LocalFileSystem)

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return (Store, (self.uri,))

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

    def below(self, name: str) -> str:
        """Return the URI of a folder in the run directory; the options of a URI (`?region=…`) stay at its end."""
        head, mark, options = self.uri.partition("?")
        return f"{head.rstrip('/')}/{name}{mark}{options}"

    def put(self, name: str, content: bytes) -> None:
        """Write a whole file: readers see the old one or the new one, never a part."""
        if not self.local:
            # One write of ready bytes: an exception inside the stream would commit a truncated object.
            with self.fs.open_output_stream(self.path(name)) as stream:
                stream.write(content)
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def get(self, name: str) -> bytes:
        """Return a file's bytes. Errors: DataError if it is not there."""
        try:
            with self.fs.open_input_stream(self.path(name)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            raise DataError("no such file in the run directory", where=self.path(name)) from None

    def exists(self, name: str) -> bool:
        """Say whether a file is there."""
        return bool(self.fs.get_file_info(self.path(name)).type == fs.FileType.File)

    def names(self, folder: str, *, suffix: str = "") -> list[str]:
        """Return the files below a folder, relative to the run directory, sorted; none if the folder is not there."""
        if self.local:
            return sorted(
                name for name in self._local_names(self.path(folder) if folder else self.root) if name.endswith(suffix)
            )
        selector = fs.FileSelector(self.path(folder) if folder else self.root, recursive=True, allow_not_found=True)
        found = []
        for info in self.fs.get_file_info(selector):
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
            self.fs.delete_file(self.path(name))
