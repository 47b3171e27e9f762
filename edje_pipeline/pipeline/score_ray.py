"""Scores units in Ray actors: one a GPU, or a few CPU workers. Only receipts come back to the driver."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from edje_pipeline.pipeline.score_journal import ScoreReceipt
from edje_pipeline.pipeline.score_worker import UnitScorer, WorkerSpec
from edje_pipeline.pipeline.stages import Stage
from edje_pipeline.pipeline.workers import RECEIPT_SCHEMA, UNIT_SCHEMA

RECEIPT_BLOCK_BYTES = 1 << 20


class ScoreActor:
    """Units in, receipts out. Two calls run at once in an actor: one reads while the other computes."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._scorer = UnitScorer(spec)
        self._reading, self._computing = threading.Lock(), threading.Lock()

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        """UNIT_SCHEMA -> RECEIPT_SCHEMA."""
        for unit in units.column("unit").to_pylist():
            with self._reading:
                loaded = self._scorer.read(unit)
            with self._computing:
                self._scorer.launch(loaded)
            logits = self._scorer.compute(loaded)  # a GPU is given the next unit before this one is fetched
            receipt = self._scorer.write(loaded, logits)
            yield pa.table({"receipt": [json.dumps(asdict(receipt))]}, RECEIPT_SCHEMA)


def run_actors(
    spec: WorkerSpec, units: Sequence[int], num_workers: int, ray_address: str | None
) -> Iterator[ScoreReceipt]:
    """Yields a receipt for each unit, in the order in which they are finished.

    Args:
        spec: given to every actor.
        units: to score.
        num_workers: actors.
        ray_address: of a running cluster; None starts one on this machine.

    Raises:
        WorkerError: the cluster cannot be reached, or an actor failed more often than its retries allow.
    """
    from edje_pipeline.pipeline import ray_bridge

    table = pa.table({"unit": list(units), "ranges": [[unit, unit + 1] for unit in units]}, UNIT_SCHEMA)
    on_gpu = spec.device.startswith("cuda")
    with ray_bridge.session(ray_address) as cluster:
        share = max(0.5, cluster.machine.num_cpus / 2 / num_workers)
        make_worker: Any = ScoreActor
        job: Any = spec
        stage = Stage(
            "score",
            make_worker,
            "actor",
            1,
            num_workers,
            num_cpus=0.0 if on_gpu else min(share, spec.num_threads),
            num_gpus=1.0 if on_gpu else 0.0,
        )
        for batch in ray_bridge.run_stages([stage], job, table, block_bytes=RECEIPT_BLOCK_BYTES):
            for text in batch.column("receipt").to_pylist():
                yield ScoreReceipt.from_dict(json.loads(text))
