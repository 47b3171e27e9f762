"""The Parquet lists of a snapshot: shards, reject files, lookup parts, tombstones."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.errors import CorruptionError
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import FileRef, Manifest, is_safe_path
from edje_pipeline.storage.pages import check_pages
from edje_pipeline.storage.parquet_io import open_parquet, reading, write_parquet
from edje_pipeline.storage.shards import (
    REJECT_LIST_SCHEMA,
    SHARD_LIST_SCHEMA,
    RejectEntry,
    ShardEntry,
    reject_entries,
    reject_list_table,
    shard_entries,
    shard_list_table,
)

LOOKUP_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
    ]
)

LOOKUP_LIST_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("min_id", pa.string(), nullable=False),
        pa.field("max_id", pa.string(), nullable=False),
    ]
)

TOMBSTONE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)

TOMBSTONE_REASONS = ("deleted", "replaced", "missing", "rejected")

MAX_LIST_BYTES = 1 << 30
MAX_LIST_ROWS = 20_000_000
MAX_ROW_GROUP_TOKEN_BYTES = 1 << 30
LIST_ROW_GROUP_ROWS = 65_536
LOOKUP_ROW_GROUP_ROWS = 65_536


@dataclass(frozen=True)
class LookupPart:
    """One sorted range of the id lookup."""

    path: str
    num_rows: int
    size_bytes: int
    sha256: str
    min_id: str
    max_id: str


def write_list(index: Location, path: str, table: pa.Table, schema: pa.Schema) -> FileRef:
    """Writes one list and returns what the head says of it."""
    written = write_parquet(
        index.child(path),
        [table.cast(schema)],
        schema,
        row_group_rows=LIST_ROW_GROUP_ROWS,
        dictionary_columns=tuple(name for name in ("reason", "row_group_rows") if name in schema.names),
    )
    return FileRef(path, table.num_rows, written.size_bytes, written.sha256)


def read_list(index: Location, ref: FileRef, schema: pa.Schema) -> pa.Table:
    """Reads a list after comparing size, sha256 and number of rows with the head.

    Raises:
        CorruptionError: the file is missing, damaged, or not the one the head means.
    """
    location = index.child(ref.path)
    if ref.size_bytes > MAX_LIST_BYTES or ref.num_rows > MAX_LIST_ROWS:
        raise CorruptionError(f"the list {location} claims {ref.num_rows:,} rows in {ref.size_bytes:,} bytes: too many")
    with reading(location, "list"):
        file = open_parquet(location, num_rows=ref.num_rows, size_bytes=ref.size_bytes, schema=schema, what="list")
        with location.open_input() as stream:
            data = stream.read_buffer()
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise CorruptionError(f"the list {location} does not have the sha256 its head names")
        check_pages(file, pa.BufferReader(data), str(location))
        return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read().cast(schema)


def read_shards(index: Location, manifest: Manifest) -> list[ShardEntry]:
    """The shard list of a snapshot; every path stays inside the index and every size is believable."""
    ref = manifest.files["shards"]
    entries = shard_entries(read_list(index, ref, SHARD_LIST_SCHEMA))
    for entry in entries:
        _check_entry(entry.path, "shards/", entry.num_rows, entry.size_bytes, ref.path)
        plausible = 0 <= entry.num_live_rows <= entry.num_rows and 0 < entry.row_group_rows <= 1 << 20
        if not plausible or entry.row_group_rows * manifest.tokens.payload_bytes > MAX_ROW_GROUP_TOKEN_BYTES:
            raise CorruptionError(f"{ref.path} gives {entry.path} impossible counts: {_shown(asdict(entry))}")
    return entries


def read_rejects(index: Location, manifest: Manifest) -> list[RejectEntry]:
    """The reject files of a snapshot."""
    ref = manifest.files["rejects"]
    table = read_list(index, ref, REJECT_LIST_SCHEMA)
    try:
        entries = reject_entries(table)
    except ValueError as error:
        raise CorruptionError(f"{ref.path} has a by_reason that is not JSON: {error}") from error
    for entry in entries:
        _check_entry(entry.path, "rejects/", entry.num_rows, entry.size_bytes, ref.path)
    return entries


def lookup_parts(index: Location, manifest: Manifest) -> list[LookupPart]:
    """The ranges of the id lookup, in order."""
    ref = manifest.files["ids"]
    parts = [LookupPart(**row) for row in read_list(index, ref, LOOKUP_LIST_SCHEMA).to_pylist()]
    last = None
    for part in parts:
        _check_entry(part.path, "snapshots/", part.num_rows, part.size_bytes, ref.path)
        if part.num_rows > MAX_LIST_ROWS or part.min_id > part.max_id or (last is not None and part.min_id <= last):
            raise CorruptionError(f"{ref.path}: the range of {part.path} is not in order: {_shown(asdict(part))}")
        last = part.max_id
    return parts


def read_tombstones(index: Location, manifest: Manifest) -> pa.Table:
    """Dead rows of the shards, sorted by (shard, row)."""
    return read_list(index, manifest.files["tombstones"], TOMBSTONE_SCHEMA)


def write_lists(
    index: Location,
    folder: str,
    *,
    shards: list[ShardEntry],
    rejects: list[RejectEntry],
    parts: list[LookupPart],
    tombstones: pa.Table,
) -> dict[str, FileRef]:
    """Writes the four lists of a snapshot into `folder`."""
    part_table = pa.Table.from_pylist([asdict(part) for part in parts], LOOKUP_LIST_SCHEMA)
    return {
        "shards": write_list(index, f"{folder}/shards.parquet", shard_list_table(shards), SHARD_LIST_SCHEMA),
        "rejects": write_list(index, f"{folder}/rejects.parquet", reject_list_table(rejects), REJECT_LIST_SCHEMA),
        "ids": write_list(index, f"{folder}/ids.parquet", part_table, LOOKUP_LIST_SCHEMA),
        "tombstones": write_list(index, f"{folder}/tombstones.parquet", tombstones, TOMBSTONE_SCHEMA),
    }


def _check_entry(path: str, prefix: str, num_rows: int, size_bytes: int, list_path: str) -> None:
    if not is_safe_path(path) or not path.startswith(prefix):
        raise CorruptionError(f"{list_path} names the file {path[:80]!r}, expected one below {prefix}; refused")
    if num_rows <= 0 or size_bytes <= 0:
        raise CorruptionError(f"{list_path} gives {path} {num_rows:,} rows and {size_bytes:,} bytes")


def _shown(value: dict[str, Any]) -> str:
    return ", ".join(f"{key}={item!s:.40}" for key, item in value.items())
