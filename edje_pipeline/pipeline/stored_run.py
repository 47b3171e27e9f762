"""Runs that start from stored tokens instead of images: another codec, or another adapter on raw tokens.

Rows of such a run are the live rows of the old snapshot in shard order, then its rejects: the same
journal, receipts and publish as for images apply. One shard is one unit.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from edje_pipeline.errors import ModelError
from edje_pipeline.pipeline.job import Job
from edje_pipeline.pipeline.metrics import peak_rss_bytes, with_metrics
from edje_pipeline.pipeline.stages import Machine, Stage, write_stage
from edje_pipeline.pipeline.workers import UNIT_SCHEMA, make_encoder, ranges_of
from edje_pipeline.storage.arrow import fixed_binary_from_numpy, numpy_from_fixed_binary
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.reject_merge import iter_rejects
from edje_pipeline.storage.schema import token_batch_schema
from edje_pipeline.storage.shards import write_rejects
from edje_pipeline.storage.snapshot_files import read_rejects
from edje_pipeline.storage.staging import Receipt, Staging


class StoredRows:
    """Numbers the live rows of a snapshot: shard s holds rows starts[s] .. starts[s + 1]."""

    def __init__(self, index: Index) -> None:
        self.index = index
        live = [entry.live_rows for entry in index.shards]
        self.starts = np.concatenate([[0], np.cumsum(live, dtype=np.int64)])

    @property
    def num_live(self) -> int:
        return int(self.starts[-1])

    @property
    def num_rows(self) -> int:
        """Live rows and rejects."""
        return self.num_live + self.index.manifest.counts.rejected

    def units(self, missing: Sequence[tuple[int, int]]) -> pa.Table:
        """UNIT_SCHEMA of the missing live rows: a unit is a shard."""
        units: list[int] = []
        ranges: list[list[int]] = []
        for start, end in missing:
            position = start
            while position < min(end, self.num_live):
                shard = int(np.searchsorted(self.starts, position, "right")) - 1
                stop = int(min(end, self.starts[shard + 1]))
                if units and units[-1] == shard:
                    ranges[-1] += [position, stop]
                else:
                    units.append(shard)
                    ranges.append([position, stop])
                position = stop
        return pa.table({"unit": units, "ranges": ranges}, UNIT_SCHEMA)

    def tables(self, shard: int, ranges: Sequence[tuple[int, int]]) -> Iterator[pa.Table]:
        """Stored rows with their row number in column `row`, one row group at a time."""
        position = int(self.starts[shard])
        view = next(view for view in self.index.iter_shards() if view.number == shard)
        for _, table in view.tables():
            rows = np.arange(position, position + table.num_rows, dtype=np.int64)
            position += table.num_rows
            wanted = np.zeros(len(rows), bool)
            for start, end in ranges:
                wanted |= (rows >= start) & (rows < end)
            if wanted.any():
                mask = pa.array(wanted)
                yield table.filter(mask).append_column("row", pa.array(rows[wanted]))


class StoredTokensWorker:
    """Units (shards) -> stored rows as token batches of the old codec."""

    def __init__(self, job: Job) -> None:
        assert job.old_index is not None
        self._rows = StoredRows(Index.open(job.old_index, job.old_snapshot))

    def __call__(self, units: pa.Table, /) -> Iterator[pa.Table]:
        """Units as UNIT_SCHEMA."""
        for shard, flat in zip(units.column("unit").to_pylist(), units.column("ranges").to_pylist(), strict=True):
            started = time.perf_counter()
            for table in self._rows.tables(shard, ranges_of(flat)):
                batch = _as_token_batch(table)
                seconds = time.perf_counter() - started
                yield with_metrics(batch, read_s=seconds, bytes_read=batch.nbytes, decode_rss_bytes=peak_rss_bytes())
                started = time.perf_counter()


class TranscodeWorker(StoredTokensWorker):
    """Units (shards) -> token batches of the new codec: numpy only."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._codec = job.codec

    def __call__(self, units: pa.Table, /) -> Iterator[pa.Table]:
        """Units as UNIT_SCHEMA."""
        old = self._rows.index.codec
        for table in super().__call__(units):
            started = time.perf_counter()
            tokens = old.decode(numpy_from_fixed_binary(table.column("tokens"))).astype(np.float16)
            batch = _with_tokens(table, self._codec.encode(tokens))
            yield with_metrics(batch, encode_s=time.perf_counter() - started)


