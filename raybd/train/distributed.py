"""The few collectives that training needs, on top of torch.distributed; each is the identity for one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raybd.objectives import ALONE, Ranks, Rows


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in the order of the ranks, with the gradients that all of them have for this rank's.

    Ranks may differ in their number of rows: each is padded to the longest, and cut afterwards.
    """

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor, sizes: list[int]) -> Tensor:
        parts = rows_BD.new_empty((len(sizes), max(sizes), *rows_BD.shape[1:]))
        dist.all_gather_into_tensor(parts.flatten(0, 1), _padded(rows_BD, max(sizes)))
        ctx.sizes = sizes
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        longest = max(ctx.sizes)
        padded = torch.cat([_padded(part, longest) for part in grads[0].split(ctx.sizes)])
        own = padded.new_empty((longest, *padded.shape[1:]))
        dist.reduce_scatter_tensor(own, padded)
        return own[: ctx.sizes[dist.get_rank()]], None


def _padded(rows_BD: Tensor, count: int) -> Tensor:
    rows_BD = rows_BD.contiguous()
    if len(rows_BD) == count:
        return rows_BD
    return torch.cat([rows_BD, rows_BD.new_zeros((count - len(rows_BD), *rows_BD.shape[1:]))])


class _AddShares(torch.autograd.Function):
    """Sums over all ranks. A share's gradient is scaled by the number of ranks because DDP averages over them.

    Each rank's backward pass then starts from its own share of the loss, times that number, and DDP's average is the
    gradient of the loss, exactly: for the encoders and for what is not gathered (the logit scale) alike.
    """

    @staticmethod
    def forward(_: Any, shares: Tensor) -> Tensor:
        found = shares.clone()
        dist.all_reduce(found)
        return found

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        return grads[0] * dist.get_world_size()


class Group:
    """The ranks of torch.distributed, for one loss under DDP: of a rank, all tensors have as many rows."""

    def __init__(self) -> None:
        self._sizes: list[int] | None = None

    def gather(self, rows_BD: Tensor) -> Rows:
        """Return this rank's rows among those of all ranks, in the order of the ranks."""
        if self._sizes is None:  # asked for once: it waits for the device
            count = torch.tensor([len(rows_BD)], device=rows_BD.device)
            counts = torch.empty(dist.get_world_size(), dtype=count.dtype, device=count.device)
            dist.all_gather_into_tensor(counts, count)
            self._sizes = counts.tolist()
        return Rows(rows_BD, _GatherRows.apply(rows_BD, self._sizes), sum(self._sizes[: dist.get_rank()]))

    def add(self, shares: Tensor) -> Tensor:
        """Return the sums over all ranks of their shares of the loss."""
        return _AddShares.apply(shares)


def ranks() -> Ranks:
    """Return the processes that share this one's batches."""
    return Group() if active() else ALONE


def active() -> bool:
    """Say whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: list[float], *, device: torch.device) -> list[float]:
    """Return the sums over all ranks of a few numbers."""
    if not active():
        return values
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found)
    return found.tolist()


def share_buffers(net: nn.Module) -> None:
    """Give every rank the buffers (BatchNorm's statistics) of rank 0, as DDP does before a forward pass."""
    if active():
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)


def wait_for_all(device: torch.device) -> None:
    """Return when every rank has come here."""
    sum_over_ranks([0.0], device=device)
