"""Small files that unpack, or promise to unpack, to gigabytes: refused within a bound that the kernel keeps.

All are met in one process of their own, whose address space may not grow by more than `GROWTH`.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable

import pytest

GROWTH = 500 << 20
VALID = "valid"
_CHILD = """
import json, resource, sys, time
from pathlib import Path
from raybd.errors import RaybdError
import numpy, PIL.Image, pyarrow, pyarrow.compute, pyarrow.parquet, webdataset, yaml
from raybd import curves, space, study_file, sweeps, tables
from raybd.data import cache, imports, shards
from raybd.store import Store
from raybd.study import Data
PIL.Image.init()

def read(path):
    found = [(0, sample) for sample in shards.samples(path)]
    index = shards.make_index([path], found)
    shards.check_share(index, most=0.0, what="data.train")
    return index

def image(path):
    try:
        return shards.decode(Path(path).read_bytes(), 32)
    except ValueError as error:
        raise RaybdError(str(error), where=path)

CALLS = {
    "shard": read,
    "image": image,
    "study": lambda path: study_file.load(path),
    "classes": lambda path: shards.classes(Data(root="/", classes=path)),
    "pattern": lambda path: shards.find_shards(Data(), Path(path).read_text(), field_name="data.train"),
    "table": lambda path: tables.read(Store(path), "epochs").to_pylist(),
    "curves": lambda path: curves.read(path),
    "csv": lambda path: imports.from_csv(path, path + ".out", image_column="image", caption_column="caption"),
    "sweep": lambda path: sweeps.import_sweep(path, path + ".out"),
}
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]), resource.RLIM_INFINITY))
for name, kind, path in json.loads(sys.stdin.read()):
    start = time.process_time()
    try:
        CALLS[kind](path)
        end = "valid"
    except RaybdError as error:
        end = f"{error.where and 'refused'}: {error}"
    except BaseException as error:
        end = f"{type(error).__name__}: {error}"
    print(json.dumps([name, end[:600], time.process_time() - start]), flush=True)
"""


def tar(*members: tuple[str, bytes], format_: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as found:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            found.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def header(name: str, size: int, *, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return the header of a member, which may promise anything."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def zeros(total: int, *, before: bytes = b"") -> bytes:
    """Return so many zeros behind some bytes, packed, without having them in memory."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as packed:
        packed.write(before)
        for _ in range(total >> 20):
            packed.write(bytes(1 << 20))
    return buffer.getvalue()


SAMPLE = [("a.png", b"x"), ("a.txt", b"a cat")]


def sparse() -> bytes:
    """Return a sparse file of 8 exbibytes in a kilobyte."""
    content = bytearray(header("a.png", 512, kind=tarfile.GNUTYPE_SPARSE))
    content[386:410] = b"%011o\0%011o\0" % (0, 512)
    content[483:495] = b"\x80" + ((1 << 63) - 1).to_bytes(11, "big")
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content) + bytes(512) + tar(("a.txt", b"a cat"))


def png(width: int, height: int, *, idat: bytes = b"") -> bytes:
    """Return a PNG that promises many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    """Return an animated WEBP of one small frame on a large canvas."""
    from PIL import Image

    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in (0, 200)]
    frames[0].save(buffer, format="WEBP", save_all=True, append_images=frames[1:])
    content = bytearray(buffer.getvalue())
    content[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(content)


def laughs(levels: int) -> str:
    """Return YAML that stands for 10 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "name: t\npoison: {num_poisoned: 1}\n" + "\n".join(lines)


