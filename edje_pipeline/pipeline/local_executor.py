"""Runs the stages in this process: threads decode, this thread encodes and writes. No ray, no start-up.

For small corpora, for tests and for `--executor local`: the workers, the receipts and the commit are
the same as with ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from edje_pipeline.pipeline.job import Job
from edje_pipeline.pipeline.stages import Stage


def run_local(stages: Sequence[Stage], job: Job, units: pa.Table) -> Generator[pa.Table, None, None]:
    """Streams the units through the stages.

    Args:
        stages: the first takes UNIT_SCHEMA tables.
        job: given to every worker.
        units: UNIT_SCHEMA, one row a unit.

    Yields:
        Tables of the last stage: receipts.
    """
    stream = _first(stages[0], job, units)
    for stage in stages[1:]:
        stream = _next(stage, job, stream)
    yield from stream


def _first(stage: Stage, job: Job, units: pa.Table) -> Iterator[pa.Table]:
    worker = stage.make_worker(job)

    def work(unit: int) -> list[pa.Table]:
        return list(worker(units.slice(unit, 1)))

    with ThreadPoolExecutor(stage.num_workers, thread_name_prefix=f"edje-{stage.name}") as pool:
        waiting: deque[Future[list[pa.Table]]] = deque()
        try:
            for unit in range(units.num_rows):
                waiting.append(pool.submit(work, unit))
                if len(waiting) > stage.num_workers:  # one unit in reserve: memory does not grow with the corpus
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _next(stage: Stage, job: Job, stream: Iterable[pa.Table]) -> Iterator[pa.Table]:
    worker = stage.make_worker(job)
    for table in _gathered(stream, stage.batch_rows):
        yield from worker(table)


def _gathered(stream: Iterable[pa.Table], batch_rows: int | None) -> Iterator[pa.Table]:
    """Tables joined until they have at least `batch_rows` rows."""
    waiting: list[pa.Table] = []
    num_waiting = 0
    for table in stream:
        waiting.append(table)
        num_waiting += table.num_rows
        if batch_rows is None or num_waiting >= batch_rows:
            yield pa.concat_tables(waiting)
            waiting, num_waiting = [], 0
    if num_waiting:
        yield pa.concat_tables(waiting)
