"""Lists of others: CSVs to import, sweeps, class files, templates, patterns of shards."""

from __future__ import annotations

import csv
import io
import os
import random
import shutil
from pathlib import Path
from typing import Any

import fuzzing
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raybd import fronts, sweeps, tables
from raybd.curves import Curve
from raybd.data import imports, limits, shards
from raybd.data.shard_writer import Imported
from raybd.errors import DataError
from raybd.store import Store
from raybd.study import Data

CELLS = [
    "",
    " ",
    "x",
    "a cat",
    "0",
    "-1",
    "0.5",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1e-400",
    "1_0",
    "٣",
    "0x10",
    "true",
    "None",
    '"',
    '""',
    "'",
    ",",
    "\t",
    "\r",
    "\n",
    "\r\n",
    "\0",
    "\ufeff",
    "\u2028",
    "é",
    "=1+1",
    "\x1b[2J",
    "../a.png",
    "/etc/passwd",
    "a.png",
    "a" * 300,
    "b" * 10_001,
    "c" * 140_000,
    "9" * 400,
    "99999999999999999999",
    "1e18",
    "1e300",
    "mmcl",
    "ssl",
    "par",
    "3.0",
]
COLUMNS = [
    "image",
    "caption",
    "label",
    "x",
    "",
    "image ",
    "lr",
    "epoch",
    "run",
    "method",
    "loss_weights.ssl",
    "zeroshot_top1",
]


@st.composite
def lists(draw: st.DrawFn, rows: list[dict[str, str]]) -> bytes:
    """Return a CSV made from rows with some cells, columns, lines, quotes or bytes that are not as they should be."""
    dice = random.Random(draw(st.integers(0, 2**32)))
    names, cells = list(rows[0]), [list(row.values()) for row in rows]
    for _ in range(dice.choice([0, 0, 1, 1, 2])):
        row = dice.choice(cells)
        what = dice.choice(["cell", "cell", "cell", "column", "header", "row", "longer", "shorter", "twice"])
        if what == "cell" and row:
            row[dice.randrange(len(row))] = dice.choice(CELLS)
        elif what == "column":
            value = dice.choice(CELLS)
            names.append(dice.choice(COLUMNS))
            for each in cells:
                each.append(value)
        elif what == "header":
            names[dice.randrange(len(names))] = dice.choice([*COLUMNS, *CELLS])
        elif what == "row":
            cells.append(list(row))
        elif what == "longer":
            row.append("x")
        elif what == "shorter" and row:
            row.pop()
        elif what == "twice":
            names[dice.randrange(len(names))] = dice.choice(names)
    text = io.StringIO()
    end = dice.choice(["\n", "\n", "\n", "\r\n", "\r"])
    writer = csv.writer(text, delimiter=dice.choice([",", ",", ",", ",", ",", "\t", ";"]), lineterminator=end)
    writer.writerows([names, *cells][dice.choice([0] * 12 + [1]) :])
    content = text.getvalue().encode()
    how = dice.choice(["as it is"] * 16 + ["damaged", "utf-16", "bom", "latin-1", "quote", "nothing", "header"])
    return {
        "damaged": lambda: draw(fuzzing.damaged(content)),
        "utf-16": lambda: text.getvalue().encode("utf-16"),
        "bom": lambda: b"\xef\xbb\xbf" + content,
        "latin-1": lambda: content + b"\xe9\n",
        "quote": lambda: content + b'"never closed, ',
        "nothing": lambda: b"",
        "header": lambda: content.splitlines(keepends=True)[0] if content else b"",
    }.get(how, lambda: content)()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("lists")
    for i in range(3):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(found / f"{i}.png")
    (found / "broken.png").write_bytes(b"\x89PNG")
    return found


# CSVs of captions

PAIRS = [{"image": f"{i % 3}.png", "caption": f"a thing {i}", "label": ("cat", "dog")[i % 2]} for i in range(6)]


def imported(table: Path, **options: Any) -> Imported:
    """Import a list and read what came of it."""
    out = table.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    found = imports.from_csv(table, out, image_column="image", caption_column="caption", **options)
    for split, count in found.samples.items():
        read = [s for path in sorted((out / split).glob("*")) for s in shards.samples(str(path))]
        assert len(read) == count
        assert all(not sample.problem for sample in read)
    if found.classes:
        assert tuple(shards.classes(Data(root=str(out)))) == found.classes
    return found


