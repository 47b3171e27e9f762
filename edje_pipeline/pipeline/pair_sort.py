"""Candidate pairs as integers, sorted by the place of their image in the index, in bounded memory.

An external merge sort: pairs are collected up to a limit, sorted, and stored as a *run*. At the end
every run gives its part of one range of row groups after the other. Ranges are cut where the pairs
counted so far reach the limit, so a popular shard makes ranges narrow, never large; a row group with
several times the limit, as in a small index that many queries name, is cut by its rows. Below the
limit nothing touches the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.parquet_io import write_parquet

PAIR_SCHEMA = pa.schema(
    [
        pa.field("query", pa.int32(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("first_stage_score", pa.float32()),
    ]
)
RUN_ROW_GROUP_ROWS = 16_384
"""Each run has one row group in memory while ranges are read: 500 runs (5 x 10^8 pairs), 230 MB."""


@dataclass(frozen=True)
class Geometry:
    """Numbers every row and every row group of an index in shard order. S shards."""

    first_row: np.ndarray
    """int64 (S + 1,): rows before each shard."""
    first_group: np.ndarray
    """int64 (S + 1,): row groups before each shard."""
    group_rows: np.ndarray
    """int64 (S,): rows of a row group of each shard."""

    @classmethod
    def of(cls, index: Index) -> Geometry:
        num_rows = np.array([entry.num_rows for entry in index.shards], np.int64)
        group_rows = np.array([entry.row_group_rows for entry in index.shards], np.int64)
        groups = -(-num_rows // np.maximum(group_rows, 1))
        return cls(np.append(0, np.cumsum(num_rows)), np.append(0, np.cumsum(groups)), group_rows)

    def places(self, pairs: pa.Table) -> np.ndarray:
        """The row of each pair's image, numbered through the index: int64 (n,)."""
        return self.first_row[pairs.column("shard").to_numpy()] + pairs.column("row").to_numpy()

    def groups_of_places(self, places: np.ndarray) -> np.ndarray:
        """The row group each place lies in, numbered through the index: int64 (n,)."""
        shards = np.searchsorted(self.first_row, places, side="right") - 1
        return self.first_group[shards] + (places - self.first_row[shards]) // self.group_rows[shards]

    def place_of_group(self, group: int) -> int:
        """The first place of a row group; of one behind the last, the number of rows."""
        if group >= self.first_group[-1]:
            return int(self.first_row[-1])
        shard = int(np.searchsorted(self.first_group, group, side="right")) - 1
        return int(self.first_row[shard] + (group - self.first_group[shard]) * self.group_rows[shard])


def sort_pairs(pairs: pa.Table, geometry: Geometry) -> tuple[pa.Table, np.ndarray]:
    """Pairs by place, then query, the first of equal ones kept.

    Returns:
        The pairs, and int64 (n,): the place of each.
    """
    places, queries = geometry.places(pairs), pairs.column("query").to_numpy()
    order = np.lexsort((queries, places))
    places, queries = places[order], queries[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (places[1:] != places[:-1]) | (queries[1:] != queries[:-1])
    return pairs.take(pa.array(order[fresh])).combine_chunks(), places[fresh]


class PairSorter:
    """Takes pairs in the order of the candidate file, gives them back in the order of the index."""

    def __init__(self, geometry: Geometry, spill_dir: Location, memory_pairs: int) -> None:
        """Args: spill_dir: for runs; made when needed. memory_pairs: in memory at a time, about."""
        self._geometry, self._spill_dir, self._memory_pairs = geometry, spill_dir, memory_pairs
        self._kept: list[pa.Table] = []
        self._num_kept = 0
        self._runs: list[_Run] = []
        self._pairs_of_group = np.zeros(0, np.int64)

    def add(self, pairs: pa.Table) -> None:
        """Takes a table of PAIR_SCHEMA."""
        if self._num_kept and self._num_kept + pairs.num_rows > self._memory_pairs:
            self._store_run()
        self._kept.append(pairs)
        self._num_kept += pairs.num_rows

    def ranges(self) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """What `sort_pairs` gives, for one range of the index after the other; at least one range."""
        if not self._runs:
            yield sort_pairs(pa.concat_tables([PAIR_SCHEMA.empty_table(), *self._kept]), self._geometry)
            return
        self._store_run()
        for end_place in self._range_ends():
            # In the order of the runs, which is that of the file: of equal pairs the first one is kept.
            parts = [run.take_before(end_place, self._geometry) for run in self._runs]
            yield sort_pairs(pa.concat_tables(parts), self._geometry)

    def _range_ends(self) -> Iterator[int]:
        """The place at which each range ends, ascending."""
        counts, geometry = self._pairs_of_group, self._geometry
        before = np.cumsum(counts) - counts
        first_groups = np.flatnonzero(np.diff(before // self._memory_pairs, prepend=-1))
        for end in [*first_groups[1:].tolist(), len(counts)]:
            # A group of more than the limit is the last of its range: the one after it begins beyond a multiple.
            num_cuts = int(counts[end - 1]) // (2 * self._memory_pairs)
            start_place, end_place = geometry.place_of_group(end - 1), geometry.place_of_group(end)
            inner = np.linspace(start_place, end_place, 2 * num_cuts + 1).astype(np.int64)[1:-1]
            yield from sorted({*inner.tolist(), end_place})

    def remove_runs(self) -> None:
        """Deletes what was spilled."""
        if self._runs:
            self._spill_dir.delete_dir()

    def _store_run(self) -> None:
        pairs, places = sort_pairs(pa.concat_tables([PAIR_SCHEMA.empty_table(), *self._kept]), self._geometry)
        self._kept, self._num_kept = [], 0
        counts = np.bincount(self._geometry.groups_of_places(places), minlength=int(self._geometry.first_group[-1]))
        self._pairs_of_group = counts + self._pairs_of_group if len(self._pairs_of_group) else counts
        location = self._spill_dir.child(f"{len(self._runs):06d}.parquet")
        write_parquet(location, [pairs], PAIR_SCHEMA, row_group_rows=RUN_ROW_GROUP_ROWS)
        self._runs.append(_Run(location))


class _Run:
    """Sorted pairs on disk, read from the front; the file is open only while it is read."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._next_group = 0
        self._rest = PAIR_SCHEMA.empty_table()

    def take_before(self, end_place: int, geometry: Geometry) -> pa.Table:
        """The pairs that were not taken yet and lie before a place."""
        taken = []
        with self._location.open_input() as stream:
            file = pq.ParquetFile(stream)
            while True:
                stop = int(np.searchsorted(geometry.places(self._rest), end_place))
                taken.append(self._rest.slice(0, stop))
                self._rest = self._rest.slice(stop)
                if self._rest.num_rows or self._next_group == file.num_row_groups:
                    return pa.concat_tables(taken)
                self._rest = file.read_row_group(self._next_group)
                self._next_group += 1
