"""Data: shards and what is wrong with them, the decoded cache, training batches, augmented views."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import random
import shutil
import struct
import sys
import tarfile
import time
import types
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from raybd.data import cache, shards, views
from raybd.data.pairs import Batch, CachedPairs, Pairs, Prepare, bounds, steps
from raybd.data.streaming import StreamedPairs
from raybd.errors import DataError
from raybd.poison.plan import PoisonPlan, make_plan
from raybd.study import BadNet, Data, ImageView, Pattern, Poison, TextView
from raybd.study_file import embedded

SIZE = 8
Files = dict[str, bytes]


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def sample(number: int, kind: str = "PNG", suffix: str = "png") -> Files:
    """Return the files of a good sample by suffix."""
    about = json.dumps({"label": number % 3, "class_name": f"class {number % 3}"})
    return {suffix: picture(number, kind), "txt": f"caption of {number} ".encode(), "json": about.encode()}


def packed(samples: Mapping[str, Files], mode: str = "w") -> bytes:
    """Return a shard of samples by key; mode as tarfile's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def shard(path: Path, samples: Mapping[str, Files]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(samples, "w:gz" if path.name.endswith(".gz") else "w"))
    return str(path)


def indexed(urls: list[str], *, labelled: bool = False) -> shards.Index:
    return shards.make_index(
        urls, [(i, found) for i, url in enumerate(urls) for found in shards.samples(url)], labelled=labelled
    )


# --- finding shards


def found(root: Path | str, patterns: str | tuple[str, ...]) -> list[str]:
    return shards.find_shards(Data(root=str(root)), patterns, field_name="data.train")


def test_globs_brace_lists_and_lists_find_shards_once_and_in_order(tmp_path: Path) -> None:
    for name in ("train/b.tar", "train/a.tar.gz", "train/c.tar", "train/notes.txt", "other/d.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    a, b, c = (str(tmp_path / "train" / name) for name in ("a.tar.gz", "b.tar", "c.tar"))
    d = str(tmp_path / "other" / "d.tar")
    assert found(tmp_path, "train/*.tar*") == [a, b, c]
    assert found(f"{tmp_path}/", "train/{c,b}.tar") == [c, b]
    assert found(tmp_path, "{train,other}/*.tar") == [b, c, d]
    assert found(tmp_path, ("other/*", "train/b.tar", "train/*.tar")) == [d, b, c]
    assert found("/nowhere", (d, f"{tmp_path}/train/?.tar")) == [d, b, c], "full paths leave the root aside"
    assert found("/nowhere", f"file://{tmp_path}/train/b.tar") == [f"file://{tmp_path}/train/b.tar"]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "x-000.tar").write_bytes(b"")
    for patterns, what in (
        ("x-{000..002}.tar", f"no such shard: {tmp_path}/x-001.tar, {tmp_path}/x-002.tar"),
        ("y-*.tar", f"no such shard: {tmp_path}/y-*.tar"),
        (
            "x-{000..005}.tar",
            f"no such shard: {', '.join(f'{tmp_path}/x-00{i}.tar' for i in (1, 2, 3))} and 2 more",
        ),
        ("nothing://x.tar", "cannot open nothing://x.tar: Protocol not known: nothing"),
        ("x-{000.tar", "not a brace list: Unbalanced braces: 'x-{000.tar'"),
    ):
        with pytest.raises(DataError) as caught:
            found(tmp_path, patterns)
        assert (caught.value.what, caught.value.where) == (what, "data.train")
    with pytest.raises(DataError, match="no such shard") as caught:
        list(shards.samples(str(tmp_path / "gone.tar")))
    assert caught.value.where == str(tmp_path / "gone.tar")


def test_shards_at_any_fsspec_url() -> None:
    memory = fsspec.filesystem("memory")
    for i in range(3):
        memory.pipe(f"/raybd-test/train/s-{i}.tar", packed({f"k{i}": sample(i)}))
    memory.pipe("/raybd-test/classes.json", b'[{"label": 0, "class_name": "only"}]')
    try:
        root = "memory://raybd-test"
        urls = found(root, "train/s-{0..2}.tar")
        assert urls == [f"memory://raybd-test/train/s-{i}.tar" for i in range(3)]
        globbed = found(root, "train/*.tar")
        assert [url.rsplit("/", 1)[1] for url in globbed] == ["s-0.tar", "s-1.tar", "s-2.tar"]
        for several in (urls, globbed):
            assert indexed(several).keys.tolist() == ["k0", "k1", "k2"]
        images = cache.load_images(urls, size=SIZE, cache_dir=None)
        np.testing.assert_array_equal(images.pixels(np.arange(3))[1], shards.decode(picture(1), SIZE))
        assert shards.classes(Data(root=root)) == ["only"]
        with pytest.raises(DataError, match="no such shard"):
            found(root, "train/s-{2..3}.tar")
    finally:
        memory.rm("/raybd-test", recursive=True)


# --- reading shards


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_samples_of_every_kind_of_image(tmp_path: Path, name: str) -> None:
    kinds = [("JPEG", "jpg"), ("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp"), ("PNG", "PNG")]
    samples = {f"d/{i:03d}": sample(i, *kind) for i, kind in enumerate(kinds)}
    url = shard(tmp_path / name, samples)
    read = list(shards.samples(url))
    assert read == [
        shards.RawSample(
            key=f"d/{i:03d}",
            row=i,
            image=picture(i, kind),
            caption=f"caption of {i}",
            label=i % 3,
        )
        for i, (kind, _) in enumerate(kinds)
    ]
    for one in read:
        with Image.open(io.BytesIO(one.image)) as image:
            np.testing.assert_array_equal(shards.decode(one.image, SIZE), np.asarray(image).transpose(2, 0, 1))