@given(content=lists([*PAIRS, {"image": "broken.png", "caption": "x", "label": "cat"}]), labelled=st.booleans())
@fuzzing.fuzzed(150)
def test_lists_of_images(content: bytes, labelled: bool, folder: Path) -> None:  # noqa: FBT001
    (folder / "list.csv").write_bytes(content)
    options = {"label_column": "label"} if labelled else {}
    fuzzing.case("csv", lambda: imported(folder / "list.csv", **options), given=content, megabytes=64)


# Folders of images

NAMES = [
    b"cat",
    b"dog",
    b"train",
    b"test",
    b"val",
    b".hidden",
    b"a b",
    b"a_b",
    b"\xff\xfe",
    b"caf\xc3\xa9",
    b"n" * 200,
    b"\x1b[2J",
    b"..x",
]
FILES = [b"0.png", b"1.PNG", b"x.txt", b".png", b"\xff.png", b"broken.jpg", b"n" * 200 + b".png", b"\n.png", b"f.gif"]


@given(seed=st.integers(0, 2**32))
@fuzzing.fuzzed(40)
def test_folders_of_images(seed: int, folder: Path) -> None:
    dice = random.Random(seed)
    base, out = os.fsencode(folder / "in"), folder / "folder-out"
    for old in (base, os.fsencode(out)):
        shutil.rmtree(old, ignore_errors=True)
    made = []
    for _ in range(dice.choice([0, 1, 2, 3])):
        parts = dice.sample(NAMES, k=dice.choice([0, 1, 1, 2]))
        path = os.path.join(base, *parts)
        os.makedirs(path, exist_ok=True)
        for name in dice.sample(FILES, k=dice.choice([0, 1, 2])):
            shutil.copy(os.fsencode(folder / dice.choice(["0.png", "1.png", "broken.png"])), os.path.join(path, name))
            made.append((parts, name))
    fuzzing.case("folder", lambda: imports.from_folder(os.fsdecode(base), out), given=made, megabytes=64)


# Sweeps

SWEEP = [
    {
        "pretrain_objective": "mmcl",
        "cleaning_loss": loss,
        "lr": lr,
        "epoch": str(epoch),
        "zeroshot_top1": "0.25",
        "asr_top1": str(0.9 - epoch / 4),
        "n_clean": "100",
        "n_triggered": "40",
    }
    for loss in ("mmcl", "mmcl_ssl")
    for lr in ("1e-4", "1e-3")
    for epoch in (0, 1, 2)
]


@given(content=lists(SWEEP))
@fuzzing.fuzzed(100)
def test_sweeps(content: bytes, folder: Path) -> None:
    path, out = folder / "sweep.csv", folder / "sweep"
    path.write_bytes(content)
    shutil.rmtree(out, ignore_errors=True)

    def read() -> list[Curve]:
        found = sweeps.import_sweep(str(path), str(out))
        assert fronts.summarise(tables.read(Store(str(out)), "fronts").to_pylist())
        assert len(tables.read(Store(str(out)), "epochs")) == sum(len(curve.epochs) for curve in found)
        return found

    fuzzing.case("sweep", read, given=content, megabytes=64)


# What was found by these tests, and mended.


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        (b"image,caption\r0.png,a\r", ":1", "new-line character"),
        (b'image,"' + b"x" * 140_000 + b'"\n0.png,a\n', ":1", "field larger than field limit"),
        (b"image,caption\n" + b"x" * (limits.MAX_TEXT_BYTES + 1), ":2", "a line of more than 1048576 bytes"),
    ],
)
def test_lists_that_are_refused(content: bytes, where: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        imports.from_csv(tmp_path / "l.csv", tmp_path / "out", image_column="image", caption_column="caption")
    assert caught.value.where == f"{tmp_path}/l.csv{where}"


def test_an_image_too_large_for_shards_is_skipped_and_named(folder: Path, tmp_path: Path) -> None:
    Image.new("1", (8001, 8000)).save(tmp_path / "large.png")
    (tmp_path / "l.csv").write_text(
        f"image,caption\n{folder}/0.png,a cat\nlarge.png,a dog\n{folder}/1.png,{'x' * 10_001}\n"
    )
    found = imports.from_csv(tmp_path / "l.csv", tmp_path / "out", image_column="image", caption_column="caption")
    assert found.samples["train"] == 1
    assert sorted(skip.why for skip in found.skipped) == [
        "ValueError: 8001x8000 pixels, at most 64000000 expected",
        "ValueError: caption too long: 10001 characters, at most 10000 expected",
    ]
