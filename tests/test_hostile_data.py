"""Shards, studies, caches and data sets from strangers: pickles in them are bytes, their names are no paths."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hostile import Canary, tar_of
from PIL import Image
from typer.testing import CliRunner
from webdataset.autodecode import basichandlers

from raybd import study_file
from raybd.cli import app
from raybd.data import cache, shards
from raybd.errors import DataError, RaybdError, StudyError

TINY = Path(__file__).parent / "studies" / "tiny.yaml"
# What webdataset's decoders unpickle, or hand to something that may.
DECODED = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "ten", "tenbin", "cbor", "mp", "msg", "cls", "joblib")
runner = CliRunner()


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "canary")


def png() -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def whole(key: str) -> dict[str, bytes]:
    return {f"{key}.png": png(), f"{key}.txt": b"a caption", f"{key}.json": b'{"label": 0}'}


def test_pickles_in_shards_are_not_decoded(canary: Canary, tmp_path: Path) -> None:
    """Beside image and caption, and in their place: under every name for which webdataset has a decoder."""
    files = {
        **whole("good"),
        "good.info.pyd": canary.pickled("info"),
        **{f"good.{suffix}": canary.pickled(suffix) for suffix in DECODED},
    }
    files |= {**whole("image"), "image.png": canary.pickled("image")}
    files |= {**whole("caption"), "caption.txt": canary.pickled("caption")}
    files |= {**whole("about"), "about.json": canary.pickled("about")}
    files |= {f"only.{suffix}": canary.pickled(f"only {suffix}") for suffix in DECODED}
    url = str(tar_of(tmp_path / "root" / "a.tar", files))
    for suffix in DECODED:
        with contextlib.suppress(Exception):
            basichandlers(suffix, files[f"good.{suffix}"])
    assert {"pyd", "pickle"} <= set(canary.fired)
    canary.wipe()
    found = cache.load_images([url], size=32, cache_dir=str(tmp_path / "cache"))
    assert found.index.keys.tolist() == ["good"]
    assert {skip.key for skip in found.index.skipped} == {"image", "caption", "about", "only"}
    assert not canary.fired


def test_names_in_shards_are_no_paths(tmp_path: Path) -> None:
    """Nothing of a shard is ever unpacked to a disk; links and devices in it are not followed."""
    (tmp_path / "secret.png").write_bytes(png())
    path = tmp_path / "root" / "a.tar"
    keys = ("../../evil", "/etc/evil", "..", "a/../../../evil", "~/evil", "C:\\evil", "a\nb")
    tar_of(path, {name: content for key in keys for name, content in whole(key).items()})
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard"), (tarfile.CHRTYPE, "device")):
            header = tarfile.TarInfo(f"{name}.png")
            header.type, header.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(header)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    found = cache.load_images([str(path)], size=32, cache_dir=str(tmp_path / "cache"))
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert all(
        path.name.startswith(("images-", ".images-", "index.json", "pixels"))
        for path in (tmp_path / "cache").rglob("*")
    )
    assert not {"link", "hard", "device"} & set(found.index.keys.tolist())


@pytest.mark.parametrize("tag", ["apply:os.makedirs", "new:os.makedirs", "name:os.system", "module:os"])
def test_tags_in_studies_call_nothing(tag: str, canary: Canary, tmp_path: Path) -> None:
    kind, _, name = tag.partition(":")
    prefix = "object/" if kind in ("apply", "new") else ""
    value = f"!!python/{prefix}{kind}:{name} [{canary.folder / 'yaml'}]" if prefix else f"!!python/{kind}:{name} ''"
    for text in (f"name: {value}\n", f"name: x\nextends: {value}\n", f"name: x\nsearch: {{space: {{lr: {value}}}}}\n"):
        path = tmp_path / "study.yaml"
        path.write_text(text)
        for arguments in (["validate", str(path)], ["run", str(path), "--dry-run"]):
            result = runner.invoke(app, arguments)
            assert isinstance(result.exception, StudyError), result.output
    result = runner.invoke(app, ["validate", str(TINY), "--set", f"name={value}"])
    assert isinstance(result.exception, StudyError)
    assert not canary.fired


@pytest.mark.parametrize("name", ["hf-hub:stranger/model", "local-dir:/tmp/model", "ViT-B-32/../x", "hf-hub:x"])
def test_models_are_open_clips_own(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names of other places, from which code or weights would be fetched, are no names of models."""
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for setting in (f"model.name={name}", f"clean.pseudo_labels={{model: '{name}', checkpoint: openai}}"):
        arguments = ["poison", str(TINY), "--run-dir", str(tmp_path), "--set", setting]
        arguments += ["--set", "clean.method=pseudo_labels"] if "pseudo" in setting else []
        result = runner.invoke(app, arguments)
        assert isinstance(result.exception, StudyError), result.output
    study = study_file.load(str(TINY), overrides=["model.pretrained=hf-hub:stranger/model"])
    from raybd.model import tag_file

    with pytest.raises(StudyError, match="no weights of that tag"):
        tag_file(study.model.name, "hf-hub:stranger/model", where="model.pretrained")


