"""Random numbers for images: each sample's depend on its own seed alone, and a whole batch is drawn in one go.

Counter-based: number i of a sample is a hash of (seed, i), so there is no generator to advance, nothing to loop over,
and CPU and GPU give the same bits. B samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """Return an unsigned 64-bit number as the int64 of the same bits."""
    return value - (1 << 64) if value >> 63 else value


_GAMMA, _MIX1, _MIX2 = (_signed(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned: torch's int64 shift keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _hash(x: Tensor) -> Tensor:
    """Return SplitMix64's output for each state, int64 that wraps around. Source: Steele et al., OOPSLA 2014."""
    x = (x ^ _shifted(x, 30)) * _MIX1
    x = (x ^ _shifted(x, 27)) * _MIX2
    return x ^ _shifted(x, 31)


def uniform(seeds: Sequence[int], *shape: int, device: torch.device) -> Tensor:
    """Return numbers in [0, 1), float32 [B, *shape]: 24 bits each, equal on every device.

    Args:
        seeds: one for each sample, from `seeding.fork`.
    """
    state_B = torch.tensor(list(seeds), dtype=torch.int64, device=device)
    counter_M = torch.arange(1, math.prod(shape) + 1, device=device) * _GAMMA
    bits_BM = _hash(state_B[:, None] + counter_M)
    return (_shifted(bits_BM, 40).to(torch.float32) / (1 << 24)).view(len(state_B), *shape)


def normal(seeds: Sequence[int], *shape: int, device: torch.device) -> Tensor:
    """Return standard normal numbers, float32 [B, *shape] (Box and Muller); devices may differ in the last bits."""
    pairs = uniform(seeds, 2, *shape, device=device)
    # 1 - u is in (0, 1]: its logarithm is finite.
    radius = (-2 * torch.log1p(-pairs[:, 0])).sqrt()
    return radius * torch.cos(2 * math.pi * pairs[:, 1])
