"""From a source of images to a published snapshot: what extract, retry-rejects and rebuild share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from edje_pipeline.errors import IndexStateError
from edje_pipeline.pipeline.codec_training import staged_codec
from edje_pipeline.pipeline.job import Job, choose_shard_rows, choose_unit_rows
from edje_pipeline.pipeline.model_choice import Choice
from edje_pipeline.pipeline.runner import (
    ExecutorOptions,
    RunOutcome,
    check_devices,
    executing,
    interruptible,
    run_units,
)
from edje_pipeline.pipeline.stages import Machine, extract_stages
from edje_pipeline.progress import progress
from edje_pipeline.storage.codecs import Codec, Float16Codec, save_codec
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import Manifest, find_manifest
from edje_pipeline.storage.plan import KnownFilter, PlanInfo, write_plan
from edje_pipeline.storage.publish import publish
from edje_pipeline.storage.reject_merge import read_reject_ids
from edje_pipeline.storage.snapshot_files import read_rejects
from edje_pipeline.storage.sources import Source
from edje_pipeline.storage.staging import Staging

SMALL_CORPUS_ROWS = 4096
DEFAULT_BATCH = {"cpu": 16, "cuda": 64}


@dataclass(frozen=True)
class ComputeOptions:
    """How images are turned into tokens; none of this changes what is stored beyond rounding."""

    batch_size: int | None = None
    """Images a forward pass; None: 16 on a CPU, 64 on a GPU."""
    shard_rows: int | None = None
    """Images a shard; None: 256 MB of tokens, and no more than a sixty-fourth of the run."""
    precision: str = "auto"
    """`float32`, `bfloat16`, `float16`; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    compile_model: bool = False
    """Run the model through torch.compile: minutes at the start, some per cent faster after."""
    max_pixels: int = 89_478_485
    """Images with more pixels are rejected by their header."""
    max_bytes: int = 256 << 20
    """Images with more encoded bytes are rejected."""
    reduced_jpeg: bool = False
    """Decode large JPEGs at a half, quarter or eighth of their size: faster, slightly other pixels."""


@dataclass(frozen=True)
class RunRequest:
    """One run over images."""

    index: Location
    source: Source | None
    """None for a run that starts from stored tokens."""
    choice: Choice
    mode: Literal["new", "add"]
    action: str
    label: str
    fingerprints: dict[str, str]
    """All parts; resuming needs each to be equal."""
    config: dict[str, Any]
    """For people and later commands: goes into run.json and the manifest."""
    head_source: dict[str, Any]
    """What the manifest names as the corpus."""
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    executor: ExecutorOptions = field(default_factory=ExecutorOptions)
    on_duplicate: Literal["error", "first"] = "error"
    limit: int | None = None
    make_known: Callable[[Staging], KnownFilter] | None = None
    """Makes the filter of images that need not be computed, when the listing starts."""
    after_listing: Callable[[Staging], None] | None = None
    removed: Callable[[Staging], pa.Table | None] | None = None
    """Ids that leave the index at publish."""
    restart: bool = False
    quiet: bool = False
    max_reject_fraction: float | None = None
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class RunReport:
    """How a run ended."""

    manifest: Manifest | None
    """None: there was nothing to do and no index yet, or nothing changed."""
    plan: PlanInfo
    outcome: RunOutcome
    num_rows_resumed: int
    """Rows that an earlier, interrupted command had finished."""
    num_accepted: int
    num_rejected: int
    was_published_before: bool = False
    timings: dict[str, float] = field(default_factory=dict)


def run_images(request: RunRequest) -> RunReport:
    """Lists, computes what is missing, publishes. The same call again resumes.

    Raises:
        IndexLockedError, ResumeMismatchError: see `Staging.begin`.
        RejectLimitError, WorkerError, DeviceError, StorageError: finished work stays in staging.
    """
    check_devices(request.executor)
    with interruptible(), Staging.begin(
        request.index, fingerprints=request.fingerprints, config=request.config, restart=request.restart,
        purpose=request.action,
    ) as staging:  # fmt: skip
        if staging.already_published is not None:
            manifest = staging.already_published
            plan = PlanInfo(0, 0, 1, "", {}, request.source.describe() if request.source is not None else "")
            counts = manifest.run_counts
            return RunReport(
                manifest, plan, RunOutcome(), counts["listed"], counts["accepted"], counts["rejected"], True
            )
        return _run(request, staging)


def _run(request: RunRequest, staging: Staging) -> RunReport:
    timings: dict[str, float] = {}
    started = time.monotonic()
    plan = _plan(request, staging)
    timings["list_s"] = time.monotonic() - started
    outcome = RunOutcome()
    if staging.is_resumed:
        outcome.num_dropped_receipts = len(staging.verify_staged())
        request.say(
            f"resuming run {staging.run_id}: {staging.covered.num_rows:,} of {plan.num_rows:,} images are done"
            + (f"; {outcome.num_dropped_receipts} damaged shards are dropped" if outcome.num_dropped_receipts else "")
        )
    resumed = staging.covered.num_rows
    removed = request.removed(staging) if request.removed is not None else None
    if plan.num_rows == 0 and (removed is None or removed.num_rows == 0):
        staging.discard()
        return RunReport(None, plan, outcome, 0, 0, 0)
    codec = request.choice.codec
    if staging.covered.num_rows < plan.num_rows or codec is None:
        codec, outcome = _compute(request, staging, plan, outcome)
    accepted = sum(receipt.num_accepted for receipt in staging.receipts)
    rejected = sum(receipt.num_rejected for receipt in staging.receipts)
    changes_nothing = request.mode == "add" and not accepted and (removed is None or not removed.num_rows)
    if changes_nothing and _are_known_rejects(staging):
        staging.discard()  # the same images failed again: a snapshot would be a copy of its parent
        return RunReport(None, plan, outcome, resumed, 0, rejected)
    timings["compute_s"] = outcome.metrics.wall_s
    timings.update({name: round(value, 3) for name, value in outcome.metrics.values.items() if name.endswith("_s")})
    save_codec(codec, staging.index)
    head = request.choice.head(
        codec, fingerprints=request.fingerprints, source=request.head_source, config=request.config, timings=timings
    )
    started = time.monotonic()
    manifest = publish(staging, head=head, mode=request.mode, removed=removed, action=request.action)
    timings["publish_s"] = time.monotonic() - started
    return RunReport(manifest, plan, outcome, resumed, accepted, rejected, timings=timings)


