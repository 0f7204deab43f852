"""Shards made of anything: every one is read to its end or refused by name, and no sample of it breaks a reader."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import fuzzing
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from raybd.data import cache, limits, shards
from raybd.data.shards import Index, RawSample
from raybd.errors import DataError

SIZE = 8
DECODING = 800  # MB that one image of the most pixels may take, as the README says


def picture(kind: str = "PNG", *, mode: str = "RGB", size: tuple[int, int] = (9, 7), **options: object) -> bytes:
    """Return a small image as the bytes of a file."""
    pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    image = Image.fromarray(pixels)
    image = (
        image.quantize(8) if mode == "P" else image.convert("L").convert(mode) if "I" in mode else image.convert(mode)
    )
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """Return a PNG that promises pixels and has none, with further chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    """Return the head of an animated WEBP with a canvas of any size."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + canvas
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def animated(kind: str) -> bytes:
    """Return an image of several frames."""
    frames = [Image.new("RGB", (9, 7), (30 * i, 0, 0)) for i in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format=kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def with_text() -> bytes:
    """Return a PNG whose text unpacks to much more than it is."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * (1 << 21), zip=True)
    return picture(pnginfo=info)


BOMB = zlib.compress(bytes(1 << 24))
IMAGES: dict[str, bytes] = {
    "png": picture(),
    "jpeg": picture("JPEG"),
    "webp": picture("WEBP"),
    "gif": picture("GIF"),
    "palette": picture(mode="P"),
    "grey": picture(mode="L"),
    "one bit": picture(mode="1"),
    "alpha": picture(mode="RGBA"),
    "sixteen bits": picture(mode="I;16"),
    "cmyk": picture("JPEG", mode="CMYK"),
    "progressive": picture("JPEG", progressive=True),
    "animated png": animated("PNG"),
    "animated webp": animated("WEBP"),
    "text that unpacks": with_text(),
    "iccp bomb": png(4, 4, chunk(b"iCCP", b"x\0\0" + BOMB)),
    "text bomb": png(4, 4, chunk(b"zTXt", b"x\0\0" + BOMB)),
    "idat bomb": b"\x89PNG\r\n\x1a\n" + png(4, 4)[8:33] + chunk(b"IDAT", BOMB) + chunk(b"IEND", b""),
    "pixel bomb": png(50_000, 50_000),
    "wide": png(2**31 - 1, 1),
    "none": png(0, 0),
    "webp bomb": webp(1 << 24, 1 << 24),
    "empty": b"",
}


@given(name=st.sampled_from(sorted(IMAGES)), data=st.data(), size=st.sampled_from([1, 4, SIZE, 224]))
@fuzzing.fuzzed(300)
def test_images(name: str, data: st.DataObject, size: int) -> None:
    content = data.draw(fuzzing.damaged(IMAGES[name]))

    def decode() -> NDArray[np.uint8]:
        try:
            return shards.decode(content, size)
        except ValueError as error:  # for which a sample is skipped
            raise DataError(str(error), where=name) from None

    found = fuzzing.case("image", decode, given=(content, size), megabytes=DECODING)
    if found is not None:
        assert (found.shape, found.dtype) == ((3, size, size), np.uint8)


def test_images_that_are_whole_decode() -> None:
    """Without it the tests above could pass with a decoder that refuses everything."""
    refused = set()
    for name, content in IMAGES.items():
        try:
            shards.decode(content, SIZE)
        except ValueError:
            refused.add(name)
    bad = {
        "gif",
        "text that unpacks",
        "iccp bomb",
        "text bomb",
        "idat bomb",
        "pixel bomb",
        "wide",
        "none",
        "webp bomb",
        "empty",
    }
    assert refused - bad == set()
    assert {"gif", "pixel bomb", "wide", "webp bomb", "empty"} <= refused


# --- members of a tar


KEYS = st.one_of(
    st.sampled_from(
        ["k", "a/b", "../up", "/etc/passwd", "..", ".", "a/../../b", "__meta__/x", "é", "a b", "\x1b[31m", "x\n"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6),
    st.integers(90, 300).map(lambda n: "n" * n),
    st.integers(90, 300).map(lambda n: "d/" * n),
)
SUFFIXES = st.sampled_from(["png", "jpg", "JPG", "webp", "txt", "json", "cls", "seg.png", "", "exe", "x" * 300])
TEXTS = st.one_of(
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=8),
    st.sampled_from(
        [b"", b"a cat", b" \n", b"\xff\xfe", b"\0", "a" * 9_999, "a" * 10_001, b"a" * (1 << 20), b"a" * 1_100_000]
    ).map(lambda text: text.encode() if isinstance(text, str) else text),
)
META = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.just("\ud800")
    | st.just("c" * 10_001),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["label", "captions", "caption", "x"]), inner)
    ),
    max_leaves=5,
)
JSONS = st.one_of(
    st.dictionaries(st.sampled_from(["label", "captions", "caption", "class_name"]), META).map(
        lambda found: json.dumps(found).encode()
    ),
    META.map(lambda found: json.dumps(found).encode()),
    st.sampled_from(
        [b"", b"{", b"[" * 100_000, b"9" * 5000, b'{"label": 1e999}', b'{"label": -0}', b"\xef\xbb\xbf{}", b"NaN"]
    ),
    TEXTS,
)


