"""Losses that are not finite: the optimizer steps on none, and nobody waits for the device to know."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raybd.errors import NonFiniteError


def numbers(found: Sequence[Tensor]) -> list[float]:
    """Return numbers that are on a device, all of them with one wait."""
    return torch.stack(list(found)).tolist() if found else []


class Guard:
    """Has a step of an optimizer on a loss that is not finite change nothing, nor any step after it.

    The device sees to that itself. NonFiniteError comes when the losses are fetched.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._seen: list[tuple[int, Tensor]] = []
        self._spoilt = torch.zeros((), dtype=torch.bool, device=device)

    def watch(self, step: int, loss: Tensor) -> None:
        """Look at the loss that a step, by number, is to be taken on."""
        self._seen.append((step, loss))
        self._spoilt |= ~torch.isfinite(loss)
        self._optimizer.found_inf = self._spoilt.float()  # as GradScaler tells it

    def check(self, *, epoch: int, lr: Callable[[int], float]) -> None:
        """Wait for the losses watched so far. Errors: NonFiniteError that names the first that is not finite.

        Args:
            lr: the learning rate of a step.
        """
        seen, self._seen = self._seen, []
        for (step, _), loss in zip(seen, numbers([loss for _, loss in seen]), strict=True):
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"loss is {loss} at step {step} (epoch {epoch}, lr {lr(step):.3g})", fix="lower the learning rate"
                )
