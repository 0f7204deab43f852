"""Webdataset shards: finding them, reading their samples, and the index of all there is.

A sample is `KEY.jpg|jpeg|png|webp`, `KEY.txt` (caption) and `KEY.json` (`label`, `class_name`, and `captions` where an
image has several), as webdataset groups them. Shards are local files or fsspec URLs, `.tar` or `.tar.gz`.
"""

from __future__ import annotations

import difflib
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from webdataset.tariterators import group_by_keys

from raybd import pulse
from raybd.data import archive, braces, class_names, limits
from raybd.errors import DataError
from raybd.study import Data
from raybd.study_file import embedded

NO_LABEL = "no label"


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in a shard; `problem` says why it cannot be used, "" if it can.

    Attributes:
        row: its place among the samples of its shard.
        label: class number, -1 where there is none.
        captions: all captions of the image where its json lists them, else empty.
    """

    key: str
    row: int
    image: bytes
    caption: str
    label: int
    problem: str = ""
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be used, and why."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Index:
    """All usable samples, in the order of shards and rows. Every array has shape [N].

    Attributes:
        listed: tuples of all captions of each sample; None where no sample lists any.
    """

    shards: tuple[str, ...]
    keys: NDArray[np.str_]
    captions: NDArray[np.object_]
    labels: NDArray[np.int64]
    shard: NDArray[np.int64]
    row: NDArray[np.int64]
    skipped: tuple[Skipped, ...] = field(default=())
    listed: NDArray[np.object_] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, chosen: NDArray[np.int64] | Sequence[int]) -> Index:
        """Return the index of the chosen samples, in the order given."""
        rows = np.asarray(chosen, dtype=np.int64)
        return replace(
            self,
            keys=self.keys[rows],
            captions=self.captions[rows],
            labels=self.labels[rows],
            shard=self.shard[rows],
            row=self.row[rows],
            listed=None if self.listed is None else self.listed[rows],
        )

    def caption_lists(self) -> list[tuple[str, ...]]:
        """Return all captions of each sample: those that its json lists, or the one that it has."""
        listed = [()] * len(self) if self.listed is None else self.listed
        return [tuple(some) or (str(one),) for some, one in zip(listed, self.captions, strict=True)]


def data_root(data: Data) -> str:
    """Return the folder or URL of a study's data; an embedded set's name is looked up in the package."""
    folder = embedded(data.root)
    return str(folder) if folder else data.root


def find_shards(data: Data, patterns: str | Sequence[str], *, field_name: str) -> list[str]:
    """Return the shards that a pattern (glob, brace list, or a list of them) stands for, each once, in order.

    Errors: DataError that names the pattern or the shards that are not there.
    """
    found: list[str] = []
    missing: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in braces.expand(pattern, field_name=field_name):
            url = name if "://" in name or name.startswith("/") else f"{data_root(data).rstrip('/')}/{name}"
            if "**" in name:
                raise DataError(
                    f"`**` looks through every folder below: {url}", where=field_name, expected="train/*.tar, or braces"
                )
            filesystem, path = _filesystem(url, field_name)
            if any(mark in name for mark in "*?["):
                matched = _matched(filesystem, path, field_name)
                found += [filesystem.unstrip_protocol(match) if "://" in url else match for match in matched]
                missing += [] if matched else [url]
            elif filesystem.exists(path):
                found.append(url)
            else:
                missing.append(url)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(
            f"no such shard: {', '.join(missing[:3])}{more}",
            where=field_name,
            fix="set data.root to where the shards are",
        )
    return list(dict.fromkeys(found))


def _matched(filesystem: Any, path: str, field_name: str) -> list[str]:
    try:
        return sorted(str(match) for match in filesystem.glob(path))
    except (ValueError, re.error) as error:
        raise DataError(f"not a glob: {path}: {error}", where=field_name, expected="train/*.tar") from None


def _filesystem(url: str, field_name: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except Exception as error:  # file systems of others raise whatever they happen to
        raise DataError(f"cannot open {url}: {error}", where=field_name) from None


def samples(url: str) -> Iterator[RawSample]:
    """Yield the samples of a shard in their order, unusable ones too.

    Errors: DataError where the shard itself cannot be read to its end.
    """
    try:
        with fsspec.open(url, "rb") as stream:
            for row, sample in enumerate(group_by_keys(archive.files(stream, url))):
                pulse.beat()
                yield _raw(sample, row)
    except FileNotFoundError:
        raise DataError("no such shard", where=url) from None
    # RecursionError: each header that is written as a file is read within the reading of the one before.
    except (tarfile.TarError, zlib.error, OSError, EOFError, ValueError, TypeError, RecursionError) as error:
        reason = str(error.args[0]) if error.args else type(error).__name__
        raise DataError(f"shard cannot be read: {reason}", where=url, fix="fetch or write it again") from None


def _raw(sample: dict[str, Any], row: int) -> RawSample:
    caption, image = "", b""
    meta: Any = {}
    problem = next((str(content) for content in sample.values() if isinstance(content, archive.Unusable)), "")
    if not problem:
        image = next((sample[suffix] for suffix in archive.IMAGES if suffix in sample), b"")
        try:
            caption = sample["txt"].decode("utf-8").strip() if "txt" in sample else ""
            meta = json.loads(sample["json"]) if "json" in sample else {}
        except (ValueError, RecursionError) as error:
            problem = f"caption or json unreadable: {error}"
    if not isinstance(meta, dict):
        problem, meta = "json is not an object", {}
    label, listed = meta.get("label"), meta.get("captions")
    texts = [text.strip() for text in listed if isinstance(text, str)] if isinstance(listed, list) else []
    captions = tuple(text for text in texts if text)
    if not caption and isinstance(meta.get("caption"), str):
        caption = meta["caption"].strip()
    caption = caption or (captions[0] if captions else "")
    return RawSample(
        key=sample["__key__"].encode(errors="backslashreplace").decode(),
        row=row,
        image=image,
        caption=caption,
        label=label if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 2**63 else -1,
        problem=problem or ("" if image else "no image") or limits.caption_problem(caption, *captions),
        captions=captions,
    )


class _TooLarge(ValueError):
    """An image that would take too much memory."""


def _refuse_larger(width: int, height: int) -> None:
    if width * height > limits.MAX_PIXELS:
        raise _TooLarge(f"image too large: {width}x{height} pixels, at most {limits.MAX_PIXELS} expected")


def decode(content: bytes, size: int) -> NDArray[np.uint8]:
    """Return an image as uint8 [3, size, size]: the shorter side resized (bicubic), the centre cut out.

    Errors: ValueError that says what is wrong with the image.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
            _refuse_larger(image.width, image.height)
            if image.format == "JPEG":
                image.draft("RGB", (size, size))
            if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
                picture = image.convert("RGBA").convert("RGB")  # straight to RGB, Pillow warns of it
            else:
                picture = image.convert("RGB")
    except _TooLarge:
        raise
    except UnidentifiedImageError:  # its text holds an address
        raise ValueError("broken image: of no known format") from None
    except Exception as error:  # decoders of damaged files raise whatever they happen to
        raise ValueError(f"broken image: {error}") from None
    if picture.size != (size, size):
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        _refuse_larger(width, height)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        picture = picture.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1))


