"""Drives a run: missing rows -> units -> stages -> receipts -> journal, until nothing is missing.

What runs the stages (ray or this process) is the executor's matter; what counts as done is the
journal's. The state here grows with units and shards, not with images.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal

import pyarrow as pa

from edje_pipeline.errors import DeviceError, RejectLimitError, WorkerError
from edje_pipeline.pipeline.job import Job
from edje_pipeline.pipeline.metrics import RunMetrics
from edje_pipeline.pipeline.stages import Machine, Stage, available_cpus, worker_counts
from edje_pipeline.pipeline.threads import let_threads_sleep
from edje_pipeline.pipeline.workers import UNIT_SCHEMA
from edje_pipeline.progress import progress
from edje_pipeline.storage.staging import Receipt, Staging

ExecutorName = Literal["ray", "local"]
MAX_PASSES = 5
UNITS_PER_PASS = 1 << 16


@dataclass(frozen=True)
class ExecutorOptions:
    """Where and how a run's stages are executed."""

    executor: ExecutorName = "ray"
    """`ray`, or `local`: this process and its threads, without the seconds that ray needs to start."""
    num_cpus: int | None = None
    """Cores to use; None: all this process may."""
    num_gpus: int | None = None
    """GPUs to use; None: all there are."""
    ray_address: str | None = None
    """Address of a running cluster; None starts one on this machine for the length of the run."""
    object_store_bytes: int | None = None
    """Shared memory for a cluster started here; None leaves it to ray."""


@dataclass
class Execution:
    """A running executor: what it found, and how to stream units through stages."""

    machine: Machine
    run: Callable[[Sequence[Stage], Job, pa.Table], Generator[pa.Table, None, None]]


@dataclass
class RunOutcome:
    """What one command's run did; rows of earlier, resumed commands are not in it."""

    num_rows_done: int = 0
    num_accepted: int = 0
    num_rejected: int = 0
    num_dropped_receipts: int = 0
    metrics: RunMetrics = field(default_factory=RunMetrics)


@contextlib.contextmanager
def executing(options: ExecutorOptions, *, block_bytes: int) -> Iterator[Execution]:
    """Starts the executor; ends it afterwards.

    Raises:
        DeviceError: fewer GPUs than asked for.
        WorkerError: ray cannot be started or reached.
    """
    if options.executor == "local":
        from edje_pipeline.pipeline.local_executor import run_local

        yield Execution(Machine(options.num_cpus or available_cpus(), _local_gpus(options.num_gpus)), run_local)
        return
    from edje_pipeline.pipeline import ray_bridge

    with ray_bridge.session(
        options.ray_address, options.num_cpus, options.num_gpus, options.object_store_bytes
    ) as cluster:

        def run(stages: Sequence[Stage], job: Job, units: pa.Table) -> Generator[pa.Table, None, None]:
            return ray_bridge.run_stages(stages, job, units, block_bytes=block_bytes)

        yield Execution(cluster.machine, run)


def check_devices(options: ExecutorOptions) -> None:
    """Before anything is written: are the GPUs there that were asked for on this machine?

    Raises:
        DeviceError: they are not.
    """
    if not options.num_gpus or options.ray_address:
        return
    import torch

    found = torch.cuda.device_count()
    if options.num_gpus > found:
        raise DeviceError(
            f"--num-gpus {options.num_gpus} was asked for, this machine has {found} CUDA devices that torch can use; "
            f"run with --num-gpus {found}" + ("" if found else " to use the CPU")
        )


def _local_gpus(num_gpus: int | None) -> int:
    let_threads_sleep()
    if num_gpus == 0:
        return 0
    import torch

    return min(torch.cuda.device_count(), 1)  # one process, one device


