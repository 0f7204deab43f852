"""Weights on disk: safetensors always; other people's `.pt` files with `weights_only=True` and never otherwise."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load
from safetensors.torch import save as _save
from torch import Tensor

from raybd.errors import CheckpointError


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> bytes:
    """Return tensors as a safetensors file; `metadata` must be JSON-able and comes back from `metadata_of`."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return _save(plain, metadata={"raybd": json.dumps(metadata or {})})


def from_bytes(content: bytes, *, where: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Errors: CheckpointError."""
    try:
        return _load(content)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"not a whole safetensors file: {error}", where=where) from None
    except KeyError as error:
        raise CheckpointError(f"holds numbers of a kind that torch has not: {error}", where=where) from None


def metadata_of(content: bytes, *, where: str = "") -> dict[str, Any]:
    """Return the metadata that `to_bytes` put into a safetensors file, or nothing. Errors: CheckpointError."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        return dict(json.loads(header.get("__metadata__", {}).get("raybd", "{}")))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"its metadata cannot be read: {error}", where=where) from None


def read(path: str) -> dict[str, Tensor]:
    """Read weights that someone else wrote, for an open_clip model: `.safetensors`, or a PyTorch file.

    A PyTorch file may hold the weights themselves or a training checkpoint with them under `state_dict`; the
    prefix `module.` of DDP is dropped. Nothing in the file is executed.

    Errors: CheckpointError.
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise CheckpointError("no such checkpoint", where=path, fix="give the path of a .safetensors or .pt file")
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        return from_bytes(content, where=path)
    try:
        _refuse_packed(content)
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"cannot be read as plain weights: {_reason(error)}",
            where=path,
            expected="tensors only; a file that needs code to be run is refused",
            fix="save the state_dict alone, or convert it to safetensors where you trust it",
        ) from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError("holds no weights", where=path, expected="a mapping of names to tensors, or `state_dict`")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def _refuse_packed(content: bytes) -> None:
    """Raise ValueError on a compressed PyTorch file: torch itself stores weights as they are, so what a file holds is
    no larger than the file."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return  # the older format
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    if names and not any("/code/" in name for name in names):  # TorchScript, of which torch says what it is
        raise ValueError(f"{names[0]} is compressed, there is no bound on what it unpacks to")


def _reason(error: Exception) -> str:
    """Say why torch refused a file, without its advice to load it all the same."""
    text = str(error)
    if called := re.search(r"GLOBAL (\S+)", text):
        return f"loading it would run {called[1]}"
    if "TorchScript" in text:
        return "a TorchScript archive, which is code"
    if "weights_only" in text or "Weights only" in text:
        return "it is a pickle of other things than weights"
    return text.splitlines()[0] if text else type(error).__name__


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return the state of an optimizer as flat tensors, `optimizer.<parameter>.<entry>`.

    Args:
        names: the name of each parameter.
    """
    found = {}
    for parameter, state in optimizer.state.items():
        for entry, value in state.items():
            found[f"optimizer.{names[parameter]}.{entry}"] = torch.as_tensor(value)
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[Tensor, str]
) -> None:
    """Put back what `optimizer_tensors` gave; hyperparameters stay as the new optimizer has them.

    Errors: CheckpointError on the state of a parameter that there is not.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        if not key.startswith("optimizer."):
            continue
        name, _, entry = key.removeprefix("optimizer.").rpartition(".")
        if name not in by_name:
            raise CheckpointError(f"optimizer state of another model: {name}", where="state")
        parameter = by_name[name]
        if value.shape == parameter.shape and value.ndim:
            # In the parameter's own memory layout: the fused step pairs the two element by element as they lie.
            value = torch.empty_like(parameter, requires_grad=False).copy_(value)
        optimizer.state[parameter][entry] = value.to(parameter.device)
