"""Scores units of a plan: one thread reads row groups ahead while the encoder computes.

The same class runs in the driver's process and inside a Ray actor.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edje_pipeline.pipeline.metrics import peak_rss_bytes
from edje_pipeline.pipeline.score_journal import ScoreReceipt
from edje_pipeline.pipeline.score_plan import read_plan_table, read_texts
from edje_pipeline.pipeline.score_rank import PART_SCHEMA
from edje_pipeline.pipeline.threads import dump_stacks_if_asked
from edje_pipeline.storage.faults import crash_point
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.parquet_io import write_parquet
from edje_pipeline.storage.payloads import read_payloads

if TYPE_CHECKING:
    from edje_pipeline.stages.score_pairs import PairScorer, PendingScores
    from edje_pipeline.storage.index import Index

READ_AHEAD = 2
PEAK_BYTES = "peak_bytes"
"""Of a receipt's stats: the worker's peak memory so far. Of several the largest counts, not the sum."""


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to know; crosses process borders."""

    index: str
    snapshot: str
    model: str | None
    precision: str
    device: str
    run_dir: str = ""
    """Of the pass; it and the threads are set by the pass."""
    num_threads: int = 1
    batch_tokens: int | None = None
    compiled: bool = False
    kernels: str = "torch"


@dataclass
class LoadedUnit:
    """A unit's pairs and payloads in memory. K images, n pairs."""

    unit: int
    payloads: np.ndarray
    """uint8 (K, P)"""
    image_ids: pa.Array
    """string (K,)"""
    image_index: np.ndarray
    """int64 (n,)"""
    queries: np.ndarray
    """int32 (n,)"""
    first_stage_scores: pa.ChunkedArray
    stats: dict[str, float]
    pending: PendingScores | None = None
    """Set when the device was given the unit ahead of its turn."""


