"""Builds the id lookup of a new snapshot with memory that does not grow with the number of images.

New rows are cut into ranges of about a million ids by split points drawn from a sample, spilled to
disk one sorted piece a group of shards, and merged range by range with the parent's lookup. Ranges
of the parent that nothing touches are named again instead of being written again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from edje_pipeline.errors import CorruptionError, DuplicateIdError
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.lookup import open_lookup
from edje_pipeline.storage.parquet_io import open_parquet, reading, write_parquet
from edje_pipeline.storage.shards import ShardEntry
from edje_pipeline.storage.snapshot_files import (
    LOOKUP_ROW_GROUP_ROWS,
    LOOKUP_SCHEMA,
    TOMBSTONE_SCHEMA,
    LookupPart,
)

MIN_PART_ROWS = 131_072
MAX_PART_ROWS = 1_000_000
NUM_PARTS_AIM = 256
SAMPLE_PER_PART = 100


def part_rows_for(num_rows: int) -> int:
    """Ids of a lookup file: few enough to merge in little memory, many enough to keep files and seeks few."""
    return min(max(MIN_PART_ROWS, num_rows // NUM_PARTS_AIM), MAX_PART_ROWS)


@dataclass
class LookupResult:
    """What the merge found."""

    parts: list[LookupPart] = field(default_factory=list)
    tombstones: list[pa.Table] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Ids to remove that the parent does not hold."""
    num_live: int = 0


@dataclass(frozen=True)
class Removal:
    """Ids that leave the parent's rows, and why."""

    image_ids: pa.StringArray
    reason: str


