"""Columns of tables as numbers: texts as codes, several columns as one key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Codes = NDArray[np.int64]
_MOST_KEYS = 2**62
_SHORT = 2**16  # keys of 16 bits are sorted by radix


def encoded(column: pa.ChunkedArray) -> tuple[Codes, list[str | None]]:
    """Return a column of texts, plain or dictionaries, as codes, and the text of each; a null is a text None."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    # One chunk or several: those of a table's parts have each their own dictionary.
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        if not whole.num_chunks:
            return np.empty(0, dtype=np.int64), [None]
        whole = whole.chunk(0)
    values = [*whole.dictionary.to_pylist(), None]
    indices = whole.indices.fill_null(len(values) - 1) if whole.null_count else whole.indices
    return indices.to_numpy().astype(np.int64), values


def combined(columns: Iterable[tuple[NDArray[Any], int]]) -> tuple[Codes, int]:
    """Return one key for each row of several columns of codes, and how many keys there may be.

    Args:
        columns: codes, shape [N], and how many there may be: codes are 0 and more, and below that number.
    """
    key_N, size = np.zeros(1, dtype=np.int64), 1
    for codes_N, number in columns:
        if size * number > _MOST_KEYS:
            found, key_N = np.unique(key_N, return_inverse=True)
            size = len(found)
        key_N = key_N * number + codes_N
        size *= number
    return key_N, size


def grouped(key_N: Codes, size: int) -> list[NDArray[np.int64]]:
    """Return the rows of each key, in their order, by the key's first row.

    Args:
        key_N, size: what `combined` gives.
    """
    if not len(key_N):
        return []
    order = np.argsort(key_N.astype(np.uint16) if size <= _SHORT else key_N, kind="stable")
    found = key_N[order]
    starts = np.flatnonzero(np.concatenate(([True], found[1:] != found[:-1])))
    return sorted(np.split(order, starts[1:]), key=lambda rows: int(rows[0]))