@st.composite
def members(draw: st.DrawFn) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Return members of a shard: samples, whole or not, and whatever else a tar can have."""
    whole = [("png", IMAGES["png"]), ("txt", b"a cat"), ("json", b'{"label": 0}')]
    found = []
    for number in range(draw(st.sampled_from([0, 2, 3, 4]))):
        for suffix, content in whole:
            info = tarfile.TarInfo(f"w{number}.{suffix}")
            info.size = len(content)
            found.append((info, content))
    for number in range(draw(st.integers(0, 3))):
        key = draw(st.just(f"k{number}") | KEYS)
        for suffix in draw(st.lists(SUFFIXES, max_size=4) | st.just(["png", "txt", "json"])):
            content = draw(
                JSONS if suffix == "json" else TEXTS if suffix == "txt" else st.sampled_from(list(IMAGES.values()))
            )
            info = tarfile.TarInfo(f"{key}.{suffix}" if suffix else key)
            info.size = len(content)
            info.type = draw(st.sampled_from([tarfile.REGTYPE] * 12 + ODD_TYPES))
            if info.type not in tarfile.REGULAR_TYPES:
                info.linkname, info.size, content = (
                    draw(st.sampled_from(["", "/etc/passwd", "../../x", "k0.png"])),
                    0,
                    b"",
                )
            if draw(st.integers(0, 15)) == 0:
                info.pax_headers = draw(st.dictionaries(st.sampled_from(PAX), st.sampled_from(PAX_VALUES), max_size=2))
            found.append((info, content))
    return found


ODD_TYPES = [
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.CONTTYPE,
]
PAX = [
    "size",
    "path",
    "mtime",
    "uid",
    "GNU.sparse.size",
    "GNU.sparse.realsize",
    "GNU.sparse.major",
    "GNU.sparse.map",
    "hdrcharset",
    "é",
]
PAX_VALUES = [
    "0",
    "-1",
    "1" * 19,
    "1e9",
    "99999999999999999999",
    "x",
    "",
    "../../etc/passwd",
    "0,1,2,3",
    "1",
    "a" * 3000,
]


def packed(found: list[tuple[tarfile.TarInfo, bytes]], *, format_: int) -> bytes:
    """Return a tar of these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_, errors="surrogateescape") as tar:
        for info, content in found:
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # a name that this format cannot hold
                continue
    return buffer.getvalue()


def lying(content: bytes, place: int, size: int) -> bytes:
    """Return a tar of which one header says another size, with the checksum to it."""
    starts = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return content
    at = starts[place % len(starts)]
    header = bytearray(content[at : at + 512])
    header[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :]


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """Return the bytes of a shard."""
    formats = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]
    content = packed(draw(members()), format_=draw(st.sampled_from(formats)))
    how = draw(st.sampled_from(["whole", "whole", "whole", "damage", "lie", "no end", "type"]))
    if how == "damage":
        content = draw(fuzzing.damaged(content))
    elif how == "lie":
        sizes = st.sampled_from([0, 1, 511, 513, 1 << 20, 1 << 27, 1 << 33, 1 << 40, (1 << 63) - 1, 1 << 80])
        content = lying(content, draw(st.integers(0, 20)), draw(sizes))
    elif how == "no end":
        content = content.rstrip(b"\0")
    elif how == "type" and len(content) > 512:
        content = (
            content[:156]
            + draw(st.sampled_from([b"S", b"x", b"g", b"L", b"K", b"X", b"1", b"9", b"V"]))
            + content[157:]
        )
    if draw(st.booleans()):
        content = gzip.compress(content, 1, mtime=0)
        if draw(st.integers(0, 3)) == 0:
            content = draw(fuzzing.damaged(content))
    return content


def read(path: Path) -> tuple[Index, Index]:
    """Return a shard's index without and with its images, as training and evaluation read it."""
    found: list[tuple[int, RawSample]] = [(0, sample) for sample in shards.samples(str(path))]
    index = shards.make_index([str(path)], found)
    assert len(index) + len(index.skipped) == len(found)
    labelled = cache.load_images([str(path)], size=SIZE, cache_dir=str(path.parent / "cache"), labelled=True).index
    shards.check_share(index, most=0.5, what="data.train")
    return index, labelled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@given(content=tars())
@example(content=b"")
@example(content=bytes(10240))
@fuzzing.fuzzed(300)
def test_shards(content: bytes, folder: Path) -> None:
    path = folder / "s.tar"
    path.write_bytes(content)
    found = fuzzing.case("shard", lambda: read(path), given=content, megabytes=DECODING)
    if found is not None:
        for caption in found[0].captions:
            assert 0 < len(caption) <= limits.MAX_CAPTION
            caption.encode()
        assert all(len(key.encode()) <= 4 * limits.MAX_NAME for key in found[0].keys)
