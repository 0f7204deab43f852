"""Other formats turned into webdataset shards: an image folder, a table of captions, CIFAR-10.

What is written is a data root that a study reads as it is (`shard_writer` says what is in it). All that can be checked
beforehand is checked before the first byte is written. Samples are mixed by a seeded hash, so that a prefix of the
shards holds all classes; the split into train and test is such a hash too, of the image's path alone.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from raybd.data import limits, shard_writer
from raybd.data.shard_writer import SPLITS, Imported, Sample, Skipped
from raybd.errors import DataError, StudyError
from raybd.seeding import share

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
TEST_FOLDERS = ("test", "val", "valid", "validation")


def from_folder(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    caption_template: str = "a photo of a {}.",
    test_share: float = 0.1,
    seed: int = 0,
    samples_per_shard: int = 5000,
) -> Imported:
    """Import an image folder: one sub-folder for each class, or train/ and test/ (or val/) that hold class folders.

    A class is named as its folder, `_` read as a space. `test_share` is used only where there is no test folder.
    Errors: DataError for a folder that is missing, empty, or has a class in test that is not in train; StudyError.
    """
    target = _checked(
        out, caption_template=caption_template, test_share=test_share, samples_per_shard=samples_per_shard
    )
    base = Path(folder)
    if not os.path.isdir(base):
        raise DataError("no such folder", where=str(base), expected="a folder with one sub-folder for each class")
    given = _split_folders(base)
    classes = _folder_classes(given["train"])
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    for split, parent in given.items():
        for path in _sub_folders(parent).values():
            label = _label(_class_name(path), classes, where=str(path))
            for image in _images(path):
                source = _printable(image.relative_to(base).as_posix())
                sample = Sample(source, image, caption_template.replace("{}", classes[label]), label)
                held_out = "test" not in given and share(seed, "import", "test", source) < test_share
                splits["test" if held_out else split].append(sample)
    about = {"kind": "folder", "caption_template": caption_template, "seed": seed}
    about |= {} if "test" in given else {"test_share": test_share}
    mixed = {split: _mixed(found, seed) for split, found in splits.items()}
    return shard_writer.write(target, mixed, classes, about=about, samples_per_shard=samples_per_shard)


def from_csv(
    csv_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    image_column: str,
    caption_column: str,
    label_column: str | None = None,
    root: str | os.PathLike[str] | None = None,
    test_share: float = 0.1,
    seed: int = 0,
    samples_per_shard: int = 5000,
) -> Imported:
    """Import a CSV or TSV with a header (UTF-8) of image paths, captions and, if there are any, class names.

    Paths are relative to `root`, or to the table's own folder. Several rows may share an image: they go to the same
    split. Without `label_column` everything is for training. A row with an empty caption is skipped and named.
    Errors: DataError, with the line, for text that is not UTF-8, columns or images that are missing; StudyError.
    """
    target = _checked(out, test_share=test_share, samples_per_shard=samples_per_shard)
    table = Path(csv_path)
    columns = [image_column, caption_column, *([] if label_column is None else [label_column])]
    rows = list(_rows(table, columns))
    base = table.parent if root is None else Path(root)
    images = _image_paths(table, base, rows)
    classes: list[str] = []
    if label_column is not None:
        for line, values in rows:
            if not values[2]:
                raise DataError("a row without a class", where=f"{table}:{line}", expected=f"text in {label_column}")
        names = {values[2] for _, values in rows}
        numbers = all(name.isascii() and name.isdigit() for name in names)
        classes = sorted(names, key=lambda name: (int(name) if numbers else 0, name))
    labels = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    skipped = []
    for (line, values), (source, image) in zip(rows, images, strict=True):
        if not values[1]:
            skipped.append(Skipped(f"{source} (line {line})", "empty caption"))
            continue
        held_out = bool(classes) and share(seed, "import", "test", source) < test_share
        label = labels[values[2]] if classes else None
        splits["test" if held_out else "train"].append(Sample(source, image, values[1], label))
    about = {"kind": "csv", "columns": columns, "seed": seed, "test_share": test_share if classes else 0}
    mixed = {split: _mixed(found, seed) for split, found in splits.items()}
    return shard_writer.write(target, mixed, classes, about=about, samples_per_shard=samples_per_shard, skipped=skipped)


def from_cifar10(
    out: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str],
    download: bool = False,
    caption_template: str = "a photo of a {}.",
    samples_per_shard: int = 5000,
) -> Imported:
    """Import CIFAR-10 as torchvision keeps it below `root`, in its own order and splits, images as PNG.

    It is downloaded (170 MB) only when asked. Errors: DataError if it is not there or damaged; StudyError.
    """
    target = _checked(out, caption_template=caption_template, samples_per_shard=samples_per_shard)
    from torchvision.datasets import CIFAR10

    try:
        # torchvision checks every file's MD5 before it unpickles it.
        sets = {split: CIFAR10(root, train=split == "train", download=download) for split in SPLITS}
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"CIFAR-10 cannot be read: {error}",
            where=str(root),
            expected=f"the folder {CIFAR10.base_folder} as published",
            fix="allow the download, or name the folder that holds it",
        ) from error
    classes = [str(name) for name in sets["train"].classes]

    def samples(split: str) -> Iterator[Sample]:
        for index, (pixels, label) in enumerate(zip(sets[split].data, sets[split].targets, strict=True)):
            caption = caption_template.replace("{}", classes[label])
            yield Sample(f"{split}/{index:05d}", shard_writer.png(Image.fromarray(pixels)), caption, int(label))

    about = {"kind": "cifar10", "caption_template": caption_template}
    given = {split: samples(split) for split in SPLITS}
    return shard_writer.write(target, given, classes, about=about, samples_per_shard=samples_per_shard)


def _checked(
    out: str | os.PathLike[str], *, samples_per_shard: int, test_share: float = 0.0, caption_template: str = "{}"
) -> Path:
    """Return OUT as a path, or say which setting is wrong."""
    if not 0 <= test_share < 1:
        raise StudyError(f"test_share is {test_share}", where="test_share", expected="at least 0 and below 1")
    if samples_per_shard < 1:
        raise StudyError(f"it is {samples_per_shard}", where="samples_per_shard", expected="a whole number above 0")
    if "{}" not in caption_template:
        raise StudyError(f"no {{}} in {caption_template!r}", where="caption_template", expected="{} for the class name")
    if "://" in os.fspath(out):
        raise DataError(
            "shards are written to a local folder", where=os.fspath(out), fix="import, then copy them there"
        )
    path = Path(out).expanduser().absolute()
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise DataError("it exists and is not empty", where=str(path), fix="name a new folder, or remove this one")
    return path


def _sub_folders(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def _split_folders(base: Path) -> dict[str, Path]:
    """Return the folder that holds the class folders of each split."""
    found = _sub_folders(base)
    if not found:
        fix = "one sub-folder for each class; for images with captions, import a CSV"
        raise DataError("no sub-folders", where=str(base), expected="one sub-folder for each class", fix=fix)
    if not set(found) <= {"train", *TEST_FOLDERS}:
        return {"train": base}
    if "train" not in found:
        raise DataError(
            f"{', '.join(found)} but no train", where=str(base), expected="a folder train with class folders"
        )
    tests = [found[name] for name in TEST_FOLDERS if name in found]
    if len(tests) > 1:
        log.warning("%s: %s is the test set; left out: %s", base, tests[0].name, ", ".join(p.name for p in tests[1:]))
    return {"train": found["train"], **({"test": tests[0]} if tests else {})}


def _class_name(folder: Path) -> str:
    name = folder.name.replace("_", " ").strip()
    if not name or name != _printable(name):
        raise DataError("the folder's name is empty or not UTF-8", where=_printable(str(folder)), fix="rename it")
    return name


def _folder_classes(parent: Path) -> list[str]:
    folders = _sub_folders(parent)
    if not folders:
        raise DataError("no class folders", where=str(parent), expected="one sub-folder for each class")
    classes: dict[str, Path] = {}
    for path in folders.values():
        name = _class_name(path)
        if name in classes:
            raise DataError(f"{classes[name].name} and {path.name} are both class {name!r}", where=str(parent))
        if not any(_images(path)):
            expected = f"at least one file {', '.join(sorted(SUFFIXES))}"
            raise DataError("no images", where=str(path), expected=expected, fix="remove the folder, or fill it")
        classes[name] = path
    return sorted(classes)


def _label(name: str, classes: list[str], *, where: str) -> int:
    if name not in classes:
        raise DataError(f"unknown class {name!r}", where=where, expected="a class that train has too", fix="rename it")
    return classes.index(name)


def _images(folder: Path) -> Iterator[Path]:
    """Yield the image files below a folder; hidden files and other kinds of files are passed over."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(parent, name)


