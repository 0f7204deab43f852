"""Imports: what went in comes out of webdataset's own reader, byte for byte; what is wrong is said before writing."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10
from webdataset.tariterators import group_by_keys, tar_file_expander

from raybd.data import imports, shards
from raybd.data.shard_writer import Imported
from raybd.errors import DataError, RaybdError, StudyError
from raybd.study import Data


def picture(number: int, kind: str) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def class_folders(base: Path, *, each: int = 12) -> dict[str, bytes]:
    """Two classes, of JPEG, PNG and WebP images; return the files by path below `base`."""
    files = {}
    for number in range(2 * each):
        kind, suffix = [("JPEG", "jpg"), ("PNG", "PNG"), ("WEBP", "webp")][number % 3]
        files[f"{('golden_dog', 'cat')[number % 2]}/{number:03d}.{suffix}"] = picture(number, kind)
    for name, content in files.items():
        put(base / name, content)
    return files


def read_back(out: Path, split: str) -> list[dict[str, Any]]:
    samples = []
    for path in sorted((out / split).iterdir()):
        with open(path, "rb") as stream:  # webdataset's own opener leaves closing to the garbage collector
            samples += list(group_by_keys(tar_file_expander(iter([{"url": str(path), "stream": stream}]))))
    return [dict(sample, about=json.loads(sample["json"]), caption=sample["txt"].decode()) for sample in samples]


def image_of(sample: dict[str, Any]) -> tuple[str, bytes]:
    return next((suffix, sample[suffix]) for suffix in ("jpg", "png", "webp") if suffix in sample)


def tree(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_folder_round_trip(tmp_path: Path) -> None:
    files = class_folders(tmp_path / "in")
    put(tmp_path / "in" / "cat" / "notes.txt", b"not an image")
    put(tmp_path / "in" / "cat" / ".hidden.png", b"not an image")
    done = imports.from_folder(tmp_path / "in", tmp_path / "out", test_share=0.3, samples_per_shard=5)
    train, test = read_back(done.out, "train"), read_back(done.out, "test")
    assert done.samples == {"train": len(train), "test": len(test)}
    assert len(train) > 5
    assert len(test) > 2
    assert done.classes == ("cat", "golden dog")
    assert {sample["about"]["source"]: image_of(sample)[1] for sample in train + test} == files
    assert len({sample["__key__"] for sample in train + test}) == len(files)
    for sample in train + test:
        folder = sample["about"]["source"].split("/")[0].replace("_", " ")
        assert sample["about"]["class_name"] == done.classes[sample["about"]["label"]] == folder
        assert sample["caption"] == f"a photo of a {folder}."
        assert image_of(sample)[0] == sample["about"]["source"][-4:].strip(".").lower()
    # Mixed: the first shard holds both classes.
    assert {sample["about"]["label"] for sample in train[:5]} == {0, 1}
    assert not list(tmp_path.glob(".out*"))


def test_classes_and_manifest(tmp_path: Path) -> None:
    class_folders(tmp_path / "in")
    done = imports.from_folder(tmp_path / "in", tmp_path / "out", test_share=0.3, samples_per_shard=5)
    labels = {split: [sample["about"]["label"] for sample in read_back(done.out, split)] for split in ("train", "test")}
    assert json.loads((done.out / "classes.json").read_bytes()) == [
        {"label": 0, "class_name": "cat", "train": labels["train"].count(0), "test": labels["test"].count(0)},
        {"label": 1, "class_name": "golden dog", "train": labels["train"].count(1), "test": labels["test"].count(1)},
    ]
    manifest = json.loads((done.out / "manifest.json").read_bytes())
    for split in ("train", "test"):
        for entry in manifest["splits"][split]:
            content = (done.out / entry["file"]).read_bytes()
            assert entry["sha256"] == hashlib.sha256(content).hexdigest()
            assert entry["bytes"] == len(content)
        numbers = [entry["samples"] for entry in manifest["splits"][split]]
        assert sum(numbers) == len(labels[split])
        assert numbers[:-1] == [5] * (len(numbers) - 1)


def test_a_study_reads_what_was_imported(tmp_path: Path) -> None:
    class_folders(tmp_path / "in")
    done = imports.from_folder(tmp_path / "in", tmp_path / "out", samples_per_shard=10)
    data = Data(root=str(done.out))
    found = shards.find_shards(data, data.train, field_name="data.train")
    samples = [(number, sample) for number, url in enumerate(found) for sample in shards.samples(url)]
    index = shards.make_index(found, samples, labelled=True)
    assert len(index) == done.samples["train"]
    assert not index.skipped
    assert tuple(shards.classes(data)) == done.classes


def test_same_input_same_bytes_other_seed_other_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        class_folders(tmp_path / name / "in")
        put(tmp_path / name / "in" / "cat" / "broken.png", b"no image")

    def run(parent: str, out: str, seed: int) -> Imported:
        return imports.from_folder(tmp_path / parent / "in", tmp_path / out / "x", seed=seed, samples_per_shard=7)

    first, second, other = run("a", "out1", 0), run("b", "out2", 0), run("a", "out3", 1)
    assert tree(first.out) == tree(second.out)
    shard = first.out / "train" / "train-000000.tar.gz"
    assert shard.read_bytes()[4:8] == bytes(4), "no time in the gzip header"
    with tarfile.open(shard) as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}
    assert tree(first.out)["train/train-000000.tar.gz"] != tree(other.out)["train/train-000000.tar.gz"]


def test_given_split_is_kept(tmp_path: Path) -> None:
    files = class_folders(tmp_path / "in" / "train")
    put(tmp_path / "in" / "val" / "cat" / "v.png", picture(99, "PNG"))
    done = imports.from_folder(tmp_path / "in", tmp_path / "out", test_share=0.9)
    assert done.samples == {"train": len(files), "test": 1}
    assert read_back(done.out, "test")[0]["about"] == {"label": 0, "class_name": "cat", "source": "val/cat/v.png"}


def test_other_formats_become_png_and_broken_images_are_named(tmp_path: Path) -> None:
    lossless = {"bmp": "BMP", "tif": "TIFF", "gif": "GIF"}
    for number, (suffix, kind) in enumerate(lossless.items()):
        put(tmp_path / "in" / "cat" / f"{suffix}.{suffix}", picture(number, kind))
    put(tmp_path / "in" / "cat" / "really-png.jpg", picture(7, "PNG"))
    put(tmp_path / "in" / "cat" / "broken.jpg", b"no image")
    put(tmp_path / "in" / "cat" / "cut.png", picture(8, "PNG")[:100])
    done = imports.from_folder(tmp_path / "in", tmp_path / "out", test_share=0)
    read = {sample["about"]["source"]: image_of(sample) for sample in read_back(done.out, "train")}
    assert {suffix for suffix, _ in read.values()} == {"png"}
    assert read["cat/really-png.jpg"][1] == picture(7, "PNG")
    for suffix in lossless:
        with Image.open(tmp_path / "in" / "cat" / f"{suffix}.{suffix}") as source:
            expected = np.asarray(source.convert("RGB"))
        with Image.open(io.BytesIO(read[f"cat/{suffix}.{suffix}"][1])) as written:
            np.testing.assert_array_equal(np.asarray(written.convert("RGB")), expected)
    assert done.samples == {"train": 4, "test": 0}
    assert {skip.source for skip in done.skipped} == {"cat/broken.jpg", "cat/cut.png"}
    assert {skip["source"] for skip in json.loads((done.out / "manifest.json").read_bytes())["skipped"]} == {
        "cat/broken.jpg",
        "cat/cut.png",
    }


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_csv_round_trip(tmp_path: Path, delimiter: str) -> None:
    rows = []
    for number in range(20):
        put(tmp_path / "pictures" / f"{number}.jpg", picture(number, "JPEG"))
        for caption in (f"été, n° {number}", f"日本 {number}"):
            rows.append((f"pictures/{number}.jpg", caption, ("zebra", "ant")[number % 2]))
    lines = [delimiter.join(('"' + cell + '"') for cell in row) for row in [("file", "text", "class"), *rows]]
    put(tmp_path / "t.csv", "\ufeff".encode() + "\r\n".join(lines).encode())
    done = imports.from_csv(
        tmp_path / "t.csv",
        tmp_path / "out",
        image_column="file",
        caption_column="text",
        label_column="class",
        test_share=0.3,
    )
    read = {split: read_back(done.out, split) for split in ("train", "test")}
    assert done.classes == ("ant", "zebra")
    assert sorted(
        (sample["about"]["source"], sample["caption"], sample["about"]["class_name"])
        for samples in read.values()
        for sample in samples
    ) == sorted(rows)
    for sample in read["train"] + read["test"]:
        assert sample["jpg"] == (tmp_path / sample["about"]["source"]).read_bytes()
        assert done.classes[sample["about"]["label"]] == sample["about"]["class_name"]
    sources = [{sample["about"]["source"] for sample in samples} for samples in read.values()]
    assert all(sources)
    assert not sources[0] & sources[1], "an image of several captions is in one split only"


def test_csv_without_labels_is_all_for_training(tmp_path: Path) -> None:
    for number in range(12):
        put(tmp_path / "elsewhere" / f"{number}.png", picture(number, "PNG"))
    body = "".join(f"{number}.png\t{'' if number == 3 else f'thing {number}'}\n" for number in range(12))
    put(tmp_path / "t.tsv", b"image\tcaption\n\n" + body.encode())
    done = imports.from_csv(
        tmp_path / "t.tsv",
        tmp_path / "out",
        image_column="image",
        caption_column="caption",
        root=tmp_path / "elsewhere",
        test_share=0.5,
    )
    assert done.samples == {"train": 11, "test": 0}
    assert done.classes == ()
    assert [(skip.source, skip.why) for skip in done.skipped] == [("3.png (line 6)", "empty caption")]
    assert all(set(sample["about"]) == {"source"} for sample in read_back(done.out, "train"))
    assert json.loads((done.out / "classes.json").read_bytes()) == []


def test_numbered_classes_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0, "PNG"))
    put(tmp_path / "t.csv", b"i,c,l\n" + b"".join(f"a.png,x{n},{n}\n".encode() for n in (10, 9, 100)))
    columns = {"image_column": "i", "caption_column": "c", "label_column": "l"}
    assert imports.from_csv(tmp_path / "t.csv", tmp_path / "out", test_share=0, **columns).classes == ("9", "10", "100")


CIFAR_CLASSES = ["airplane", "automobile", "bird"]


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, bytes]]:
    """Tiny batches in CIFAR-10's format, whose MD5 torchvision is told to expect; return root and pixels by source."""
    folder = tmp_path / "root" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels: dict[str, bytes] = {}

    def batch(name: str, content: dict[str, Any]) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    sums: dict[str, str] = {"batches.meta": batch("batches.meta", {"label_names": CIFAR_CLASSES})}
    for split, names in {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}.items():
        for name in names:
            data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            sums[name] = batch(name, {"data": data, "labels": [0, 1, 2, 1]})
            for row in data:
                number = sum(source.startswith(split) for source in pixels)
                pixels[f"{split}/{number:05d}"] = row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes()
    monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in sums if n.startswith("data")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return tmp_path / "root", pixels