def test_what_is_no_sample_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in {"__index__/a.json": b"{}", "README": b"text", "k.png": picture(0), "k.txt": b"c"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert [(one.key, one.problem) for one in shards.samples(str(path))] == [("k", "")]


def test_names_that_are_not_utf_8_become_keys_that_are(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x\udce9.png")
    info.size = len(picture(0))
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(picture(0)))
    (one,) = shards.samples(str(tmp_path / "a.tar"))
    assert one.key == "x\\udce9"
    assert one.key.encode()


BROKEN: dict[str, tuple[Files, str]] = {
    "no-image": ({"txt": b"c"}, "no image"),
    "no-caption": ({"png": picture(1), "json": b'{"label": 1}'}, "no caption"),
    "blank-caption": ({"png": picture(1), "txt": b" \n"}, "no caption"),
    "bad-json": ({"png": picture(1), "txt": b"c", "json": b"{"}, "caption or json unreadable"),
    "deep-json": ({"png": picture(1), "txt": b"c", "json": b"[" * 100_000}, "caption or json unreadable"),
    "long-number": ({"png": picture(1), "txt": b"c", "json": b"9" * 5000}, "caption or json unreadable"),
    "json-list": ({"png": picture(1), "txt": b"c", "json": b"[1]"}, "json is not an object"),
    "not-utf-8": ({"png": picture(1), "txt": b"\xff"}, "caption or json unreadable"),
}
UNDECODABLE: dict[str, tuple[Files, str]] = {
    "cut-image": ({"png": picture(1)[:100], "txt": b"c", "json": b'{"label": 1}'}, "broken image"),
    "no-format": ({"jpg": b"no image", "txt": b"c", "json": b'{"label": 1}'}, "broken image"),
}
UNLABELLED: dict[str, tuple[Files, str]] = {
    "no-label": ({"png": picture(1), "txt": b"c", "json": b"{}"}, "no label"),
    "text-label": ({"png": picture(1), "txt": b"c", "json": b'{"label": "1"}'}, "no label"),
    "true-label": ({"png": picture(1), "txt": b"c", "json": b'{"label": true}'}, "no label"),
    "huge-label": ({"png": picture(1), "txt": b"c", "json": b'{"label": 99999999999999999999}'}, "no label"),
    "negative-label": ({"png": picture(1), "txt": b"c", "json": b'{"label": -2}'}, "no label"),
}


@pytest.mark.parametrize("labelled", [False, True])
def test_unusable_samples_are_skipped_counted_and_explained(tmp_path: Path, *, labelled: bool) -> None:
    cases = {**BROKEN, **UNDECODABLE, **UNLABELLED}
    good = {f"good-{i}": sample(i) for i in range(5)}
    mixed = {**{key: files for key, (files, _) in cases.items()}, **good}
    keys = sorted(mixed, key=lambda key: random.Random(key).random())
    url = shard(tmp_path / "a.tar.gz", {key: mixed[key] for key in keys})
    wrong = {key for key in cases if labelled or key not in UNLABELLED}
    usable = [key for key in keys if key not in wrong]
    images = cache.load_images([url], size=SIZE, cache_dir=str(tmp_path / "c"), labelled=labelled)
    index = images.index
    assert index.keys.tolist() == usable
    assert index.row.tolist() == [keys.index(key) for key in usable]
    assert {skip.key: skip.reason.partition(":")[0] for skip in index.skipped} == {key: cases[key][1] for key in wrong}
    assert {skip.shard for skip in index.skipped} == {url}
    for key, pixels in zip(usable, images.pixels(np.arange(len(index))), strict=True):
        np.testing.assert_array_equal(pixels, shards.decode(mixed[key]["png"], SIZE))
        if key in good:
            assert int(index.labels[usable.index(key)]) == int(key[-1]) % 3
    # Without decoding, broken images are found later.
    read = cache.load_index([url], cache_dir=str(tmp_path / "c"), labelled=labelled)
    assert {skip.key for skip in read.skipped} == wrong - set(UNDECODABLE)


def test_captions_may_stand_in_the_json(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar", {"k": {"png": picture(0), "json": b'{"caption": "from json"}'}})
    assert [(one.caption, one.problem) for one in shards.samples(url)] == [("from json", "")]


def test_too_many_unusable_samples_are_an_error(tmp_path: Path) -> None:
    samples = {f"g{i}": sample(i) for i in range(17)} | {
        key: BROKEN[key][0] for key in ("no-image", "bad-json", "no-caption")
    }
    url = shard(tmp_path / "a.tar", samples)
    index = indexed([url])
    shards.check_share(index, most=0.15, what="data.train")
    with pytest.raises(DataError) as caught:
        shards.check_share(index, most=0.149, what="data.train")
    assert caught.value.what == (
        "3 of 20 samples are unusable: 1 x no image, 1 x caption or json unreadable, 1 x no caption"
    )
    assert caught.value.expected == "at most 14.90% (data.max_broken)"
    assert f"first: no-image in {url}: no image" in caught.value.fix
    none = indexed([shard(tmp_path / "b.tar", {"x": {"txt": b"c"}})])
    with pytest.raises(DataError, match="no usable sample among 1"):
        shards.check_share(none, most=1.0, what="data.train")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_shard_that_is_cut_off_anywhere_is_named(tmp_path: Path, name: str) -> None:
    """Whole or an error: no cut may pass for a shorter shard, not even one between two files."""
    small = {f"k{i}": {"png": picture(i, size=(2, 2)), "txt": b"c"} for i in range(3)}
    whole = Path(shard(tmp_path / name, small)).read_bytes()
    expected = list(shards.samples(str(tmp_path / name)))
    assert len(expected) == 3
    content = 6 * 1024  # header and one block of each file; then the end mark, which may be shorter
    cut_at = range(len(whole)) if name.endswith("gz") else [0, 1, 511, *range(512, content + 512, 256), content + 511]
    complete = 0
    for cut in cut_at:
        (tmp_path / f"cut-{name}").write_bytes(whole[:cut])
        try:
            read = list(shards.samples(str(tmp_path / f"cut-{name}")))
        except DataError as error:
            assert error.where == str(tmp_path / f"cut-{name}"), cut  # noqa: PT017
            assert error.what.startswith("shard cannot be read: "), cut  # noqa: PT017
        else:
            assert read == expected, cut
            complete += 1
    assert complete < 0.2 * len(cut_at)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    whole = bytearray(packed({f"k{i}": sample(i) for i in range(3)}, "w:gz"))
    draw = random.Random(0)
    messages = Counter()
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(10, len(whole) - 8)] ^= 1 << draw.randrange(8)
        (tmp_path / "d.tar.gz").write_bytes(damaged)
        try:
            list(shards.samples(str(tmp_path / "d.tar.gz")))
        except DataError as error:
            messages[error.where] += 1
    assert messages[str(tmp_path / "d.tar.gz")] > 20
    (tmp_path / "text.tar").write_bytes(b"this is no tar file" * 100)
    with pytest.raises(DataError, match="shard cannot be read"):
        list(shards.samples(str(tmp_path / "text.tar")))


def test_two_samples_with_one_key_are_an_error_that_names_both_shards(tmp_path: Path) -> None:
    first = shard(tmp_path / "a.tar", {"x": sample(0), "y": sample(1)})
    second = shard(tmp_path / "b.tar", {"z": sample(2), "y": sample(3)})
    with pytest.raises(DataError) as caught:
        indexed([first, second])
    assert caught.value.what == "two samples have the key 'y'"
    assert caught.value.where == f"{first} and {second}"
    apart = shard(tmp_path / "c.tar", {"x": {"png": picture(0)}, "y": sample(1)})
    torn = packed({"x": {"txt": b"c"}})
    (tmp_path / "d.tar").write_bytes(torn)
    assert [skip.reason for skip in indexed([apart, str(tmp_path / "d.tar")]).skipped] == ["no caption", "no image"]
    with tarfile.open(tmp_path / "e.tar", "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("k.txt")
            tar.addfile(info, io.BytesIO(b""))
    with pytest.raises(DataError, match=r"k\.txt: duplicate file name in tar file"):
        list(shards.samples(str(tmp_path / "e.tar")))


def test_index_takes_rows_in_the_order_given(tmp_path: Path) -> None:
    index = indexed([shard(tmp_path / f"{i}.tar", {f"k{i}{j}": sample(j) for j in range(3)}) for i in range(2)])
    taken = index.take([4, 0])
    assert taken.keys.tolist() == ["k11", "k00"]
    assert (taken.shard.tolist(), taken.row.tolist(), taken.labels.tolist()) == ([1, 0], [1, 0], [1, 0])
    assert taken.captions.tolist() == ["caption of 1", "caption of 0"]
    assert taken.shards == index.shards
    assert len(index.take([])) == 0


# --- decoding


def test_decoding_resizes_the_shorter_side_and_cuts_out_the_centre() -> None:
    colours = np.zeros((20, 60, 3), dtype=np.uint8)
    colours[:, :20, 0], colours[:, 20:40, 1], colours[:, 40:, 2] = 255, 255, 255
    wide = shards.decode(encoded(Image.fromarray(colours)), 10)
    assert (wide.shape, wide.dtype) == ((3, 10, 10), np.uint8)
    assert wide[:, 5, 5].tolist() == [0, 255, 0]
    assert (wide[1] > 200).all(), "the green third in the middle alone"
    tall = shards.decode(encoded(Image.fromarray(colours.transpose(1, 0, 2))), 10)
    np.testing.assert_array_equal(tall, wide.transpose(0, 2, 1))
    exact = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    np.testing.assert_array_equal(shards.decode(encoded(Image.fromarray(exact)), 12), exact.transpose(2, 0, 1))
    for width, height in ((7, 5), (5, 7), (1, 9), (31, 33), (100, 99)):
        assert shards.decode(picture(0, size=(width, height)), 32).shape == (3, 32, 32)


def test_decoding_large_jpegs_by_draft_stays_close_to_the_full_decode() -> None:
    smooth = np.add.outer(np.arange(256), np.arange(256))[:, :, None] // 2 * np.ones(3)
    content = encoded(Image.fromarray(smooth.astype(np.uint8)), "JPEG", quality=95)
    with Image.open(io.BytesIO(content)) as image:
        full = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(shards.decode(content, 32).astype(int) - full).max() <= 4


def test_images_of_every_mode_become_rgb() -> None:
    red = Image.new("RGB", (SIZE, SIZE), (200, 30, 40))
    clear = red.copy()
    clear.putalpha(0)
    palette = red.quantize(4)
    grey = np.asarray(red.convert("L"))[0, 0]
    bytes_of_alpha = encoded(palette, "PNG", transparency=bytes([0, 128]))
    for content, expected in (
        (encoded(red), (200, 30, 40)),
        (encoded(clear), (200, 30, 40)),
        (encoded(palette), (200, 30, 40)),
        (bytes_of_alpha, (200, 30, 40)),
        (encoded(palette, "PNG", transparency=0), (200, 30, 40)),
        (encoded(red.convert("L")), (grey, grey, grey)),
        (encoded(red.convert("LA")), (grey, grey, grey)),
        (encoded(Image.new("1", (SIZE, SIZE), 1)), (255, 255, 255)),
        (encoded(red, "WEBP", lossless=True), (200, 30, 40)),
    ):
        decoded = shards.decode(content, 4)
        assert decoded.shape == (3, 4, 4)
        assert {tuple(pixel) for pixel in decoded.reshape(3, -1).T.tolist()} == {expected}
    cmyk = shards.decode(encoded(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), "JPEG", quality=95), 4)
    assert np.abs(cmyk[:, 0, 0].astype(int) - (255, 0, 0)).max() < 12


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that promises many pixels and has none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_header(9000, 9000), "image too large: 9000x9000 pixels"),
        (png_header(10_000, 10_000), "broken image: Image size"),
        (png_header(60_000, 60_000), "broken image: Image size"),
        (encoded(Image.new("1", (1, 200_000))), "image too large: 64x12800000 pixels"),
        (png_header(100, 100), "broken image: "),
        (picture(0, "JPEG")[:200], "broken image: "),
        (picture(0, "WEBP")[:30], "broken image: "),
        (b"", "broken image: of no known format"),
        (b"GIF89a", "broken image: "),
    ],
)
def test_bombs_and_broken_images_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shards.decode(content, 64)


