"""`extract`: a corpus of images becomes an index, or joins one. Config in, result out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.hub import about, default_model
from edje_pipeline.models.spec import fingerprint_of
from edje_pipeline.pipeline.image_run import (
    ComputeOptions,
    RunReport,
    RunRequest,
    require_same_model,
    run_images,
)
from edje_pipeline.pipeline.incremental import Incremental
from edje_pipeline.pipeline.metrics import RunMetrics
from edje_pipeline.pipeline.model_choice import Choice, choose
from edje_pipeline.pipeline.runner import ExecutorOptions
from edje_pipeline.progress import format_bytes, format_duration
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import Manifest, find_manifest
from edje_pipeline.storage.sources import Source, SourceOptions, open_source


@dataclass(frozen=True)
class ExtractConfig:
    """Everything that `run_extract` needs."""

    corpus: str
    """Folder, tars, Parquet files or list of URIs; a path, URI or pattern."""
    index: str
    """Directory or URI of the index; made when absent."""
    model: str | None = None
    """Directory, `hf:org/name[@revision]` or bundled name; None: the existing index's own."""
    variant: str | None = None
    """`49kb`, `1kb`, `int8`, `int4`, `local`, `raw`, or a codec such as `pq48`; None: as the index, else 49kb."""
    codebook: str | None = None
    """File of a trained codec; None: one is trained on the first images where the variant needs it."""
    source: str = "auto"
    """`folder`, `webdataset`, `parquet`, `list`; `auto` looks."""
    source_options: SourceOptions = field(default_factory=SourceOptions)
    """How to read the corpus."""
    on_duplicate: Literal["error", "first"] = "error"
    """What to do when one image_id stands twice."""
    limit: int | None = None
    """Take only the first images."""
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    """How images become tokens."""
    executor: ExecutorOptions = field(default_factory=ExecutorOptions)
    """Where that happens."""
    prune_missing: bool = False
    """Drop images from an existing index that the corpus no longer has."""
    max_reject_fraction: float | None = None
    """Publish nothing when more of the images are rejected."""
    warn_reject_fraction: float = 0.0
    """Exit code 3 when more of the images are rejected; 0: when any is."""
    restart: bool = False
    """Discard an unfinished run instead of resuming it."""
    dry_run: bool = False
    """List and say what would be done; write nothing."""
    quiet: bool = False
    """No progress."""

    def __post_init__(self) -> None:
        """Raises ConfigError naming every value out of range."""
        problems = [
            f"--{name.replace('_', '-')} is {value}, expected a number above 0"
            for name, value in (
                ("limit", self.limit),
                ("batch_size", self.compute.batch_size),
                ("shard_rows", self.compute.shard_rows),
                ("num_cpus", self.executor.num_cpus),
                ("max_pixels", self.compute.max_pixels),
                ("max_bytes", self.compute.max_bytes),
            )
            if value is not None and value < 1
        ]
        problems += [
            f"--{name.replace('_', '-')} is {value}, expected a fraction from 0 to 1"
            for name, value in (
                ("max_reject_fraction", self.max_reject_fraction),
                ("warn_reject_fraction", self.warn_reject_fraction),
            )
            if value is not None and not 0 <= value <= 1
        ]
        if self.on_duplicate not in ("error", "first"):
            problems.append(f"--on-duplicate is {self.on_duplicate!r}, expected error or first")
        if problems:
            raise ConfigError("; ".join(problems))


