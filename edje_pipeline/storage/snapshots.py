"""Changes to a published index that compute nothing: roll back, prune, delete."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from edje_pipeline.errors import CorruptionError, IndexStateError
from edje_pipeline.progress import format_bytes
from edje_pipeline.storage.cleanup import remove_file
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.lock import IndexLock
from edje_pipeline.storage.lookup import as_id_array
from edje_pipeline.storage.lookup_build import Removal
from edje_pipeline.storage.manifest import Manifest, read_head, read_manifest
from edje_pipeline.storage.publish import Change, commit, swap_manifest
from edje_pipeline.storage.recovery import files_needed_by, finish_published, open_runs, staged_run_ids
from edje_pipeline.storage.shards import RejectEntry, ShardEntry
from edje_pipeline.storage.snapshot_files import LookupPart, lookup_parts, read_rejects, read_shards, read_tombstones

SHOWN_IDS = 10


@dataclass(frozen=True)
class RollbackResult:
    """Which snapshot was left, and which is current now."""

    index: str
    previous: str
    current: str
    num_images: int
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        return (
            f"{self.index} is now at {self.current} ({self.num_images:,} images).\n"
            f"{self.previous} is kept; `edje-pipeline rollback INDEX --to {self.previous}` returns to it."
        )


@dataclass(frozen=True)
class PruneResult:
    """What was removed."""

    index: str
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    num_files: int
    freed_bytes: int
    dry_run: bool
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        verb = "Would drop" if self.dry_run else "Dropped"
        lines = [f"{verb} {len(self.dropped)} snapshots, {self.num_files} files, {format_bytes(self.freed_bytes)}."]
        lines += [f"  kept {name}" for name in self.kept]
        return "\n".join(lines)


@dataclass(frozen=True)
class DeleteResult:
    """What a deletion did; exit code 3 when ids were unknown."""

    index: str
    snapshot: str
    num_deleted: int
    num_unknown: int
    unknown: tuple[str, ...]
    num_images: int

    @property
    def exit_code(self) -> int:
        return 3 if self.num_unknown else 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "unknown": list(self.unknown)}

    def to_text(self) -> str:
        lines = [
            f"Deleted {self.num_deleted:,} images from {self.index}; {self.num_images:,} are left.",
            f"Current snapshot: {self.snapshot}. The bytes stay until no snapshot needs them (`prune`).",
        ]
        if self.num_unknown:
            shown = ", ".join(self.unknown)
            lines.append(f"{self.num_unknown:,} ids are not in the index: {shown}")
        return "\n".join(lines)


def rollback(index: Location, to: str | None = None) -> RollbackResult:
    """Makes an earlier snapshot the current one: a single swap, no file is removed.

    Args:
        index: root of the index.
        to: name of a snapshot; the parent of the current one when None.

    Raises:
        IndexNotFoundError: nothing published, or no such snapshot.
        IndexStateError: the current snapshot is the first.
        CorruptionError: files of that snapshot are gone; nothing was changed.
    """
    current = read_manifest(index)
    with IndexLock(index, purpose="rollback") as lock:
        finish_published(index)
        current = read_manifest(index)
        name = to or current.parent
        if name is None:
            raise IndexStateError(f"{current.snapshot} in {index} is the first snapshot; there is none to return to")
        target = read_head(index, name)
        _check_files(index, target)
        lock.assert_held()
        swap_manifest(index, target)
    return RollbackResult(str(index), current.snapshot, target.snapshot, target.counts.accepted)


def _check_files(index: Location, target: Manifest) -> None:
    read_tombstones(index, target)
    sized: list[ShardEntry | RejectEntry | LookupPart] = [
        *read_shards(index, target),
        *read_rejects(index, target),
        *lookup_parts(index, target),
    ]
    for entry in sized:
        location = index.child(entry.path)
        try:
            size = location.size_bytes()
        except FileNotFoundError:
            raise CorruptionError(
                f"snapshot {target.snapshot} needs {location}, which is gone; nothing was changed"
            ) from None
        if size != entry.size_bytes:
            raise CorruptionError(f"{location} has {size:,} bytes, expected {entry.size_bytes:,}; nothing was changed")


def prune(index: Location, *, keep: int = 0, dry_run: bool = False) -> PruneResult:
    """Removes all snapshots but the current and the `keep` newest others, then every file none of them needs.

    Readers that have a dropped snapshot open lose it. An unfinished run keeps its files.
    """
    read_manifest(index)
    with IndexLock(index, purpose="prune") as lock:
        finish_published(index)
        manifest = read_manifest(index)
        staged = staged_run_ids(index)
        names = [
            name
            for name in index.child("snapshots").list_dirs()
            if not any(name.endswith(f"-{run_id}") for run_id in staged)
        ]
        whole = [name for name in names if index.child("snapshots", name, "head.json").exists()]
        others = [name for name in whole if name != manifest.snapshot]
        kept = {manifest.snapshot, *(others[-keep:] if keep > 0 else [])}
        needed: set[str] = set()
        for name in kept:
            head = manifest if name == manifest.snapshot else read_head(index, name)
            needed |= files_needed_by(index, head)
        codecs = {read_head(index, name).fingerprints["codec"] for name in kept}
        codecs |= {run["fingerprints"].get("codec", "") for run in open_runs(index)}
        doomed = _doomed(index, names, needed, codecs, staged)
        lock.assert_held()
        if not dry_run:
            # Heads first: a snapshot without its head is not offered any more, whatever is left of it.
            for path, _ in sorted(doomed, key=lambda item: not item[0].endswith("/head.json")):
                remove_file(index, path)
            _remove_empty_folders(index, names)
    return PruneResult(
        index=str(index),
        kept=tuple(sorted(kept)),
        dropped=tuple(name for name in whole if name not in kept),
        num_files=len(doomed),
        freed_bytes=sum(size for _, size in doomed),
        dry_run=dry_run,
    )


def _doomed(
    index: Location, names: list[str], needed: set[str], codecs: set[str], staged: list[str]
) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for folder in ("shards", "rejects", *(f"snapshots/{name}" for name in names)):
        if _is_link(index, folder):
            continue
        found += [
            (f"{folder}/{entry.path}", entry.size_bytes)
            for entry in index.child(folder).list_files(recursive=False)
            if f"{folder}/{entry.path}" not in needed and not any(run_id in entry.path for run_id in staged)
        ]
    if not _is_link(index, "codecs"):
        found += [
            (f"codecs/{entry.path}", entry.size_bytes)
            for entry in index.child("codecs").list_files(recursive=False)
            if entry.path.partition(".")[0] not in codecs
        ]
    return found


def _is_link(index: Location, folder: str) -> bool:
    return index.is_local and Path(index.child(folder).path).is_symlink()


def _remove_empty_folders(index: Location, names: list[str]) -> None:
    if not index.is_local:
        return
    for name in names:
        folder = Path(index.child("snapshots", name).path)
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def delete(index: Location, image_ids: Sequence[str] | pa.StringArray | pa.ChunkedArray) -> DeleteResult:
    """Takes images (and rejects) out of the index by their ids: a new snapshot with tombstones.

    Ids that the index does not hold are reported; when it holds none of them nothing is published.

    Raises:
        IndexNotFoundError: nothing is published there.
        IndexLockedError: another run holds the index.
    """
    ids = pc.unique(as_id_array(image_ids))
    read_manifest(index)
    with IndexLock(index, purpose="delete") as lock:
        finish_published(index)
        base = read_manifest(index)
        now = dt.datetime.now(dt.UTC)
        run_id = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        run = {"run_id": run_id, "kind": "edit", "fingerprints": base.fingerprints}
        index.child("staging", run_id, "run.json").write_bytes(json.dumps(run).encode())
        change = Change(run_id, "delete", base.head, removals=[Removal(ids, "deleted")])
        published = commit(index, change, parent=base, base=base, lock=lock, publish_empty=False)
    unknown = published.unknown_ids
    return DeleteResult(
        index=str(index),
        snapshot=published.manifest.snapshot,
        num_deleted=len(ids) - len(unknown),
        num_unknown=len(unknown),
        unknown=tuple(unknown[:SHOWN_IDS]),
        num_images=published.manifest.counts.accepted,
    )
