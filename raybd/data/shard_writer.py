"""Writes a data root: webdataset shards, their classes and their manifest, all of it or nothing.

`train/train-000000.tar.gz` …, `test/…`, `classes.json` (label, class_name, samples in train and in test) and
`manifest.json` (samples, bytes and SHA-256 of each file; what was left out). A sample is KEY.jpg|png|webp, KEY.txt
(caption) and KEY.json (label and class_name, where there are classes, and source); keys are unique over all shards.
The same samples and library versions give the same bytes. The folder appears under its name when it is complete.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import shutil
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from raybd.data import limits
from raybd.errors import DataError

log = logging.getLogger(__name__)

SPLITS = ("train", "test")
COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # kept byte for byte; MPO: JPEG from some phones
# Other decoders of Pillow's run programs, or are seldom looked at.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
PNG_MODES = frozenset({"1", "L", "LA", "RGB", "RGBA", "I;16"})


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out: which, and why."""

    source: str
    why: str


@dataclass(frozen=True)
class Imported:
    """What an import wrote: samples in each split, class names by label (none without labels), what was left out."""

    out: Path
    samples: dict[str, int]
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample to write: its name in the source, the image (a file, or encoded bytes), caption and label."""

    source: str
    image: Path | bytes
    caption: str
    label: int | None


def png(image: Image.Image) -> bytes:
    """Return an image encoded as PNG, without loss except for modes that PNG lacks."""
    if image.mode not in PNG_MODES:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _encoded(image: Path | bytes) -> tuple[str, bytes]:
    """Return suffix and bytes of an image that decodes to the end: as it is, or as PNG where shards lack its format.

    Errors: ValueError where shards cannot hold it, and whatever decoders of damaged files happen to raise.
    """
    size = len(image) if isinstance(image, bytes) else image.stat().st_size
    if size > limits.MAX_IMAGE_BYTES:
        raise ValueError(f"{size} bytes, at most {limits.MAX_IMAGE_BYTES} expected")
    content = image if isinstance(image, bytes) else image.read_bytes()
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        if opened.width * opened.height > limits.MAX_PIXELS:
            raise ValueError(f"{opened.width}x{opened.height} pixels, at most {limits.MAX_PIXELS} expected")
        opened.load()
        suffix = COPIED.get(opened.format or "")
        return (suffix, content) if suffix else ("png", png(opened))


def _members(samples: Iterable[Sample], classes: list[str], skipped: list[Skipped]) -> Iterator[tuple[Sample, Any]]:
    """Yield the samples that decode with their files by suffix; add the others to `skipped`."""
    for sample in samples:
        try:
            if problem := limits.caption_problem(sample.caption):
                raise ValueError(problem)
            suffix, content = _encoded(sample.image)
        except Exception as error:  # decoders of damaged files raise whatever they happen to
            unknown = isinstance(error, UnidentifiedImageError)  # its text holds an address: other bytes at each run
            why = "not an image" if unknown else f"{type(error).__name__}: {error}"
            skipped.append(Skipped(sample.source, why))
            log.warning("skipped %s: %s", sample.source, why)
            continue
        about: dict[str, Any] = {"source": sample.source}
        if sample.label is not None:
            about = {"label": sample.label, "class_name": classes[sample.label], **about}
        record = json.dumps(about, ensure_ascii=False, separators=(",", ":"))
        yield sample, {suffix: content, "txt": sample.caption.encode(), "json": record.encode()}


def _write_shard(path: Path, members: Iterable[tuple[Sample, dict[str, bytes]]], first_key: int) -> dict[str, Any]:
    """Write one shard without times and owners; return its entry of the manifest (`file` is for the caller)."""
    count = 0
    with open(path, "wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:  # noqa: SIM117
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for _, files in members:
                for suffix, content in files.items():
                    info = tarfile.TarInfo(f"{first_key + count:09d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                count += 1
    with open(path, "rb") as done:
        digest = hashlib.file_digest(done, "sha256").hexdigest()
    return {"samples": count, "bytes": path.stat().st_size, "sha256": digest}


def _write_split(
    folder: Path,
    samples: Iterator[tuple[Sample, Any]],
    *,
    samples_per_shard: int,
    first_key: int,
    counts: Counter[int],
) -> list[dict[str, Any]]:
    """Write the shards of one split into OUT/SPLIT, counting samples of each label; return the manifest's entries."""
    entries: list[dict[str, Any]] = []

    def counted(first: tuple[Sample, Any]) -> Iterator[tuple[Sample, Any]]:
        for sample, files in chain([first], islice(samples, samples_per_shard - 1)):
            if sample.label is not None:
                counts[sample.label] += 1
            yield sample, files

    for first in samples:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{folder.name}-{len(entries):06d}.tar.gz"
        entry = _write_shard(folder / name, counted(first), first_key)
        entries.append({"file": f"{folder.name}/{name}", **entry})
        first_key += entry["samples"]
        log.info("%s/%s: %d samples", folder.name, name, entry["samples"])
    return entries


def _write_splits(
    folder: Path,
    given: Mapping[str, Iterable[Sample]],
    classes: list[str],
    skipped: list[Skipped],
    *,
    samples_per_shard: int,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Counter[int]]]:
    """Write all shards; return the manifest's entries and the samples of each label, by split."""
    shards: dict[str, list[dict[str, Any]]] = {}
    counts: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
    written = 0
    for split in SPLITS:
        found = _members(given[split], classes, skipped)
        shards[split] = _write_split(
            folder / split, found, samples_per_shard=samples_per_shard, first_key=written, counts=counts[split]
        )
        written += sum(entry["samples"] for entry in shards[split])
    return shards, counts


def write(
    out: Path,
    given: Mapping[str, Iterable[Sample]],
    classes: list[str],
    *,
    about: dict[str, Any],
    samples_per_shard: int,
    skipped: Iterable[Skipped] = (),
) -> Imported:
    """Write the given samples of each split, in their order, to a folder that is not there or empty.

    Images that do not decode are skipped and named; `skipped` are those that the caller left out, `about` says in the
    manifest where all this is from. Errors: DataError if nothing is left to train on.
    """
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    left_out = list(skipped)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        shards, counts = _write_splits(temporary, given, classes, left_out, samples_per_shard=samples_per_shard)
        if not shards["train"]:
            why = f"; {len(left_out)} were skipped, the first is {left_out[0].source}" if left_out else ""
            raise DataError(f"no training samples{why}", where=str(out), fix="repair the images, or lower test_share")
        listed = [
            {"label": label, "class_name": name, **{split: counts[split][label] for split in SPLITS}}
            for label, name in enumerate(classes)
        ]
        _write_json(temporary / "classes.json", listed)
        unusable = [{"source": item.source, "why": item.why} for item in left_out]
        manifest = {"name": out.name, "source": about, "splits": shards, "skipped": unusable}
        _write_json(temporary / "manifest.json", manifest)
        if out.exists():
            out.rmdir()  # empty: a folder that has been filled meanwhile stays, and this fails
        temporary.rename(out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise DataError(f"cannot be written: {error}", where=str(out)) from error
        raise
    samples = {split: sum(entry["samples"] for entry in shards[split]) for split in SPLITS}
    return Imported(out, samples, tuple(classes), tuple(left_out))


def _write_json(path: Path, content: Any) -> None:
    # Names of files may hold what is no character.
    path.write_bytes((json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode(errors="backslashreplace"))
