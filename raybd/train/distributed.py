"""The few collectives that training needs, on top of torch.distributed; each is the identity for one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in the order of the ranks, with gradients for this rank's.

    Every rank computes the same loss of all rows, so the gradient of its own rows is there without communication.
    It is scaled by the number of ranks because DDP averages over them: the average is then the gradient of that
    loss, exactly, for the encoders and for what is not gathered (the logit scale) alike.
    """

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        world, rank = dist.get_world_size(), dist.get_rank()
        count = torch.tensor([len(rows_BD)], device=rows_BD.device)
        counts = [torch.zeros_like(count) for _ in range(world)]
        dist.all_gather(counts, count)
        sizes = [int(found) for found in counts]
        # Ranks may differ by a row: pad to the longest, cut afterwards.
        padded = rows_BD.new_zeros((max(sizes), *rows_BD.shape[1:]))
        padded[: len(rows_BD)] = rows_BD
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
        ctx.world, ctx.start, ctx.stop = world, sum(sizes[:rank]), sum(sizes[: rank + 1])
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad_ND,) = grads
        return grad_ND[ctx.start : ctx.stop] * ctx.world


def active() -> bool:
    """Say whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(rows_BD: Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of the ranks; for losses that every rank computes alike under DDP."""
    return _GatherRows.apply(rows_BD) if active() else rows_BD


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
