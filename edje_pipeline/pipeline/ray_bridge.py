"""Everything this package says to ray when it extracts, scores or rebuilds. Nowhere else is it imported.

`session` starts or joins a cluster quietly; `run_stages` turns a list of stages into one streaming
Ray Data plan whose rows meet the driver as receipts only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import shutil
import sys
import tempfile
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from edje_pipeline.errors import DeviceError, EdjeError, WorkerError
from edje_pipeline.pipeline.job import Job
from edje_pipeline.pipeline.stages import Machine, Stage, available_cpus
from edje_pipeline.pipeline.workers import UNIT_SCHEMA, Worker
from edje_pipeline.progress import format_bytes

logger = logging.getLogger(__name__)

MAX_BLOCKS = 8192
"""Blocks of the outer dataset: each is one task and a few hundred bytes on the driver."""
SHARED_MEMORY = "/dev/shm"  # noqa: S108  # where ray keeps objects, on Linux
SMALL_STORE_BYTES = 512 << 20
"""Shared memory below which decoding and encoding hold each other up."""
TASK_RETRIES = 4
ACTOR_RESTARTS = 20
NO_PROGRESS_S = 6 * 3600.0
PASSED_ON = ("EDJE_", "HF_", "AWS_", "GOOGLE_", "OMP_", "TORCH_", "XDG_CACHE_HOME", "TMPDIR")
"""Prefixes of environment variables that workers on other machines need as well."""

# Before ray reads them: no usage report, no metrics agents, results of GPUs hidden only when asked.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_enable_metrics_collection", "0")
os.environ.setdefault("RAY_TQDM", "0")


@dataclass(frozen=True)
class Cluster:
    """What the session reached."""

    machine: Machine
    is_remote: bool
    """Joined with an address, rather than started here."""
    object_store_bytes: int


@contextlib.contextmanager
def session(
    address: str | None = None,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    object_store_bytes: int | None = None,
) -> Iterator[Cluster]:
    """Starts a small cluster on this machine, or joins the one at `address`; ends or leaves it afterwards.

    A cluster that this process is connected to already is used and left running.

    Args:
        address: of a running cluster (`auto`, `ray://host:10001`, `host:6379`).
        num_cpus: cores to use; all when None.
        num_gpus: GPUs to use; all there are when None.
        object_store_bytes: shared memory of a cluster started here.

    Raises:
        DeviceError: fewer GPUs than asked for.
        WorkerError: the cluster cannot be started or reached.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        import ray.data

    if ray.is_initialized():
        _quieten(ray)
        yield _describe(ray, address, num_cpus, num_gpus)
        return
    with ray_chatter_to_file():
        try:
            _start(ray, address, num_cpus, num_gpus, object_store_bytes)
            _quieten(ray)
            yield _describe(ray, address, num_cpus, num_gpus)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def ray_chatter_to_file() -> Iterator[None]:
    """Sends ray's own messages to a file: what its C++ part writes to descriptor 2, what its threads print.

    Python's stderr stays where it was, for progress and errors.
    """
    path = Path(tempfile.gettempdir()) / f"edje-ray-{os.getpid()}.log"
    python_stderr, sys_stderr = os.dup(2), sys.stderr
    sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    os.dup2(sink, 2)
    os.close(sink)
    if sys_stderr is sys.__stderr__:
        sys.stderr = os.fdopen(os.dup(python_stderr), "w", buffering=1)
    try:
        # Ray prints its raylet's messages to stdout, where a command's JSON belongs.
        with open(path, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            yield
    finally:
        if sys.stderr is not sys_stderr:
            sys.stderr.close()
            sys.stderr = sys_stderr
        os.dup2(python_stderr, 2)
        os.close(python_stderr)
        path.unlink(missing_ok=True)


def _start(
    ray: Any, address: str | None, num_cpus: int | None, num_gpus: int | None, object_store_bytes: int | None
) -> None:
    passed_on = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    options: dict[str, Any] = {
        "log_to_driver": False,
        "configure_logging": True,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": passed_on} if address else {},
        "include_dashboard": False,
    }
    if address:
        options |= {"address": address}
        del options["include_dashboard"]
    else:
        # Ray runs its workers at niceness 15 by default. The work of a command is in them: on a busy machine it would
        # get what all others leave. A cluster that runs already has made its choice.
        os.environ.setdefault("RAY_worker_niceness", "0")
        options |= {"num_cpus": num_cpus or available_cpus(), "_temp_dir": os.environ.get("EDJE_RAY_TEMP_DIR")}
        if num_gpus is not None:
            options["num_gpus"] = num_gpus
        if object_store_bytes:
            options["object_store_memory"] = object_store_bytes
        warn_of_small_shared_memory(object_store_bytes or SMALL_STORE_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"reach the ray cluster at {address}" if address else "start ray on this machine"
        hint = (
            "check --ray-address, and RAY_AUTH_MODE=token if the cluster asks for a token"
            if address
            else "small corpora do without it: --executor local"
        )
        raise WorkerError(f"cannot {where}: {error}; {hint}") from error


def warn_of_small_shared_memory(wanted_bytes: int) -> None:
    """Says so where ray, whose own warning goes to its log, would keep its objects on the disk."""
    with contextlib.suppress(OSError):  # no such folder: not Linux
        free_bytes = shutil.disk_usage(SHARED_MEMORY).free
        if free_bytes < wanted_bytes:
            logger.warning(
                "%s has %s free, ray wants %s: it will keep pixels on the disk, or hold few of them; "
                "enlarge it (docker run --shm-size=4g), or use --executor local",
                SHARED_MEMORY,
                format_bytes(free_bytes),
                format_bytes(wanted_bytes),
            )


def _quieten(ray: Any) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    context.enable_stats_summary_collection = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    context.actor_init_retry_on_errors = True
    context.actor_init_max_retries = 2
    context.max_consecutive_actor_init_deaths = 3
    context.max_errored_blocks = 0
    context.raise_original_map_exception = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray").setLevel(logging.ERROR)


def _describe(ray: Any, address: str | None, num_cpus: int | None, num_gpus: int | None) -> Cluster:
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if num_gpus is not None and num_gpus > gpus:
        raise DeviceError(
            f"{num_gpus} GPUs were asked for, ray finds {gpus}; run with --num-gpus {gpus}"
            + ("" if gpus else " to use the CPU")
        )
    cpus = int(resources.get("CPU", 1))
    machine = Machine(min(num_cpus, cpus) if num_cpus else max(cpus, 1), gpus if num_gpus is None else num_gpus)
    return Cluster(machine, bool(address), int(resources.get("object_store_memory", 0)))


class _Actor:
    """Holds a stage's worker in an actor."""

    def __init__(self, stage: Stage, job: Job) -> None:
        self._worker = stage.make_worker(job)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        yield from self._worker(table)


class _Task:
    """Calls a stage's worker in a task; a process keeps the worker of the job it last saw."""

    _kept: tuple[str, Worker] | None = None

    def __init__(self, stage: Stage, job: Job) -> None:
        self._stage, self._job = stage, job
        self._key = hashlib.sha256(pickle.dumps((stage, job))).hexdigest()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        kept = _Task._kept
        if kept is None or kept[0] != self._key:
            kept = _Task._kept = (self._key, self._stage.make_worker(self._job))
        yield from kept[1](table)


def run_stages(
    stages: Sequence[Stage], job: Job, units: pa.Table, *, block_bytes: int, backpressure_ratio: float = 10.0
) -> Generator[pa.Table, None, None]:
    """Streams the units through the stages on the cluster of the current `session`.

    Args:
        stages: the first takes UNIT_SCHEMA tables.
        job: given to every worker.
        units: UNIT_SCHEMA, one row a unit.
        block_bytes: size of one unit's output; blocks are closed there.
        backpressure_ratio: how much larger than its own output a stage's queue may grow, see ray's
            `downstream_capacity_backpressure_ratio`.

    Yields:
        Tables of the last stage: receipts.

    Raises:
        EdjeError: one that a worker raised, as it was.
        WorkerError: tasks or actors died more often than they may be tried again.
    """
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    # A unit's table is a little larger than its pixels; ray cuts a block only beyond 1.5 times this.
    context.target_max_block_size = max(int(block_bytes * 0.95), 1 << 20)
    if hasattr(context, "downstream_capacity_backpressure_ratio"):
        context.downstream_capacity_backpressure_ratio = backpressure_ratio
    assert units.schema.equals(UNIT_SCHEMA)
    per_block = -(-units.num_rows // MAX_BLOCKS)
    blocks = [units.slice(start, per_block).combine_chunks() for start in range(0, units.num_rows, per_block)]
    dataset = ray.data.from_arrow(blocks)
    for number, stage in enumerate(stages):
        dataset = _add(ray, dataset, stage, job, batch_rows=1 if number == 0 else stage.batch_rows)
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except ray.exceptions.RayError as error:
        raise _own_error(error) from error


def _add(ray: Any, dataset: Any, stage: Stage, job: Job, *, batch_rows: int | None) -> Any:
    options: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": batch_rows, "zero_copy_batch": True}
    if stage.kind == "task":
        compute = ray.data.TaskPoolStrategy(size=stage.num_workers)
        return dataset.map_batches(
            _Task(stage, job).__call__, compute=compute, num_cpus=stage.num_cpus, max_retries=TASK_RETRIES, **options
        )
    compute = ray.data.ActorPoolStrategy(
        size=stage.num_workers,
        max_tasks_in_flight_per_actor=4,
        # The next batch is put together while this one computes; the model itself runs one at a time.
        max_concurrent_calls_per_actor=2,
    )
    # Ray would add a CPU to a GPU's actor: with as many GPUs as CPUs nothing would be left to decode.
    resources = {"num_gpus": stage.num_gpus, "num_cpus": 0} if stage.num_gpus else {"num_cpus": stage.num_cpus}
    return dataset.map_batches(
        _Actor,
        fn_constructor_args=(stage, job),
        compute=compute,
        max_restarts=ACTOR_RESTARTS,
        max_task_retries=TASK_RETRIES,
        **resources,
        **options,
    )


def _own_error(error: BaseException) -> EdjeError:
    """The error of this package that a worker raised, or a WorkerError that says what died."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, EdjeError):
            return _plain(cause)
        inner = getattr(cause, "cause", None)
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return WorkerError(
        f"a worker failed and its retries did too ({type(error).__name__}: {last[:300]}); finished work is kept, "
        "run the same command again. Worker logs are in /tmp/ray/session_latest/logs"
    )


def _plain(error: EdjeError) -> EdjeError:
    """Ray raises a subclass made on the spot; the class of our tree is what callers catch."""
    for kind in type(error).__mro__:
        if kind.__module__ == EdjeError.__module__:
            return kind(error.message if hasattr(error, "message") else str(error))
    return WorkerError(str(error))