@dataclass(frozen=True)
class ExtractResult:
    """What a run over images did."""

    action: str
    index: str
    snapshot: str | None
    """None when nothing was published: a dry run, or nothing to do."""
    description: str
    """The corpus, as it was found."""
    num_listed: int
    """accepted + rejected + unchanged."""
    num_accepted: int
    num_rejected: int
    num_unchanged: int
    """Images that the index had already with the same content."""
    num_removed: int
    """Images that left the index."""
    num_resumed: int
    """Rows that an interrupted run had done and that were not computed again."""
    num_computed: int
    """Rows that this very command computed."""
    num_images: int
    """In the index now."""
    rejects_by_reason: dict[str, int]
    payload_bytes: int
    variant: str
    warn_reject_fraction: float = 0.0
    metrics: RunMetrics = field(default_factory=RunMetrics)
    timings: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """3 when more than `warn_reject_fraction` of the run's images were rejected."""
        settled = self.num_accepted + self.num_rejected
        return 3 if settled and self.num_rejected / settled > self.warn_reject_fraction else 0

    def to_dict(self) -> dict[str, Any]:
        value = {key: item for key, item in asdict(self).items() if key not in ("metrics", "notes")}
        return {**value, "notes": list(self.notes), "metrics": self.metrics.to_dict(), "exit_code": self.exit_code}

    def to_text(self) -> str:
        lines = [*(f"note: {note}" for note in self.notes)]
        if self.snapshot is None:
            return "\n".join([*lines, f"{self.action}: nothing was published; {self._counts()}"])
        lines += [
            f"index           {self.index}",
            f"snapshot        {self.snapshot}, {self.num_images:,} images of {format_bytes(self.payload_bytes)}",
            f"this run        {self._counts()}",
        ]
        if self.rejects_by_reason:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rejects_by_reason.items())
            lines.append(f"rejects         {reasons}")
        if self.num_resumed:
            lines.append(f"resumed         {self.num_resumed:,} rows were done by the interrupted run")
        if self.num_computed:
            wall_s, startup_s = self.metrics.wall_s, self.metrics.startup_s
            rate, steady = (self.num_computed / max(seconds, 1e-3) for seconds in (wall_s, wall_s - startup_s))
            speed = f"speed           {rate:,.1f} images/s over {format_duration(wall_s)}"
            after = f"; {steady:,.1f} after {format_duration(startup_s)} of start-up" if startup_s else ""
            lines += [speed + after, *self.metrics.to_lines()]
        return "\n".join(lines)

    def _counts(self) -> str:
        parts = [f"{self.num_accepted:,} accepted", f"{self.num_rejected:,} rejected"]
        if self.num_unchanged:
            parts.append(f"{self.num_unchanged:,} unchanged")
        if self.num_removed:
            parts.append(f"{self.num_removed:,} removed")
        return f"{self.num_listed:,} listed = {', '.join(parts)}"


def run_extract(config: ExtractConfig, *, say: Callable[[str], None] | None = None) -> ExtractResult:
    """Extracts a corpus into an index. Call it again with the same config to resume an interrupted run.

    Raises:
        SourceError: the corpus cannot be listed. ModelError: the model cannot be opened.
        IndexStateError: the index holds tokens of another model, is locked, or has another unfinished run.
        RejectLimitError, DeviceError, WorkerError, StorageError: finished work stays and is resumed.
    """
    say = say or stderr_sayer(quiet=config.quiet)
    source = open_source(config.corpus, config.source, options=config.source_options)
    index = Location.parse(config.index)
    existing = find_manifest(index)
    choice = _choose(config, existing, index, say)
    if existing is not None:
        require_same_model(existing, choice, index)
    incremental = Incremental(index, source.to_dict(), config.prune_missing, config.compute.max_bytes)
    if config.dry_run:
        return _dry_run(config, source, choice, existing, incremental)
    request = RunRequest(
        index=index,
        source=source,
        choice=choice,
        mode="add" if existing is not None else "new",
        action="extract",
        label="extract",
        fingerprints={**choice.fingerprints, **_own_fingerprints(config, source)},
        config=run_config(config),
        head_source=source.to_dict(),
        compute=config.compute,
        executor=config.executor,
        on_duplicate=config.on_duplicate,
        limit=config.limit,
        make_known=(lambda _: incremental.known_filter()) if existing is not None else None,
        after_listing=incremental.store_missing if existing is not None else None,
        removed=incremental.read_missing if existing is not None else None,
        restart=config.restart,
        quiet=config.quiet,
        max_reject_fraction=config.max_reject_fraction,
        say=say,
    )
    report = run_images(request)
    return to_result(report, request, config.warn_reject_fraction, existing)


def _choose(config: ExtractConfig, existing: Manifest | None, index: Location, say: Callable[[str], None]) -> Choice:
    model, variant = config.model, config.variant
    if existing is not None:
        model = model or str(existing.head.config.get("model", "")) or None
        if variant is None and config.codebook is None:
            variant = str(existing.head.config.get("variant", "")) or None
    if model is None:
        model = default_model()
        say(f"no --model was given: using {model}, {about(model)}")
    return choose(model, variant, codebook=config.codebook, existing=existing, index=index)


