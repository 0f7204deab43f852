"""Reading a Parquet file that anyone may have written."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raybd.columns import numbers
from raybd.errors import DataError

_TAIL = 8  # length of the footer, 4 bytes, and the mark at the end of a file
# A few kilobytes may stand for any number of rows, and for any length of text in them.
_MAX_CELLS = 20_000_000  # rows x columns
_MAX_BYTES = 256 << 20  # of a file unpacked, and of all its texts
_SMALL = 1 << 20


def read(content: bytes, *, where: str, columns: Collection[str], encoded: bool = False) -> pa.Table:
    """Return a Parquet file's columns as Parquet has them: numbers, texts, times; and its key-value metadata.

    The Arrow schema that a file may embed is not looked at: it can name extension types, and a process that has
    loaded Ray has one registered whose values are pickles, unpickled as soon as they are asked for.

    Args:
        columns: those to read; some may be missing.
        encoded: leave texts as dictionaries, which takes less time and memory where many are the same.

    Errors: DataError.
    """
    try:
        metadata = _metadata(content)
        there = {metadata.schema.column(i).path for i in range(metadata.num_columns)}
        # Of these columns those of texts are read as dictionaries.
        options = {"read_dictionary": [*there.intersection(columns)], "arrow_extensions_enabled": False}
        file = pq.ParquetFile(pa.BufferReader(content), metadata=metadata, **options)
        found = [field for field in file.schema_arrow if field.name in columns]
        texts = [field.name for field in found if pa.types.is_dictionary(field.type)]
        _check(file.metadata, found, where)
        # Threads cost more than they bring where there is little to read.
        table = file.read(columns=[field.name for field in found], use_threads=len(content) > _SMALL)
        chunks = [chunk for name in texts for chunk in table.column(name).chunks]
        # Of small parts the bound says enough, in a fraction of the time.
        if sum(map(_bound, chunks)) > _MAX_BYTES and (length := sum(map(_length, chunks))) > _MAX_BYTES:
            raise DataError(f"{length} bytes of text", where=where, expected=f"at most {_MAX_BYTES}")
        kept = [_kept(field, encoded=encoded) for field in found]
        expected = pa.schema(kept, metadata=table.schema.metadata)
        table = table if table.schema == expected else table.cast(expected)
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError, IndexError) as error:
        raise DataError(f"not a readable Parquet file: {error}", where=where) from None
    return table


def _footer_start(content: bytes) -> int:
    return max(0, len(content) - _TAIL - int.from_bytes(content[-_TAIL:-4], "little"))


def _metadata(content: bytes) -> pq.FileMetaData:
    """Return what the footer says, without the Arrow schema. Errors: of Arrow, on what is no footer."""
    # Within the footer, whose other parts hold their lengths: a key that nothing looks for, of the same length. The
    # file itself is not copied: that would take as long as to read some columns.
    footer = bytes(content[_footer_start(content) :]).replace(b"ARROW:schema", b"other:schema")
    return pq.ParquetFile(pa.BufferReader(footer), arrow_extensions_enabled=False).metadata


def _check(meta: pq.FileMetaData, found: list[pa.Field], where: str) -> None:
    """Refuse a file that would take much memory. Errors: DataError."""
    names = [field.name for field in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"columns that are there twice: {', '.join(twice)}", where=where)
    for field in found:
        if pa.types.is_nested(field.type):
            raise DataError(f"column {field.name} holds {field.type}", where=where, expected="one value in each row")
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    rows = max(meta.num_rows, sum(group.num_rows for group in groups))
    if rows * len(found) > _MAX_CELLS:
        raise DataError(f"{rows} rows of {len(found)} columns", where=where, expected=f"at most {_MAX_CELLS} values")
    if any(not 0 <= group.total_byte_size <= _MAX_BYTES for group in groups):
        raise DataError("unpacks to too much", where=where, expected=f"at most {_MAX_BYTES} bytes")


def _kept(field: pa.Field, *, encoded: bool) -> pa.Field:
    """Return a column as it is wanted of one that is read with its texts as dictionaries."""
    if not pa.types.is_dictionary(field.type) or (encoded and pa.types.is_string(field.type.value_type)):
        return field
    return field.with_type(field.type.value_type)


def _bound(chunk: pa.Array) -> int:
    """Return what the texts of a column take at most: in each row all that is in its dictionary."""
    if pa.types.is_dictionary(chunk.type):
        return len(chunk) * int(chunk.dictionary.nbytes)
    return int(chunk.nbytes)


def _length(chunk: pa.Array) -> int:
    """Return how many bytes the texts of a column take, each as often as it is there. Errors: IndexError."""
    texts = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
    if not len(texts):
        return 0
    wide = pa.types.is_large_string(texts.type) or pa.types.is_large_binary(texts.type)
    ends_D = np.frombuffer(texts.buffers()[1], dtype=np.int64 if wide else np.int32)
    length_D = np.diff(ends_D[texts.offset : texts.offset + len(texts) + 1]).astype(np.int64)
    if not pa.types.is_dictionary(chunk.type):
        return int(length_D.sum())
    codes_N, there_N = numbers(chunk.indices)
    return int(length_D[codes_N[there_N]].sum())