class VisionTokensWorker:
    """Stored vision tokens -> token batches through the adapter; holds the adapter."""

    def __init__(self, job: Job) -> None:
        assert job.old_index is not None
        self._encoder = make_encoder(job, with_backbone=False)
        self._old = Index.open(job.old_index, job.old_snapshot).codec
        self._step = max(job.batch_size, 1) * 4

    def __call__(self, table: pa.Table, /) -> Iterator[pa.Table]:
        """A table of StoredTokensWorker."""
        for start in range(0, table.num_rows, self._step):
            started = time.perf_counter()
            part = table.slice(start, self._step)
            tokens = self._old.decode(numpy_from_fixed_binary(part.column("tokens")))
            encoded = self._encoder.encode_vision_tokens(tokens.astype(np.float16))
            if not encoded.is_finite.all():
                bad = part.column("image_id")[int(np.argmin(encoded.is_finite))].as_py()
                raise ModelError(
                    f"the adapter turns the stored vision tokens of {bad!r} into NaN, infinity or values beyond "
                    "float16; the old snapshot stays as it is. Check the adapter's weights"
                )
            batch = _with_tokens(part, encoded.payload)
            seconds = time.perf_counter() - started
            yield with_metrics(batch, encode_s=seconds, encode_rss_bytes=peak_rss_bytes())


def transcode_stages(job: Job, machine: Machine) -> list[Stage]:
    """transcode -> write."""
    first = Stage("encode", TranscodeWorker, "task", None, machine.num_cpus, num_cpus=0.5)
    return [first, write_stage(job, machine)]


def vision_token_stages(job: Job, machine: Machine) -> list[Stage]:
    """read -> encode (adapter and codec) -> write."""
    encode_cpus = 0.0 if machine.num_gpus else machine.num_cpus / 2 / machine.num_encoders
    return [
        Stage("decode", StoredTokensWorker, "task", None, machine.num_cpus, num_cpus=0.25),
        Stage(
            "encode", VisionTokensWorker, "actor", job.batch_size * 4, machine.num_encoders,
            num_cpus=encode_cpus, num_gpus=1.0 if machine.num_gpus else 0.0,
        ),
        write_stage(job, machine),
    ]  # fmt: skip


def keep_rejects(staging: Staging, rows: StoredRows) -> None:
    """Journals the old snapshot's rejects as this run's own: no image is read, so none can have changed."""
    position = rows.num_live
    index = rows.index
    for table in iter_rejects(index.location, read_rejects(index.location, index.manifest)):
        covered = [(position, position + table.num_rows)]
        position += table.num_rows
        if table.num_rows and not staging.covered.overlaps(covered):
            name = f"rejects/{staging.run_id}-{uuid.uuid4().hex}.parquet"
            staging.journal([Receipt(tuple(covered), None, write_rejects(staging.index, name, table))])


def _as_token_batch(table: pa.Table) -> pa.Table:
    payload = table.schema.field("tokens").type.byte_width
    has_embedding = "embedding" in table.column_names
    schema = token_batch_schema(payload, table.schema.field("embedding").type.byte_width // 2 if has_embedding else 0)
    made = {name: pa.nulls(table.num_rows, pa.string()) for name in schema.names if name.startswith("reject_")}
    made["uri"] = pa.array([""] * table.num_rows, pa.string())
    return pa.table([made[name] if name in made else table.column(name) for name in schema.names], schema=schema)


def _with_tokens(table: pa.Table, payload: np.ndarray) -> pa.Table:
    position = table.schema.get_field_index("tokens")
    return table.set_column(position, pa.field("tokens", pa.binary(payload.shape[1])), fixed_binary_from_numpy(payload))
