"""The plan: the corpus listed once, stored in units, and read unit by unit ever after.

    plan_dir/part-<pass>-<n>.parquet   PLAN_SCHEMA, zstd; row group k of part n is unit n * UNITS_PER_PART + k
    plan_dir/plan.json                 written last; without it the listing did not end and starts again

Every unit but the last has exactly `unit_rows` rows, so unit = row // unit_rows. Nothing here is
proportional to the number of images: rows are streamed, ids are compared through spilled hashes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.errors import CorruptionError, DuplicateIdError, SourceNotFoundError
from edje_pipeline.storage import files, plan_writer
from edje_pipeline.storage.duplicates import DuplicateFinder, hash_ids
from edje_pipeline.storage.faults import crash_point
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.plan_writer import PlanWriter, part_name
from edje_pipeline.storage.schema import LISTING_SCHEMA, PLAN_SCHEMA
from edje_pipeline.storage.sources.base import Source

SUSPECTS_PER_PASS = 1_000_000
PLAN_NAME = "plan.json"

KnownFilter = Callable[[pa.RecordBatch], Any]
"""Listing batch -> bool (n,), True where the image is to be left out of the plan."""


@dataclass(frozen=True)
class PlanInfo:
    """What was planned; the content of plan.json."""

    num_rows: int
    num_units: int
    unit_rows: int
    listing_sha256: str
    source: dict[str, Any]
    description: str
    num_duplicates_dropped: int = 0
    num_known: int = 0
    """Listed images that the `known` filter left out."""
    notes: list[str] = field(default_factory=list)
    """What the listing passed over or tolerated, one line each."""
    generation: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlanInfo:
        """The inverse of `to_dict`."""
        return cls(**data)


def write_plan(
    source: Source,
    plan_dir: Location,
    *,
    unit_rows: int = 256,
    on_duplicate: Literal["error", "first"] = "error",
    limit: int | None = None,
    known: KnownFilter | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> PlanInfo:
    """Lists the source into `plan_dir`; whatever an unfinished listing left there is removed first.

    Args:
        source: what to list.
        plan_dir: made when absent.
        unit_rows: images a unit.
        on_duplicate: "first" keeps the first of equal image_ids and counts the others.
        limit: stop after this many rows.
        known: leaves listed images out of the plan, for an index that has them already.
        on_progress: called with the number of newly listed images.

    Raises:
        SourceNotFoundError: the corpus holds no image.
        DuplicateIdError: two images have one id; the message names both places.
    """
    plan_dir.delete_dir()
    plan_dir.make_dirs()
    counts = {"known": 0}
    batches = _limited(_unknown(source, known, counts, on_progress), limit)
    scratch = Path(plan_dir.path) if plan_dir.is_local else None
    with DuplicateFinder(scratch) as finder:
        num_rows = 0
        with PlanWriter(plan_dir, unit_rows, generation=0) as writer:
            for batch in batches:
                finder.add(batch.column("image_id").to_pylist())
                writer.add(batch)
                num_rows += batch.num_rows
        if num_rows == 0 and counts["known"] == 0:
            raise SourceNotFoundError(_nothing_found(source))
        suspects = finder.repeated_hashes()
    dropped = 0
    generation = 0
    if len(suspects):
        drop = _repeated_rows(plan_dir, writer.num_units, suspects, on_duplicate)
        dropped = len(drop)
        if dropped:
            generation = 1
            kept = _without(plan_dir, writer.num_units, drop)
            with PlanWriter(plan_dir, unit_rows, generation=1) as second:
                for batch in kept:
                    second.add(batch)
            _delete_parts(plan_dir, writer.num_units, generation=0)
            writer = second
    info = PlanInfo(
        num_rows=writer.num_rows,
        num_units=writer.num_units,
        unit_rows=unit_rows,
        listing_sha256=writer.listing_sha256,
        source=source.to_dict(),
        description=source.describe(),
        num_duplicates_dropped=dropped,
        num_known=counts["known"],
        notes=source.notes.to_lines(),
        generation=generation,
    )
    crash_point("listing.done")
    plan_dir.child(PLAN_NAME).write_bytes(json.dumps(info.to_dict(), indent=1).encode())
    return info


def open_plan(plan_dir: Location) -> PlanInfo | None:
    """The finished plan in a directory, or None when there is none."""
    place = plan_dir.child(PLAN_NAME)
    if not place.exists():
        return None
    try:
        return PlanInfo.from_dict(json.loads(place.read_bytes(max_bytes=16 << 20)))
    except (ValueError, TypeError) as error:
        raise CorruptionError(f"{place} is not a plan: {error}; start again with --restart") from error


def read_unit(
    plan_dir: Location, unit: int, row_ranges: Iterable[tuple[int, int]] | None = None, *, generation: int | None = None
) -> pa.Table:
    """The plan rows of one unit (PLAN_SCHEMA), all of them or those inside `row_ranges` ([start, end) of `row`).

    `generation` is `PlanInfo.generation`; read from plan.json when not given.
    """
    if generation is None:
        info = open_plan(plan_dir)
        generation = info.generation if info is not None else 0
    place = plan_dir.child(part_name(generation, unit // plan_writer.UNITS_PER_PART))
    try:
        with place.open_input() as stream:
            table = pq.ParquetFile(stream, pre_buffer=False).read_row_group(
                unit % plan_writer.UNITS_PER_PART, use_threads=False
            )
    except (pa.ArrowException, FileNotFoundError) as error:
        raise CorruptionError(f"unit {unit} of the plan cannot be read from {place}: {error}; use --restart") from error
    table = table.cast(PLAN_SCHEMA)
    if row_ranges is None:
        return table
    rows = table.column("row").to_numpy()
    mask = np.zeros(len(rows), bool)
    for start, end in row_ranges:
        mask |= (rows >= start) & (rows < end)
    return table.filter(pa.array(mask))


def _delete_parts(plan_dir: Location, num_units: int, *, generation: int) -> None:
    for number in range(-(-num_units // plan_writer.UNITS_PER_PART)):
        plan_dir.child(part_name(generation, number)).delete_file()


def _unknown(
    source: Source, known: KnownFilter | None, counts: dict[str, int], on_progress: Callable[[int], None] | None
) -> Iterator[pa.RecordBatch]:
    for batch in source.list_batches():
        if on_progress is not None:
            on_progress(batch.num_rows)
        if known is None:
            yield batch
            continue
        mask = np.asarray(known(batch), dtype=bool)
        counts["known"] += int(mask.sum())
        if not mask.all():
            yield batch.filter(pa.array(~mask))


def _limited(batches: Iterator[pa.RecordBatch], limit: int | None) -> Iterator[pa.RecordBatch]:
    left = limit
    for batch in batches:
        if left is None:
            yield batch
            continue
        yield batch.slice(0, left)
        left -= min(left, batch.num_rows)
        if left == 0:
            return


def _units(plan_dir: Location, num_units: int, generation: int) -> Iterator[pa.Table]:
    for number in range(-(-num_units // plan_writer.UNITS_PER_PART)):
        with plan_dir.child(part_name(generation, number)).open_input() as stream:
            file = pq.ParquetFile(stream, pre_buffer=False)
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, use_threads=False)


def _repeated_rows(
    plan_dir: Location, num_units: int, suspects: np.ndarray, on_duplicate: Literal["error", "first"]
) -> np.ndarray:
    """Sorted rows whose image_id stands in an earlier row; compares the ids of equal hashes.

    Raises:
        DuplicateIdError: there is one and `on_duplicate` is "error".
    """
    repeated: list[int] = []
    for start in range(0, len(suspects), SUSPECTS_PER_PASS):
        some = suspects[start : start + SUSPECTS_PER_PASS]
        first_uri: dict[str, str] = {}
        for unit in _units(plan_dir, num_units, 0):
            ids = unit.column("image_id").to_pylist()
            hashes = hash_ids(ids)
            places = np.searchsorted(some, hashes)
            for position in np.flatnonzero(some[np.minimum(places, len(some) - 1)] == hashes).tolist():
                image_id, uri = ids[position], unit.column("uri")[position].as_py()
                if image_id not in first_uri:
                    first_uri[image_id] = uri
                elif on_duplicate == "first":
                    repeated.append(unit.column("row")[position].as_py())
                else:
                    raise DuplicateIdError(
                        f"image_id {image_id!r} stands at two places: {_place(first_uri[image_id])} and {_place(uri)}"
                        f" ({len(suspects):,} ids are repeated). Make ids unique (for tars --qualify-ids puts "
                        "the tar's name before the key), or keep the first of each with --on-duplicate first"
                    )
    return np.sort(np.asarray(repeated, np.int64))


def _place(uri: str) -> str:
    return files.shown(uri)


def _without(plan_dir: Location, num_units: int, drop: np.ndarray) -> Iterator[pa.RecordBatch]:
    for unit in _units(plan_dir, num_units, 0):
        rows = unit.column("row").to_numpy()
        keep = ~np.isin(rows, drop[np.searchsorted(drop, rows[0]) : np.searchsorted(drop, rows[-1], "right")])
        yield from unit.filter(pa.array(keep)).select(LISTING_SCHEMA.names).cast(LISTING_SCHEMA).to_batches()


def _nothing_found(source: Source) -> str:
    notes = source.notes.to_lines()
    also = f" Seen: {'; '.join(notes)}." if notes else ""
    return f"no image in the {source.describe()}; looked for {source.looked_for()}.{also} Check the path and --source"
