"""Zero-copy steps between numpy matrices of bytes and Arrow fixed-size binary columns, and tables put together.

Fixed-size binary is how pixels, tokens and embeddings travel and rest: a contiguous buffer that
Ray, Parquet and numpy all share without a copy or a Python object a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa


def fixed_binary_from_numpy(rows: np.ndarray, mask: np.ndarray | None = None) -> pa.FixedSizeBinaryArray:
    """Wraps a C-contiguous array (n, ...) as n values of fixed size, without copying.

    Args:
        rows: any dtype, shape (n, ...); each row's bytes become one value.
        mask: optional bool (n,), True where the value is null.
    """
    rows = np.ascontiguousarray(rows)
    num_rows = rows.shape[0]
    width = rows.dtype.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
    validity = None
    if mask is not None and mask.any():
        validity = pa.array(~mask).buffers()[1]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), num_rows, [validity, pa.py_buffer(rows)])


def numpy_from_fixed_binary(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The bytes of a fixed-size binary column as uint8 (n, width); null rows hold undefined bytes.

    Zero-copy (and then read-only) when the column is one chunk.
    """
    if isinstance(column, pa.ChunkedArray):
        if column.num_chunks != 1:
            column = column.combine_chunks()
            if isinstance(column, pa.ChunkedArray):
                column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
        else:
            column = column.chunk(0)
    width = column.type.byte_width
    buffer = column.buffers()[1]
    if len(column) == 0 or buffer is None:
        return np.empty((0, width), np.uint8)
    flat = np.frombuffer(buffer, np.uint8, count=len(column) * width, offset=column.offset * width)
    return flat.reshape(len(column), width)


def gathered(tables: Iterable[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """Tables put together to `num_rows` rows or somewhat more; the last may have fewer."""
    kept: list[pa.Table] = []
    count = 0
    for table in tables:
        kept.append(table)
        count += table.num_rows
        if count >= num_rows:
            yield pa.concat_tables(kept)
            kept, count = [], 0
    if kept:
        yield pa.concat_tables(kept)
