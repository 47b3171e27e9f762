"""The stages of a run as workers: a table in, tables out. No ray here; an executor calls them.

units (unit, ranges) -> ReadDecode -> image batches -> Encode -> token batches -> Write -> receipts
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from edje_pipeline.pipeline.job import Job
from edje_pipeline.pipeline.metrics import collect_metrics, peak_rss_bytes, with_metrics
from edje_pipeline.pipeline.threads import dump_stacks_if_asked, let_threads_sleep
from edje_pipeline.storage.faults import crash_point
from edje_pipeline.storage.plan import read_unit
from edje_pipeline.storage.schema import REJECT_SCHEMA, shard_schema
from edje_pipeline.storage.shards import write_rejects, write_shard
from edje_pipeline.storage.sources import read_images
from edje_pipeline.storage.staging import Receipt

UNIT_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.int64(), nullable=False),
        pa.field("ranges", pa.list_(pa.int64()), nullable=False),  # start, end, start, end ... of plan rows
    ]
)
RECEIPT_SCHEMA = pa.schema([pa.field("receipt", pa.string(), nullable=False)])
READ_CHUNK_ROWS = 64


class Worker(Protocol):
    """One stage inside one process."""

    def __call__(self, table: pa.Table, /) -> Iterator[pa.Table]:
        """Tables out for a table in."""


def ranges_of(flat: Sequence[int]) -> list[tuple[int, int]]:
    """`[s, e, s, e]` -> pairs."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def row_ranges(rows: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Half-open ranges that hold exactly the given row numbers.

    Raises:
        ValueError: a row stands twice.
    """
    rows = np.sort(rows)
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    if len(rows) > 1 and (np.diff(rows) == 0).any():
        raise ValueError("a plan row came to the writer twice")
    starts = np.concatenate([rows[:1], rows[breaks]])
    ends = np.concatenate([rows[breaks - 1], rows[-1:]]) + 1
    return tuple((int(start), int(end)) for start, end in zip(starts, ends, strict=True))


class ReadDecodeWorker:
    """Units -> image batches, one a unit. Reading the next rows overlaps with decoding these."""

    def __init__(self, job: Job) -> None:
        assert job.preprocess is not None
        self._job = job

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        """Units as UNIT_SCHEMA."""
        from edje_pipeline.pipeline.attempts import Attempt

        for unit, flat in zip(units.column("unit").to_pylist(), units.column("ranges").to_pylist(), strict=True):
            rows = read_unit(self._job.plan_dir, unit, ranges_of(flat), generation=self._job.plan_generation)
            with Attempt(self._job.plan_dir, f"{unit}-{flat[0]}") as attempt:
                crash_point("stage.decode")
                table = attempt.decode_apart(rows, self._job) if attempt.crashed_before else self.decode(rows)
            yield table

    def decode(self, rows: pa.Table) -> pa.Table:
        """Plan rows -> image batch with metrics."""
        from edje_pipeline.stages.decode import decode_batch

        job = self._job
        assert job.preprocess is not None
        chunks = [rows.slice(start, READ_CHUNK_ROWS) for start in range(0, rows.num_rows, READ_CHUNK_ROWS)]
        tables, read_s, decode_s, bytes_read = [], 0.0, 0.0, 0
        with ThreadPoolExecutor(1, thread_name_prefix="edje-read") as reader:
            waiting = reader.submit(self._read, chunks[0])
            for number, chunk in enumerate(chunks):
                blobs, seconds = waiting.result()
                if number + 1 < len(chunks):
                    waiting = reader.submit(self._read, chunks[number + 1])
                read_s += seconds
                bytes_read += sum(len(blob) for blob in blobs if isinstance(blob, bytes))
                started = time.perf_counter()
                tables.append(
                    decode_batch(
                        chunk,
                        blobs,
                        job.preprocess,
                        max_pixels=job.max_pixels,
                        max_bytes=job.max_bytes,
                        reduced_jpeg=job.reduced_jpeg,
                    )
                )
                decode_s += time.perf_counter() - started
        table = pa.concat_tables(tables).combine_chunks()
        return with_metrics(
            table,
            read_s=read_s,
            decode_s=decode_s,
            bytes_read=bytes_read,
            decode_rss_bytes=peak_rss_bytes(),
        )

    def _read(self, rows: pa.Table) -> tuple[list[Any], float]:
        started = time.perf_counter()
        blobs = read_images(self._job.source, rows, max_bytes=self._job.max_bytes)
        return blobs, time.perf_counter() - started


class EncodeWorker:
    """Image batches -> token batches; holds the models."""

    def __init__(self, job: Job) -> None:
        self._encoder, self._image_size = make_encoder(job), _image_size(job)
        if job.compile_model:
            # Here, not under the first images: what cannot be compiled fails at the start, and the summary counts
            # compiling as start-up. Two micro-batches, because the second is the first to be handed on.
            self._encoder.encode(np.zeros((2 * job.batch_size, *self._image_size, 3), np.uint8))
        self._ended = time.perf_counter()
        self._num_inside, self._counting = 0, threading.Lock()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """One table in, one out: same rows, same order.

        Ray calls from two threads, so that the next table is there when this one is done; `Encoder` lets one
        of them at a time feed the model. Seconds of two tables that overlap are counted once.
        """
        from edje_pipeline.stages.encode import encode_table

        with self._counting:
            started, began_at = time.perf_counter(), time.time()
            wait_s = 0.0 if self._num_inside else started - self._ended
            self._num_inside += 1
        try:
            tokens = encode_table(table, self._encoder, self._image_size)
            crash_point("stage.encode")
        finally:
            with self._counting:
                self._num_inside -= 1
                ended = time.perf_counter()
                encode_s = ended - max(started, self._ended)
                self._ended = ended
        yield with_metrics(
            tokens,
            encode_s=encode_s,
            encode_wait_s=wait_s,
            encode_began_at=began_at,
            # Through the object store with ray: the pixels that came in and the tokens that go out.
            handed_on_bytes=table.nbytes + tokens.nbytes,
            encode_rss_bytes=peak_rss_bytes(),
        )


def _image_size(job: Job) -> tuple[int, int]:
    return job.preprocess.image_size if job.preprocess is not None else (0, 0)


def make_encoder(job: Job, *, with_backbone: bool = True) -> Any:
    """The `Encoder` of a job, with the thread count and the models it names."""
    let_threads_sleep()
    dump_stacks_if_asked()
    import torch

    from edje_pipeline.models.checkpoint import open_model
    from edje_pipeline.stages.encode import Encoder

    # Torch would take OMP_NUM_THREADS, which ray sets to the worker's num_cpus, a scheduling number.
    torch.set_num_threads(job.num_threads)
    model = open_model(job.model)
    return Encoder(
        backbone=model.load_backbone() if with_backbone else None,
        adapter=model.load_adapter() if job.use_adapter else None,
        codec=job.codec,
        embedding_dim=job.embedding_dim if with_backbone else 0,
        device=job.device,
        precision=job.precision,
        micro_batch_size=job.batch_size,
        compile_model=job.compile_model,
    )


class WriteWorker:
    """Token batches -> a shard, a reject file, and a receipt that names both."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Any mix of rows; one receipt out."""
        started = time.perf_counter()
        job = self._job
        table = table.sort_by("row")
        accepted_mask = table.column("reject_reason").is_null()
        accepted = table.filter(accepted_mask)
        rejected = table.filter(pa.compute.invert(accepted_mask))
        crash_point("stage.write")
        unique = f"{job.run_id}-{uuid.uuid4().hex}"
        shard = None
        if accepted.num_rows:
            schema = shard_schema(job.codec.payload_bytes, job.embedding_dim)
            rows = accepted.select(schema.names).combine_chunks().cast(schema)
            shard = write_shard(job.index, f"shards/{unique}.parquet", rows, row_group_rows=job.row_group_rows)
        rejects = None
        if rejected.num_rows:
            rejects = write_rejects(job.index, f"rejects/{unique}.parquet", self._reject_rows(rejected))
        stats = {
            **collect_metrics(table),
            "write_s": time.perf_counter() - started,
            "write_rss_bytes": float(peak_rss_bytes()),
        }
        receipt = Receipt(row_ranges(table.column("row").to_numpy()), shard, rejects, stats)
        yield pa.table({"receipt": [json.dumps(receipt.to_dict())]}, RECEIPT_SCHEMA)

    def _reject_rows(self, rejected: pa.Table) -> pa.Table:
        """Rejects with the place of their bytes, which does not travel with the pixels."""
        rows = rejected.column("row").to_numpy()
        found = {}
        for unit in np.unique(rows // self._job.unit_rows).tolist():
            plan = read_unit(self._job.plan_dir, unit, row_ranges(rows), generation=self._job.plan_generation)
            found.update({row["row"]: row for row in plan.to_pylist()})
        records = [
            {
                "image_id": row["image_id"],
                "uri": row["uri"],
                "stage": row["reject_stage"],
                "reason": row["reject_reason"],
                "message": row["reject_message"],
                **{key: found[row["row"]][key] for key in ("container", "offset", "length")},
            }
            for row in rejected.select(
                ["row", "image_id", "uri", "reject_stage", "reject_reason", "reject_message"]
            ).to_pylist()
        ]
        return pa.Table.from_pylist(records, REJECT_SCHEMA)