def _own_fingerprints(config: ExtractConfig, source: Source) -> dict[str, str]:
    options = {
        "limit": config.limit,
        "on_duplicate": config.on_duplicate,
        "prune_missing": config.prune_missing,
        "max_pixels": config.compute.max_pixels,
        "max_bytes": config.compute.max_bytes,
        "reduced_jpeg": config.compute.reduced_jpeg,
    }
    return {"corpus": fingerprint_of(source.to_dict()), "options": fingerprint_of(options)}


def run_config(config: ExtractConfig) -> dict[str, Any]:
    """The options as they go into run.json and the manifest."""
    value = asdict(config)
    value["source_options"] = config.source_options.to_dict()
    return value


def to_result(
    report: RunReport, request: RunRequest, warn_reject_fraction: float, existing: Manifest | None
) -> ExtractResult:
    """A run's report as a command shows it."""
    manifest = report.manifest or existing
    notes = list(report.plan.notes)
    if report.plan.num_duplicates_dropped:
        notes.append(f"{report.plan.num_duplicates_dropped:,} images with a repeated image_id were left out")
    if report.was_published_before:
        notes.append("the interrupted run had already published its snapshot; only its clean-up was left")
    if report.outcome.num_dropped_receipts:
        notes.append(f"{report.outcome.num_dropped_receipts:,} damaged shards were found and computed again")
    if report.manifest is None:
        notes.append("nothing is new or changed, so the snapshot stays as it is")
    removed = 0
    if existing is not None and report.manifest is not None and request.mode == "add":
        removed = max(report.manifest.counts.tombstones - existing.counts.tombstones, 0)
    return ExtractResult(
        action=request.action,
        index=str(request.index),
        snapshot=report.manifest.snapshot if report.manifest is not None else None,
        description=report.plan.description,
        num_listed=report.num_accepted + report.num_rejected + report.plan.num_known,
        num_accepted=report.num_accepted,
        num_rejected=report.num_rejected,
        num_unchanged=report.plan.num_known,
        num_removed=removed,
        num_resumed=report.num_rows_resumed,
        num_computed=report.outcome.num_rows_done,
        num_images=manifest.counts.accepted if manifest is not None else 0,
        rejects_by_reason=manifest.counts.rejects_by_reason if report.num_rejected and manifest is not None else {},
        payload_bytes=manifest.tokens.payload_bytes if manifest is not None else request.choice.payload_bytes,
        variant=request.choice.variant,
        warn_reject_fraction=warn_reject_fraction,
        metrics=report.outcome.metrics,
        timings=report.timings,
        notes=tuple(notes),
    )


def _dry_run(
    config: ExtractConfig, source: Source, choice: Choice, existing: Manifest | None, incremental: Incremental
) -> ExtractResult:
    known = incremental.known_filter() if existing is not None else None
    num_listed = num_known = 0
    for batch in source.list_batches():
        num_known += int(known(batch).sum()) if known is not None else 0
        num_listed += batch.num_rows
        if config.limit is not None and num_listed - num_known >= config.limit:
            num_listed = config.limit + num_known
            break
    to_do = num_listed - num_known
    return ExtractResult(
        action="dry run",
        index=config.index,
        snapshot=None,
        description=source.describe(),
        num_listed=num_listed,
        num_accepted=0,
        num_rejected=0,
        num_unchanged=num_known,
        num_removed=0,
        num_resumed=0,
        num_computed=0,
        num_images=existing.counts.accepted if existing is not None else 0,
        rejects_by_reason={},
        payload_bytes=choice.payload_bytes,
        variant=choice.variant,
        notes=(
            f"{source.describe()}",
            f"would compute {to_do:,} images with {choice.model.spec.name} as {choice.codec_spec}",
            f"would write {format_bytes(to_do * choice.payload_bytes)} of tokens to {config.index}",
        ),
    )


def stderr_sayer(*, quiet: bool) -> Callable[[str], None]:
    """Says lines on stderr, or nothing."""

    def say(line: str) -> None:
        if not quiet:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    return say
