"""Reads a published index: numpy and pyarrow, no torch, no ray."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.errors import ConfigError, CorruptionError, UnknownIdError
from edje_pipeline.storage.arrow import numpy_from_fixed_binary
from edje_pipeline.storage.codecs import Codec, load_codec
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.lookup import LookupReader, as_id_array
from edje_pipeline.storage.manifest import Manifest, read_head, read_manifest
from edje_pipeline.storage.pages import check_pages
from edje_pipeline.storage.parquet_io import open_parquet, reading
from edje_pipeline.storage.schema import shard_schema
from edje_pipeline.storage.shards import ShardEntry
from edje_pipeline.storage.snapshot_files import lookup_parts, read_shards, read_tombstones

OPEN_SHARDS = 32


@dataclass(frozen=True)
class ShardView:
    """One shard of a snapshot, without its dead rows."""

    index: Index
    number: int
    entry: ShardEntry

    @property
    def num_row_groups(self) -> int:
        return -(-self.entry.num_rows // self.entry.row_group_rows)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """One row group at a time: (row numbers in the shard (n,) int64, live rows as a table)."""
        dead = self.index.dead_rows(self.number)
        for group in range(self.num_row_groups):
            table = self.index.read_row_group(self.number, group, columns)
            rows = np.arange(table.num_rows, dtype=np.int64) + group * self.entry.row_group_rows
            if len(dead):
                alive = ~np.isin(rows, dead)
                rows, table = rows[alive], table.filter(pa.array(alive))
            if len(rows):
                yield rows, table


class Index:
    """A snapshot of an index. It stays the same while others publish; `prune` ends it.

    Open with `Index.open`. Not safe for use by several threads at once: open one each.
    """

    def __init__(self, location: Location, manifest: Manifest) -> None:
        self.location = location
        self.manifest = manifest
        self.shards: list[ShardEntry] = read_shards(location, manifest)
        """In the order of the shard numbers that `locate` returns."""
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._schema = shard_schema(manifest.tokens.payload_bytes, manifest.embedding_dim)

    @classmethod
    def open(cls, uri: str | os.PathLike[str] | Location, snapshot: str | None = None) -> Index:
        """Opens the current snapshot, or the one that is named.

        Raises:
            IndexNotFoundError: there is none; the message says what is there.
            FormatVersionError: a newer program wrote it.
            CorruptionError: its lists are damaged.
        """
        location = Location.parse(uri)
        manifest = read_head(location, snapshot) if snapshot else read_manifest(location)
        return cls(location, manifest)

    @cached_property
    def codec(self) -> Codec:
        """Turns stored payloads into tokens."""
        return load_codec(self.manifest.codec, self.location)

    @property
    def snapshot(self) -> str:
        return self.manifest.snapshot

    def __len__(self) -> int:
        return self.manifest.counts.accepted

    def __repr__(self) -> str:
        return f"Index({str(self.location)!r}, snapshot={self.snapshot!r}, {len(self):,} images)"

    # -- ids -------------------------------------------------------------------------------------

    def ids(self) -> list[str]:
        """All image_ids in ascending order. For very large indexes use `iter_ids`."""
        return [text for piece in self.iter_ids() for text in piece.to_pylist()]

    def iter_ids(self) -> Iterator[pa.StringArray]:
        """All image_ids in ascending order, up to 65,536 at a time."""
        for table in self._new_lookup().tables():
            yield from table.column("image_id").chunks

    def iter_lookup(self) -> Iterator[pa.Table]:
        """(image_id, shard, row) of all live rows by ascending id, up to 65,536 at a time."""
        return self._new_lookup().tables()

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, str) and bool(self.locate([image_id])[0][0] >= 0)

    def locate(self, ids: Sequence[str] | pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and row in the shard of each id, int32 (n,); -1 where the index has none."""
        return self._lookup.locate(as_id_array(ids))

    @cached_property
    def _lookup(self) -> LookupReader:
        return self._new_lookup()

    def _new_lookup(self) -> LookupReader:
        return LookupReader(self.location, lookup_parts(self.location, self.manifest), len(self.shards))

    def _locate_all(self, ids: Sequence[str] | pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
        array = as_id_array(ids)
        shards, rows = self._lookup.locate(array)
        missing = np.flatnonzero(shards < 0)
        if len(missing):
            shown = ", ".join(repr(array[int(position)].as_py()) for position in missing[:5])
            more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
            raise UnknownIdError(
                f"{len(missing):,} of {len(array):,} image_ids are not in {self.location}: {shown}{more}; "
                "`Index.ids()` lists what is"
            )
        return shards, rows

    # -- values ----------------------------------------------------------------------------------

    def tokens(self, ids: Sequence[str] | pa.StringArray) -> np.ndarray:
        """Decoded tokens, float32 (n, M, E), in the order of `ids`, which may repeat.

        Raises:
            UnknownIdError: the index does not hold some of them; the message lists the first.
            CorruptionError: a shard is damaged.
        """
        spec = self.manifest.tokens
        payload = self.payloads(ids)
        if not len(payload):
            return np.empty((0, spec.num_tokens, spec.dim), np.float32)
        return self.codec.decode(payload)

    def payloads(self, ids: Sequence[str] | pa.StringArray) -> np.ndarray:
        """As `tokens`, but as stored: uint8 (n, P)."""
        return self._gather(ids, "tokens", self.manifest.tokens.payload_bytes)

    def embeddings(self, ids: Sequence[str] | pa.StringArray) -> np.ndarray:
        """The backbone's pooled embedding, float32 (n, De), in the order of `ids`.

        Raises:
            ConfigError: the index stores none.
        """
        width = self.manifest.embedding_dim
        if not width:
            raise ConfigError(f"{self.location} stores no embeddings: its backbone has none")
        return self._gather(ids, "embedding", 2 * width).view(np.float16).astype(np.float32)

    def _gather(self, ids: Sequence[str] | pa.StringArray, column: str, width: int) -> np.ndarray:
        shards, rows = self._locate_all(ids)
        out = np.empty((len(shards), width), np.uint8)
        if not len(shards):
            return out
        sizes = np.array([entry.row_group_rows for entry in self.shards], np.int32)
        groups = rows // sizes[shards]
        order = np.lexsort((rows, groups, shards))
        # Each run of equal (shard, row group) is one read.
        keys = np.stack([shards[order], groups[order]], axis=1)
        starts = np.flatnonzero(np.any(np.diff(keys, axis=0, prepend=-1) != 0, axis=1))
        for begin, end in zip(starts, [*starts[1:], len(order)], strict=True):
            shard, group = int(keys[begin][0]), int(keys[begin][1])
            values = numpy_from_fixed_binary(self.read_row_group(shard, group, [column]).column(column))
            wanted = order[begin:end]
            out[wanted] = values[rows[wanted] - group * int(sizes[shard])]
        return out

    # -- shards ----------------------------------------------------------------------------------

    def iter_shards(self) -> Iterator[ShardView]:
        """Every shard that still has live rows."""
        for number, entry in enumerate(self.shards):
            if entry.live_rows:
                yield ShardView(self, number, entry)

    def read_row_group(self, shard: int, row_group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of one row group, dead ones included; `dead_rows` names those.

        Raises:
            CorruptionError: the shard is missing, damaged or not the one the list means.
        """
        entry = self.shards[shard]
        location = self.location.child(entry.path)
        file = self._open_shard(shard)
        names = list(columns) if columns is not None else self._schema.names
        with reading(location, "shard"):
            self._check_row_group(file, shard, row_group, names)
            return file.read_row_group(row_group, columns=names)

    def _open_shard(self, number: int) -> pq.ParquetFile:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        entry = self.shards[number]
        file = open_parquet(
            self.location.child(entry.path),
            num_rows=entry.num_rows,
            size_bytes=entry.size_bytes,
            schema=self._schema,
            what="shard",
        )
        if file.metadata.num_row_groups != -(-entry.num_rows // entry.row_group_rows):
            raise CorruptionError(
                f"the shard {entry.path} has {file.metadata.num_row_groups} row groups, its list says "
                f"{entry.row_group_rows} rows each"
            )
        self._files[number] = file
        if len(self._files) > OPEN_SHARDS:
            self._files.popitem(last=False)
        return file

    def _check_row_group(self, file: pq.ParquetFile, shard: int, row_group: int, names: list[str]) -> None:
        entry = self.shards[shard]
        expected = min(entry.row_group_rows, entry.num_rows - row_group * entry.row_group_rows)
        found = file.metadata.row_group(row_group).num_rows
        if found != expected:
            raise CorruptionError(
                f"row group {row_group} of the shard {entry.path} has {found:,} rows, expected {expected:,}"
            )
        packed = [name for name in names if not self._is_stored_plain(file, row_group, name)]
        if packed:  # a plain column cannot unpack to more than the file has bytes
            with self.location.child(entry.path).open_input() as stream:
                check_pages(file, stream, entry.path, row_groups=[row_group], columns=packed)

    def _is_stored_plain(self, file: pq.ParquetFile, row_group: int, name: str) -> bool:
        chunk = file.metadata.row_group(row_group).column(self._schema.get_field_index(name))
        return chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page

    def dead_rows(self, shard: int) -> np.ndarray:
        """Sorted numbers of the rows of a shard that a tombstone names, int64."""
        begin, end = np.searchsorted(self._dead[0], [shard, shard + 1])
        return self._dead[1][begin:end]

    @cached_property
    def _dead(self) -> tuple[np.ndarray, np.ndarray]:
        table = read_tombstones(self.location, self.manifest)
        return table.column("shard").to_numpy(), table.column("row").to_numpy().astype(np.int64)
