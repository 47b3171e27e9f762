"""`retry-rejects`: the rejected images of an index once more; those that work now join it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.spec import fingerprint_of
from edje_pipeline.pipeline.extract import ExtractResult, stderr_sayer, to_result
from edje_pipeline.pipeline.image_run import ComputeOptions, RunRequest, require_same_model, run_images
from edje_pipeline.pipeline.model_choice import choose
from edje_pipeline.pipeline.runner import ExecutorOptions
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import Manifest, read_manifest
from edje_pipeline.storage.reject_merge import iter_rejects
from edje_pipeline.storage.schema import RejectReason
from edje_pipeline.storage.snapshot_files import read_rejects
from edje_pipeline.storage.sources import Source, SourceOptions


@dataclass(frozen=True)
class RetryConfig:
    """Everything that `run_retry_rejects` needs."""

    index: str
    """Directory or URI of the index."""
    reasons: tuple[str, ...] = ()
    """Retry only rejects of these reasons; empty: all."""
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    """How images become tokens; raise `max_pixels` here to take in large ones."""
    executor: ExecutorOptions = field(default_factory=ExecutorOptions)
    """Where that happens."""
    restart: bool = False
    """Discard an unfinished run instead of resuming it."""
    quiet: bool = False
    """No progress."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a reason that does not exist."""
        unknown = sorted(set(self.reasons) - {reason.value for reason in RejectReason})
        if unknown:
            known = ", ".join(reason.value for reason in RejectReason)
            raise ConfigError(f"no reject reason {', '.join(unknown)}; the reasons are {known}")


class RejectsSource(Source):
    """Lists the rejects of a snapshot; their bytes lie where the corpus was listed."""

    def __init__(self, index: Location, manifest: Manifest, reasons: tuple[str, ...]) -> None:
        super().__init__(str(index), SourceOptions())
        self._index, self._manifest, self._reasons = index, manifest, reasons

    def describe(self) -> str:
        only = f" ({', '.join(self._reasons)})" if self._reasons else ""
        return f"rejects{only} of {self._index}"

    def to_dict(self) -> dict[str, Any]:
        """Of the corpus: that is what reads the bytes."""
        return self._manifest.head.source

    def _entries(self) -> Iterator[tuple[str, str, str, int, int]]:
        for table in iter_rejects(self._index, read_rejects(self._index, self._manifest)):
            for row in table.to_pylist():
                if not self._reasons or row["reason"] in self._reasons:
                    yield row["image_id"], row["uri"], row["container"], row["offset"], row["length"]


def run_retry_rejects(config: RetryConfig, *, say: Callable[[str], None] | None = None) -> ExtractResult:
    """Computes the rejects of the current snapshot again and publishes a new one.

    Raises:
        IndexNotFoundError: there is no index. Others: see `run_extract`.
    """
    say = say or stderr_sayer(quiet=config.quiet)
    index = Location.parse(config.index)
    existing = read_manifest(index)
    stored = existing.head.config
    choice = choose(
        str(stored.get("model", "")), str(stored.get("variant", "")) or None, existing=existing, index=index
    )
    require_same_model(existing, choice, index)
    source = RejectsSource(index, existing, config.reasons)
    num_wanted = sum(batch.num_rows for batch in source.list_batches())
    if not num_wanted:
        return _nothing(config, existing, source, choice.variant)
    request = RunRequest(
        index=index,
        source=source,
        choice=choice,
        mode="add",
        action="retry-rejects",
        label="retry-rejects",
        fingerprints={
            **choice.fingerprints,
            "corpus": fingerprint_of(["rejects", existing.snapshot, config.reasons]),
            "options": fingerprint_of([config.compute.max_pixels, config.compute.max_bytes]),
        },
        config={**stored, "retry_rejects": asdict(config)},
        head_source=existing.head.source,
        compute=config.compute,
        executor=config.executor,
        on_duplicate="first",
        restart=config.restart,
        quiet=config.quiet,
        say=say,
    )
    return to_result(run_images(request), request, 0.0, existing)


def _nothing(config: RetryConfig, existing: Manifest, source: RejectsSource, variant: str) -> ExtractResult:
    return ExtractResult(
        action="retry-rejects",
        index=config.index,
        snapshot=None,
        description=source.describe(),
        num_listed=0,
        num_accepted=0,
        num_rejected=0,
        num_unchanged=0,
        num_removed=0,
        num_resumed=0,
        num_computed=0,
        num_images=existing.counts.accepted,
        rejects_by_reason={},
        payload_bytes=existing.tokens.payload_bytes,
        variant=variant,
        notes=("the index has no such rejects",),
    )
