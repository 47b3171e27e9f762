"""Carries a parent's rejects into a new snapshot, without those that a run has settled anew."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from edje_pipeline.storage.location import Location
from edje_pipeline.storage.lookup import LookupReader
from edje_pipeline.storage.pages import check_pages
from edje_pipeline.storage.parquet_io import open_parquet, reading
from edje_pipeline.storage.schema import REJECT_SCHEMA
from edje_pipeline.storage.shards import RejectEntry, write_rejects
from edje_pipeline.storage.snapshot_files import LookupPart


def read_reject_file(index: Location, entry: RejectEntry) -> pa.Table:
    """The rows of one reject file, compared with its entry first."""
    location = index.child(entry.path)
    file = open_parquet(
        location, num_rows=entry.num_rows, size_bytes=entry.size_bytes, schema=REJECT_SCHEMA, what="reject file"
    )
    with reading(location, "reject file"):
        with location.open_input() as stream:
            check_pages(file, stream, str(location))
        return file.read().cast(REJECT_SCHEMA)


def iter_rejects(index: Location, entries: Sequence[RejectEntry]) -> Iterator[pa.Table]:
    """Reject rows, one file at a time."""
    for entry in entries:
        yield read_reject_file(index, entry)


def read_reject_ids(index: Location, entries: Sequence[RejectEntry]) -> pa.StringArray:
    """The ids that one run rejected."""
    arrays = [chunk for table in iter_rejects(index, entries) for chunk in table.column("image_id").chunks]
    return pa.concat_arrays(arrays) if arrays else pa.array([], pa.string())


def merge_rejects(
    index: Location,
    old: Sequence[RejectEntry],
    *,
    run_id: str,
    parts: Sequence[LookupPart],
    num_shards: int,
    new_reject_ids: pa.StringArray | None,
    removed_ids: Sequence[pa.StringArray],
) -> tuple[list[RejectEntry], set[str]]:
    """Entries of the parent's rejects that still hold, and the removed ids that were found among them.

    A reject is settled when its id is live in the new lookup, was rejected again, or is to be removed.
    Files without a settled row are named again; others are written again without those rows.
    """
    lookup = LookupReader(index, parts, num_shards)
    kept: list[RejectEntry] = []
    dropped: set[str] = set()
    for entry in old:
        table = read_reject_file(index, entry)
        ids = table.column("image_id").combine_chunks()
        if isinstance(ids, pa.ChunkedArray):
            ids = pa.concat_arrays(ids.chunks)
        settled = lookup.locate(ids)[0] >= 0
        if new_reject_ids is not None:
            settled |= _is_in(ids, new_reject_ids)
        for removed in removed_ids:
            gone = _is_in(ids, removed)
            dropped.update(ids.filter(pa.array(gone)).to_pylist())
            settled |= gone
        if not settled.any():
            kept.append(entry)
        elif not settled.all():
            rest = table.filter(pa.array(~settled))
            kept.append(write_rejects(index, f"rejects/{run_id}-{uuid.uuid4().hex}.parquet", rest))
    return kept, dropped


def _is_in(ids: pa.StringArray, values: pa.StringArray) -> np.ndarray:
    return pc.is_in(ids, value_set=values).to_numpy(zero_copy_only=False)
