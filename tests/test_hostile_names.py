"""Names and links in a run directory from elsewhere: nothing outside of it is written, read or removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from raybd import tables
from raybd.errors import DataError
from raybd.store import Store

OUTSIDE = ("../x", "a/../../x", "/etc/x", "a//x", "./x", "..", "a/..", "a\0b", "a/.")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "run").mkdir()
    return Store(str(tmp_path / "run"))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_elsewhere_is_refused(store: Store, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_text("precious")
    for act in (store.get, store.exists, store.delete, store.names, store.path, lambda name: store.put(name, b"")):
        with pytest.raises(DataError, match="no name of a file in a run directory"):
            act(name)
    assert (tmp_path / "x").read_text() == "precious"
    assert list(Path(store.root).iterdir()) == []


def test_links_are_neither_followed_nor_removed_with_what_they_lead_to(store: Store, tmp_path: Path) -> None:
    models, root = tmp_path / "models", Path(store.root)
    models.mkdir()
    (models / "best.safetensors").write_text("precious")
    (root / "weights").mkdir()
    (root / "weights" / "mmcl-0000").symlink_to(models)
    (root / "tables").symlink_to(models)
    (root / "study.json").symlink_to(models / "best.safetensors")
    acts = (
        lambda: store.names("weights"),
        lambda: store.delete("weights/mmcl-0000/best.safetensors"),
        lambda: store.put("weights/mmcl-0000/new", b""),
        lambda: tables.write(store, "epochs", "part", []),
        lambda: tables.read(store, "epochs"),
        lambda: store.get("study.json"),
        lambda: store.exists("study.json"),
    )
    for act in acts:
        with pytest.raises(DataError, match="a link in a run directory is not followed"):
            act()
    assert [path.name for path in models.iterdir()] == ["best.safetensors"]
    assert (models / "best.safetensors").read_text() == "precious"


def test_links_that_go_round_in_circles_are_refused_at_once(store: Store) -> None:
    folder = Path(store.root) / "ledger"
    folder.mkdir()
    for name in "abc":
        (folder / name).symlink_to(folder)
    with pytest.raises(DataError, match="a link"):
        store.names("ledger")


def test_the_run_directory_itself_may_be_a_link(store: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store.root)
    through = Store(str(tmp_path / "link"))
    through.put("a/b", b"1")
    assert through.names("a") == ["a/b"]
    assert store.get("a/b") == b"1"


def test_a_part_of_a_table_has_no_folder(store: Store) -> None:
    with pytest.raises(DataError, match="no name of a part"):
        tables.write(store, "fronts", "x/y", [])
