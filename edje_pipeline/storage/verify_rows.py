"""The part of `verify` that opens files: shards, reject files and the id lookup, each against its entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edje_pipeline.errors import CodecError, CorruptionError
from edje_pipeline.storage.arrow import numpy_from_fixed_binary
from edje_pipeline.storage.codecs import Codec
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.lookup import LookupReader, open_lookup
from edje_pipeline.storage.manifest import Manifest
from edje_pipeline.storage.pages import check_pages
from edje_pipeline.storage.parquet_io import hash_file, open_parquet, reading
from edje_pipeline.storage.reject_merge import read_reject_file
from edje_pipeline.storage.schema import REJECT_SCHEMA, RejectReason, RejectStage, shard_schema
from edje_pipeline.storage.shards import RejectEntry, ShardEntry
from edje_pipeline.storage.snapshot_files import LookupPart

SHOWN_ROWS = 5


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `kind` is from a small set, for machines."""

    kind: str
    path: str
    message: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    def to_text(self) -> str:
        return self.message if self.path in self.message else f"{self.path}: {self.message}"


class RowChecks:
    """Checks files one at a time; memory holds one row group and a few pieces of the lookup."""

    def __init__(self, index: Location, manifest: Manifest, codec: Codec | None, *, quick: bool) -> None:
        self._index = index
        self._manifest = manifest
        self._codec = codec
        self._quick = quick
        self._lookup: LookupReader | None = None
        self._shards: list[ShardEntry] = []

    def run(
        self,
        shards: list[ShardEntry] | None,
        rejects: list[RejectEntry] | None,
        parts: list[LookupPart] | None,
        tombstones: pa.Table | None,
    ) -> Iterator[list[Problem]]:
        """Yields the problems of one file after another, an empty list for a good one."""
        self._shards = shards or []
        lookup_is_good = parts is not None and shards is not None
        last: str | None = None
        for part in parts or []:
            found = list(self._guarded("lookup", part.path, self._check_part(part, last)))
            last = part.max_id
            lookup_is_good = lookup_is_good and not found
            yield found
        if lookup_is_good and parts is not None and not self._quick:
            # Rows are compared with the lookup only when the lookup itself can be trusted.
            self._lookup = LookupReader(self._index, parts, len(self._shards))
        dead = _dead_by_shard(tombstones)
        for number, entry in enumerate(self._shards):
            yield list(self._guarded("shard", entry.path, self._check_shard(number, entry, dead.get(number))))
        for reject in rejects or []:
            yield list(self._guarded("rejects", reject.path, self._check_rejects(reject)))

    @staticmethod
    def _guarded(kind: str, path: str, checks: Iterator[Problem]) -> Iterator[Problem]:
        try:
            yield from checks
        except (CorruptionError, CodecError) as error:
            yield Problem(kind, path, str(error))

    # -- lookup ----------------------------------------------------------------------------------

    def _check_part(self, part: LookupPart, last: str | None) -> Iterator[Problem]:
        file = open_lookup(self._index, part)
        if self._quick:
            return
        yield from self._check_hash("lookup", part.path, part.sha256)
        sizes = np.array([entry.num_rows for entry in self._shards], np.int64)
        for group in range(file.metadata.num_row_groups):
            table = self._read_group(file, part.path, group)
            ids = table.column("image_id").combine_chunks()
            ids = pa.concat_arrays(ids.chunks) if isinstance(ids, pa.ChunkedArray) else ids
            ascending = pc.all(pc.less(ids.slice(0, len(ids) - 1), ids.slice(1))).as_py()
            first, end = ids[0].as_py(), ids[-1].as_py()
            if ascending is False or (last is not None and first <= last):
                yield Problem("lookup", part.path, f"row group {group} is not in strictly ascending order of image_id")
            if first < part.min_id or end > part.max_id:
                yield Problem("lookup", part.path, f"row group {group} leaves the range of its list entry")
            shard, row = (table.column(name).to_numpy() for name in ("shard", "row"))
            known = (shard >= 0) & (shard < len(sizes)) & (row >= 0)
            if not known.all() or (row >= sizes[shard]).any():
                yield Problem("lookup", part.path, f"row group {group} names rows that no shard has")
            last = end

    # -- shards ----------------------------------------------------------------------------------

    def _check_shard(self, number: int, entry: ShardEntry, dead: np.ndarray | None) -> Iterator[Problem]:
        schema = shard_schema(self._manifest.tokens.payload_bytes, self._manifest.embedding_dim)
        file = open_parquet(
            self._index.child(entry.path),
            num_rows=entry.num_rows,
            size_bytes=entry.size_bytes,
            schema=schema,
            what="shard",
        )
        num_dead = 0 if dead is None else len(dead)
        if entry.live_rows != entry.num_rows - num_dead:
            said = f"{entry.live_rows:,} of {entry.num_rows:,} rows live, tombstones name {num_dead:,} of them"
            yield Problem("counts", entry.path, f"its list entry says {said}")
        low, high = _id_bounds(file)
        if low is not None and (low, high) != (entry.min_id, entry.max_id):
            yield Problem(
                "shard",
                entry.path,
                f"holds ids {low!r} to {high!r}, its list says {entry.min_id!r} to {entry.max_id!r}",
            )
        if file.metadata.num_row_groups != -(-entry.num_rows // entry.row_group_rows):
            yield Problem("shard", entry.path, f"has {file.metadata.num_row_groups} row groups, not what its list says")
        if self._quick:
            return
        yield from self._check_hash("shard", entry.path, entry.sha256)
        for group in range(file.metadata.num_row_groups):
            table = self._read_group(file, entry.path, group)
            yield from self._check_rows(number, entry, group, table, dead)

    def _check_rows(
        self, number: int, entry: ShardEntry, group: int, table: pa.Table, dead: np.ndarray | None
    ) -> Iterator[Problem]:
        start = group * entry.row_group_rows
        if table.num_rows != min(entry.row_group_rows, entry.num_rows - start):
            yield Problem("shard", entry.path, f"row group {group} has {table.num_rows:,} rows")
            return
        nulls = [name for name in table.column_names if table.column(name).null_count]
        if nulls:
            yield Problem("shard", entry.path, f"row group {group} has empty values in {', '.join(nulls)}")
            return
        ids = table.column("image_id")
        if self._codec is not None:
            bad = self._undecodable(numpy_from_fixed_binary(table.column("tokens")))
            yield from self._rows_problem(
                "tokens", entry, bad, start, ids, "hold NaN or infinite tokens, or no valid code"
            )
        if self._manifest.embedding_dim:
            values = numpy_from_fixed_binary(table.column("embedding")).copy().view(np.float16)
            bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
            yield from self._rows_problem("embedding", entry, bad, start, ids, "hold a NaN or infinite embedding")
        if self._lookup is not None:
            shard, row = self._lookup.locate(_one_array(ids))
            rows = np.arange(table.num_rows) + start
            is_dead = np.zeros(table.num_rows, bool) if dead is None else np.isin(rows, dead)
            here = (shard == number) & (row == rows)
            lost = np.flatnonzero(~is_dead & (shard < 0))
            yield from self._rows_problem("lookup", entry, lost, start, ids, "are missing in the id lookup")
            twice = np.flatnonzero(~is_dead & ~here & (shard >= 0))
            for position in twice[:SHOWN_ROWS]:
                other = self._shards[shard[position]].path
                yield Problem(
                    "duplicate",
                    entry.path,
                    f"image_id {ids[int(position)].as_py()!r} stands in row {rows[position]} and in {other} "
                    f"row {row[position]} ({len(twice)} such rows in row group {group})",
                )
            undead = np.flatnonzero(is_dead & here)
            yield from self._rows_problem("lookup", entry, undead, start, ids, "are dead but still in the id lookup")

    def _undecodable(self, payload: np.ndarray) -> np.ndarray:
        assert self._codec is not None
        try:
            with np.errstate(invalid="ignore", over="ignore"):
                tokens = self._codec.decode(payload)
        except CodecError:
            bad = []
            for position in range(len(payload)):
                try:
                    tokens = self._codec.decode(payload[position : position + 1])
                except CodecError:
                    bad.append(position)
                    continue
                if not np.isfinite(tokens).all():
                    bad.append(position)
            return np.array(bad, np.int64)
        return np.flatnonzero(~np.isfinite(tokens.reshape(len(tokens), -1)).all(axis=1))

    @staticmethod
    def _rows_problem(
        kind: str, entry: ShardEntry, bad: np.ndarray, start: int, ids: pa.ChunkedArray, what: str
    ) -> Iterator[Problem]:
        if len(bad):
            shown = ", ".join(f"{start + row} ({ids[int(row)].as_py()!r})" for row in bad[:SHOWN_ROWS])
            more = "" if len(bad) <= SHOWN_ROWS else f" and {len(bad) - SHOWN_ROWS} more"
            yield Problem(kind, entry.path, f"rows {shown}{more} {what}")

    # -- rejects ---------------------------------------------------------------------------------

    def _check_rejects(self, entry: RejectEntry) -> Iterator[Problem]:
        if self._quick:
            open_parquet(
                self._index.child(entry.path),
                num_rows=entry.num_rows,
                size_bytes=entry.size_bytes,
                schema=REJECT_SCHEMA,
                what="reject file",
            )
            return
        yield from self._check_hash("rejects", entry.path, entry.sha256)
        table = read_reject_file(self._index, entry)
        found = {row["values"]: row["counts"] for row in table.column("reason").value_counts().to_pylist()}
        if found != entry.by_reason:
            yield Problem("counts", entry.path, f"holds {found}, its list says {entry.by_reason}")
        for column, allowed in (("reason", RejectReason), ("stage", RejectStage)):
            strange = set(table.column(column).unique().to_pylist()) - {str(value) for value in allowed}
            if strange:
                yield Problem(
                    "rejects", entry.path, f"has the {column} {sorted(map(str, strange))[:3]}, not one of the list"
                )
        if self._lookup is not None:
            ids = _one_array(table.column("image_id"))
            both = np.flatnonzero(self._lookup.locate(ids)[0] >= 0)
            if len(both):
                shown = ", ".join(repr(ids[int(row)].as_py()) for row in both[:SHOWN_ROWS])
                yield Problem("rejects", entry.path, f"{len(both)} ids are both accepted and rejected: {shown}")

    # -- files -----------------------------------------------------------------------------------

    def _check_hash(self, kind: str, path: str, sha256: str) -> Iterator[Problem]:
        found = hash_file(self._index.child(path)).sha256
        if found != sha256:
            yield Problem(kind, path, f"its bytes have the sha256 {found[:12]}..., its list says {sha256[:12]}...")

    def _read_group(self, file: pq.ParquetFile, path: str, group: int) -> pa.Table:
        location = self._index.child(path)
        with reading(location):
            with location.open_input() as stream:
                check_pages(file, stream, path, row_groups=[group])
            return file.read_row_group(group)


def _id_bounds(file: pq.ParquetFile) -> tuple[str | None, str | None]:
    bounds: list[tuple[str, str]] = []
    for group in range(file.metadata.num_row_groups):
        statistics: Any = file.metadata.row_group(group).column(0).statistics
        if statistics is None or not statistics.has_min_max:
            return None, None
        bounds.append((statistics.min, statistics.max))
    return min(low for low, _ in bounds), max(high for _, high in bounds)


def _dead_by_shard(tombstones: pa.Table | None) -> dict[int, np.ndarray]:
    if tombstones is None or tombstones.num_rows == 0:
        return {}
    shards, rows = (tombstones.column(name).to_numpy() for name in ("shard", "row"))
    return {int(number): rows[shards == number] for number in np.unique(shards)}


def _one_array(column: pa.ChunkedArray) -> pa.StringArray:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.string())
