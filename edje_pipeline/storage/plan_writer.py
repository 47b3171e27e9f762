"""Writes plan files: listing batches cut into units, rows numbered, everything hashed on the way."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.storage.faults import crash_point
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.schema import LISTING_SCHEMA, PLAN_SCHEMA

UNITS_PER_PART = 256
"""Row groups of a plan file: enough to keep files few, few enough to keep footers small."""


def part_name(generation: int, number: int) -> str:
    """File name of a part; `generation` 1 is a plan written again without its duplicates."""
    return f"part-{generation}-{number:06d}.parquet"


class PlanWriter:
    """Cuts listing batches into units and writes them, numbering the rows."""

    def __init__(self, plan_dir: Location, unit_rows: int, *, generation: int) -> None:
        self._plan_dir = plan_dir
        self._unit_rows = unit_rows
        self._generation = generation
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0
        self._part = ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self._hashers = [hashlib.sha256() for _ in LISTING_SCHEMA]
        self.num_rows = 0
        self.num_units = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self._num_waiting:
                self._flush(self._num_waiting)
            self._part.close()
        else:
            # The part's atomic writer must see the error: it then removes its temporary file.
            self._part.__exit__(kind, error, trace)

    def add(self, batch: pa.RecordBatch) -> None:
        """Takes rows of LISTING_SCHEMA."""
        self._waiting.append(batch)
        self._num_waiting += batch.num_rows
        if self._num_waiting >= self._unit_rows:
            self._flush(self._num_waiting // self._unit_rows * self._unit_rows)

    @property
    def listing_sha256(self) -> str:
        """Of all rows in order, whatever the batches they came in."""
        return hashlib.sha256(b"".join(hasher.digest() for hasher in self._hashers)).hexdigest()

    def _flush(self, num_rows: int) -> None:
        table = pa.Table.from_batches(self._waiting, LISTING_SCHEMA).combine_chunks()
        self._waiting = table.slice(num_rows).to_batches()
        self._num_waiting = table.num_rows - num_rows
        for start in range(0, num_rows, self._unit_rows):
            self._write_unit(table.slice(start, min(self._unit_rows, num_rows - start)))

    def _write_unit(self, unit: pa.Table) -> None:
        if self.num_units % UNITS_PER_PART == 0:
            self._part.close()
            name = part_name(self._generation, self.num_units // UNITS_PER_PART)
            stream = self._part.enter_context(self._plan_dir.child(name).open_atomic())
            self._writer = self._part.enter_context(
                pq.ParquetWriter(
                    stream, PLAN_SCHEMA, compression="zstd", use_dictionary=["container"], write_statistics=False
                )
            )
        assert self._writer is not None
        self._hash(unit)
        rows = pa.array(np.arange(self.num_rows, self.num_rows + unit.num_rows), pa.int64())
        self._writer.write_table(unit.add_column(0, PLAN_SCHEMA.field("row"), rows), row_group_size=unit.num_rows)
        self.num_rows += unit.num_rows
        self.num_units += 1
        crash_point("listing.batch")

    def _hash(self, unit: pa.Table) -> None:
        for hasher, column in zip(self._hashers, unit.columns, strict=True):
            if pa.types.is_string(column.type):
                # A length before each text: two different columns never hash the same bytes.
                for text in column.to_pylist():
                    data = text.encode()
                    hasher.update(len(data).to_bytes(4, "little") + data)
            else:
                hasher.update(column.to_numpy().astype("<i8").tobytes())
