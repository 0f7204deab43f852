"""Weights on disk: safetensors always; other people's `.pt` files with `weights_only=True` and never otherwise."""

from __future__ import annotations

import io
import json
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


def metadata_of(content: bytes) -> dict[str, Any]:
    """Return the metadata that `to_bytes` put into a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return json.loads(header.get("__metadata__", {}).get("raybd", "{}"))


def read(path: str) -> dict[str, Tensor]:
    """Read weights that someone else wrote, for an open_clip model: `.safetensors`, or a PyTorch file.

    A PyTorch file may hold the weights themselves or a training checkpoint with them under `state_dict`; the
    prefix `module.` of DDP is dropped. Nothing in the file is executed.

    Errors: CheckpointError.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError("no such checkpoint", where=path, fix="give the path of a .safetensors or .pt file")
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        return from_bytes(content, where=path)
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"cannot be read as plain weights: {reason}",
            where=path,
            expected="tensors only; a file that needs code to be run is refused",
            fix="save the state_dict alone, or convert it to safetensors where you trust it",
        ) from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError("holds no weights", where=path, expected="a mapping of names to tensors, or `state_dict`")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


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
    """Put back what `optimizer_tensors` gave; hyperparameters stay as the new optimizer has them."""
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        if not key.startswith("optimizer."):
            continue
        name, _, entry = key.removeprefix("optimizer.").rpartition(".")
        parameter = by_name[name]
        if value.shape == parameter.shape and value.ndim:
            # In the parameter's own memory layout: the fused step pairs the two element by element as they lie.
            value = torch.empty_like(parameter, requires_grad=False).copy_(value)
        optimizer.state[parameter][entry] = value.to(parameter.device)