def _are_known_rejects(staging: Staging) -> bool:
    """True when every reject of this run is one of the current snapshot's already."""
    manifest = find_manifest(staging.index)
    if manifest is None:
        return False
    new = read_reject_ids(staging.index, [receipt.rejects for receipt in staging.receipts if receipt.rejects])
    old = read_reject_ids(staging.index, read_rejects(staging.index, manifest))
    return bool(pc.all(pc.is_in(new, value_set=old)).as_py())


def _plan(request: RunRequest, staging: Staging) -> PlanInfo:
    info = staging.plan_info
    if info is not None:
        return PlanInfo.from_dict(info)
    assert request.source is not None
    spec = request.choice.model.spec.preprocess
    batch_size = request.compute.batch_size or DEFAULT_BATCH["cpu"]
    unit_rows = choose_unit_rows(spec.pixel_bytes, batch_size, small_corpus_size(request.source, request.limit))
    with progress("listing", 0, quiet=request.quiet) as report:
        plan = write_plan(
            request.source,
            staging.plan_dir,
            unit_rows=unit_rows,
            on_duplicate=request.on_duplicate,
            limit=request.limit,
            known=request.make_known(staging) if request.make_known is not None else None,
            on_progress=report.update,
        )
    if request.after_listing is not None:
        request.after_listing(staging)
    staging.set_plan_info(plan.to_dict())
    known = f", {plan.num_known:,} of them unchanged in the index" if plan.num_known else ""
    request.say(f"{plan.description}: {plan.num_rows + plan.num_known:,} images{known}")
    for note in plan.notes:
        request.say(f"note: {note}")
    return plan


def small_corpus_size(source: Source, limit: int | None) -> int | None:
    """The number of images when it is small, from a look at the first listing batches; else None."""
    num = 0
    for batch in source.list_batches():
        num += batch.num_rows
        if limit is not None and num >= limit:
            return limit
        if num >= SMALL_CORPUS_ROWS:
            return None
    return num


def _compute(request: RunRequest, staging: Staging, plan: PlanInfo, outcome: RunOutcome) -> tuple[Codec, RunOutcome]:
    spec = request.choice.model.spec.preprocess
    with executing(request.executor, block_bytes=plan.unit_rows * spec.pixel_bytes) as execution:
        job = make_job(request, staging, plan, execution.machine)
        codec = request.choice.codec or staged_codec(
            staging, job, request.choice, execution, num_rows=plan.num_rows, say=request.say
        )
        job = replace(job, codec=codec)
        dropped = outcome.num_dropped_receipts
        outcome = run_units(
            staging,
            job,
            extract_stages(job, execution.machine),
            execution,
            num_rows=plan.num_rows,
            label=request.label,
            quiet=request.quiet,
            max_reject_fraction=request.max_reject_fraction,
        )
        outcome.num_dropped_receipts = dropped
    return codec, outcome


def make_job(request: RunRequest, staging: Staging, plan: PlanInfo, machine: Machine) -> Job:
    """The constants for the workers. A codec that is not trained yet is stood in for by float16."""
    choice, compute = request.choice, request.compute
    device = "cuda" if machine.num_gpus else "cpu"
    batch_size = compute.batch_size or DEFAULT_BATCH[device]
    return Job(
        index=staging.index,
        run_id=staging.run_id,
        plan_dir=staging.plan_dir,
        codec=choice.codec or Float16Codec(choice.num_tokens, choice.dim),
        embedding_dim=choice.embedding_dim,
        unit_rows=plan.unit_rows,
        shard_rows=compute.shard_rows or choose_shard_rows(choice.payload_bytes, plan.num_rows),
        source=plan.source,
        plan_generation=plan.generation,
        model=choice.location,
        preprocess=choice.model.spec.preprocess,
        use_adapter=choice.use_adapter,
        max_pixels=compute.max_pixels,
        max_bytes=compute.max_bytes,
        reduced_jpeg=compute.reduced_jpeg,
        device=device,
        precision=compute.precision,
        compile_model=compute.compile_model,
        batch_size=min(batch_size, plan.unit_rows),
        num_threads=machine.threads_per_encoder,
    )


def require_same_model(existing: Manifest, choice: Choice, index: Location) -> None:
    """Raises IndexStateError when new tokens would be of another kind than those in the index."""
    differing = [part for part, value in choice.fingerprints.items() if existing.fingerprints.get(part) != value]
    if differing:
        stored = existing.head.config
        raise IndexStateError(
            f"the index {index} holds tokens made with another {', '.join(differing)} "
            f"(its model: {stored.get('model', '?')}, variant {stored.get('variant', '?')}); "
            "use `edje-pipeline rebuild` to change it, or another --index"
        )
