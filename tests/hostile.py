"""Files that would do something if they were trusted: what they would do can be seen afterwards."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Where Ray and others keep pickles, by the names that they look for: Tune, Train, searchers, Optuna, numpy.
PLANTED = (
    *("tuner.pkl", "trainable.pkl", "trainer.pkl", "ray/tuner.pkl", "ray/trainable.pkl", "ray/search-0a/tuner.pkl"),
    *("ray/search-0a/trainable.pkl", "ray/search-0a/searcher-state-2025-01-01_00-00-00.pkl"),
    *("ray/search-0a/search_gen_state-2025-01-01_00-00-00.json", "ray/search-0a/experiment_state-2025-01-01.json"),
    *("ray/search-0a/basic-variant-state-2025-01-01.json", "ray/search-0a/trial_0/params.pkl"),
    *("ray/search-0a/trial_0/checkpoint_000000/.metadata.pkl", "ray/search-0a/trial_0/checkpoint_000000/dict.pkl"),
    *("ray/pretrain-0a/trainer.pkl", "ray/pretrain-0a/checkpoint_manager_snapshot.json", "ray/pretrain-0a/.train"),
    *("ray/pretrain-0a/checkpoint_000000/state.pt", "ray/.validate_storage_marker", "optuna.pkl", "sampler.pkl"),
    *("state/state.pkl", "pretrained/model.pt", "weights/mmcl-0000/model.pt", "errors/mmcl-0000.txt", "preview.png"),
    *("tables/epochs/x.pkl", "tables/epochs/x.npy", "ledger/trials/mmcl-0000/x.pkl", "cache.npy", "driver.lock"),
    *("progress/x.json", "report.html", "sitecustomize.py", "raybd.py", "torch.py", "conftest.py", "index.npz"),
)


class Canary:
    """Makes pickles that leave a mark in a folder when they are loaded, each its own.

    Args:
        folder: outside of all that a test works with.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def object(self, name: str) -> object:
        """Return an object that cannot be unpickled without leaving the mark `name`."""
        return _Bomb(str(self.folder / name))

    def pickled(self, name: str) -> bytes:
        """Return such an object's pickle."""
        return pickle.dumps(self.object(name))

    @property
    def fired(self) -> list[str]:
        """The marks that were left."""
        return sorted(os.listdir(self.folder))

    def proves(self, content: bytes) -> None:
        """Assert that loading a pickle naively does leave a mark; it is wiped off again."""
        assert not self.fired
        pickle.loads(content)
        assert self.fired
        self.wipe()

    def wipe(self) -> None:
        """Take all marks away."""
        for name in self.fired:
            (self.folder / name).rmdir()


class _Bomb:
    def __init__(self, mark: str) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.makedirs, (self._mark, 0o777, True))


def tar_of(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write a tar of files, names as given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def with_pickles(found: pa.Table, canary: Canary, *, column: str | None = None) -> bytes:
    """Return a table as a Parquet file that holds pickles wherever one may be: in the metadata of the file, of pandas
    and of fields, and as the payload of extension types, old and Ray's own.

    Args:
        column: whose values become pickles of Ray's extension type too; None adds such a column beside the others.
    """
    pickles = pa.array([canary.pickled("value")] * found.num_rows, pa.large_binary())
    ray = {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": b""}
    of_ray = pa.field(column or "beside", pa.large_binary(), metadata=ray)
    if column:
        found = found.set_column(found.schema.get_field_index(column), of_ray, pickles)
    else:
        found = found.append_column(of_ray, pickles)
    old = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": canary.pickled("field")}
    found = found.append_column(pa.field("old", pa.int64(), metadata=old), pa.array([0] * found.num_rows))
    plain = [field.with_metadata({**(field.metadata or {}), "note": canary.pickled("note")}) for field in found.schema]
    whole = {**(found.schema.metadata or {}), "pandas": canary.pickled("pandas"), "raybd.more": canary.pickled("more")}
    sink = pa.BufferOutputStream()
    pq.write_table(found.cast(pa.schema(plain, metadata=whole)), sink)
    return sink.getvalue().to_pybytes()


def plant(run_dir: Path, canary: Canary) -> None:
    """Put a pickle under each name of `PLANTED` into a run directory, and code under those of modules."""
    for number, name in enumerate(PLANTED):
        path = run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mark = f"{number:02d}"
        if path.suffix == ".npy":
            sink = io.BytesIO()
            np.save(sink, np.array([canary.object(mark)], dtype=object), allow_pickle=True)
            path.write_bytes(sink.getvalue())
        elif path.suffix == ".py":
            path.write_text(f"import os; os.mkdir({str(canary.folder / mark)!r})")
        else:
            path.write_bytes(canary.pickled(mark))
