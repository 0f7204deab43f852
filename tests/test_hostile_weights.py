"""Files of weights from strangers: what is code is refused, what is no plain number is refused, nothing is executed."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Canary, tar_of
from torch import Tensor, nn
from typer.testing import CliRunner

from raybd import checkpoint
from raybd.cli import app
from raybd.errors import CheckpointError
from raybd.model import Clip, create, load_weights, pretrained
from raybd.study_file import load
from raybd.train.inputs import Inputs

Weights = dict[str, Tensor]
NAME = "resnet-tiny-32"
TINY = Path(__file__).parent / "studies" / "tiny.yaml"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "canary")


@pytest.fixture(scope="module")
def own() -> Weights:
    return create(NAME, seed=0).net.state_dict()


@pytest.fixture
def clip() -> Clip:
    return create(NAME, seed=1)


def saved(found: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(found, sink, **options)
    return sink.getvalue()


class _State(dict[str, Any]):
    """A mapping that brings a pickle along, as a training checkpoint of somebody's own classes would."""

    def __init__(self, weights: Weights, bomb: object) -> None:
        super().__init__(weights)
        self.bomb = bomb


PICKLES: dict[str, Callable[[Weights, Canary], bytes]] = {
    "plain.pt": lambda own, canary: canary.pickled("mark"),
    "zip.pt": lambda own, canary: saved({**own, "x": canary.object("mark")}),
    "legacy.pth": lambda own, canary: saved({**own, "x": canary.object("mark")}, _use_new_zipfile_serialization=False),
    "beside.ckpt": lambda own, canary: saved({"state_dict": own, "optimizer": canary.object("mark")}),
    "state_dict.bin": lambda own, canary: saved({"state_dict": canary.object("mark")}),
    "own_class.pt": lambda own, canary: saved({"state_dict": _State(own, canary.object("mark"))}),
    "zip.safetensors": lambda own, canary: saved({**own, "x": canary.object("mark")}),
    "plain.safetensors": lambda own, canary: canary.pickled("mark"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_in_a_file_of_weights_is_not_loaded(name: str, own: Weights, canary: Canary, tmp_path: Path) -> None:
    content = PICKLES[name](own, canary)
    with contextlib.suppress(RuntimeError):  # a plain pickle is no checkpoint, but that is said after it was loaded
        torch.load(io.BytesIO(content), weights_only=False)
    assert canary.fired == ["mark"]
    canary.wipe()
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.read(str(path))
    assert not canary.fired
    told = str(refused.value)
    assert "weights_only" not in told, "torch's advice is to load it all the same"
    assert path.suffix == ".safetensors" or "a file that needs code to be run is refused" in told


def test_evaluate_refuses_a_pickle_and_says_what_it_would_run(own: Weights, canary: Canary, tmp_path: Path) -> None:
    path = tmp_path / "suspect.pt"
    path.write_bytes(PICKLES["zip.pt"](own, canary))
    result = CliRunner().invoke(app, ["evaluate", str(path), "--study", str(TINY)])
    assert isinstance(result.exception, CheckpointError)
    assert "loading it would run os.makedirs" in str(result.exception)
    assert not canary.fired


def test_neither_pretraining_nor_pseudo_labels_start_from_a_pickle(
    own: Weights, canary: Canary, tmp_path: Path
) -> None:
    path = tmp_path / "suspect.pt"
    path.write_bytes(PICKLES["beside.ckpt"](own, canary))
    study = load(str(TINY), overrides=[f"model.start={path}"])
    with pytest.raises(CheckpointError, match=r"loading it would run os\.makedirs"):
        Inputs(study).new_model(study.pretrain.settings("mmcl"), seed=0)
    with pytest.raises(CheckpointError, match=r"loading it would run os\.makedirs"):
        pretrained(NAME, str(path), field="clean.pseudo_labels")
    assert not canary.fired


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*TorchScript")
def test_a_torchscript_archive_is_code(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
    with pytest.raises(CheckpointError, match="a TorchScript archive, which is code"):
        checkpoint.read(str(path))


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """Two kilobytes that would become as many megabytes."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved({"x": torch.zeros(1 << 19)}))) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in plain.namelist():
            target.writestr(name, plain.read(name))
    assert len(torch.load(io.BytesIO(packed.getvalue()))["x"]) == 1 << 19
    assert len(packed.getvalue()) < 10_000
    path = tmp_path / "packed.pt"
    path.write_bytes(packed.getvalue())
    with pytest.raises(CheckpointError, match="no bound on what it unpacks to"):
        checkpoint.read(str(path))


def header(content: Any, *, body: bytes = b"", length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(kind: str, shape: list[int], end: int) -> dict[str, Any]:
    return {"a": {"dtype": kind, "shape": shape, "data_offsets": [0, end]}}


HEADERS = {
    "nothing": b"",
    "a header longer than the file": header({}, length=2**63),
    "a header of a hundred megabytes": header({}, length=10**8),
    "more elements than can be counted": header(tensor("F32", [2**40, 2**40], 4), body=bytes(4)),
    "a tensor past the end": header(tensor("F32", [10], 40), body=bytes(4)),
    "two tensors in one place": header(
        {**tensor("F32", [1], 4), "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, body=bytes(4)
    ),
    "numbers that torch has not": header(tensor("F8_E8M0", [1], 1), body=b"\0"),
    "a kind that is none": header(tensor("pickle", [1], 4), body=bytes(4)),
    "nested": header(b"[" * 100_000),
    "no JSON": header(b"{]"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_safetensors_file_with_a_false_header_is_refused(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[fault])
    with pytest.raises(CheckpointError):
        checkpoint.read(str(path))


@pytest.mark.parametrize("metadata", ["]", "[1]", "[" * 100_000, 7])
def test_false_metadata_is_refused(metadata: Any) -> None:
    with pytest.raises(CheckpointError, match="metadata"):
        checkpoint.metadata_of(header({"__metadata__": {"raybd": metadata}}))


MISFITS: dict[str, Callable[[Tensor], Tensor]] = {
    "without storage": lambda own: torch.empty(own.shape, device="meta"),
    "sparse": lambda own: own.to_sparse(),
    "complex": lambda own: own.to(torch.complex64),
    "yes and no": lambda own: own > 0,
    "larger than any memory": lambda own: torch.zeros(1).expand(10**13),
}


@pytest.mark.parametrize("fault", MISFITS)
@pytest.mark.parametrize("name", ["positional_embedding", "logit_bias"])
def test_weights_that_are_no_plain_numbers_are_refused(
    fault: str, name: str, own: Weights, clip: Clip, tmp_path: Path
) -> None:
    """Also of the logit bias, which a model without one takes over from the file."""
    path = tmp_path / "x.pt"
    path.write_bytes(saved({**own, name: MISFITS[fault](torch.ones(own.get(name, torch.ones(1)).shape))}))
    with pytest.raises(CheckpointError):
        load_weights(clip, checkpoint.read(str(path)), where=str(path))


def test_plain_weights_of_either_format_are_read(own: Weights, clip: Clip, tmp_path: Path) -> None:
    for new in (True, False):
        path = tmp_path / "x.pt"
        path.write_bytes(saved({"state_dict": own, "epoch": 3}, _use_new_zipfile_serialization=new))
        load_weights(clip, checkpoint.read(str(path)), where=str(path))
        assert all(torch.equal(value, own[name]) for name, value in clip.net.state_dict().items())


def test_a_tar_of_weights_is_no_file_of_weights(own: Weights, canary: Canary, tmp_path: Path) -> None:
    """torch reads tars too, as it wrote them in 2017: of pickles."""
    path = tar_of(tmp_path / "old.tar", {"pickle": canary.pickled("mark"), "storages": b"", "tensors": b""})
    with pytest.raises(CheckpointError):
        checkpoint.read(str(path))
    assert not canary.fired
