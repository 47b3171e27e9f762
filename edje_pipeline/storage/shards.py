"""Shards and reject files: the immutable Parquet files that hold rows, and their list entries."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from edje_pipeline.storage.location import Location
from edje_pipeline.storage.parquet_io import write_parquet
from edje_pipeline.storage.schema import REJECT_SCHEMA

MAX_ROW_GROUP_BYTES = 8 << 20
MAX_ROW_GROUP_ROWS = 65_536
REJECT_ROW_GROUP_ROWS = 65_536

SHARD_LIST_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("num_live_rows", pa.int64(), nullable=False),
        pa.field("row_group_rows", pa.int32(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("min_id", pa.string(), nullable=False),
        pa.field("max_id", pa.string(), nullable=False),
    ]
)

REJECT_LIST_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("by_reason", pa.string(), nullable=False),  # JSON object: reason -> count
    ]
)


@dataclass(frozen=True)
class ShardEntry:
    """One shard as a list names it. `path` is relative to the index, POSIX style."""

    path: str
    num_rows: int
    row_group_rows: int
    size_bytes: int
    sha256: str
    min_id: str
    max_id: str
    num_live_rows: int = -1
    """Rows that no tombstone names; -1 where nobody said, which means all of them."""

    @property
    def live_rows(self) -> int:
        return self.num_rows if self.num_live_rows < 0 else self.num_live_rows

    def with_live_rows(self, num_live_rows: int) -> ShardEntry:
        return replace(self, num_live_rows=num_live_rows)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "num_live_rows": self.live_rows}


@dataclass(frozen=True)
class RejectEntry:
    """One reject file as a list names it."""

    path: str
    num_rows: int
    size_bytes: int
    sha256: str
    by_reason: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def row_group_rows_for(payload_bytes: int) -> int:
    """Rows of a row group so that its tokens take 4 to 8 MiB: the largest power of two below 8 MiB.

    The row group is the unit of random access: 128 rows at 49,152 B, 8,192 at 1,024 B.
    """
    rows = max(1, MAX_ROW_GROUP_BYTES // max(payload_bytes, 1))
    return min(int(2 ** (rows.bit_length() - 1)), MAX_ROW_GROUP_ROWS)


def write_shard(
    index: Location,
    name: str,
    table: pa.Table,
    *,
    row_group_rows: int,
    token_compression: str = "none",  # noqa: S107
) -> ShardEntry:
    """Writes accepted rows under `name` (`shards/<run>-<unique>.parquet`) and returns their entry.

    Args:
        index: root of the index.
        name: relative to it.
        table: at least one row, columns as `schema.shard_schema` says, in that order.
        row_group_rows: from `row_group_rows_for`; every row group but the last has as many.
        token_compression: of the token column: `none`, or `zstd` where a measurement shows that it pays.

    Raises:
        ValueError: the table is empty.
        StorageError: the target cannot be written.
    """
    if table.num_rows == 0:
        raise ValueError("a shard has at least one row")
    bounds = pc.min_max(table.column("image_id"))
    schema = pa.schema([field.with_nullable(False) for field in table.schema])
    written = write_parquet(
        index.child(name),
        [table.cast(schema)],
        schema,
        row_group_rows=row_group_rows,
        raw_columns=("tokens",),
        dictionary_columns=("width", "height"),
        raw_compression=token_compression,
    )
    return ShardEntry(
        path=name,
        num_rows=table.num_rows,
        row_group_rows=row_group_rows,
        size_bytes=written.size_bytes,
        sha256=written.sha256,
        min_id=bounds["min"].as_py(),
        max_id=bounds["max"].as_py(),
        num_live_rows=table.num_rows,
    )


def write_rejects(index: Location, name: str, table: pa.Table) -> RejectEntry:
    """Writes rejected rows (`schema.REJECT_SCHEMA`) under `name` (`rejects/<run>-<unique>.parquet`)."""
    if table.num_rows == 0:
        raise ValueError("a reject file has at least one row")
    table = table.select(REJECT_SCHEMA.names).cast(REJECT_SCHEMA)
    written = write_parquet(
        index.child(name),
        [table],
        REJECT_SCHEMA,
        row_group_rows=REJECT_ROW_GROUP_ROWS,
        dictionary_columns=("stage", "reason", "container"),
    )
    reasons = Counter(table.column("reason").to_pylist())
    return RejectEntry(name, table.num_rows, written.size_bytes, written.sha256, dict(sorted(reasons.items())))


def shard_list_table(entries: list[ShardEntry]) -> pa.Table:
    """Entries as the rows of `shards.parquet`."""
    return pa.Table.from_pylist([entry.to_dict() for entry in entries], SHARD_LIST_SCHEMA)


def shard_entries(table: pa.Table) -> list[ShardEntry]:
    """The inverse of `shard_list_table`."""
    return [ShardEntry(**row) for row in table.to_pylist()]


def reject_list_table(entries: list[RejectEntry]) -> pa.Table:
    """Entries as the rows of `rejects.parquet`."""
    rows = [{**entry.to_dict(), "by_reason": json.dumps(entry.by_reason, sort_keys=True)} for entry in entries]
    return pa.Table.from_pylist(rows, REJECT_LIST_SCHEMA)


def reject_entries(table: pa.Table) -> list[RejectEntry]:
    """The inverse of `reject_list_table`."""
    return [RejectEntry(**{**row, "by_reason": json.loads(row["by_reason"])}) for row in table.to_pylist()]