def test_cifar10_round_trip(tmp_path: Path, cifar10: tuple[Path, dict[str, bytes]]) -> None:
    root, pixels = cifar10
    done = imports.from_cifar10(tmp_path / "a" / "out", root=root, samples_per_shard=8)
    read = {split: read_back(done.out, split) for split in ("train", "test")}
    assert done.samples == {"train": 20, "test": 4}
    assert done.classes == tuple(CIFAR_CLASSES)
    assert [sample["about"]["label"] for sample in read["train"]] == [0, 1, 2, 1] * 5
    assert read["test"][2]["caption"] == "a photo of a bird."
    decoded = {}
    for sample in read["train"] + read["test"]:
        with Image.open(io.BytesIO(sample["png"])) as image:
            decoded[sample["about"]["source"]] = image.tobytes()
    assert decoded == pixels
    again = imports.from_cifar10(tmp_path / "b" / "out", root=root, samples_per_shard=8)
    assert tree(again.out) == tree(done.out)


def test_cifar10_missing_or_damaged(tmp_path: Path, cifar10: tuple[Path, dict[str, bytes]]) -> None:
    with pytest.raises(DataError, match="allow the download"):
        imports.from_cifar10(tmp_path / "out", root=tmp_path / "nowhere")
    (cifar10[0] / CIFAR10.base_folder / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(DataError, match="corrupted"):
        imports.from_cifar10(tmp_path / "out", root=cifar10[0])
    assert not (tmp_path / "out").exists()


def folder_case(base: Path, case: str) -> dict[str, Any]:
    """Make the input folder `base/in` with one thing wrong; return the options of the import."""
    source = base / "in"
    if case == "missing":
        return {}
    class_folders(source / "train" if case in ("test class", "only test") else source, each=2)
    match case:
        case "loose":
            for path in list(source.iterdir()):
                path.rename(base / path.name)
        case "empty class":
            (source / "empty").mkdir()
        case "same name":
            put(source / "golden dog" / "0.png", picture(0, "PNG"))
        case "test class":
            put(source / "test" / "horse" / "0.png", picture(0, "PNG"))
        case "only test":
            (source / "train").rename(source / "test")
        case "all broken":
            for path in source.rglob("*.*"):
                path.write_bytes(b"no image")
        case "template":
            return {"caption_template": "a photo"}
        case "share":
            return {"test_share": 1.0}
        case "shard size":
            return {"samples_per_shard": 0}
    return {}


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("missing", DataError, "no such folder"),
        ("loose", DataError, "no sub-folders"),
        ("empty class", DataError, "empty: no images"),
        ("same name", DataError, "are both class 'golden dog'"),
        ("test class", DataError, "test/horse: unknown class 'horse'"),
        ("only test", DataError, "test but no train"),
        ("all broken", DataError, "no training samples; 4 were skipped"),
        ("template", StudyError, "caption_template"),
        ("share", StudyError, "test_share"),
        ("shard size", StudyError, "samples_per_shard"),
    ],
)
def test_folder_errors(tmp_path: Path, case: str, kind: type[RaybdError], message: str) -> None:
    options = folder_case(tmp_path, case)
    with pytest.raises(kind, match=message):
        imports.from_folder(tmp_path / "in", tmp_path / "out", **options)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name], "nothing was written"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "t.csv: cannot be read: No such file"),
        (b"", "t.csv:1: no column 'i'"),
        (b"i,c\na.png,x\n", r"t.csv:1: no column 'l'\n  expected: one of the columns i, c"),
        (b"i,c,l,c\na.png,x,y,z\n", "t.csv:1: more than one column 'c'"),
        (b"i,c,l\n", "no rows"),
        (b"i,c,l\na.png,x,y\n\na.png,\xe9t\xe9,y\n", "t.csv:4: byte 7 of the line is not UTF-8"),
        (b"i,c,l\na.png,x,y\na.png,x, with comma,y\n", "t.csv:3: 4 cells"),
        (b'i,c,l\na.png,"never closed,y\n', "t.csv:2: "),
        (b"i,c,l\na.png,x,y\nb.png,x,y\n", "t.csv:3: 1 of 2 images are not there; the first is .*b.png"),
        (b"i,c,l\n" + b"long" * 2000 + b",x,y\n", "t.csv:2: 1 of 1 images are not there"),
        (b"i,c,l\na.png,x,y\na.png,x,\n", "t.csv:3: a row without a class"),
    ],
)
def test_csv_errors(tmp_path: Path, table: bytes | None, message: str) -> None:
    put(tmp_path / "a.png", picture(0, "PNG"))
    if table is not None:
        put(tmp_path / "t.csv", table)
    with pytest.raises(DataError, match=message):
        imports.from_csv(
            tmp_path / "t.csv", tmp_path / "out", image_column="i", caption_column="c", label_column="l", test_share=0
        )
    assert not [path for path in tmp_path.iterdir() if "out" in path.name], "nothing was written"