def test_a_cache_holds_no_pickles(canary: Canary, tmp_path: Path) -> None:
    """An entry that somebody else put there is read as JSON and pixels; one that is neither is made again."""
    url = str(tar_of(tmp_path / "root" / "a.tar", whole("good")))
    made = cache.load_images([url], size=32, cache_dir=str(tmp_path / "cache"))
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    for name in ("index.json", "pixels.u8"):
        sink = io.BytesIO()
        np.save(sink, np.array([canary.object(name)], dtype=object), allow_pickle=True)
        (entry / name).write_bytes(sink.getvalue())
        (entry / f"{name}.npy").write_bytes(sink.getvalue())
        (entry / "index.pkl").write_bytes(canary.pickled("index"))
        again = cache.load_images([url], size=32, cache_dir=str(tmp_path / "cache"))
        assert again.index.keys.tolist() == made.index.keys.tolist()
        assert (again.pixels(np.array([0])) == made.pixels(np.array([0]))).all()
    assert not canary.fired


def test_a_lock_in_a_cache_does_not_empty_what_it_links_to(tmp_path: Path) -> None:
    """A folder that others may write to, as the cache below /tmp may be."""
    url = str(tar_of(tmp_path / "root" / "a.tar", whole("good")))
    cache.load_images([url], size=32, cache_dir=str(tmp_path / "cache"))
    (lock,) = (path for path in (tmp_path / "cache").iterdir() if path.name.endswith(".lock"))
    precious = tmp_path / "precious"
    precious.write_text("precious")
    lock.unlink()
    lock.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        cache.load_images([url], size=32, cache_dir=str(tmp_path / "cache"))
    assert precious.read_text() == "precious"


def test_a_cifar10_that_is_not_the_published_one_is_not_unpickled(canary: Canary, tmp_path: Path) -> None:
    """It is made of pickles: torchvision loads them once their hashes are right."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(canary.pickled(name))
    pickle.loads((folder / "test_batch").read_bytes())
    assert canary.fired == ["test_batch"]
    canary.wipe()
    result = runner.invoke(app, ["data", "import", "cifar10", str(tmp_path / "out"), "--root", str(tmp_path)])
    assert isinstance(result.exception, DataError)
    assert not canary.fired


def test_imports_read_pictures_and_texts_only(canary: Canary, tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "cat"
    folder.mkdir(parents=True)
    (folder / "good.png").write_bytes(png())
    for name in ("bad.png", "bad.jpg", "bad.npy", "bad.pkl", "bad.tif"):
        (folder / name).write_bytes(canary.pickled(name))
    result = runner.invoke(app, ["data", "import", "folder", str(tmp_path / "photos"), str(tmp_path / "out")])
    assert result.exception is None or isinstance(result.exception, RaybdError), result.output
    (tmp_path / "list.csv").write_bytes(b"image,caption\nphotos/cat/bad.png,a cat\n" + canary.pickled("csv"))
    result = runner.invoke(app, ["data", "import", "csv", str(tmp_path / "list.csv"), str(tmp_path / "out2")])
    assert isinstance(result.exception, RaybdError), result.output
    (tmp_path / "sweep.csv").write_bytes(canary.pickled("sweep"))
    result = runner.invoke(app, ["data", "import-sweep", str(tmp_path / "sweep.csv"), str(tmp_path / "out3")])
    assert isinstance(result.exception, RaybdError), result.output
    assert not canary.fired


def test_a_class_file_is_json(canary: Canary, tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_bytes(canary.pickled("classes"))
    data = study_file.load(str(TINY), overrides=[f"data.root={tmp_path}"]).data
    with pytest.raises(DataError):
        shards.classes(data)
    (tmp_path / "classes.json").write_text(json.dumps([{"label": 0, "class_name": os.sep}]))
    assert shards.classes(data) == [os.sep]
    assert not canary.fired


def test_the_cache_below_tmp_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no home to write to: whoever made the folder first could put entries there."""
    monkeypatch.delenv("RAYBD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none/cache")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    own = cache.folder(None)
    assert own.parent == tmp_path
    assert own.stat().st_mode & 0o077 == 0
    assert cache.folder(None) == own
    (tmp_path / "elsewhere").mkdir()
    own.rmdir()
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="somebody else's"):
        cache.folder(None)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(DataError, match="somebody else's"):
        cache.folder(None)