def _printable(text: str) -> str:
    """Return text that UTF-8 can hold: bytes of a file name that are not UTF-8 become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _lines(table: Path) -> Iterator[str]:
    """Yield a table's lines. Errors: DataError with the line that is not UTF-8."""
    try:
        with open(table, "rb") as file:
            lines = iter(lambda: file.readline(limits.MAX_TEXT_BYTES + 1), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) > limits.MAX_TEXT_BYTES:
                    what = f"a line of more than {limits.MAX_TEXT_BYTES} bytes"
                    raise DataError(what, where=f"{table}:{number}", expected="a CSV or TSV file")
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    what = f"byte {error.start + 1} of the line is not UTF-8"
                    raise DataError(what, where=f"{table}:{number}", fix="save the table as UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(table), expected="a CSV or TSV file") from error


def _rows(table: Path, columns: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and the wanted cells, stripped, of each row."""
    lines = _lines(table)
    head = next(lines, "")
    delimiter = "\t" if "\t" in head else ","
    try:
        header = [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]
    except csv.Error as error:
        raise DataError(str(error), where=f"{table}:1", expected="a header: names of columns") from None
    for name in columns:
        if header.count(name) != 1:
            what = f"{'no' if name not in header else 'more than one'} column {name!r}"
            known = ", ".join(header)[:1000] or "(none)"
            raise DataError(what, where=f"{table}:1", expected=f"one of the columns {known}")
    at = [header.index(name) for name in columns]
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    rows = 0
    try:
        for row in reader:
            if row and len(row) != len(header):
                what, where = f"{len(row)} cells", f"{table}:{reader.line_num + 1}"
                raise DataError(what, where=where, expected=f"{len(header)}, as in the header", fix="quote such cells")
            if row:
                rows += 1
                yield reader.line_num + 1, [row[i].strip() for i in at]
    except csv.Error as error:
        where = f"{table}:{reader.line_num + 1}"
        raise DataError(str(error), where=where, fix='write a quote inside a quoted cell as ""') from None
    if not rows:
        raise DataError("no rows below the header", where=str(table))


def _image_paths(table: Path, base: Path, rows: list[tuple[int, list[str]]]) -> list[tuple[str, Path]]:
    """Return source name and path of each row's image. Errors: DataError for files that are not there."""
    found, missing = [], []
    for line, values in rows:
        path = base / values[0]
        if not values[0] or not os.path.isfile(path):  # Path.is_file raises for a name that is too long
            missing.append((line, path))
        source = path.relative_to(base) if path.is_relative_to(base) else path
        found.append((_printable(source.as_posix()), path))
    if missing:
        raise DataError(
            f"{len(missing)} of {len(rows)} images are not there; the first is {missing[0][1]}",
            where=f"{table}:{missing[0][0]}",
            expected=f"files, relative to {base}",
            fix="name the folder that the paths start from, or remove these rows",
        )
    return found


def _mixed(samples: list[Sample], seed: int) -> list[Sample]:
    return sorted(samples, key=lambda s: (share(seed, "import", "order", s.source, s.caption), s.source, s.caption))