def test_out_must_be_new_or_empty_and_local(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", each=2)
    put(tmp_path / "full" / "mine.txt", b"keep")
    with pytest.raises(DataError, match="not empty"):
        imports.from_folder(tmp_path / "in", tmp_path / "full")
    with pytest.raises(DataError, match="not empty"):
        imports.from_folder(tmp_path / "in", tmp_path / "full" / "mine.txt")
    with pytest.raises(DataError, match="local folder"):
        imports.from_folder(tmp_path / "in", "s3://bucket/out")
    with pytest.raises(DataError, match="cannot be written"):
        imports.from_folder(tmp_path / "in", tmp_path / "full" / "mine.txt" / "out", test_share=0)
    assert tree(tmp_path / "full") == {"mine.txt": b"keep"}
    (tmp_path / "new").mkdir()
    assert imports.from_folder(tmp_path / "in", tmp_path / "new", test_share=0).samples["train"] == 4


def test_an_import_that_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path / "in", each=2)
    opened = Image.open

    def stop(file: Any, **options: Any) -> Any:
        if file.getvalue() == picture(3, "JPEG"):
            raise KeyboardInterrupt
        return opened(file, **options)

    monkeypatch.setattr(Image, "open", stop)
    with pytest.raises(KeyboardInterrupt):
        imports.from_folder(tmp_path / "in", tmp_path / "out", test_share=0)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
