"""Finds image_ids in the sorted, range-partitioned lookup without reading more of it than needed."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edje_pipeline.errors import ConfigError, CorruptionError
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.pages import check_pages
from edje_pipeline.storage.parquet_io import open_parquet, reading
from edje_pipeline.storage.snapshot_files import LOOKUP_SCHEMA, LookupPart

CACHED_ROW_GROUPS = 64
CACHED_FILES = 64


class LookupReader:
    """Maps image_id to (shard, row). Keeps at most `CACHED_ROW_GROUPS` pieces of 65,536 ids in memory."""

    def __init__(self, index: Location, parts: Sequence[LookupPart], num_shards: int) -> None:
        self._index = index
        self._parts = list(parts)
        self._max_ids = [part.max_id for part in self._parts]
        self._num_shards = num_shards
        self._files: OrderedDict[int, tuple[pq.ParquetFile, list[str]]] = OrderedDict()
        self._pieces: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def locate(self, image_ids: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
        """Where each id is: shard and row as int32 (n,), -1 where the index does not hold it.

        The order of the answer is that of `image_ids`, which may repeat.
        """
        num_ids = len(image_ids)
        shards = np.full(num_ids, -1, np.int32)
        rows = np.full(num_ids, -1, np.int32)
        if num_ids == 0 or not self._parts:
            return shards, rows
        order = pc.sort_indices(image_ids)
        asked = image_ids.take(order)
        positions = order.to_numpy()
        for number, begin, end in _spans(asked, self._max_ids):
            _, group_max_ids = self._open(number)
            for group, first, last in _spans(asked.slice(begin, end - begin), group_max_ids):
                piece = self._piece(number, group)
                chosen = asked.slice(begin + first, last - first)
                found = pc.index_in(chosen, value_set=piece.column("image_id").combine_chunks())
                hits = found.is_valid().to_numpy(zero_copy_only=False)
                where = found.drop_null().to_numpy()
                target = positions[begin + first : begin + last][hits]
                shards[target] = piece.column("shard").to_numpy()[where]
                rows[target] = piece.column("row").to_numpy()[where]
        return shards, rows

    def tables(self) -> Iterator[pa.Table]:
        """The whole lookup in order, one piece (image_id, shard, row) at a time; nothing is kept."""
        for number in range(len(self._parts)):
            file, maxima = self._open(number)
            for group in range(len(maxima)):
                yield self._read(number, file, group)

    def _open(self, number: int) -> tuple[pq.ParquetFile, list[str]]:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        part = self._parts[number]
        file = open_lookup(self._index, part)
        with reading(self._index.child(part.path), "id lookup"):
            maxima = [_max_id(file, group) for group in range(file.metadata.num_row_groups)]
        if maxima != sorted(maxima):
            raise CorruptionError(f"the id lookup {part.path} is not sorted")
        self._files[number] = (file, maxima)
        if len(self._files) > CACHED_FILES:
            self._files.popitem(last=False)
        return file, maxima

    def _piece(self, number: int, group: int) -> pa.Table:
        key = (number, group)
        if key in self._pieces:
            self._pieces.move_to_end(key)
            return self._pieces[key]
        piece = self._read(number, self._open(number)[0], group)
        self._pieces[key] = piece
        if len(self._pieces) > CACHED_ROW_GROUPS:
            self._pieces.popitem(last=False)
        return piece

    def _read(self, number: int, file: pq.ParquetFile, group: int) -> pa.Table:
        location = self._index.child(self._parts[number].path)
        with reading(location, "id lookup"):
            with location.open_input() as stream:
                check_pages(file, stream, str(location), row_groups=[group])
            table = file.read_row_group(group).combine_chunks()
        bounds = pc.min_max(table.column("shard"))
        if bounds["min"].as_py() < 0 or bounds["max"].as_py() >= self._num_shards:
            raise CorruptionError(f"the id lookup {location} names a shard that the shard list does not have")
        return table


def open_lookup(index: Location, part: LookupPart) -> pq.ParquetFile:
    """Opens one file of the lookup; see `open_parquet`."""
    return open_parquet(
        index.child(part.path),
        num_rows=part.num_rows,
        size_bytes=part.size_bytes,
        schema=LOOKUP_SCHEMA,
        what="id lookup",
    )


def _max_id(file: pq.ParquetFile, group: int) -> str:
    statistics = file.metadata.row_group(group).column(0).statistics
    if statistics is not None and statistics.has_min_max:
        return statistics.max
    # Ids of some kilobytes have no statistics; the last one of a sorted piece is its bound.
    return file.read_row_group(group, columns=["image_id"]).column(0)[-1].as_py()


def _spans(asked: pa.StringArray, max_ids: list[str]) -> Iterator[tuple[int, int, int]]:
    """Cuts sorted ids at sorted inclusive upper bounds: (bound number, begin, end), empty spans left out."""
    num_ids = len(asked)
    if num_ids <= len(max_ids):
        numbers = [bisect_left(max_ids, text) for text in asked.to_pylist()]
        begin = 0
        while begin < num_ids and numbers[begin] < len(max_ids):
            end = bisect_right(numbers, numbers[begin])
            yield numbers[begin], begin, end
            begin = end
        return
    view = _Texts(asked)
    begin = 0
    for number, bound in enumerate(max_ids):
        end = bisect_right(view, bound, lo=begin)
        if end > begin:
            yield number, begin, end
        begin = end
        if begin >= num_ids:
            return


class _Texts(Sequence[str]):
    """A string array that bisect can index without turning it into a list."""

    def __init__(self, array: pa.StringArray) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, position: Any) -> Any:
        return self._array[position].as_py()


def as_id_array(ids: Any) -> pa.StringArray:
    """Image ids as a caller has them (a sequence, an Arrow column) as one string array."""
    if isinstance(ids, str):
        raise ConfigError("expected a sequence of image_ids, got one string; write [image_id]")
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks) if ids.num_chunks else pa.array([], pa.string())
    if isinstance(ids, pa.Array):
        return pc.cast(ids, pa.string())
    return pa.array(list(ids), pa.string())
