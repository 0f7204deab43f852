"""What has been read once: the index of a set of shards, and its decoded images as one memory-mapped array.

Every process of a machine maps the same file, so trials share one copy of the images. An entry is named by what it
was made from (shards with sizes and times, image size, which keys), written beside and renamed: it is whole or absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from raybd import pulse
from raybd.data import limits
from raybd.data.shards import NO_LABEL, Index, RawSample, Skipped, array_of_tuples, decode, make_index, samples
from raybd.errors import DataError
from raybd.provenance import digest

log = logging.getLogger(__name__)
_FORMAT = 3
_CHUNK = 256
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Images:
    """Decoded samples: row i of `index` has the uint8 image `pixels_MCHW[at_N[i]]`.

    Attributes:
        digest: hash of all pixels.
    """

    index: Index
    pixels_MCHW: NDArray[np.uint8]
    at_N: NDArray[np.int64]
    digest: str = ""

    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return a copy of the images of some rows, uint8 [B, 3, H, W]."""
        return np.ascontiguousarray(self.pixels_MCHW[self.at_N[rows]])

    def take(self, rows: NDArray[np.int64]) -> Images:
        """Return the samples of some rows; the pixels stay where they are."""
        return Images(self.index.take(rows), self.pixels_MCHW, self.at_N[rows], self.digest)


