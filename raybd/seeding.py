"""One seed for a study, and an independent one for each purpose below it."""

from __future__ import annotations

import hashlib


def fork(seed: int, *labels: str | int) -> int:
    """Derive the seed for the purpose that `labels` name: a number in [0, 2**63), the same on every platform.

    Equal arguments give equal seeds; any other label gives an unrelated one. `1` and `"1"` are different labels.
    """
    path = "\0".join(f"{type(label).__name__}:{label}" for label in (seed, *labels))
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") >> 1


def share(seed: int, *labels: str | int) -> float:
    """Return a number in [0, 1) that depends on `seed` and `labels` alone: a coin that falls the same way always."""
    return (fork(seed, *labels) >> 10) / 2**53  # all 63 bits would round to 1.0 at the upper end
