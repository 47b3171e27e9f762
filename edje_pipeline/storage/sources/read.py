"""The bytes of listed images, container by container; a failure is a value, never an exception."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.errors import EdjeError
from edje_pipeline.storage import files
from edje_pipeline.storage.schema import RejectReason
from edje_pipeline.storage.sources.base import WHOLE_FILE, ReadFailure, SourceOptions
from edje_pipeline.storage.sources.parquet import bytes_column, open_parquet

MAX_IMAGE_BYTES = 256 << 20
WHOLE_GROUP_BYTES = 256 << 20
"""Row groups up to this size (uncompressed, image column) are read at once, larger ones in small batches."""
STREAM_ROWS = 16
MAX_GROUP_BYTES = 64 << 30

Blob = bytes | ReadFailure


def read_images(source: dict[str, Any], rows: pa.Table, *, max_bytes: int = MAX_IMAGE_BYTES) -> list[Blob]:
    """The encoded bytes of plan or listing rows, in row order.

    Args:
        source: `Source.to_dict()` of the source that listed them.
        rows: has the columns of LISTING_SCHEMA.
        max_bytes: cap on one encoded image.

    Each container is opened once. Nothing here raises for a bad image, file or container.
    """
    blobs: list[Blob] = [ReadFailure(RejectReason.UNREADABLE, "not read")] * rows.num_rows
    containers = rows.column("container").to_pylist()
    offsets = rows.column("offset").to_numpy()
    lengths = rows.column("length").to_numpy()
    groups: dict[str, list[int]] = {}
    for position, container in enumerate(containers):
        groups.setdefault(container, []).append(position)
    for container, positions in groups.items():
        where = np.asarray(positions)
        try:
            if (lengths[where] == WHOLE_FILE).all():
                found = [_whole_file(container, max_bytes)] * len(positions)
            elif source["kind"] == "parquet":
                found = _parquet_rows(source, container, offsets[where], lengths[where], max_bytes)
            else:
                found = _members(container, offsets[where], lengths[where], max_bytes)
        except (OSError, pa.ArrowException, EdjeError, ValueError, MemoryError) as error:
            found = [failure_of(error)] * len(positions)
        for position, blob in zip(positions, found, strict=True):
            blobs[position] = blob
    return blobs


def failure_of(error: BaseException) -> ReadFailure:
    """A failed read in the words of the closed list."""
    if isinstance(error, FileNotFoundError):
        return ReadFailure(RejectReason.MISSING, "the listed file is not there any more")
    if isinstance(error, OSError) and error.errno in (errno.EISDIR, errno.ENOTDIR):
        return ReadFailure(RejectReason.MISSING, "the listed file is not a file any more")
    text = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
    return ReadFailure(RejectReason.UNREADABLE, f"{type(error).__name__}: {text}")


def _too_many(size: int, max_bytes: int) -> ReadFailure:
    return ReadFailure(
        RejectReason.TOO_MANY_BYTES, f"the encoded image has {size:,} bytes, more than the {max_bytes:,} allowed"
    )


def _whole_file(uri: str, max_bytes: int) -> Blob:
    with files.open_binary(uri) as stream:
        data = bytes(stream.read(max_bytes + 1))
    if len(data) > max_bytes:
        return _too_many(files.file_size(uri), max_bytes)
    return data


def _members(uri: str, offsets: np.ndarray, lengths: np.ndarray, max_bytes: int) -> list[Blob]:
    blobs: list[Blob] = []
    with files.open_binary(uri) as stream:
        for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            if length > max_bytes:
                blobs.append(_too_many(length, max_bytes))
                continue
            stream.seek(offset)
            data = bytes(stream.read(length))
            if len(data) < length:
                message = f"the tar ends {length - len(data):,} bytes before the member does"
                blobs.append(ReadFailure(RejectReason.TRUNCATED, message))
            else:
                blobs.append(data)
    return blobs


def _parquet_rows(
    source: dict[str, Any], uri: str, groups: np.ndarray, insides: np.ndarray, max_bytes: int
) -> list[Blob]:
    blobs: list[Blob] = [ReadFailure(RejectReason.MISSING, "the row is not in the Parquet file any more")] * len(groups)
    with files.open_binary(uri) as stream:
        file = open_parquet(stream, files.shown(uri))
        column = source.get("image_column") or bytes_column(
            file.schema_arrow, SourceOptions.from_dict(source.get("options", {}))
        )
        if column is None or column not in file.schema_arrow.names:
            return [ReadFailure(RejectReason.MISSING, f"the Parquet file has no column {column!r} any more")] * len(
                groups
            )
        for group in np.unique(groups).tolist():
            wanted = {int(insides[i]): int(i) for i in np.flatnonzero(groups == group)}
            if not 0 <= group < file.num_row_groups:
                continue
            try:
                _one_group(file, group, column, wanted, blobs, max_bytes)
            except (OSError, pa.ArrowException, MemoryError) as error:
                for position in wanted.values():
                    blobs[position] = failure_of(error)
    return blobs


def _one_group(
    file: pq.ParquetFile, group: int, column: str, wanted: dict[int, int], blobs: list[Blob], max_bytes: int
) -> None:
    """Fills `blobs[position]` for `wanted[row inside the group] = position`."""
    size = _uncompressed_bytes(file, group, column)
    if size > MAX_GROUP_BYTES:
        failure = ReadFailure(
            RejectReason.TOO_MANY_BYTES, f"the row group unpacks to {size:,} bytes, more than {MAX_GROUP_BYTES:,}"
        )
        for position in wanted.values():
            blobs[position] = failure
        return
    batch_rows = 1024 if size <= WHOLE_GROUP_BYTES else STREAM_ROWS
    last = max(wanted)
    start = 0
    for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(0)
        if pa.types.is_struct(values.type):
            values = (
                values.field("bytes")
                if values.null_count == 0
                else values.flatten()[values.type.get_field_index("bytes")]
            )
        for inside in range(start, start + len(values)):
            if inside in wanted:
                blobs[wanted[inside]] = _value(values[inside - start], max_bytes)
        start += len(values)
        if start > last:
            return


def _value(value: pa.Scalar, max_bytes: int) -> Blob:
    if not value.is_valid:
        return ReadFailure(RejectReason.MISSING, "the row holds no image bytes")
    buffer = value.as_buffer()
    return _too_many(buffer.size, max_bytes) if buffer.size > max_bytes else buffer.to_pybytes()


def _uncompressed_bytes(file: pq.ParquetFile, group: int, column: str) -> int:
    metadata = file.metadata.row_group(group)
    chunks = (metadata.column(index) for index in range(metadata.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".", 1)[0] == column)