def folder(cache_dir: str | None) -> Path:
    """Return the folder of all entries: the one asked for, `$RAYBD_CACHE`, or the user's cache folder."""
    chosen = cache_dir or os.environ.get("RAYBD_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.access(os.path.dirname(base) or "/", os.W_OK):
        return Path(base) / "raybd"
    shared = Path(tempfile.gettempdir()) / f"raybd-{os.getuid()}"
    shared.mkdir(mode=0o700, exist_ok=True)
    if shared.is_symlink() or shared.stat().st_uid != os.getuid():
        raise DataError("this cache is somebody else's", where=str(shared), fix="set RAYBD_CACHE to a folder of yours")
    return shared


def fingerprint(shards: Sequence[str]) -> str:
    """Return a hash of shards by name, size and time of change; a shard that is replaced changes it."""
    facts = []
    for url in shards:
        filesystem, path = fsspec.core.url_to_fs(url)
        try:
            info = filesystem.info(path)
        except FileNotFoundError:
            raise DataError("no such shard", where=url) from None
        stamp = info.get("mtime") or info.get("LastModified") or info.get("ETag") or info.get("updated")
        facts.append([url, info.get("size"), str(stamp)])
    return digest(facts, length=16)


def content_hash(index: Index) -> str:
    """Return a hash of what the samples are, wherever they lie: keys, captions and labels."""
    return digest([index.keys.tolist(), index.captions.tolist(), index.labels.tolist()])


def load_index(shards: Sequence[str], *, cache_dir: str | None, labelled: bool = False) -> Index:
    """Return the index of shards without decoding images; read from the cache where it has been made before.

    Errors: DataError on a shard that cannot be read, or two samples with one key.
    """
    home = folder(cache_dir) / f"index-{digest([_FORMAT, fingerprint(shards), labelled])}"
    with _locked(home):
        found = _read(home)
        if found is not None:
            return found.index
        index = make_index(shards, list(_read_all(shards)), labelled=labelled)
        _commit(home, index, None)
        return index


def load_images(
    shards: Sequence[str],
    *,
    size: int,
    cache_dir: str | None,
    labelled: bool = False,
    keys: Collection[str] | None = None,
) -> Images:
    """Return decoded images of shards, all or those of `keys`; broken ones are among `index.skipped`.

    Args:
        size: side of the square images, pixels.
        labelled: a sample without a label counts as unusable.

    Errors: DataError.
    """
    wanted = digest(sorted(keys)) if keys is not None else None
    home = folder(cache_dir) / f"images-{digest([_FORMAT, fingerprint(shards), size, labelled, wanted])}"
    with _locked(home):
        found = _read(home)
        if found is None:
            _decode_to(home, shards, size=size, labelled=labelled, keys=keys)
            found = _read(home)
            assert found is not None
        return found


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Let one process of a machine at a time look for an entry and make it; the others wait and find it."""
    home.parent.mkdir(parents=True, exist_ok=True)
    # No link is followed: others may write to a folder below /tmp.
    lock = os.open(home.parent / f".{home.name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pulse.beat()
                time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(lock)


def _read_all(shards: Sequence[str]) -> Iterator[tuple[int, RawSample]]:
    """Yield (shard number, sample without its image bytes) of every shard."""
    for number, url in enumerate(shards):
        for sample in samples(url):
            yield number, replace(sample, image=b"")


def _decode_to(home: Path, shards: Sequence[str], *, size: int, labelled: bool, keys: Collection[str] | None) -> None:
    """Decode into a temporary file beside the entry, then commit it."""
    home.parent.mkdir(parents=True, exist_ok=True)
    # An unlinked temporary file: a process that dies leaves nothing behind.
    with tempfile.TemporaryFile(dir=home.parent) as pixels, ThreadPoolExecutor() as pool:
        entries: list[tuple[int, RawSample]] = []
        found = hashlib.sha256()
        for chunk in _chunks(_wanted(shards, keys)):
            for (number, sample), image in zip(chunk, pool.map(lambda pair: _try(pair[1], size), chunk), strict=True):
                problem = image if isinstance(image, str) else NO_LABEL if labelled and sample.label < 0 else ""
                entries.append((number, replace(sample, image=b"", problem=problem)))
                if not isinstance(image, str) and not problem:
                    pixels.write(image.tobytes())
                    found.update(image.tobytes())
        index = make_index(shards, entries, labelled=labelled)
        pixels.seek(0)
        _commit(home, index, pixels, shape=(len(index), 3, size, size), pixels_hash=found.hexdigest())


def _wanted(shards: Sequence[str], keys: Collection[str] | None) -> Iterator[tuple[int, RawSample]]:
    wanted = set(keys) if keys is not None else None
    for number, url in enumerate(shards):
        for sample in samples(url):
            if wanted is None or sample.key in wanted:
                yield number, sample


def _chunks(found: Iterable[tuple[int, RawSample]]) -> Iterator[list[tuple[int, RawSample]]]:
    """Yield samples in groups that are decoded at once: not too many, and not too many bytes."""
    chunk, held = [], 0
    for pair in found:
        chunk.append(pair)
        held += len(pair[1].image)
        if len(chunk) == _CHUNK or held > limits.MAX_IMAGE_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _try(sample: RawSample, size: int) -> NDArray[np.uint8] | str:
    if sample.problem:
        return sample.problem
    try:
        return decode(sample.image, size)
    except ValueError as error:
        return str(error)


def _commit(home: Path, index: Index, pixels: Any, *, shape: tuple[int, ...] = (), pixels_hash: str = "") -> None:
    """Write an entry beside its place and rename it there; a process that was faster wins."""
    home.parent.mkdir(parents=True, exist_ok=True)
    temporary = home.parent / f".{home.name}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        meta = {
            "shards": index.shards,
            "keys": index.keys.tolist(),
            "captions": index.captions.tolist(),
            "labels": index.labels.tolist(),
            "shard": index.shard.tolist(),
            "row": index.row.tolist(),
            "skipped": [asdict(skip) for skip in index.skipped],
            "shape": shape,
            "pixels_hash": pixels_hash,
            "listed": None if index.listed is None else index.listed.tolist(),
        }
        (temporary / "index.json").write_text(json.dumps(meta), encoding="utf-8")
        if pixels is not None:
            with open(temporary / "pixels.u8", "wb") as target:
                shutil.copyfileobj(pixels, target, 1 << 22)
        temporary.rename(home)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (isinstance(error, OSError) and home.is_dir()):
            raise


def _read(home: Path) -> Images | None:
    """Return an entry, None if there is none; one that a crash of the machine has damaged is removed."""
    if not home.is_dir():
        return None
    try:
        return _load(home)
    except (ValueError, KeyError, TypeError, OSError) as error:
        log.warning("cache entry %s is damaged and is made again: %s", home, error)
        shutil.rmtree(home, ignore_errors=True)
        return None


def _load(home: Path) -> Images:
    meta = json.loads((home / "index.json").read_text(encoding="utf-8"))
    index = Index(
        shards=tuple(meta["shards"]),
        keys=np.array(meta["keys"], dtype=np.str_),
        captions=np.array(meta["captions"], dtype=object),
        labels=np.array(meta["labels"], dtype=np.int64),
        shard=np.array(meta["shard"], dtype=np.int64),
        row=np.array(meta["row"], dtype=np.int64),
        skipped=tuple(Skipped(**skip) for skip in meta["skipped"]),
        listed=None if meta["listed"] is None else array_of_tuples(meta["listed"]),
    )
    shape = tuple(meta["shape"])
    pixels: NDArray[np.uint8] = np.zeros(shape or (0,), dtype=np.uint8)
    if shape and shape[0]:
        pixels = np.memmap(home / "pixels.u8", dtype=np.uint8, mode="r", shape=shape)
    return Images(index, pixels, np.arange(len(pixels)), meta["pixels_hash"])