def make_index(shards: Sequence[str], found: Sequence[tuple[int, RawSample]], *, labelled: bool = False) -> Index:
    """Make the index of samples read from shards.

    Args:
        found: (number of the shard, sample), in order.
        labelled: samples without a label are unusable.

    Errors: DataError where two samples have one key.
    """
    usable: list[tuple[int, RawSample]] = []
    skipped: list[Skipped] = []
    seen: dict[str, int] = {}
    for number, sample in found:
        problem = sample.problem or (NO_LABEL if labelled and sample.label < 0 else "")
        if problem:
            skipped.append(Skipped(shards[number], sample.key, problem))
            continue
        if sample.key in seen:
            raise DataError(
                f"two samples have the key {sample.key!r}",
                where=f"{shards[seen[sample.key]]} and {shards[number]}",
                fix="keys tell poisoned from clean pairs, so they must differ; `raybd data import` writes such shards",
            )
        seen[sample.key] = number
        usable.append((number, sample))
    captions = [sample.captions for _, sample in usable]
    return Index(
        shards=tuple(shards),
        keys=np.array([sample.key for _, sample in usable], dtype=np.str_),
        captions=np.array([sample.caption for _, sample in usable], dtype=object),
        labels=np.array([sample.label for _, sample in usable], dtype=np.int64),
        shard=np.array([number for number, _ in usable], dtype=np.int64),
        row=np.array([sample.row for _, sample in usable], dtype=np.int64),
        skipped=tuple(skipped),
        listed=array_of_tuples(captions) if any(captions) else None,
    )