class UnitScorer:
    """Reads, scores and writes units; see the module docstring."""

    def __init__(self, spec: WorkerSpec, *, index: Index | None = None, scorer: PairScorer | None = None) -> None:
        import torch

        from edje_pipeline.reranker import open_scorer
        from edje_pipeline.storage.index import Index

        dump_stacks_if_asked()
        torch.set_num_threads(spec.num_threads)
        self._index = index if index is not None else Index.open(spec.index, snapshot=spec.snapshot)
        self._scorer = (
            scorer
            if scorer is not None
            else open_scorer(
                self._index,
                spec.model,
                precision=spec.precision,
                device=spec.device,
                batch_tokens=spec.batch_tokens,
                compiled=spec.compiled,
                kernels=spec.kernels,
            ).scorer
        )
        self._run_dir = Location(spec.run_dir)
        plan_dir = self._run_dir.child("plan")
        self._units = read_plan_table(plan_dir.child("units.parquet"))
        self._texts_of_query, self._texts = read_texts(plan_dir)
        self._files: dict[int, pq.ParquetFile] = {}

    def run(self, units: Iterable[int]) -> Iterator[ScoreReceipt]:
        """Scores units and yields a receipt for each, in order. Parts are durable when they are yielded."""
        waiting: list[Future[LoadedUnit]] = []
        ahead: LoadedUnit | None = None
        todo = iter(units)
        with ThreadPoolExecutor(1, "edje-read") as reader:
            try:
                while True:
                    while len(waiting) < READ_AHEAD and (unit := next(todo, None)) is not None:
                        waiting.append(reader.submit(self.read, unit))
                    if not waiting:
                        break
                    started = time.perf_counter()
                    loaded: LoadedUnit | None = waiting.pop(0).result()
                    assert loaded is not None
                    loaded.stats["wait_s"] = time.perf_counter() - started
                    if len(waiting) < READ_AHEAD and (unit := next(todo, None)) is not None:
                        waiting.append(reader.submit(self.read, unit))
                    if self._scorer.device.type == "cuda":
                        # The GPU gets the next unit before this thread waits for the last one and stores it.
                        self.launch(loaded)
                        loaded, ahead = ahead, loaded
                    if loaded is not None:
                        yield self.write(loaded, self.compute(loaded))
                if ahead is not None:
                    yield self.write(ahead, self.compute(ahead))
            finally:
                for future in waiting:
                    future.cancel()

    def read(self, unit: int) -> LoadedUnit:
        """The unit's pairs and the payloads of its images, each row group once."""
        started = time.perf_counter()
        pairs = self._pairs(unit)
        shards, rows = pairs.column("shard").to_numpy(), pairs.column("row").to_numpy()
        fresh = np.ones(len(rows), bool)
        fresh[1:] = (shards[1:] != shards[:-1]) | (rows[1:] != rows[:-1])
        payloads, ids, num_read = read_payloads(self._index, shards[fresh], rows[fresh])
        stats = {
            "num_images": float(len(ids)),
            "num_rows_read": float(num_read),
            "bytes_read": float(num_read * payloads.shape[1]),
            "read_s": time.perf_counter() - started,
        }
        queries = pairs.column("query").to_numpy()
        return LoadedUnit(unit, payloads, ids, np.cumsum(fresh) - 1, queries, pairs.column("first_stage_score"), stats)

    def launch(self, loaded: LoadedUnit) -> PendingScores:
        """Gives a unit to the device."""
        started = time.perf_counter()
        texts = self._texts_of_query[loaded.queries]
        loaded.pending = self._scorer.launch(loaded.payloads, loaded.image_index, self._texts, texts)
        loaded.stats["score_s"] = time.perf_counter() - started
        return loaded.pending

    def compute(self, loaded: LoadedUnit) -> np.ndarray:
        """Logits float32 (n,).

        Raises:
            CorruptionError: the tokens of an image are not finite.
            ModelError: the encoder turns finite tokens into a score that is not.
        """
        pending = loaded.pending or self.launch(loaded)
        started = time.perf_counter()
        logits = pending.result()
        loaded.stats["score_s"] += time.perf_counter() - started
        crash_point("score.computed")
        if not np.isfinite(logits).all():
            self._explain(loaded, logits)
        return logits

    def write(self, loaded: LoadedUnit, logits: np.ndarray) -> ScoreReceipt:
        """Stores the scored pairs under a name no other attempt uses."""
        started = time.perf_counter()
        table = pa.table(
            [loaded.queries, loaded.image_ids.take(pa.array(loaded.image_index)), logits, loaded.first_stage_scores],
            PART_SCHEMA,
        )
        name = f"parts/{loaded.unit:08d}-{uuid.uuid4().hex[:8]}.parquet"
        written = write_parquet(
            self._run_dir.child(name),
            [table],
            PART_SCHEMA,
            row_group_rows=len(logits),
            dictionary_columns=("image_id",),
        )
        loaded.stats["write_s"] = time.perf_counter() - started
        loaded.stats[PEAK_BYTES] = float(peak_rss_bytes())
        return ScoreReceipt(loaded.unit, name, len(logits), written.size_bytes, written.sha256, loaded.stats)

    def _pairs(self, unit: int) -> pa.Table:
        number = self._units.column("file")[unit].as_py()
        if number not in self._files:
            location = self._run_dir.child(f"plan/pairs-{number:05d}.parquet")
            self._files = {number: pq.ParquetFile(location.open_input())}
        return self._files[number].read_row_group(self._units.column("row_group")[unit].as_py())

    def _explain(self, loaded: LoadedUnit, logits: np.ndarray) -> None:
        from edje_pipeline.reranker import raise_not_finite

        pair = int(np.flatnonzero(~np.isfinite(logits))[0])
        image = int(loaded.image_index[pair])
        query_ids = read_plan_table(self._run_dir.child("plan/queries.parquet")).column("query_id")
        query_id, image_id = query_ids[int(loaded.queries[pair])].as_py(), loaded.image_ids[image].as_py()
        raise_not_finite(self._scorer, loaded.payloads[image], f"query {query_id!r}", image_id, float(logits[pair]))