def run_units(
    staging: Staging,
    job: Job,
    stages: Sequence[Stage],
    execution: Execution,
    *,
    num_rows: int,
    label: str,
    quiet: bool = False,
    max_reject_fraction: float | None = None,
    make_units: Callable[[Sequence[tuple[int, int]]], pa.Table] | None = None,
) -> RunOutcome:
    """Computes every plan row that the journal does not have.

    Args:
        staging: the run.
        job: its constants.
        stages: from units to receipts.
        execution: from `executing`.
        num_rows: rows of the plan.
        label: shown by the progress display.
        quiet: show nothing.
        max_reject_fraction: see `check_reject_limit`.
        make_units: missing row ranges -> UNIT_SCHEMA; None: units of `job.unit_rows` rows.

    Raises:
        RejectLimitError: too many rejects; what was done stays journalled.
        WorkerError: rows stay missing after several passes.
    """
    outcome = RunOutcome(metrics=RunMetrics(num_workers=worker_counts(stages), began_at=time.time()))
    rejected = sum(receipt.num_rejected for receipt in staging.receipts)
    started = time.monotonic()
    passes_without_progress = 0
    to_units = make_units or (lambda missing: units_of(missing, job.unit_rows))
    with progress(label, num_rows, quiet=quiet, skipped=staging.covered.num_rows) as report:
        while missing := staging.covered.missing(num_rows):
            before = staging.covered.num_rows
            with contextlib.closing(execution.run(stages, job, to_units(missing))) as tables:
                for table in tables:
                    for receipt in _take(staging, table):
                        outcome.metrics.add(receipt.stats)
                        outcome.num_rows_done += receipt.num_rows
                        outcome.num_accepted += receipt.num_accepted
                        outcome.num_rejected += receipt.num_rejected
                        rejected += receipt.num_rejected
                        report.update(receipt.num_rows, rejected=rejected)
                    check_reject_limit(rejected, staging.covered.num_rows, num_rows, max_reject_fraction)
            passes_without_progress = passes_without_progress + 1 if staging.covered.num_rows == before else 0
            if passes_without_progress == MAX_PASSES:
                raise WorkerError(
                    f"{num_rows - before:,} rows did not come back from the workers in {MAX_PASSES} passes; "
                    "run the same command again, and report it if that stays so"
                )
    outcome.metrics.wall_s = time.monotonic() - started
    return outcome


def _take(staging: Staging, table: pa.Table) -> list[Receipt]:
    receipts = [Receipt.from_dict(json.loads(text)) for text in table.column("receipt").to_pylist()]
    return staging.journal(receipts)


def units_of(missing: Sequence[tuple[int, int]], unit_rows: int) -> pa.Table:
    """Missing row ranges cut at unit borders: UNIT_SCHEMA, at most UNITS_PER_PASS units in order."""
    units: list[int] = []
    ranges: list[list[int]] = []
    for start, end in missing:
        position = start
        while position < end:
            unit = position // unit_rows
            stop = min(end, (unit + 1) * unit_rows)
            if units and units[-1] == unit:
                ranges[-1] += [position, stop]
            elif len(units) == UNITS_PER_PASS:
                return pa.table({"unit": units, "ranges": ranges}, UNIT_SCHEMA)
            else:
                units.append(unit)
                ranges.append([position, stop])
            position = stop
    return pa.table({"unit": units, "ranges": ranges}, UNIT_SCHEMA)


def check_reject_limit(num_rejected: int, num_done: int, num_rows: int, limit: float | None) -> None:
    """Stops a run that cannot end below the limit any more, or that looks hopeless early.

    Raises:
        RejectLimitError: more than `limit` x `num_rows` images are rejected.
    """
    if limit is None or num_rejected <= limit * num_rows:
        return
    raise RejectLimitError(
        f"{num_rejected:,} of {num_done:,} images done so far were rejected, more than the "
        f"{limit:.2%} of {num_rows:,} that --max-reject-fraction allows; nothing was published. "
        "`edje-pipeline inspect INDEX` lists the reasons; raise the limit to go on where it stopped"
    )


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the run like Ctrl-C: lock released, journal kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