class NewRows:
    """(image_id, shard, row) of the new shards, readable by range; spilled when they are many."""

    def __init__(
        self, index: Location, shards: Sequence[tuple[int, ShardEntry]], scratch: Path, part_rows: int
    ) -> None:
        self._index = index
        self._shards = list(shards)
        self._scratch = scratch
        self._group_rows = 2 * part_rows
        self._pieces: list[Path] = []
        self._bounds: list[str] = []
        self._table: pa.Table | None = None
        total = sum(entry.num_rows for _, entry in self._shards)
        self.bounds: list[str] = []
        if total <= part_rows + part_rows // 4:
            self._table = self._read_group(self._shards)
        else:
            self.bounds = self._draw_bounds(total, part_rows)

    def spill(self, bounds: list[str]) -> None:
        """Sorts the rows into the ranges cut at `bounds` (each the first id of a range)."""
        self._bounds = bounds
        if self._table is not None:
            return
        self._scratch.mkdir(parents=True, exist_ok=True)
        for group in _groups(self._shards, self._group_rows):
            table = self._read_group(group)
            path = self._scratch / f"new-{len(self._pieces):06d}.arrow"
            cuts = _cut(table, bounds)
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, LOOKUP_SCHEMA) as writer:
                for begin, end in pairwise(cuts):
                    writer.write_batch(_one_batch(table.slice(begin, end - begin)))
            self._pieces.append(path)

    def range(self, number: int) -> pa.Table:
        """The new rows of one range, in no particular order."""
        if self._table is not None:
            cuts = _cut(self._table, self._bounds)
            return self._table.slice(cuts[number], cuts[number + 1] - cuts[number])
        batches = []
        for path in self._pieces:
            with pa.OSFile(str(path)) as source:
                batches.append(pa.ipc.open_file(source).get_batch(number))
        return pa.Table.from_batches(batches, LOOKUP_SCHEMA)

    def _read_group(self, shards: Sequence[tuple[int, ShardEntry]]) -> pa.Table:
        tables = [_read_ids(self._index, number, entry) for number, entry in shards]
        table = pa.concat_tables(tables) if tables else LOOKUP_SCHEMA.empty_table()
        return table.sort_by("image_id").combine_chunks()

    def _draw_bounds(self, total: int, part_rows: int) -> list[str]:
        num_parts = -(-total // part_rows)
        every = max(1, total // (num_parts * SAMPLE_PER_PART))
        sample: list[str] = []
        for number, entry in self._shards:
            ids = _read_ids(self._index, number, entry).column("image_id")
            first = number * 7919 % every
            sample += ids.take(pa.array(np.arange(first, len(ids), every))).to_pylist()
        sample.sort()
        if not sample:
            return []
        picked = [sample[len(sample) * part // num_parts] for part in range(1, num_parts)]
        return sorted(set(picked))


def build_lookup(
    index: Location,
    folder: str,
    *,
    new_shards: Sequence[tuple[int, ShardEntry]],
    base: Sequence[LookupPart],
    removals: Sequence[Removal],
    shard_paths: Sequence[str],
    scratch: Path,
    part_rows: int | None = None,
) -> LookupResult:
    """Merges new rows with the parent's lookup and writes `folder`/ids-NNNNN.parquet.

    Args:
        index: root of the index.
        folder: of the new snapshot, relative to the index.
        new_shards: (number in the new shard list, entry) of the shards this run adds.
        base: the parent's lookup; empty when the snapshot starts anew.
        removals: ids that leave the parent's rows. The first reason that names an id counts.
        shard_paths: the new shard list, for messages.
        scratch: a local directory for sorted pieces.
        part_rows: about how many ids a file gets; by `part_rows_for` when None.

    Raises:
        DuplicateIdError: one id stands in two rows of the new shards.
    """
    if part_rows is None:
        part_rows = part_rows_for(sum(entry.num_rows for _, entry in new_shards) + sum(part.num_rows for part in base))
    new = NewRows(index, new_shards, scratch, part_rows)
    bounds = sorted({*new.bounds, *(part.min_id for part in base[1:])})
    new.spill(bounds)
    result = LookupResult()
    writer = _PartWriter(index, folder, part_rows, result)
    base_reader = _BaseReader(index, base)
    removal_tables = [Removal(pc.unique(r.image_ids).sort(), r.reason) for r in removals]
    for number in range(len(bounds) + 1):
        low = bounds[number - 1] if number else None
        high = bounds[number] if number < len(bounds) else None
        rows = new.range(number)
        leaving = [Removal(_between(removal.image_ids, low, high), removal.reason) for removal in removal_tables]
        untouched = base_reader.whole_part(low, high)
        if rows.num_rows == 0 and untouched is not None and not any(len(r.image_ids) for r in leaving):
            writer.reuse(untouched, partial(base_reader.read, low, high))
            continue
        table, dead = _merge(base_reader.read(low, high), rows, leaving, shard_paths, result)
        writer.add(table)
        if dead.num_rows:
            result.tombstones.append(dead)
    writer.flush()
    return result


def _merge(
    old: pa.Table, new: pa.Table, leaving: Sequence[Removal], shard_paths: Sequence[str], result: LookupResult
) -> tuple[pa.Table, pa.Table]:
    """One range: (live rows sorted by id, tombstones)."""
    dead: list[pa.Table] = []
    for removal in leaving:
        if not len(removal.image_ids):
            continue
        if removal.reason != "rejected":
            known = pc.is_in(removal.image_ids, value_set=old.column("image_id").combine_chunks())
            result.unknown += removal.image_ids.filter(pc.invert(known)).to_pylist()
        gone = pc.is_in(old.column("image_id"), value_set=removal.image_ids)
        dead.append(_tombstones(old.filter(gone), removal.reason))
        old = old.filter(pc.invert(gone))
    if new.num_rows and old.num_rows:
        replaced = pc.is_in(old.column("image_id"), value_set=new.column("image_id").combine_chunks())
        dead.append(_tombstones(old.filter(replaced), "replaced"))
        old = old.filter(pc.invert(replaced))
    table = pa.concat_tables([old, new]).sort_by("image_id").combine_chunks()
    if table.num_rows > 1:
        ids = table.column("image_id").chunk(0)
        same = pc.equal(ids.slice(1), ids.slice(0, len(ids) - 1))
        if pc.any(same).as_py():
            first = int(np.flatnonzero(same.to_numpy(zero_copy_only=False))[0])
            places = [
                f"{shard_paths[table.column('shard')[row].as_py()]} row {table.column('row')[row].as_py()}"
                for row in (first, first + 1)
            ]
            raise DuplicateIdError(
                f"the image_id {ids[first].as_py()!r} was written twice: {places[0]} and {places[1]}; nothing was "
                "published. Ids must be unique in a corpus; --on-duplicate first keeps the first of each"
            )
    result.num_live += table.num_rows
    return table, pa.concat_tables(dead) if dead else TOMBSTONE_SCHEMA.empty_table()


def _tombstones(rows: pa.Table, reason: str) -> pa.Table:
    return rows.append_column(TOMBSTONE_SCHEMA.field("reason"), pa.array([reason] * rows.num_rows, pa.string()))


class _BaseReader:
    """Ranges of the parent's lookup; holds one part at a time."""

    def __init__(self, index: Location, parts: Sequence[LookupPart]) -> None:
        self._index = index
        self._parts = list(parts)
        self._held: tuple[int, pa.Table] | None = None

    def _overlapping(self, low: str | None, high: str | None) -> list[int]:
        return [
            number
            for number, part in enumerate(self._parts)
            if (high is None or part.min_id < high) and (low is None or part.max_id >= low)
        ]

    def whole_part(self, low: str | None, high: str | None) -> LookupPart | None:
        """The part that is exactly this range, None when the range is empty or cuts one."""
        numbers = self._overlapping(low, high)
        if len(numbers) != 1:
            return None
        part = self._parts[numbers[0]]
        inside = (low is None or part.min_id >= low) and (high is None or part.max_id < high)
        return part if inside else None

    def read(self, low: str | None, high: str | None) -> pa.Table:
        """Rows with low <= image_id < high."""
        tables = []
        for number in self._overlapping(low, high):
            if self._held is None or self._held[0] != number:
                part = self._parts[number]
                with reading(self._index.child(part.path), "id lookup"):
                    table = open_lookup(self._index, part).read().cast(LOOKUP_SCHEMA).combine_chunks()
                self._held = (number, table)
            table = self._held[1]
            cuts = _cut(table, [bound for bound in (low, high) if bound is not None])
            begin = cuts[1] if low is not None else 0
            end = cuts[-2] if high is not None else table.num_rows
            tables.append(table.slice(begin, end - begin))
        return pa.concat_tables(tables) if tables else LOOKUP_SCHEMA.empty_table()


class _PartWriter:
    """Collects sorted ranges and writes them as files of about `part_rows` ids."""

    def __init__(self, index: Location, folder: str, part_rows: int, result: LookupResult) -> None:
        self._index = index
        self._folder = folder
        self._part_rows = part_rows
        self._result = result
        self._waiting: list[pa.Table] = []
        self._number = 0

    @property
    def _num_waiting(self) -> int:
        return sum(table.num_rows for table in self._waiting)

    def add(self, table: pa.Table) -> None:
        """Appends the next range; writes when there is enough."""
        if table.num_rows:
            self._waiting.append(table)
        while self._num_waiting >= 2 * self._part_rows:
            self._write(self._part_rows)
        if 4 * self._num_waiting >= 3 * self._part_rows:  # ranges cut from a sample are a little smaller or larger
            self.flush()

    def reuse(self, part: LookupPart, read: Callable[[], pa.Table]) -> None:
        """Names a file of the parent again, unless that would strand a small piece before it."""
        self._result.num_live += part.num_rows
        if 0 < self._num_waiting < self._part_rows // 4 or part.num_rows < self._part_rows // 4:
            self.add(read())
            return
        self.flush()
        self._result.parts.append(part)

    def flush(self) -> None:
        """Writes what waits."""
        if self._waiting:
            self._write(self._num_waiting)

    def _write(self, num_rows: int) -> None:
        table = pa.concat_tables(self._waiting).combine_chunks()
        rest = table.slice(num_rows)
        self._waiting = [rest] if rest.num_rows else []
        table = table.slice(0, num_rows)
        path = f"{self._folder}/ids-{self._number:05d}.parquet"
        self._number += 1
        written = write_parquet(self._index.child(path), [table], LOOKUP_SCHEMA, row_group_rows=LOOKUP_ROW_GROUP_ROWS)
        ids = table.column("image_id")
        self._result.parts.append(
            LookupPart(path, num_rows, written.size_bytes, written.sha256, ids[0].as_py(), ids[-1].as_py())
        )


def _read_ids(index: Location, number: int, entry: ShardEntry) -> pa.Table:
    location = index.child(entry.path)
    file = open_parquet(location, num_rows=entry.num_rows, size_bytes=entry.size_bytes, what="shard")
    with reading(location, "shard"):
        ids = file.read(columns=["image_id"]).column("image_id").combine_chunks()
    if ids.null_count:
        raise CorruptionError(f"the shard {location} holds a row without image_id")
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks)
    columns = [ids, pa.array(np.full(len(ids), number, np.int32)), pa.array(np.arange(len(ids), dtype=np.int32))]
    return pa.Table.from_arrays(columns, schema=LOOKUP_SCHEMA)


def _groups(shards: Sequence[tuple[int, ShardEntry]], group_rows: int) -> Iterator[list[tuple[int, ShardEntry]]]:
    group: list[tuple[int, ShardEntry]] = []
    for number, entry in shards:
        if group and sum(e.num_rows for _, e in group) + entry.num_rows > group_rows:
            yield group
            group = []
        group.append((number, entry))
    if group:
        yield group


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], LOOKUP_SCHEMA)


def _cut(table: pa.Table, bounds: Sequence[str]) -> list[int]:
    """Positions [0, ..., num_rows] at which a table sorted by id is cut so that each bound begins a range."""
    column = table.column("image_id")
    view = _Column(column)
    return [0, *(bisect_left(view, bound) for bound in bounds), table.num_rows]


def _between(ids: pa.StringArray, low: str | None, high: str | None) -> pa.StringArray:
    view = _Column(ids)
    begin = bisect_left(view, low) if low is not None else 0
    end = bisect_left(view, high) if high is not None else len(ids)
    return ids.slice(begin, end - begin)


class _Column(Sequence[str]):
    """A string column that bisect can index without turning it into a list."""

    def __init__(self, column: pa.ChunkedArray | pa.StringArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, position: int) -> str:  # type: ignore[override]
        return self._column[position].as_py()
