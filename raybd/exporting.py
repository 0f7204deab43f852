"""A point of a run as a folder that can be passed on: open_clip's weights and configuration, a model card, hashes.

The folder appears under its name whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

import yaml

from raybd import provenance, run_models
from raybd.cluster.credentials import hidden
from raybd.errors import DataError, StorageError
from raybd.run_models import Point, Row
from raybd.store import Store

# Names that open_clip looks for in a folder, and on Hugging Face's hub.
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
CARD, STUDY, SUMS = "README.md", "study.yaml", "SHA256SUMS"
TRUNK = "raybd_resnet_tiny"  # module that goes along where open_clip has no such image tower
_NAMES = (WEIGHTS, CONFIG, f"{TRUNK}.py", STUDY, CARD, SUMS)
_MARK = "raybd"  # of a configuration that was written here; open_clip passes over it


def export(store: Store, text: str, *, out: str | None = None, force: bool = False) -> Path:
    """Write a point of a run into a folder, and return the folder.

    Args:
        text: the point, see `run_models.named`.
        out: the folder; default `exports/STUDY-TRIAL-EPOCH`. It must be new or empty.
        force: replace what an earlier export left there. What is none is refused all the same.

    Errors: DataError where it is no run directory; StudyError, CheckpointError where it has no such point, or weights
        of another model; DataError where the folder is taken; StorageError where it cannot be written.
    """
    if out is not None:
        _check_free(Path(out), force=force)
    study, record = run_models.study_of(store)
    point = run_models.named(store, text, where=f"POINT {text}")
    folder = Path(os.path.abspath(out if out is not None else Path("exports") / _folder_name(study.name, point)))
    _check_free(folder, force=force)
    made = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    target = Store(str(made))
    try:
        _fill(target, store, point, study=_without_secrets(study.resolved()), record=record)
        _put_in_place(made, folder)
    except BaseException:
        _remove(made)
        raise
    return folder


def _without_secrets(value: Any) -> Any:
    """Return settings without keys and passwords: addresses of data may carry some, and this leaves the house."""
    if isinstance(value, dict):
        return {name: _without_secrets(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    return hidden(value) if isinstance(value, str) else value


def _folder_name(study: str, point: Point) -> str:
    """Return the name of a folder for a point: ids may be anybody's, so they are taken by their letters."""
    return f"{study}-{re.sub(r'[^A-Za-z0-9_-]', '_', point.name)}"


def _check_free(folder: Path, *, force: bool) -> None:
    """Raise DataError unless a folder may be written: it is not there, is empty, or may be replaced."""
    if not os.path.lexists(folder):
        return
    if os.path.islink(folder) or not folder.is_dir():
        raise DataError("not a folder", where=str(folder), fix="give a new --out")
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise StorageError(
            f"cannot be looked into: {error.strerror}", where=str(folder), fix="give another --out"
        ) from None
    if not names:
        return
    foreign = _foreign(folder, names)
    if foreign:
        raise DataError(
            f"not empty, and holds what `raybd export` did not write: {foreign}",
            where=str(folder),
            expected="a folder that is new or empty, or one that it wrote itself",
            fix="give a new --out",
        )
    if not force:
        raise DataError("not empty: an export lies there", where=str(folder), fix="give a new --out, or --force")


def _foreign(folder: Path, names: list[str]) -> str:
    """Return the name of something in a folder that no export put there; empty where there is nothing of the kind."""
    for name in names:
        if name not in _NAMES or not (folder / name).is_file() or (folder / name).is_symlink():
            return name
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return names[0]
    return "" if isinstance(config, dict) and _MARK in config else CONFIG


def _put_in_place(made: Path, folder: Path) -> None:
    """Give a finished folder its name. What an earlier export left under it is removed once it is out of the way."""
    old = made.with_name(f"{made.name}.old")
    moved = folder.is_dir() and bool(os.listdir(folder))
    if moved:
        os.rename(folder, old)
    try:
        os.rename(made, folder)  # also in the place of an empty one
    except OSError as error:
        if moved:
            os.rename(old, folder)
        raise StorageError(f"cannot put it in place: {error.strerror}", where=str(folder)) from None
    if moved:
        _remove(old)


def _remove(folder: Path) -> None:
    """Remove a folder of an export: its own files, and the folder where nothing else is in it."""
    with contextlib.suppress(OSError):
        for name in _NAMES:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _fill(target: Store, store: Store, point: Point, *, study: Row, record: Row) -> None:
    """Write the files of a point into a folder, the hashes last. Errors: StudyError, CheckpointError, StorageError."""
    # These import torch, which a mistake in the command does not wait for.
    from raybd import checkpoint, model, resnet_tiny
    from raybd.report import card

    model.check_whole(study["model"]["name"])
    clip = model.create(study["model"]["name"], seed=0)
    where = store.path(point.checkpoint)
    model.load_weights(clip, checkpoint.from_bytes(store.get(point.checkpoint), where=where), where=where)
    config = model.open_clip_config(clip)
    whose = {"study": study["name"], "study_hash": record["hash"], "checkpoint": point.checkpoint}
    files = {
        WEIGHTS: checkpoint.to_bytes(clip.net.state_dict()),
        CONFIG: _json({**config, _MARK: {**whose, "code": provenance.code_version()}}),
        STUDY: yaml.safe_dump(study, sort_keys=False, allow_unicode=True).encode(),
    }
    own_trunk = config["model_cfg"]["vision_cfg"].get("timm_model_name") == TRUNK
    if own_trunk:
        files[f"{TRUNK}.py"] = Path(resnet_tiny.__file__).read_bytes()
    shipped = card.Shipped(
        model=clip.name,
        image_size=clip.image_size,
        context_length=clip.tokenizer.context_length,
        mean=clip.mean,
        std=clip.std,
        parameters=sum(parameter.numel() for parameter in clip.net.parameters()),
        trunk=TRUNK if own_trunk else None,
        weights=WEIGHTS,
        sha256=hashlib.sha256(files[WEIGHTS]).hexdigest(),
        code=provenance.code_version(),
    )
    files[CARD] = card.build(store, point, shipped, study=study, record=record, hide=hidden).encode()
    sums = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    for name, content in (*files.items(), (SUMS, "".join(sums).encode())):
        target.put(name, content)
    model.check_folder(target.root, clip)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
