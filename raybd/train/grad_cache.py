"""Gradient caching: the gradient of a loss of the whole batch, holding the activations of a few pairs at a time.

All pairs are encoded without a graph, the loss gives the gradient of their rows, and each micro batch is encoded once
more, with a graph, to carry its rows' gradients to the weights. It costs one more forward pass.

Source: arXiv 2101.06983 (GradCache).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from raybd.data.pairs import Batch
from raybd.objectives import Loss

if TYPE_CHECKING:
    from raybd.train.loop import Features, Training

_ROWS = ("image_BD", "text_BD", "image_view_BD", "text_view_BD")
_NUMBERS = ("logit_scale", "logit_bias")


@contextmanager
def untracked(net: nn.Module) -> Iterator[None]:
    """Leave the statistics of BatchNorm as they are; layers in train mode still normalise by those of the batch."""
    tracking = [part for part in net.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    for part in tracking:
        part.track_running_stats = False
    try:
        yield
    finally:
        for part in tracking:
            part.track_running_stats = True


def backward(run: Training, batch: Batch, *, size: int) -> Loss:
    """Put the gradient of the run's loss of a batch into the parameters; return the loss.

    It is the gradient of the loss of rows that are encoded `size` pairs at a time. For a model without BatchNorm, or
    with BatchNorm in eval mode, that is the loss of the batch; in train mode BatchNorm normalises each micro batch by
    its own statistics, as it does each rank's part under DDP, and its running ones take in each micro batch once. What
    is drawn at random (dropout) is drawn alike in both passes.
    """
    parts, states, found = list(_parts(batch, size)), [], []
    with torch.no_grad(), untracked(run.clip.net):
        for part in parts:
            states.append(_random_state(run.context.device))
            found.append(run.features(part))
    leaves = _leaves(found)
    loss = run.loss_of(leaves)
    run.guard(loss)
    run.optimizer.zero_grad(set_to_none=True)
    loss.total.backward()
    start = 0
    for number, (part, state) in enumerate(zip(parts, states, strict=True), start=1):
        stop = start + len(part.images_BCHW)
        last = number == len(parts)
        with nullcontext() if last else _unshared(run.net):
            _set_random_state(state, run.context.device)
            _carry(run.features(part), leaves, slice(start, stop), numbers=_NUMBERS if last else ())
        start = stop
    return loss


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    images, tokens = batch.image_views_BCHW, batch.token_views_BL
    for start in range(0, len(batch.images_BCHW), size):
        some = slice(start, start + size)
        yield replace(
            batch,
            images_BCHW=batch.images_BCHW[some],
            tokens_BL=batch.tokens_BL[some],
            image_views_BCHW=None if images is None else images[some],
            token_views_BL=None if tokens is None else tokens[some],
            keys=batch.keys[some],
        )


def _leaves(found: list[Features]) -> Features:
    """Return all rows, the scale and the bias as the ends of a graph."""
    joined: dict[str, Tensor | None] = {
        name: None if getattr(found[0], name) is None else torch.cat([getattr(one, name) for one in found])
        for name in _ROWS
    }
    joined |= {name: getattr(found[0], name) for name in _NUMBERS}
    ends = {name: None if end is None else end.detach().clone().requires_grad_() for name, end in joined.items()}
    return replace(found[0], **ends)


def _carry(found: Features, leaves: Features, some: slice, *, numbers: tuple[str, ...]) -> None:
    """Take the gradients of some rows, and of `numbers`, on to the parameters."""
    given = [(getattr(found, name), getattr(leaves, name), name in _ROWS) for name in (*_ROWS, *numbers)]
    wanted = [
        (one, end.grad[some] if rows else end.grad)
        for one, end, rows in given
        if end is not None and one.requires_grad and end.grad is not None
    ]
    torch.autograd.backward([one for one, _ in wanted], [gradient for _, gradient in wanted])


def _unshared(net: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which ranks do not add up their gradients yet: they do so with the last micro batch."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
