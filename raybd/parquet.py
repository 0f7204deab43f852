"""Reading a Parquet file that anyone may have written."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from raybd.errors import DataError

_TAIL = 8  # length of the footer, 4 bytes, and the mark at the end of a file


def read(content: bytes, *, where: str) -> pa.Table:
    """Return a Parquet file's columns as Parquet has them: numbers, texts, times; and its key-value metadata.

    The Arrow schema that a file may embed is not looked at: it can name extension types, and a process that has
    loaded Ray has one registered whose values are pickles, unpickled as soon as they are asked for.

    Errors: DataError.
    """
    start = max(0, len(content) - _TAIL - int.from_bytes(content[-_TAIL:-4], "little"))
    # Within the footer, whose other parts hold their lengths: a key that nothing looks for, of the same length.
    plain = content[:start] + content[start:].replace(b"ARROW:schema", b"other:schema")
    try:
        return pq.ParquetFile(pa.BufferReader(plain), arrow_extensions_enabled=False).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a readable Parquet file: {error}", where=where) from None
