"""Which listed images an index has already with the same content, and which of its images are gone.

Content is compared by sha256 of the encoded bytes: every known image is read, none is decoded. State:
one bit an image of the index when missing ones are asked for; otherwise one listing batch.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.pipeline.stages import available_cpus
from edje_pipeline.storage.arrow import numpy_from_fixed_binary
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.plan import KnownFilter
from edje_pipeline.storage.schema import LISTING_SCHEMA
from edje_pipeline.storage.sources import read_images
from edje_pipeline.storage.staging import Staging

MISSING_FILE = "missing.parquet"
MISSING_SCHEMA = pa.schema(
    [pa.field("image_id", pa.string(), nullable=False), pa.field("reason", pa.string(), nullable=False)]
)
CHUNK_ROWS = 64
KEPT_SHARDS = 64


class Incremental:
    """Compares a listing with the current snapshot of an index."""

    def __init__(self, index: Location, source: dict[str, Any], prune_missing: bool, max_bytes: int) -> None:
        self._location, self._source = index, source
        self._prune_missing, self._max_bytes = prune_missing, max_bytes
        self._index: Index | None = None
        self._seen: list[np.ndarray] = []

    def known_filter(self) -> KnownFilter:
        """A filter for one listing: True for rows whose id the index has with the same content."""
        index = self._index = Index.open(self._location)
        self._seen = [np.zeros(entry.num_rows, bool) for entry in index.shards] if self._prune_missing else []

        @lru_cache(maxsize=KEPT_SHARDS)
        def digests(shard: int) -> np.ndarray:
            groups = range(-(-index.shards[shard].num_rows // index.shards[shard].row_group_rows))
            tables = [index.read_row_group(shard, group, ["content_sha256"]) for group in groups]
            return numpy_from_fixed_binary(pa.concat_tables(tables).column("content_sha256"))

        def known(batch: pa.RecordBatch) -> np.ndarray:
            shards, rows = index.locate(batch.column("image_id"))
            mask = np.zeros(batch.num_rows, bool)
            candidates = np.flatnonzero(shards >= 0)
            if not len(candidates):
                return mask
            if self._seen:
                for shard in np.unique(shards[candidates]).tolist():
                    self._seen[shard][rows[shards == shard]] = True
            stored = np.stack([digests(int(shards[i]))[rows[i]] for i in candidates])
            found = self._digests_now(pa.Table.from_batches([batch], LISTING_SCHEMA).take(candidates))
            mask[candidates] = [
                digest is not None and digest == old.tobytes() for digest, old in zip(found, stored, strict=True)
            ]
            return mask

        return known

    def _digests_now(self, rows: pa.Table) -> list[bytes | None]:
        """sha256 of each image's bytes; None where they cannot be read (the run then says why)."""

        def work(start: int) -> list[bytes | None]:
            blobs = read_images(self._source, rows.slice(start, CHUNK_ROWS), max_bytes=self._max_bytes)
            return [hashlib.sha256(blob).digest() if isinstance(blob, bytes) else None for blob in blobs]

        with ThreadPoolExecutor(available_cpus()) as pool:
            parts = pool.map(work, range(0, rows.num_rows, CHUNK_ROWS))
            return [digest for part in parts for digest in part]

    def store_missing(self, staging: Staging) -> None:
        """Writes the ids that the listing did not name beside the plan, for `read_missing` after a resume."""
        if not self._prune_missing or self._index is None:
            return
        with (
            staging.plan_dir.child(MISSING_FILE).open_atomic() as stream,
            pq.ParquetWriter(stream, MISSING_SCHEMA) as writer,
        ):
            for table in self._index.iter_lookup():
                shards, rows = table.column("shard").to_numpy(), table.column("row").to_numpy()
                gone = np.zeros(len(rows), bool)
                for shard in np.unique(shards).tolist():
                    gone[shards == shard] = ~self._seen[shard][rows[shards == shard]]
                if gone.any():
                    ids = table.column("image_id").filter(pa.array(gone)).combine_chunks().cast(pa.string())
                    reasons = pa.array(["missing"] * int(gone.sum()), pa.string())
                    writer.write_table(pa.table([ids, reasons], schema=MISSING_SCHEMA))

    def read_missing(self, staging: Staging) -> pa.Table | None:
        """(image_id, reason) of images that leave the index; None without --prune-missing."""
        if not self._prune_missing:
            return None
        with staging.plan_dir.child(MISSING_FILE).open_input() as stream:
            return pq.read_table(stream)