def array_of_tuples(found: Sequence[Sequence[str]]) -> NDArray[np.object_]:
    """Return an array [N] whose elements are tuples, whether they are equally long or not."""
    array = np.empty(len(found), dtype=object)
    for i, texts in enumerate(found):
        array[i] = tuple(texts)
    return array


def check_share(index: Index, *, most: float, what: str) -> None:
    """Raise DataError where more than the share `most` of the samples is unusable, or none is usable."""
    total = len(index) + len(index.skipped)
    if not len(index):
        raise DataError(f"no usable sample among {total}", where=what, fix=_reasons(index))
    if len(index.skipped) > most * total:
        first = index.skipped[0]
        raise DataError(
            f"{len(index.skipped)} of {total} samples are unusable: {_reasons(index)}",
            where=what,
            expected=f"at most {most:.2%} (data.max_broken)",
            fix=f"mend the shards (first: {first.key} in {first.shard}: {first.reason}) or raise data.max_broken",
        )


def _reasons(index: Index) -> str:
    counted = Counter(skip.reason.partition(":")[0] for skip in index.skipped)
    return ", ".join(f"{number} x {reason}" for reason, number in counted.most_common(5))


def classes(data: Data) -> list[str]:
    """Return the class names of a study, by label: those of a known data set, or of a file. Errors: DataError."""
    name = data.classes
    if name in class_names.NAMES:
        return class_names.named(name)
    url = name if "://" in name or name.startswith("/") else f"{data_root(data).rstrip('/')}/{name}"
    content = _class_file(url)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=url) from None
    shape = '[{"label": 0, "class_name": "…"}, …]'
    if not isinstance(found, list):
        raise DataError("not a list of classes", where=url, expected=shape)
    by_label: dict[int, str] = {}
    for place, entry in enumerate(found):
        label, known = (entry.get("label"), entry.get("class_name")) if isinstance(entry, dict) else (None, None)
        if not isinstance(label, int) or isinstance(label, bool) or not isinstance(known, str | int):
            raise DataError(f"not a list of classes: entry {place}", where=url, expected=shape)
        if problem := limits.caption_problem(str(known).strip()):
            raise DataError(f"entry {place}: {problem.replace('caption', 'class name')}", where=url)
        by_label[label] = str(known)
    if not found or sorted(by_label) != list(range(len(found))):
        raise DataError("labels must be 0, 1, 2, … each once", where=url)
    return [by_label[label] for label in range(len(by_label))]


def _class_file(url: str) -> bytes:
    filesystem, path = _filesystem(url, "data.classes")
    try:
        with filesystem.open(path, "rb") as file:
            content: bytes = file.read(limits.MAX_CLASS_FILE_BYTES + 1)
    except FileNotFoundError:
        raise DataError(
            "no such class file",
            where=url,
            expected=f"a JSON file, or one of {', '.join(class_names.NAMES)}",
            fix="set data.root or data.classes",
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"class file cannot be read: {error}", where=url) from None
    if len(content) > limits.MAX_CLASS_FILE_BYTES:
        raise DataError(f"larger than a class file can be ({limits.MAX_CLASS_FILE_BYTES >> 20} MiB)", where=url)
    return content


def target_label(data: Data, target_class: str, *, where: str = "poison.target_class") -> int:
    """Return the label of a target class, which the setting `where` names. Errors: DataError that suggests names."""
    names = classes(data)
    if target_class not in names:
        close = difflib.get_close_matches(target_class, names, n=3)
        known = ", ".join(close) if close else ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
        raise DataError(
            f"no class {target_class!r} among the {len(names)} classes of {data.root}",
            where=where,
            fix=f"one of: {known}",
        )
    return names.index(target_class)
