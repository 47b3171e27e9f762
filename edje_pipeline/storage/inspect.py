"""A summary of an index for people and machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edje_pipeline.progress import format_bytes, format_duration
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import Manifest, read_head, read_manifest
from edje_pipeline.storage.recovery import open_runs, stored_snapshots
from edje_pipeline.storage.snapshot_files import lookup_parts, read_rejects


@dataclass(frozen=True)
class InspectReport:
    """What an index holds, what made it, and how many bytes it takes."""

    index: str
    manifest: Manifest
    snapshots: tuple[dict[str, Any], ...]
    lookup_bytes: int
    reject_bytes: int
    head_bytes: int
    unfinished_runs: tuple[str, ...]
    exit_code: int = 0

    @property
    def total_bytes(self) -> int:
        """Of the shown snapshot: shards, lookup, rejects, lists."""
        return self.manifest.counts.shard_bytes + self.lookup_bytes + self.reject_bytes + self.head_bytes

    def to_dict(self) -> dict[str, Any]:
        counts = self.manifest.counts
        return {
            "index": self.index,
            "manifest": self.manifest.to_dict(),
            "bytes": {
                "shards": counts.shard_bytes,
                "lookup": self.lookup_bytes,
                "rejects": self.reject_bytes,
                "lists": self.head_bytes,
                "total": self.total_bytes,
                "per_image": round(self.total_bytes / counts.accepted, 2) if counts.accepted else None,
            },
            "snapshots": list(self.snapshots),
            "unfinished_runs": list(self.unfinished_runs),
        }

    def to_text(self) -> str:
        manifest, counts = self.manifest, self.manifest.counts
        tokens = manifest.tokens
        per_image = f" ({self.total_bytes / counts.accepted:,.0f} B an image)" if counts.accepted else ""
        dead = f", {counts.tombstones:,} dead rows" if counts.tombstones else ""
        lines = [
            f"index       {self.index}",
            f"snapshot    {manifest.snapshot} ({manifest.action}, {manifest.created_at})",
            f"images      {counts.accepted:,} accepted, {counts.rejected:,} rejected, {counts.listed:,} listed",
            f"tokens      {tokens.num_tokens} x {tokens.dim}, {tokens.codec}, {tokens.payload_bytes:,} B an image",
            f"embedding   {manifest.embedding_dim or 'none'}",
            f"on disk     {format_bytes(self.total_bytes)}{per_image}, {counts.shards:,} shards{dead}",
        ]
        lines += [f"rejected    {count:,} {reason}" for reason, count in counts.rejects_by_reason.items()]
        model = manifest.head.model
        if model:
            backbone = model.get("backbone") or {}
            source = backbone.get("source", "") if isinstance(backbone, dict) else ""
            lines.append(f"model       {str(model.get('name', ''))[:40]} {str(source)[:40]}".rstrip())
        lines += [f"{part:<11} {value[:16]}" for part, value in manifest.fingerprints.items()]
        total = sum(manifest.head.timings.values())
        if total:
            lines.append(f"time        {format_duration(total)} over all stages")
        for snapshot in self.snapshots:
            mark = "*" if snapshot["current"] else " "
            lines.append(f"{mark} {snapshot['snapshot']}  {snapshot['action']:<8} {snapshot['accepted']:,} images")
        lines += [f"note: run {run} is unfinished; run its command again" for run in self.unfinished_runs]
        return "\n".join(line[:100] for line in lines)


def inspect(index: Location, snapshot: str | None = None) -> InspectReport:
    """Reads heads and lists only: as quick for 10^9 images as for ten.

    Raises:
        IndexNotFoundError, FormatVersionError, CorruptionError: as for `Index.open`.
    """
    current = read_manifest(index)
    manifest = read_head(index, snapshot) if snapshot else current
    heads = stored_snapshots(index, current)
    return InspectReport(
        index=str(index),
        manifest=manifest,
        snapshots=tuple(
            {
                "snapshot": head.snapshot,
                "parent": head.parent,
                "action": head.action,
                "created_at": head.created_at,
                "current": head.snapshot == current.snapshot,
                **{key: value for key, value in asdict(head.counts).items() if key in ("accepted", "rejected")},
            }
            for head in heads
        ),
        lookup_bytes=sum(part.size_bytes for part in lookup_parts(index, manifest)),
        reject_bytes=sum(entry.size_bytes for entry in read_rejects(index, manifest)),
        head_bytes=sum(ref.size_bytes for ref in manifest.files.values()) + len(manifest.to_bytes()),
        unfinished_runs=tuple(run["run_id"] for run in open_runs(index)),
    )
