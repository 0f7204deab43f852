"""Class names and prompt templates by name, and the captions that shards list."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
from PIL import Image

from raybd.data import cache, class_names, prompts, shards
from raybd.errors import DataError, StudyError
from raybd.study import Data

FLICKR = Path(__file__).resolve().parents[2] / "shared" / "data" / "flickr8k-64"


@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        ("imagenet", 1000, {0: "tench", 954: "banana", 999: "toilet paper"}),
        ("cifar10", 10, {0: "airplane", 1: "automobile", 9: "truck"}),
        ("cifar100", 100, {0: "apple", 1: "aquarium fish", 4: "beaver", 47: "maple tree", 52: "oak tree", 99: "worm"}),
        ("caltech101", 101, {0: "Faces", 1: "Faces easy", 4: "accordion", 10: "beaver", 100: "yin yang"}),
    ],
)
def test_class_names_are_in_the_order_of_their_labels(name: str, count: int, some: dict[int, str]) -> None:
    found = shards.classes(Data(root="nowhere", classes=name))
    assert len(found) == count
    assert len(set(found)) == (998 if name == "imagenet" else count)  # ImageNet has two pairs of one name
    assert {label: found[label] for label in some} == some
    if name != "imagenet":
        # CIFAR numbers its names alphabetically; torchvision sorts Caltech's folders, capitals first.
        assert [found.index(other) for other in sorted(found)] == list(range(count))
    assert shards.target_label(Data(classes=name), found[7]) == 7


def test_an_unknown_list_of_classes_is_answered_with_the_known(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        shards.classes(Data(root=str(tmp_path), classes="cifar1000"))
    assert all(name in caught.value.expected for name in class_names.NAMES)


def made(name: str) -> list[str]:
    return [template("zebra") for template in prompts.templates(name, field="f")]


def test_templates_by_name() -> None:
    assert [len(set(made(name))) for name in prompts.NAMES] == [80, 7, 18, 34]
    assert [len(made(name)) for name in prompts.NAMES] == [80, 7, 18, 34]
    assert made("openai_imagenet") == [template("zebra") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    for name in ("cifar", "caltech101"):
        half = len(made(name)) // 2
        assert all("zebra" in text and text.endswith(".") and "  " not in text for text in made(name))
        assert made(name)[0] == "a photo of a zebra."
        assert made(name)[half] == "a photo of the zebra."
    # What open_clip has of them, among its 80 prompts for ImageNet, checks their wording.
    published = set(made("openai_imagenet"))
    assert set(made("caltech101")) <= published
    assert set(made("cifar")) - published == {
        f"a {contrast} contrast photo of {article} zebra." for contrast in ("low", "high") for article in ("a", "the")
    } | {"a photo of a big zebra.", "a photo of the big zebra."}


def test_unknown_templates_are_answered_with_the_known() -> None:
    with pytest.raises(StudyError, match="no templates of the name 'cifar10'") as caught:
        prompts.templates("cifar10", field="evaluation.templates")
    assert caught.value.expected == "openai_imagenet, simple, cifar, caltech101"


def write_shard(path: Path, captions: list[object], *, text: bool = True) -> Path:
    """Write a shard of one-coloured images whose json lists captions."""
    with tarfile.open(path, "w") as tar:
        for number, listed in enumerate(captions):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(picture, "PNG")
            about = {"label": number} | ({} if listed is None else {"captions": listed})
            files = {"png": picture.getvalue(), "json": json.dumps(about).encode()}
            if text:
                files["txt"] = f"caption {number}".encode()
            for suffix, content in files.items():
                header = tarfile.TarInfo(f"k{number}.{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return path


def test_captions_are_listed_where_the_json_has_them(tmp_path: Path) -> None:
    url = str(write_shard(tmp_path / "a.tar", [["one ", "two"], None, "not a list", ["", 3, "three"], []]))
    expected = [("one", "two"), ("caption 1",), ("caption 2",), ("three",), ("caption 4",)]
    for _ in range(2):  # the second time from the cache
        index = cache.load_images([url], size=8, cache_dir=str(tmp_path / "cache")).index
        assert index.caption_lists() == expected
        assert index.captions.tolist() == [f"caption {number}" for number in range(5)]
        assert index.take([3, 0]).caption_lists() == [("three",), ("one", "two")]
        assert cache.load_index([url], cache_dir=str(tmp_path / "cache")).caption_lists() == expected


def test_equally_many_captions_of_each_image_are_no_table(tmp_path: Path) -> None:
    url = str(write_shard(tmp_path / "a.tar", [["a", "b"], ["c", "d"], ["e", "f"]]))
    index = cache.load_index([url], cache_dir=str(tmp_path / "cache"))
    assert index.listed is not None
    assert index.listed.shape == (3,)
    assert index.caption_lists() == [("a", "b"), ("c", "d"), ("e", "f")]


def test_the_first_listed_caption_stands_in_for_a_missing_one(tmp_path: Path) -> None:
    url = str(write_shard(tmp_path / "a.tar", [["one", "two"], None], text=False))
    index = cache.load_index([url], cache_dir=str(tmp_path / "cache"))
    assert index.captions.tolist() == ["one"]
    assert [skip.reason for skip in index.skipped] == ["no caption"]


def test_data_without_lists_keeps_none(tmp_path: Path) -> None:
    url = str(write_shard(tmp_path / "a.tar", [None, None]))
    for _ in range(2):
        index = cache.load_index([url], cache_dir=str(tmp_path / "cache"))
        assert index.listed is None
        assert index.take(np.array([1])).caption_lists() == [("caption 1",)]


@pytest.mark.skipif(not FLICKR.is_dir(), reason=f"NOT RUN: needs the photos with five captions each in {FLICKR}")
def test_flickr8k_has_five_captions_of_each_image(tmp_path: Path) -> None:
    (url, *_) = shards.find_shards(Data(root=str(FLICKR)), "test/*.tar*", field_name="data.test")
    index = cache.load_index([url], cache_dir=str(tmp_path))
    found = index.caption_lists()
    assert len(found) == 1500
    assert {len(some) for some in found} == {5}
    assert all(str(one) in some for one, some in zip(index.captions, found, strict=True))
