"""`rebuild`: a new snapshot after a change of codec, adapter or backbone, with the least possible work.

    codec changed                from the stored tokens, no image is read
    adapter (and codec) changed  from stored vision tokens if there are any, else from the images
    backbone or preprocessing    from the images

The old snapshot stays readable until `prune`; `rollback` returns to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from edje_pipeline.errors import CodecError, ConfigError, IndexStateError
from edje_pipeline.models.spec import fingerprint_of
from edje_pipeline.pipeline.extract import ExtractResult, stderr_sayer, to_result
from edje_pipeline.pipeline.image_run import ComputeOptions, RunReport, RunRequest, run_images
from edje_pipeline.pipeline.model_choice import NO_ADAPTER, Choice, choose
from edje_pipeline.pipeline.rebuild_stored import run_stored
from edje_pipeline.pipeline.runner import ExecutorOptions
from edje_pipeline.pipeline.snapshot_diff import SnapshotDiff, compare_snapshots
from edje_pipeline.storage.codecs import is_coarser
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.lock import IndexLock
from edje_pipeline.storage.recovery import finish_published
from edje_pipeline.storage.sources import SourceOptions, open_source

Way = Literal["nothing", "tokens", "raw", "images"]


@dataclass(frozen=True)
class RebuildConfig:
    """Everything that `run_rebuild` needs."""

    index: str
    """Directory or URI of the index."""
    model: str | None = None
    """The new model; None: the index's own."""
    variant: str | None = None
    """The new variant or codec; None: the index's own."""
    codebook: str | None = None
    """File of a trained codec."""
    corpus: str | None = None
    """Where the images are now; None: where the manifest says."""
    raw_index: str | None = None
    """An index of the same images with vision tokens (`--variant raw`), for a change of the adapter."""
    from_images: bool = False
    """Read the images even where stored tokens would do."""
    allow_lossy: bool = False
    """Rebuild from stored tokens that are coarser than the new codec."""
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    """How images become tokens."""
    executor: ExecutorOptions = field(default_factory=ExecutorOptions)
    """Where that happens."""
    max_reject_fraction: float | None = None
    """Publish nothing when more of the images are rejected."""
    restart: bool = False
    """Discard an unfinished run instead of resuming it."""
    dry_run: bool = False
    """Say what would be done; write nothing."""
    quiet: bool = False
    """No progress."""


@dataclass(frozen=True)
class RebuildResult:
    """What changed, how the new snapshot was made, and how it differs from the old."""

    changed: tuple[str, ...]
    """Parts whose fingerprint differs."""
    way: Way
    plan_text: str
    run: ExtractResult | None
    diff: SnapshotDiff | None
    old_snapshot: str

    @property
    def exit_code(self) -> int:
        return self.run.exit_code if self.run is not None and self.way == "images" else 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "changed": list(self.changed),
            "way": self.way,
            "plan": self.plan_text,
            "run": self.run.to_dict() if self.run is not None else None,
            "diff": self.diff.to_dict() if self.diff is not None else None,
            "old_snapshot": self.old_snapshot,
            "exit_code": self.exit_code,
        }

    def to_text(self) -> str:
        lines = [self.plan_text]
        if self.run is not None:
            lines.append(self.run.to_text())
        if self.diff is not None:
            lines += self.diff.to_lines()
            lines.append(f"the old snapshot {self.old_snapshot} stays until `prune`; `rollback` returns to it")
        return "\n".join(lines)


