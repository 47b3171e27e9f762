"""Stored token payloads by (shard, row): each row group is read once, whatever the order asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from edje_pipeline.storage.arrow import numpy_from_fixed_binary

if TYPE_CHECKING:
    from edje_pipeline.storage.index import Index


def read_payloads(index: Index, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, pa.Array, int]:
    """Payloads and ids of stored images.

    Args:
        index: an open index.
        shards: int (K,), ascending.
        rows: int (K,), ascending within a shard; no (shard, row) twice.

    Returns:
        uint8 (K, P), writable; string array (K,) of image ids; how many rows were read for it.
    """
    payloads = np.empty((len(shards), index.manifest.tokens.payload_bytes), np.uint8)
    ids: list[pa.Array] = []
    num_read = 0
    entries = index.shards
    for shard, first, last in _runs(shards):
        group_rows = entries[shard].row_group_rows
        in_shard = rows[first:last]
        for group, start, stop in _runs(in_shard // group_rows):
            table = index.read_row_group(shard, group, ["image_id", "tokens"])
            num_read += table.num_rows
            local = in_shard[start:stop] - group * group_rows
            matrix = numpy_from_fixed_binary(table.column("tokens"))
            np.take(matrix, local, axis=0, out=payloads[first + start : first + stop])
            ids.append(table.column("image_id").combine_chunks().take(pa.array(local)))
    names = pa.concat_arrays([_one_array(part) for part in ids]) if ids else pa.array([], pa.string())
    return payloads, names, num_read


def _one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        return column.chunk(0) if column.num_chunks else pa.array([], column.type)
    return column


def _runs(values: np.ndarray) -> list[tuple[int, int, int]]:
    """Equal neighbours as (value, start, stop)."""
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1)) if len(values) else np.empty(0, np.int64)
    stops = np.append(starts[1:], len(values))
    return [(int(values[start]), int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]
