"""Columns of tables as numbers: texts as codes, several columns as one key."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Codes = NDArray[np.signedinteger[Any]]
_MOST_KEYS = 2**62
_SHORT = 2**16  # keys of 16 bits are sorted by radix
_FEW = 16  # keys, whose rows are found faster one by one


def encoded(column: pa.ChunkedArray) -> tuple[Codes, list[str | None]]:
    """Return a column of texts, plain or dictionaries, as codes, and the text of each; a null is a text None."""
    code_N, dictionary = coded(column)
    return code_N, [*_texts(dictionary), None]


def coded(column: pa.ChunkedArray) -> tuple[Codes, pa.Array]:
    """Return a column of texts, plain or dictionaries, as codes, and the texts; a null has the code after the last."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    if column.num_chunks > 1:
        # Those of a table's parts have each their own dictionary.
        column = column.unify_dictionaries()
    if not column.num_chunks:
        return np.empty(0, dtype=np.int64), pa.array([], pa.string())
    dictionary = column.chunk(0).dictionary
    parts = []
    for chunk in column.chunks:
        code_N, there_N = numbers(chunk.indices)
        parts.append(np.where(there_N, code_N, len(dictionary)) if chunk.null_count else code_N)
    return parts[0] if len(parts) == 1 else np.concatenate(parts), dictionary


def _texts(values: pa.Array) -> list[str | None]:
    """Return texts as Python has them: those of a hundred thousand trials in a fraction of Arrow's own time."""
    if not pa.types.is_string(values.type) or values.null_count or not len(values):
        return values.to_pylist()
    ends = np.frombuffer(values.buffers()[1], dtype=np.int32)[values.offset : values.offset + len(values) + 1]
    whole = values.buffers()[2].to_pybytes()[ends[0] : ends[-1]] if ends[-1] > ends[0] else b""
    places = (ends - ends[0]).tolist()
    if whole.isascii():
        text = whole.decode("ascii")
        return [text[a:b] for a, b in pairwise(places)]
    return [whole[a:b].decode() for a, b in pairwise(places)]


def numbers(column: pa.Array | pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return a column of numbers, and which of them are there: any number, or NaN, stands for a null.

    Times are numbers of their unit. From the buffers themselves: what pyarrow gives numpy loads pandas, which takes as
    long as all the rest.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    kind = np.dtype(np.int64 if pa.types.is_timestamp(column.type) else column.type.to_pandas_dtype())
    if not chunks:
        return np.empty(0, dtype=kind), np.empty(0, dtype=bool)
    parts = []
    for chunk in chunks:
        data, there_N = chunk.buffers()[1], present(chunk)
        here = slice(chunk.offset, chunk.offset + len(chunk))
        found_N = np.frombuffer(data, dtype=kind)[here] if data else np.zeros(len(chunk), dtype=kind)
        if found_N.dtype.kind == "f" and not there_N.all():
            found_N = np.where(there_N, found_N, np.nan)
        parts.append((found_N, there_N))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([found for found, _ in parts]), np.concatenate([there for _, there in parts])


def present(column: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    """Say which values of a column are there, shape [N]."""
    if isinstance(column, pa.ChunkedArray):
        return np.concatenate([np.ones(0, dtype=bool), *map(present, column.chunks)])
    if not column.null_count:
        return np.ones(len(column), dtype=bool)
    if pa.types.is_dictionary(column.type):
        return present(column.indices)
    if not (valid := column.buffers()[0]):
        return np.zeros(len(column), dtype=bool)  # a column of the type null has no buffer
    bits = np.unpackbits(np.frombuffer(valid, dtype=np.uint8), bitorder="little")
    return bits[column.offset : column.offset + len(column)].astype(bool)


def taken(table: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    """Return some rows of a table, given by their places."""
    # From a buffer, as in `numbers`.
    places = pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))])
    return table.take(places)


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


def ordered(key_N: NDArray[Any]) -> NDArray[np.int64] | None:
    """Return the rows by rising keys, equal ones in their order; None where they come so, as in most tables."""
    return None if (key_N[1:] >= key_N[:-1]).all() else np.argsort(key_N, kind="stable")


def grouped(key_N: Codes, size: int) -> list[NDArray[np.int64]]:
    """Return the rows of each key, in their order, by the key's first row.

    Args:
        key_N, size: what `combined` gives.
    """
    if not len(key_N):
        return []
    if size <= _FEW:
        rows = [np.flatnonzero(key_N == key) for key in np.flatnonzero(np.bincount(key_N))]
        return sorted(rows, key=lambda rows: int(rows[0]))
    order = np.argsort(key_N.astype(np.uint16) if size <= _SHORT else key_N, kind="stable")
    found = key_N[order]
    starts = np.flatnonzero(np.concatenate(([True], found[1:] != found[:-1])))
    return sorted(np.split(order, starts[1:]), key=lambda rows: int(rows[0]))