STUDY = "name: t\npoison: {num_poisoned: 1}\n"
GRID = "search:\n  sampler: grid\n  space:\n" + "".join(
    f"    {name}: {{low: 1, high: 60}}\n" for name in ("warmup_steps", "epochs", "num_samples", "abd.steps")
)
BOMBS: dict[str, tuple[str, Callable[[], bytes | str], str]] = {
    "one file of 3 GiB": ("shard", lambda: zeros(400 << 20, before=header("a.png", 3 << 30)), "as bombs do"),
    "many images of 60 MiB": (
        "shard",
        lambda: b"".join(zeros(60 << 20, before=header(f"{i}.png", 60 << 20)) for i in range(6)),
        "as bombs do",
    ),
    "pax header of 1 GiB": ("shard", lambda: zeros(8 << 20, before=header("x", 1 << 30, kind=b"x")), "a header of"),
    "long name of 1 GiB": ("shard", lambda: zeros(8 << 20, before=header("x", 1 << 30, kind=b"L")), "a header of"),
    "sparse file": ("shard", sparse, "1 x file too large"),
    "promised exbibyte": ("shard", lambda: header("a.png", 1 << 60) + bytes(512), "unexpected end of data"),
    "chain of headers": (
        "shard",
        lambda: (header("x", 12, kind=b"x") + b"12 a=bcdefg\n".ljust(512, b"\0")) * 3000,
        "recursion",
    ),
    "name of a megabyte": ("shard", lambda: tar(("k" * 1_000_000 + ".png", b"x"), *SAMPLE), "name too long"),
    "folders of a megabyte": (
        "shard",
        lambda: tar(("/" * 1_000_000, b"x"), ("a/" * 500_000 + ".png", b"x"), *SAMPLE),
        "name too long",
    ),
    "caption of 900 KB": ("shard", lambda: tar(("a.png", b"x"), ("a.txt", b"a" * 900_000)), "caption too long"),
    "caption of 5 MB": ("shard", lambda: tar(("a.png", b"x"), ("a.txt", b"a" * 5_000_000)), "file too large"),
    "deep json": ("shard", lambda: tar(*SAMPLE, ("a.json", b"[" * 1_000_000)), "caption or json unreadable"),
    "png of 50,000 x 50,000": ("image", lambda: png(50_000, 50_000), "could be decompression bomb"),
    "png of 8,001 x 8,001": ("image", lambda: png(8_001, 8_001), "image too large"),
    "png of 81 pixels with 64 MiB more": ("image", lambda: png(9, 9, idat=zlib.compress(bytes(1 << 26), 1)), VALID),
    "webp of 16,383 x 16,383": ("image", lambda: webp(16_383, 16_383), "could be decompression bomb"),
    "billion laughs": ("study", lambda: laughs(9), "more than 100000 values"),
    "sexagesimal number": ("study", lambda: STUDY + "seed: 1" + ":59" * 300_000, "mistake"),
    "hexadecimal number": ("study", lambda: STUDY + "seed: 0x" + "f" * 900_000, "mistake"),
    "grid of 12 million": ("study", lambda: STUDY + GRID, "a grid of more than"),
    "10,000 unknown keys": ("study", lambda: STUDY + "".join(f"k{i}: 1\n" for i in range(10_000)), "mistakes"),
    "deep study": ("study", lambda: STUDY + "a: " + "[" * 400_000, "nested too deeply"),
    "study of 10 MB": ("study", lambda: STUDY + "#" * 10_000_000, "larger than such a file can be"),
    "class file of 17 MB": ("classes", lambda: b"[" + b" " * (17 << 20), "larger than a class file"),
    "deep classes": ("classes", lambda: "[" * 1_000_000, "not JSON"),
    "brace range": ("pattern", lambda: "x{0..99999999999}.tar", "stands for more than"),
    "brace product": ("pattern", lambda: "{{0..999}{0..999}{0..999},x}", "stands for more than"),
    "braces doubled": ("pattern", lambda: "{a,b}" * 60, "stands for more than"),
    "deep braces": ("pattern", lambda: "{" * 2000 + "}" * 2000, "not a brace list"),
    "long pattern": ("pattern", lambda: "{a," * 50_000 + "}" * 50_000, "a pattern of"),
    "line of 20 MB": ("csv", lambda: b"image,caption\n" + bytes(20 << 20), "a line of more than"),
}


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    """What each bomb met, and the processor time that it took."""
    folder = tmp_path_factory.mktemp("bombs")
    given = []
    for number, (name, (kind, make, _)) in enumerate(BOMBS.items()):
        content = make()
        path = folder / f"{number}{'.yaml' if kind == 'study' else ''}"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        given.append((name, kind, str(path)))
        del content
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(GROWTH)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    found = {name: (end, seconds) for name, end, seconds in map(json.loads, done.stdout.splitlines())}
    assert len(found) == len(BOMBS), f"after {len(found)} of {len(BOMBS)}: {done.stderr[-2000:]}"
    return found


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name: str, met: dict[str, tuple[str, float]]) -> None:
    end, seconds = met[name]
    assert end == VALID if BOMBS[name][2] == VALID else end.startswith("refused: "), end
    assert BOMBS[name][2] in end
    assert seconds < 10