def run_rebuild(config: RebuildConfig, *, say: Callable[[str], None] | None = None) -> RebuildResult:
    """Makes a new snapshot of an index for another model, adapter or codec.

    Raises:
        CodecError: stored tokens are coarser than the new codec and neither `allow_lossy` nor
            `from_images` is set. Others: see `run_extract`.
    """
    say = say or stderr_sayer(quiet=config.quiet)
    location = Location.parse(config.index)
    index = Index.open(location)
    stored = index.manifest.head.config
    model = config.model or str(stored.get("model", ""))
    variant = config.variant or (None if config.codebook else str(stored.get("variant", "")) or None)
    choice = choose(model, variant, codebook=config.codebook, existing=index.manifest, index=location)
    old = index.manifest.fingerprints
    changed = tuple(part for part, value in choice.fingerprints.items() if old.get(part) != value)
    if {"backbone", "preprocess", "adapter"} & set(changed):
        # A codebook fits the tokens it was trained on: new tokens get a new one.
        choice = choose(model, variant, codebook=config.codebook)
        changed = tuple(part for part, value in choice.fingerprints.items() if old.get(part) != value)
    if not changed:
        with IndexLock(location, purpose="rebuild"):
            finish_published(location)
        text = "model, adapter and codec are those of the index: nothing to rebuild"
        return RebuildResult((), "nothing", text, None, None, index.snapshot)
    way, raw = _choose_way(config, index, choice, changed)
    text = f"{', '.join(changed)} changed: {_describe(way, raw, index, choice)}"
    if config.dry_run:
        return RebuildResult(changed, way, text, None, None, index.snapshot)
    say(text)
    request = _request(config, location, index, choice, way, raw, say)
    report: RunReport = run_images(request) if way == "images" else run_stored(request, raw)
    result = to_result(report, request, 0.0, index.manifest)
    diff = None
    if report.manifest is not None:
        result = replace(result, rejects_by_reason=report.manifest.counts.rejects_by_reason)
        diff = compare_snapshots(location, index.snapshot, report.manifest.snapshot)
    return RebuildResult(changed, way, text, result, diff, index.snapshot)


def _choose_way(config: RebuildConfig, index: Index, choice: Choice, changed: tuple[str, ...]) -> tuple[Way, Index]:
    """How to make the new tokens, and the index whose tokens are read for it."""
    if config.from_images or {"backbone", "preprocess"} & set(changed):
        return "images", index
    if "adapter" not in changed:
        if is_coarser(index.codec, choice.payload_bytes) and not config.allow_lossy:
            raise CodecError(
                f"the stored tokens are {index.codec.name} ({index.codec.payload_bytes:,} B an image), coarser than "
                f"the new {choice.codec_spec} ({choice.payload_bytes:,} B): what they lost stays lost. "
                "Use --from-images to read the images again, or --allow-lossy to go on all the same"
            )
        return "tokens", index
    raw = Index.open(config.raw_index) if config.raw_index else index
    if raw.manifest.fingerprints["adapter"] == NO_ADAPTER:
        for part in ("backbone", "preprocess"):
            if raw.manifest.fingerprints[part] != choice.fingerprints[part]:
                raise IndexStateError(
                    f"the vision tokens in {raw.location} were made with another {part} than the model "
                    f"{choice.location}; use --from-images"
                )
        return "raw", raw
    if config.raw_index:
        raise ConfigError(
            f"{config.raw_index} holds no vision tokens but variant {raw.manifest.head.config.get('variant')}; "
            "--raw-index expects an index of `extract --variant raw`"
        )
    return "images", index


def _describe(way: Way, raw: Index, index: Index, choice: Choice) -> str:
    num = len(raw) if way != "images" else index.manifest.counts.listed
    source = {
        "tokens": "re-encodes the stored tokens, no image is read",
        "raw": f"runs the adapter on the vision tokens in {raw.location}, no image is read",
        "images": "reads and encodes the images again",
    }[way]
    return f"{source}; {num:,} images to {choice.codec_spec} ({choice.payload_bytes:,} B each)"


def _request(
    config: RebuildConfig, location: Location, index: Index, choice: Choice, way: Way, raw: Index,
    say: Callable[[str], None],
) -> RunRequest:  # fmt: skip
    head = index.manifest.head
    stored_source = head.source
    options = SourceOptions.from_dict(stored_source.get("options", {}))
    kind = str(stored_source.get("kind", "auto"))
    corpus = config.corpus or str(stored_source.get("uri", ""))
    # An index rebuilt from tokens must not need its images to be there.
    source = (
        open_source(corpus, kind if config.corpus is None else "auto", options=options) if way == "images" else None
    )
    own = {
        "corpus": fingerprint_of([way, corpus, raw.snapshot if way != "images" else ""]),
        "options": fingerprint_of([config.compute.max_pixels, config.compute.max_bytes]),
    }
    return RunRequest(
        index=location,
        source=source,
        choice=choice,
        mode="new",
        action="rebuild",
        label="rebuild",
        fingerprints={**choice.fingerprints, **own},
        config={**head.config, "rebuild": asdict(config)},
        head_source=source.to_dict() if source is not None else stored_source,
        compute=config.compute,
        executor=config.executor,
        on_duplicate="error" if head.config.get("on_duplicate", "error") == "error" else "first",
        limit=head.config.get("limit"),
        restart=config.restart,
        quiet=config.quiet,
        max_reject_fraction=config.max_reject_fraction,
        say=say,
    )
