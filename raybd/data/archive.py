"""The files of a shard: a tar, packed with gzip or not, that may be damaged or made to do harm.

Nothing is written to disk, links lead nowhere, and no more is held in memory than one file and one header.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, Self

from raybd.data import limits

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json")
# Types of headers that tarfile reads with their content.
_READ_AT_ONCE = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class Unusable(str):
    """What stands for the content of a file that is not read: why it cannot be used."""


class _Header(tarfile.TarInfo):
    """A header that must be whole: tarfile takes a shard that is cut off between two files for a complete one.

    The content of a header that is written as a file, which tarfile reads at once, must not be large.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            found = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the mark at the end of every shard
            raise tarfile.ReadError(f"cut off or damaged: {error}") from None
        if found.type in _READ_AT_ONCE and found.size > limits.MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {found.size} bytes")
        return found


class _Packed:
    """The bytes of a shard in order, those first that were read before; `count` is how many there were."""

    def __init__(self, stream: Any, *, head: bytes) -> None:
        self._stream, self._head, self.count = stream, head, 0

    def read(self, size: int) -> bytes:
        content: bytes = self._head[:size] or self._stream.read(size)
        self._head = self._head[size:]
        self.count += len(content)
        return content


class _Unpacked:
    """The bytes of a shard in order, unpacked. Errors: tarfile.ReadError where they are too many, or end too early."""

    def __init__(self, stream: Any) -> None:
        head = stream.read(2)
        self._packed = _Packed(stream, head=head)
        self._source: Any = self._packed
        if head == b"\x1f\x8b":
            self._source = gzip.GzipFile(fileobj=self._packed, mode="rb")  # type: ignore[call-overload] # it only reads
        self._count = self._empty = 0

    def read(self, size: int) -> bytes:
        content: bytes = self._source.read(size)
        self._count += len(content)
        if self._count > max(limits.MAX_UNPACKED_BYTES, limits.MAX_RATIO * self._packed.count):
            raise tarfile.ReadError(f"it unpacks to more than {limits.MAX_RATIO} times its size, as bombs do")
        # tarfile goes on at the end, block by block, until it has skipped as many bytes as a header says.
        self._empty = 0 if content else self._empty + 1
        if self._empty > 2:
            raise tarfile.ReadError("unexpected end of data")
        return content


def _most(name: str) -> int:
    """Return how many bytes a file of a shard may have, by its name; 0 for files that are not looked at."""
    suffix = name.rpartition("/")[2].partition(".")[2].lower()
    return limits.MAX_IMAGE_BYTES if suffix in IMAGES else limits.MAX_TEXT_BYTES if suffix in TEXTS else 0


def _shorter(name: str) -> str:
    """Return a name that is as good as unique, the same before the suffix for the files of a sample."""
    stem, _, suffix = name.rpartition(".")
    start = re.sub(r"[./]", "_", stem[:80])
    return f"{start}-{zlib.crc32(stem.encode(errors='backslashreplace')):08x}.{suffix[:20].replace('/', '_')}"


def files(stream: Any, url: str) -> Iterator[dict[str, Any]]:
    """Yield the files of a shard, compressed or not, as webdataset's `tar_file_expander` does.

    In place of the content of a file that cannot be used is an `Unusable`; other files than those of samples are empty.
    """
    unpacked: Any = _Unpacked(stream)
    with tarfile.open(fileobj=unpacked, mode="r|", tarinfo=_Header) as tar:
        for member in tar:
            name = member.name
            content: Any = b""
            if not member.isreg() or re.match(r"__[^/]*__($|/)", name):
                continue
            if len(name) > limits.MAX_NAME:
                name = _shorter(name)
                content = Unusable(f"name too long: {len(member.name)} characters, at most {limits.MAX_NAME} expected")
            elif most := _most(name):
                if 0 <= member.size <= most:
                    content = tar.extractfile(member).read()  # type: ignore[union-attr] # it is a regular file
                else:
                    content = Unusable(f"file too large: {member.size} bytes, at most {most} expected")
            yield {"fname": name, "data": content, "__url__": url}
            tar.members = []  # type: ignore[attr-defined] # they would be kept in memory