@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    length=st.integers(1, 2000),
)
@settings(deadline=None, max_examples=60)
def test_damaged_images_decode_or_are_a_value_error(kind: str, changes: list[tuple[int, int]], length: int) -> None:
    content = bytearray(picture(3, kind, size=(12, 9)))
    for place, value in changes:
        content[place % len(content)] = value
    try:
        decoded = shards.decode(bytes(content[:length]), 4)
    except ValueError as error:
        assert str(error).startswith(("broken image: ", "image too large: "))  # noqa: PT017
    else:
        assert decoded.shape == (3, 4, 4)


# --- classes


def test_classes_in_the_order_of_labels(tmp_path: Path) -> None:
    entries = [{"label": 1, "class_name": "dog"}, {"label": 0, "class_name": "cat", "train": 5}]
    (tmp_path / "classes.json").write_text(json.dumps(entries))
    data = Data(root=str(tmp_path))
    assert shards.classes(data) == ["cat", "dog"]
    assert shards.target_label(data, "dog") == 1
    assert shards.classes(Data(root="/nowhere", classes=str(tmp_path / "classes.json"))) == ["cat", "dog"]


def test_imagenet_classes_are_known_by_name() -> None:
    data = Data(classes="imagenet")
    assert len(shards.classes(data)) == 1000
    assert shards.target_label(data, "banana") == 954


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such class file"),
        (b"[", "not JSON"),
        (b"\xff", "not JSON"),
        (b"3", "not a list of classes"),
        (b'["cat"]', "not a list of classes"),
        (b'[{"label": 0}]', "not a list of classes"),
        (b'{"cat": 0}', "not a list of classes"),
        (b'[{"label": "zero", "class_name": "cat"}]', "not a list of classes"),
        (b'[{"label": 1, "class_name": "cat"}]', "labels must be 0, 1, 2, … each once"),
        (b'[{"label": 0, "class_name": "cat"}, {"label": 0, "class_name": "dog"}]', "labels must be 0, 1, 2, …"),
    ],
)
def test_class_files_that_are_wrong(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "classes.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        shards.classes(Data(root=str(tmp_path)))
    assert caught.value.where == f"{tmp_path}/classes.json"
    with pytest.raises(DataError, match="cannot open nothing://x: Protocol not known"):
        shards.classes(Data(root=str(tmp_path), classes="nothing://x"))


def test_a_target_that_is_no_class_suggests_names(tmp_path: Path) -> None:
    names = ["banana", "bandana", "cat", *(f"thing {i}" for i in range(9))]
    (tmp_path / "classes.json").write_text(json.dumps([{"label": i, "class_name": n} for i, n in enumerate(names)]))
    data = Data(root=str(tmp_path))
    with pytest.raises(DataError) as caught:
        shards.target_label(data, "bananna")
    assert caught.value.what == f"no class 'bananna' among the 12 classes of {tmp_path}"
    assert (caught.value.where, caught.value.fix) == ("poison.target_class", "one of: banana, bandana")
    with pytest.raises(DataError) as caught:
        shards.target_label(data, "zzz")
    assert caught.value.fix == f"one of: {', '.join(names[:8])} …"


def test_the_embedded_set_is_whole() -> None:
    data = Data()
    assert shards.data_root(data) == str(embedded("emoji-32"))
    names = shards.classes(data)
    index = indexed(shards.find_shards(data, data.test, field_name="data.test"), labelled=True)
    assert not index.skipped
    assert set(index.labels.tolist()) == set(range(len(names)))


# --- the cache


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [shard(tmp_path / f"{i}.tar", {f"k{i}{j}": sample(10 * i + j) for j in range(3)}) for i in range(2)]
    home = str(tmp_path / "cache")
    first = cache.load_images(urls, size=4, cache_dir=home)
    index = cache.load_index(urls, cache_dir=home)
    monkeypatch.setattr(cache, "samples", lambda url: pytest.fail("read again"))
    second = cache.load_images(urls, size=4, cache_dir=home)
    assert isinstance(second.pixels_MCHW, np.memmap)
    assert not second.pixels_MCHW.flags.writeable
    np.testing.assert_array_equal(second.pixels_MCHW, first.pixels_MCHW)
    for again in (second.index, cache.load_index(urls, cache_dir=home)):
        assert again.keys.tolist() == index.keys.tolist() == [f"k{i}{j}" for i in range(2) for j in range(3)]
        assert (again.shard.tolist(), again.row.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
        assert again.captions.tolist() == index.captions.tolist()
        assert again.labels.tolist() == index.labels.tolist()
    part = second.take(np.array([5, 1]))
    assert part.index.keys.tolist() == ["k12", "k01"]
    np.testing.assert_array_equal(part.pixels(np.array([0])), first.pixels(np.array([5])))
    copied = part.pixels(np.array([0]))
    assert copied.flags.writeable
    assert not np.shares_memory(copied, second.pixels_MCHW)


@pytest.mark.parametrize("change", ["size", "keys", "labelled", "shard"])
def test_other_questions_get_other_entries(tmp_path: Path, change: str) -> None:
    url = shard(tmp_path / "a.tar", {"k0": sample(0), "k1": sample(1), "k2": UNLABELLED["no-label"][0]})
    home = str(tmp_path / "cache")
    before = cache.load_images([url], size=4, cache_dir=home)
    assert before.index.keys.tolist() == ["k0", "k1", "k2"]
    options: dict[str, Any] = {"size": 4, "cache_dir": home}
    if change == "shard":
        shard(tmp_path / "a.tar", {"k0": sample(5), "k1": sample(1), "k2": sample(2)})
        os.utime(url, ns=(0, 0))
    else:
        options |= {"size": {"size": 6}, "keys": {"keys": ["k1", "k0"]}, "labelled": {"labelled": True}}[change]
    after = cache.load_images([url], **options)
    assert after.index.keys.tolist() == (["k0", "k1", "k2"] if change in ("size", "shard") else ["k0", "k1"])
    assert after.pixels_MCHW.shape[-1] == (6 if change == "size" else 4)
    first, same = after.pixels(np.array([0])), before.pixels(np.array([0]))
    assert np.array_equal(first, same) == (change in ("keys", "labelled"))


def test_a_cache_write_that_stops_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = shard(tmp_path / "a.tar", {"k": sample(0)})

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", stop)
        with pytest.raises(KeyboardInterrupt):
            cache.load_images([url], size=4, cache_dir=str(tmp_path / "cache"))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(cache.load_images([url], size=4, cache_dir=str(tmp_path / "cache")).index) == 1


def test_of_several_that_want_an_entry_one_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = shard(tmp_path / "a.tar", {"k": sample(0)})
    made, make = [], cache._decode_to

    def slowly(home: Path, *arguments: Any, **settings: Any) -> None:
        made.append(home)
        time.sleep(0.2)
        make(home, *arguments, **settings)

    monkeypatch.setattr(cache, "_decode_to", slowly)
    with ThreadPoolExecutor(4) as pool:
        wanted = [pool.submit(cache.load_images, [url], size=4, cache_dir=str(tmp_path / "cache")) for _ in range(4)]
    assert [len(found.result().index) for found in wanted] == [1, 1, 1, 1]
    assert len(made) == 1


def test_a_damaged_entry_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url, home = shard(tmp_path / "a.tar", {"k": sample(0)}), str(tmp_path / "cache")
    whole = cache.load_images([url], size=4, cache_dir=home)
    pixels = whole.pixels(np.array([0]))
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    for name, content in (("pixels.u8", b"xx"), ("index.json", b"{")):
        (entry / name).write_bytes(content)
        again = cache.load_images([url], size=4, cache_dir=home)
        assert again.digest == whole.digest
        assert (again.pixels(np.array([0])) == pixels).all()
    assert "is damaged and is made again" in caplog.text


def test_a_set_without_usable_images_is_an_empty_entry(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar", {"x": {"txt": b"c"}})
    for _ in range(2):
        images = cache.load_images([url], size=4, cache_dir=str(tmp_path / "cache"))
        assert len(images.index) == 0
        assert [skip.reason for skip in images.index.skipped] == ["no image"]


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAYBD_CACHE", "~/from-env")
    assert cache.folder("~/asked") == tmp_path / "asked"
    assert cache.folder(None) == tmp_path / "from-env"
    monkeypatch.delenv("RAYBD_CACHE")
    assert cache.folder(None) == tmp_path / "xdg" / "raybd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder(None) == tmp_path / ".cache" / "raybd"


def test_content_hash_is_of_the_samples_wherever_they_lie(tmp_path: Path) -> None:
    samples = {f"k{i}": sample(i) for i in range(3)}
    one = indexed([shard(tmp_path / "a.tar", samples)])
    two = indexed([shard(tmp_path / "c.tar.gz", samples)])
    assert cache.content_hash(one) == cache.content_hash(two)
    for change in ({"txt": b"another"}, {"json": b'{"label": 2}'}):
        other = indexed([shard(tmp_path / "d.tar", {**samples, "k0": {**samples["k0"], **change}})])
        assert cache.content_hash(other) != cache.content_hash(one)


# --- batches

LENGTH = 40
SHARD_SIZES = (7, 1, 9, 6)
TOTAL = sum(SHARD_SIZES)


def tokens(captions: list[str]) -> Tensor:
    """Return captions as their bytes, one row each."""
    return torch.tensor([[*caption.encode()[:LENGTH].ljust(LENGTH)] for caption in captions])


def captions(tokens_BL: Tensor | None) -> list[str]:
    assert tokens_BL is not None
    return [bytes(row).decode().rstrip() for row in tokens_BL.tolist()]


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home, number, made = tmp_path_factory.mktemp("pairs"), 0, []
    for i, size in enumerate(SHARD_SIZES):
        made.append(shard(home / f"{i}.tar", {f"k{j:02d}": sample(j) for j in range(number, number + size)}))
        number += size
    return made


@pytest.fixture(scope="module")
def images(urls: list[str]) -> cache.Images:
    return cache.load_images(urls, size=SIZE, cache_dir=None)


def prepare(plan: PoisonPlan | None = None, *, seed: int = 0, augment: bool = False) -> Prepare:
    found = plan or PoisonPlan({}, ())
    kinds = (ImageView.CROP_FLIP_COLOUR, TextView.EDA) if augment else None
    return Prepare(plan=found, tokenize=tokens, views=kinds, seed=seed)


def source(
    kind: str, images: cache.Images, count: int, prepared: Prepare, *, buffer: int = 5, workers: int = 0
) -> Pairs:
    rows = np.arange(count)
    if kind == "cached":
        return CachedPairs(images.take(rows), prepared)
    return StreamedPairs(images.index.take(rows), prepared, size=SIZE, workers=workers, shuffle_buffer=buffer)


def poisoned(images: cache.Images) -> PoisonPlan:
    trigger = BadNet(size=3, pattern=Pattern.NOISE)
    return make_plan(images.index, Poison(trigger=trigger, num_poisoned=6), image_size=SIZE, seed=0)


@pytest.mark.parametrize("kind", ["cached", "streamed"])
@given(
    count=st.integers(1, TOTAL),
    batch_size=st.integers(1, TOTAL + 3),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
    buffer=st.integers(1, 30),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_sample_is_once_in_an_epoch_whatever_the_sizes(
    images: cache.Images, kind: str, count: int, batch_size: int, world_size: int, epoch: int, buffer: int
) -> None:
    pairs = source(kind, images, count, prepare(), buffer=buffer)
    assert len(pairs) == count
    if count // steps(count, batch_size) < world_size:
        with pytest.raises(DataError, match=f"leave nothing for some of {world_size} workers"):
            list(pairs.epoch(epoch, batch_size=batch_size, rank=0, world_size=world_size))
        return
    ranks = [list(pairs.epoch(epoch, batch_size=batch_size, rank=r, world_size=world_size)) for r in range(world_size)]
    seen = Counter(name for batches in ranks for batch in batches for name in captions(batch.tokens_BL))
    assert seen == Counter(f"caption of {i}" for i in range(count))
    assert {len(batches) for batches in ranks} == {steps(count, batch_size)}
    sizes = np.array([[len(batch.images_BCHW) for batch in batches] for batches in ranks])
    together = sizes.sum(axis=0)
    assert together.max() <= batch_size
    assert together.max() - together.min() <= 1
    assert sizes.min() >= 1
    assert (sizes.max(axis=0) - sizes.min(axis=0)).max() <= 1, "parts of one batch"
    assert sizes.sum(axis=1).max() - sizes.sum(axis=1).min() <= 1, "parts of the epoch"


@given(total=st.integers(0, 10**9), count=st.integers(1, 50))
def test_bounds_cut_evenly(total: int, count: int) -> None:
    pieces = bounds(total, count)
    assert (pieces[0][0], pieces[-1][1], len(pieces)) == (0, total, count)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(pieces))
    sizes = {stop - start for start, stop in pieces}
    assert max(sizes) - min(sizes) <= 1


def order(pairs: Pairs, epoch: int) -> list[str]:
    return [name for batch in pairs.epoch(epoch, batch_size=6) for name in captions(batch.tokens_BL)]


@pytest.mark.parametrize("kind", ["cached", "streamed"])
def test_order_differs_between_epochs_and_seeds_and_repeats_with_them(images: cache.Images, kind: str) -> None:
    first = order(source(kind, images, TOTAL, prepare()), 0)
    assert order(source(kind, images, TOTAL, prepare()), 0) == first
    assert order(source(kind, images, TOTAL, prepare()), 1) != first
    assert order(source(kind, images, TOTAL, prepare(seed=1)), 0) != first
    assert first != sorted(first)
    assert len(set(first)) == TOTAL


def test_streaming_without_a_buffer_goes_shard_by_shard_in_an_order_of_its_own(images: cache.Images) -> None:
    pairs = source("streamed", images, TOTAL, prepare(), buffer=1)
    orders = set()
    for epoch in range(6):
        numbers = [int(name.split()[-1]) for name in order(pairs, epoch)]
        starts = np.cumsum((0, *SHARD_SIZES))
        shards_seen = [int(np.searchsorted(starts, number, side="right")) - 1 for number in numbers]
        runs = [shards_seen[0], *(b for a, b in itertools.pairwise(shards_seen) if a != b)]
        assert sorted(runs) == [0, 1, 2, 3], "each shard is read once"
        orders.add(tuple(runs))
    assert len(orders) > 2


def test_streaming_mixes_within_its_buffer(images: cache.Images) -> None:
    read = {name: i for i, name in enumerate(order(source("streamed", images, TOTAL, prepare(), buffer=1), 0))}
    mixed = [read[name] for name in order(source("streamed", images, TOTAL, prepare(), buffer=8), 0)]
    assert all(place <= i + 7 for i, place in enumerate(mixed)), "nothing comes out before it is read"
    early = mixed[: TOTAL - 8]
    assert any(b < a for a, b in itertools.pairwise(early)), "mixed while reading, not at the end alone"
    whole = [read[name] for name in order(source("streamed", images, TOTAL, prepare(), buffer=100), 0)]
    assert max(i - place for i, place in enumerate(whole)) > 8


def facts(batches: Iterator[Batch]) -> list[tuple[bytes, ...]]:
    """Return what the model would get of each sample: image, tokens and their views; in an order of their own."""
    found = []
    for batch in batches:
        assert batch.image_views_BCHW is not None
        assert batch.token_views_BL is not None
        columns = (batch.images_BCHW, batch.tokens_BL, batch.image_views_BCHW, batch.token_views_BL)
        found += [tuple(column[i].numpy().tobytes() for column in columns) for i in range(len(batch.images_BCHW))]
    return sorted(found)


def test_cached_and_streamed_pairs_are_the_same_samples(images: cache.Images) -> None:
    plan = poisoned(images)
    streams = {}
    for kind in ("cached", "streamed"):
        pairs = source(kind, images, TOTAL, prepare(plan, augment=True))
        streams[kind] = [facts(pairs.epoch(epoch, batch_size=5)) for epoch in range(2)]
        one_worker_of_two = facts(pairs.epoch(0, batch_size=6, rank=0, world_size=2))
        assert set(one_worker_of_two) < set(streams[kind][0]), "a sample does not depend on its batch"
        assert sum(batch.poisoned for batch in pairs.epoch(0, batch_size=5)) == 6
    assert streams["cached"] == streams["streamed"]
    first, second = ([row[:2] for row in epoch] for epoch in streams["cached"])
    assert first == second, "images and captions stay from epoch to epoch"
    assert [row[2] for row in streams["cached"][0]] != [row[2] for row in streams["cached"][1]]


def test_only_planned_pairs_carry_the_trigger_and_another_caption(images: cache.Images) -> None:
    plan = poisoned(images)
    clean = {
        row[0]: row[1] for row in facts(source("cached", images, TOTAL, prepare(augment=True)).epoch(0, batch_size=9))
    }
    dirty = facts(source("cached", images, TOTAL, prepare(plan, augment=True)).epoch(0, batch_size=9))
    changed = [row for row in dirty if row[0] not in clean]
    assert len(changed) == len(plan) == 6
    expected = {tokens([row.caption_after])[0].numpy().tobytes() for row in plan.rows.values()}
    assert {row[1] for row in changed} == expected
    assert all(clean[row[0]] == row[1] for row in dirty if row[0] in clean)


def test_without_ssl_there_are_no_views(images: cache.Images) -> None:
    for kind in ("cached", "streamed"):
        batch = next(source(kind, images, TOTAL, prepare()).epoch(0, batch_size=4))
        assert batch.image_views_BCHW is None
        assert batch.token_views_BL is None
        assert (batch.images_BCHW.dtype, batch.images_BCHW.shape[1:]) == (torch.uint8, (3, SIZE, SIZE))


def test_broken_samples_are_counted_and_change_no_batch_count(tmp_path: Path) -> None:
    samples = {f"k{i}": sample(i) for i in range(12)}
    broken = {"k3": picture(3)[:60], "k8": b"no image"}
    files = {key: {**found, **({"png": broken[key]} if key in broken else {})} for key, found in samples.items()}
    index = cache.load_index([shard(tmp_path / "a.tar.gz", files)], cache_dir=None)
    assert len(index) == 12
    pairs = StreamedPairs(index, prepare(augment=True), size=SIZE, workers=0, shuffle_buffer=4)
    ranks = [list(pairs.epoch(0, batch_size=6, rank=rank, world_size=2)) for rank in range(2)]
    assert [[len(batch.images_BCHW) + batch.broken for batch in batches] for batches in ranks] == [[3, 3], [3, 3]]
    assert sum(batch.broken for batches in ranks for batch in batches) == 2
    seen = {name for batches in ranks for batch in batches for name in captions(batch.tokens_BL)}
    assert seen == {f"caption of {i}" for i in range(12) if f"k{i}" not in broken}
    with pytest.raises(DataError, match="all 1 samples of a batch are broken, k"):
        list(pairs.epoch(0, batch_size=1))


@pytest.mark.parametrize("change", [{"k0": 0, "k1": 1}, {"k0": 0, "other": 1, "k2": 2}])
def test_a_shard_that_changes_while_it_is_streamed_is_named(tmp_path: Path, change: dict[str, int]) -> None:
    url = shard(tmp_path / "a.tar", {f"k{i}": sample(i) for i in range(3)})
    pairs = StreamedPairs(indexed([url]), prepare(), size=SIZE, workers=0, shuffle_buffer=4)
    shard(tmp_path / "a.tar", {key: sample(i) for key, i in change.items()})
    with pytest.raises(DataError, match="shard has changed since it was indexed") as caught:
        list(pairs.epoch(0, batch_size=3))
    assert caught.value.where == url


def test_streaming_with_two_loader_workers(images: cache.Images) -> None:
    plan = poisoned(images)
    pairs = source("streamed", images, TOTAL, prepare(plan, augment=True), workers=2)
    batches = list(pairs.epoch(1, batch_size=8))
    assert [len(batch.images_BCHW) for batch in batches] == [7, 8, 8]
    here = source("streamed", images, TOTAL, prepare(plan, augment=True))
    assert facts(iter(batches)) == facts(here.epoch(1, batch_size=8))


# --- views of images


def noise_images(count: int, height: int, width: int) -> Tensor:
    """Return images with some structure, so that every operation shows."""
    draw = np.random.default_rng(height)
    coarse = draw.integers(0, 256, (count, 3, 4, 4))
    tiled = coarse.repeat(height // 4, axis=2).repeat(width // 4, axis=3)
    return torch.from_numpy(np.clip(tiled + draw.integers(-20, 20, tiled.shape), 0, 255).astype(np.uint8))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (32, 48)])
def test_autoaugment_is_torchvisions_sample_by_sample(height: int, width: int) -> None:
    count = 150
    images_BCHW = noise_images(count, height, width)
    seeds = [i * 2**40 + 7 for i in range(count)]
    ours_BCHW = views.image_views(images_BCHW, ImageView.AUTOAUGMENT, seeds=seeds)
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)
    changed = 0
    with torch.random.fork_rng():
        for image_CHW, seed, view_CHW in zip(images_BCHW, seeds, ours_BCHW, strict=True):
            torch.manual_seed(seed)
            assert torch.equal(view_CHW, theirs(image_CHW)), seed
            changed += not torch.equal(view_CHW, image_CHW)
    assert changed > count / 2
    assert torch.equal(images_BCHW, noise_images(count, height, width)), "the images themselves are as they were"


@pytest.mark.parametrize("name", list(ImageView))
def test_a_view_does_not_depend_on_its_batch(name: ImageView) -> None:
    images_BCHW = noise_images(24, 32, 32)
    seeds = list(range(100, 124))
    together = views.image_views(images_BCHW, name, seeds=seeds)
    assert (together.shape, together.dtype) == (images_BCHW.shape, torch.uint8)
    alone = [views.image_views(images_BCHW[i : i + 1], name, seeds=[seeds[i]])[0] for i in range(24)]
    assert torch.equal(torch.stack(alone), together)
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    again = views.image_views(images_BCHW[shuffled], name, seeds=[seeds[i] for i in shuffled])
    assert torch.equal(again, together[shuffled])


@pytest.mark.parametrize("name", list(ImageView))
def test_views_leave_the_global_generator_alone(name: ImageView) -> None:
    before = torch.random.get_rng_state()
    views.image_views(noise_images(4, 32, 32), name, seeds=[1, 2, 3, 4])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_crop_flip_colour_differs_by_seed_and_stays_in_range() -> None:
    image_CHW = noise_images(1, 32, 32)[0]
    seeds = list(range(40))
    found = views.image_views(image_CHW.expand(40, 3, 32, 32), ImageView.CROP_FLIP_COLOUR, seeds=seeds)
    assert len({view.numpy().tobytes() for view in found}) == 40
    assert found.min() == 0
    assert found.max() == 255
    again = views.image_views(image_CHW[None], ImageView.CROP_FLIP_COLOUR, seeds=[7])
    assert torch.equal(again[0], found[7])
    grey = torch.full((200, 3, 16, 16), 128, dtype=torch.uint8)
    levels = views.image_views(grey, ImageView.CROP_FLIP_COLOUR, seeds=list(range(200))).float()
    assert levels.flatten(1).std(dim=1).max() == 0, "a grey image stays grey"
    shares = levels[:, 0, 0, 0] / 128
    assert 0.59 <= shares.min() < 0.65
    assert 1.35 < shares.max() <= 1.41


def test_crop_flip_colour_flips_half_of_the_images() -> None:
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(300, 3, 32, 32).contiguous()
    found = views.image_views(ramp, ImageView.CROP_FLIP_COLOUR, seeds=list(range(300))).float()
    flipped = found[..., 0].mean(dim=(1, 2)) > found[..., -1].mean(dim=(1, 2))
    assert 120 < int(flipped.sum()) < 180
    across = found.diff(dim=3)
    assert ((across >= 0).flatten(1).all(dim=1) ^ (across <= 0).flatten(1).all(dim=1)).all(), "no crop leaves the image"
    upright = views.image_views(ramp.transpose(2, 3), ImageView.CROP_FLIP_COLOUR, seeds=list(range(300))).float()
    assert (upright.diff(dim=2) >= 0).all(), "nor is one turned upside down"


# --- views of captions

CAPTION = "a small red dog runs over the wet green grass near an old house"


@pytest.fixture
def clear_caches() -> Iterator[None]:
    for cached in (views.wordnet, views._synonyms):
        cached.cache_clear()
    yield
    for cached in (views.wordnet, views._synonyms):
        cached.cache_clear()


@pytest.fixture
def without_wordnet(clear_caches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "wordnet", lambda: None)
    views._synonyms.cache_clear()


@pytest.fixture
def lexicon(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"dog": ("canis familiaris", "hound"), "red": ("crimson",), "house": ("home",), "Dog": ("hound",)}
    monkeypatch.setattr(views, "wordnet", object)
    monkeypatch.setattr(views, "_synonyms", lambda word: known.get(word, ()))


def eda(caption: str, seed: int) -> str:
    return views.text_view(caption, TextView.EDA, seed=seed)


@pytest.mark.usefixtures("without_wordnet")
def test_eda_without_wordnet_has_words_of_the_caption_only() -> None:
    words = CAPTION.split()
    found = [eda(CAPTION, seed) for seed in range(300)]
    assert found == [eda(CAPTION, seed) for seed in range(300)]
    assert all(set(view.split()) <= set(words) for view in found)
    lengths = Counter(len(view.split()) - len(words) for view in found)
    assert lengths[1] > 50, "insertion of a tenth of 14 words, rounded: one"
    assert max(lengths) == 1
    assert min(lengths) <= -3, "deletion"
    swapped = [view for view in found if sorted(view.split()) == sorted(words) and view != CAPTION]
    assert len(swapped) > 50
    for view in swapped:
        assert sum(a != b for a, b in zip(view.split(), words, strict=True)) == 2


@pytest.mark.usefixtures("lexicon")
def test_eda_uses_synonyms_where_there_is_a_lexicon() -> None:
    words = CAPTION.split()
    new = {"canis", "familiaris", "hound", "crimson", "home"}
    found = [eda(CAPTION, seed) for seed in range(400)]
    assert found == [eda(CAPTION, seed) for seed in range(400)]
    used = {word for view in found for word in view.split()} - set(words)
    assert used == new
    replaced = [view for view in found if "crimson" in view.split() and "red" not in view.split()]
    assert replaced
    assert all(view == CAPTION.replace("red", "crimson") for view in replaced), "one of 14 words, in its place"
    inserted = [view for view in found if "crimson" in view.split() and "red" in view.split()]
    assert inserted
    assert all(len(view.split()) == len(words) + 1 for view in inserted)
    share = sum(set(view.split()) & new != set() for view in found) / len(found)
    assert 0.4 < share < 0.6, "replacement and insertion, two of four ways"


@pytest.mark.parametrize("words", [10, 20, 40])
@pytest.mark.usefixtures("without_wordnet")
def test_eda_changes_a_tenth_of_the_words(words: int) -> None:
    caption = " ".join(f"w{i}" for i in range(words))
    longest = max(len(eda(caption, seed).split()) for seed in range(60))
    assert longest == words + words // 10
    kept = [len(eda(caption, seed).split()) for seed in range(600)]
    deleted = [words - length for length in kept if length < words]
    assert abs(sum(deleted) / len(deleted) - 0.1 * words / (1 - 0.9**words)) < 0.35


@pytest.mark.parametrize("lexicon_of", ["without_wordnet", "lexicon"])
@given(caption=st.text(alphabet=st.sampled_from("dog red\tété🐕 \n"), max_size=30), seed=st.integers(0, 2**63 - 1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_eda_never_empties_a_caption(request: pytest.FixtureRequest, lexicon_of: str, caption: str, seed: int) -> None:
    request.getfixturevalue(lexicon_of)
    found = eda(caption, seed)
    assert found == eda(caption, seed)
    if caption.split():
        assert found.split()
    else:
        assert found == caption


@pytest.mark.usefixtures("without_wordnet")
def test_eda_of_one_word() -> None:
    assert {eda("dog", seed) for seed in range(60)} == {"dog", "dog dog"}


def test_without_wordnet_it_is_said_once(
    clear_caches: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.delitem(sys.modules, "nltk.corpus", raising=False)
    with caplog.at_level(logging.WARNING):
        for seed in range(20):
            eda(CAPTION, seed)
    assert [record.message for record in caplog.records] == [
        "WordNet is not installed: text views swap, delete and repeat words, and put in no synonyms"
    ]


def test_without_its_data_nltk_is_not_asked(
    clear_caches: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    corpus = types.ModuleType("nltk.corpus")
    corpus.wordnet = types.SimpleNamespace(ensure_loaded=lambda: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nltk", types.ModuleType("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)
    monkeypatch.setattr(views, "nltk_folders", lambda: [tmp_path])
    assert views.wordnet() is None
    views.wordnet.cache_clear()
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora/wordnet.zip").touch()
    assert views.wordnet() is corpus.wordnet


def test_the_data_are_looked_for_where_nltk_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk_data = pytest.importorskip("nltk.data")
    monkeypatch.delenv("NLTK_DATA", raising=False)
    assert [str(folder) for folder in views.nltk_folders()] == nltk_data.path
    monkeypatch.setenv("NLTK_DATA", os.pathsep.join(["/one", "~/two"]))
    assert views.nltk_folders()[:2] == [Path("/one"), Path.home() / "two"]


def test_synonyms_are_lower_case_sorted_and_not_the_word_itself(
    clear_caches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lemma:
        def __init__(self, name: str) -> None:
            self.name = lambda: name

    class Synset:
        def __init__(self, *names: str) -> None:
            self.lemmas = lambda: [Lemma(name) for name in names]

    class Reader:
        def synsets(self, word: str) -> list[Synset]:
            return [Synset("Dog", "domestic_dog"), Synset("Canis_familiaris", "dog")] if word.lower() == "dog" else []

    monkeypatch.setattr(views, "wordnet", Reader)
    assert views._synonyms("Dog") == ("canis familiaris", "domestic dog")
    assert views._synonyms("xyz") == ()
