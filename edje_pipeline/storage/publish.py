"""Makes a finished run visible: lookup, lists and head of a new snapshot, then one swap of the manifest.

Order: every shard is durable before its receipt; every file of the snapshot is durable before the
manifest names it; the manifest is replaced by one rename (one PUT on an object store); only then are
leftovers removed. A kill before the swap changes nothing a reader can see, and the same command
publishes again; a kill after it is recognised by `recovery.finish_published`.
"""

from __future__ import annotations

import datetime as dt
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from edje_pipeline.errors import CorruptionError, IndexStateError
from edje_pipeline.storage.cleanup import remove_tree
from edje_pipeline.storage.faults import crash_point
from edje_pipeline.storage.location import Location, fsync_dir, storage_errors
from edje_pipeline.storage.lock import IndexLock
from edje_pipeline.storage.lookup_build import LookupResult, Removal, build_lookup
from edje_pipeline.storage.manifest import (
    MANIFEST_NAME,
    Counts,
    HeadFields,
    Manifest,
    find_manifest,
)
from edje_pipeline.storage.recovery import remove_leftovers, remove_unpublished_snapshots
from edje_pipeline.storage.reject_merge import merge_rejects, read_reject_ids
from edje_pipeline.storage.shards import RejectEntry, ShardEntry
from edje_pipeline.storage.snapshot_files import (
    TOMBSTONE_REASONS,
    TOMBSTONE_SCHEMA,
    lookup_parts,
    read_rejects,
    read_shards,
    read_tombstones,
    write_lists,
)
from edje_pipeline.storage.staging import Staging

SAME_IN_ADD = ("backbone", "preprocess", "adapter", "codec")


@dataclass(frozen=True)
class Change:
    """What a new snapshot does to its parent."""

    run_id: str
    action: str
    head: HeadFields
    shards: Sequence[ShardEntry] = ()
    rejects: Sequence[RejectEntry] = ()
    removals: Sequence[Removal] = ()
    run_counts: dict[str, int] | None = None


@dataclass(frozen=True)
class Published:
    """The new manifest and the ids that were to be removed but are not in the index."""

    manifest: Manifest
    unknown_ids: list[str]


def publish(
    staging: Staging,
    *,
    head: HeadFields,
    mode: Literal["new", "add"],
    removed: pa.Table | None = None,
    action: str = "extract",
    part_rows: int | None = None,
) -> Manifest:
    """Publishes a finished run as the current snapshot.

    Args:
        staging: the run; every plan row must be covered.
        head: what the run knows of itself.
        mode: `new`: the snapshot is this run's rows and nothing else. `add`: this run's rows join the
            parent's; a live row with the same image_id is replaced; a row this run rejected leaves.
        removed: (image_id, reason `deleted` | `missing`) to take from the parent; `add` only.
        action: named in the manifest.
        part_rows: about how many ids a lookup file gets; chosen by their number when None.

    Raises:
        IndexStateError: rows are still missing, or `add` onto tokens of another kind.
        DuplicateIdError: one id was written twice.
        IndexLockedError: the lease on an object store was lost meanwhile.
        StorageError: the target cannot be written; run the same command again.
    """
    if staging.already_published is not None:
        return staging.already_published
    crash_point("publish.begin")
    index = staging.index
    receipts = staging.receipts
    _check_complete(staging)
    parent = find_manifest(index)
    base = parent if mode == "add" else None
    if base is not None:
        _check_same_kind(index, base, head)
    accepted = sum(receipt.num_accepted for receipt in receipts)
    rejected = sum(receipt.num_rejected for receipt in receipts)
    change = Change(
        run_id=staging.run_id,
        action=action,
        head=head,
        shards=[receipt.shard for receipt in receipts if receipt.shard],
        rejects=[receipt.rejects for receipt in receipts if receipt.rejects],
        removals=_removals(removed) if mode == "add" else [],
        run_counts={"listed": accepted + rejected, "accepted": accepted, "rejected": rejected},
    )
    return commit(index, change, parent=parent, base=base, lock=staging.lock, part_rows=part_rows).manifest


def commit(
    index: Location,
    change: Change,
    *,
    parent: Manifest | None,
    base: Manifest | None,
    lock: IndexLock,
    part_rows: int | None = None,
    publish_empty: bool = True,
) -> Published:
    """Writes and publishes a snapshot; the lock is held and staging/<run_id> exists. See `publish`.

    With `publish_empty=False` a change that changes nothing leaves the parent current.
    """
    remove_unpublished_snapshots(index, change.run_id)
    snapshot = f"{_next_number(index):06d}-{change.run_id}"
    folder = f"snapshots/{snapshot}"
    old_shards = read_shards(index, base) if base else []
    shards = [*old_shards, *change.shards]
    removals = list(change.removals)
    reject_ids = read_reject_ids(index, change.rejects) if base and change.rejects else None
    if reject_ids is not None:
        removals.append(Removal(reject_ids, "rejected"))
    with tempfile.TemporaryDirectory(prefix="edje-publish-", dir=_scratch_parent(index, change.run_id)) as scratch:
        lookup = build_lookup(
            index,
            folder,
            new_shards=list(enumerate(shards))[len(old_shards) :],
            base=lookup_parts(index, base) if base else [],
            removals=removals,
            shard_paths=[entry.path for entry in shards],
            scratch=Path(scratch),
            part_rows=part_rows,
        )
    crash_point("publish.lookup")
    rejects = list(change.rejects)
    unknown = lookup.unknown
    if base is not None:
        kept, dropped = merge_rejects(
            index,
            read_rejects(index, base),
            run_id=change.run_id,
            parts=lookup.parts,
            num_shards=len(shards),
            new_reject_ids=reject_ids,
            removed_ids=[removal.image_ids for removal in change.removals],
        )
        rejects = [*kept, *rejects]
        unknown = sorted(set(unknown) - dropped)
    crash_point("publish.rejects")
    if not publish_empty and base is not None and not lookup.tombstones and rejects == read_rejects(index, base):
        remove_tree(index, folder)
        remove_tree(index, f"staging/{change.run_id}")
        return Published(base, unknown)
    tombstones = _all_tombstones(index, base, lookup)
    dead = np.bincount(tombstones.column("shard").to_numpy(), minlength=len(shards))
    shards = [entry.with_live_rows(entry.num_rows - int(dead[number])) for number, entry in enumerate(shards)]
    files = write_lists(index, folder, shards=shards, rejects=rejects, parts=lookup.parts, tombstones=tombstones)
    crash_point("publish.lists")
    manifest = Manifest(
        snapshot=snapshot,
        parent=parent.snapshot if parent else None,
        run_id=change.run_id,
        action=change.action,
        created_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        head=change.head,
        counts=_counts(shards, rejects, tombstones.num_rows),
        run_counts=change.run_counts or {"listed": 0, "accepted": 0, "rejected": 0},
        files=files,
    )
    if manifest.counts.accepted != lookup.num_live:
        raise CorruptionError(
            f"the shards hold {manifest.counts.accepted:,} live rows, the id lookup {lookup.num_live:,}; "
            "nothing was published, run `edje-pipeline verify` on the index"
        )
    index.child(folder, "head.json").write_bytes(manifest.to_bytes())
    _sync_folders(index, folder)
    crash_point("publish.head")
    lock.assert_held()
    swap_manifest(index, manifest)
    crash_point("publish.swapped")
    remove_leftovers(index, manifest)
    return Published(manifest, unknown)


def swap_manifest(index: Location, manifest: Manifest) -> None:
    """The one write that changes what a reader sees."""
    index.child(MANIFEST_NAME).write_bytes(manifest.to_bytes())


def _check_complete(staging: Staging) -> None:
    info = staging.plan_info
    if info is None or not isinstance(info.get("num_rows"), int):
        raise IndexStateError(f"run {staging.run_id} has no finished listing; nothing to publish")
    missing = staging.covered.missing(info["num_rows"])
    if missing:
        num = sum(end - start for start, end in missing)
        raise IndexStateError(
            f"run {staging.run_id} has {num:,} of {info['num_rows']:,} rows still to do, the first is row "
            f"{missing[0][0]}; nothing was published, run the same command again"
        )
    if staging.covered.num_rows != info["num_rows"]:
        raise CorruptionError(
            f"the journal of run {staging.run_id} covers {staging.covered.num_rows:,} rows, "
            f"its listing has {info['num_rows']:,}"
        )


def _check_same_kind(index: Location, base: Manifest, head: HeadFields) -> None:
    differing = [part for part in SAME_IN_ADD if base.fingerprints.get(part) != head.fingerprints.get(part)]
    if base.tokens != head.tokens or base.embedding_dim != head.embedding_dim:
        differing = differing or ["token shape"]
    if differing:
        raise IndexStateError(
            f"the tokens in {index} were made with another {', '.join(differing)}; one snapshot has tokens of one "
            "kind. Use `edje-pipeline rebuild` to change it, or another --index"
        )


def _removals(removed: pa.Table | None) -> list[Removal]:
    if removed is None or removed.num_rows == 0:
        return []
    result = []
    for reason in sorted(set(removed.column("reason").to_pylist())):
        if reason not in TOMBSTONE_REASONS:
            raise ValueError(f"the reason {reason!r} is not one of {', '.join(TOMBSTONE_REASONS)}")
        mask = pc.equal(removed.column("reason"), reason)
        ids = removed.filter(mask).column("image_id").cast(pa.string()).combine_chunks()
        result.append(Removal(pa.concat_arrays(ids.chunks) if isinstance(ids, pa.ChunkedArray) else ids, reason))
    return result


def _all_tombstones(index: Location, base: Manifest | None, lookup: LookupResult) -> pa.Table:
    old = [read_tombstones(index, base)] if base else []
    table = pa.concat_tables([*old, *lookup.tombstones] or [TOMBSTONE_SCHEMA.empty_table()])
    return table.sort_by([("shard", "ascending"), ("row", "ascending")])


def _counts(shards: list[ShardEntry], rejects: list[RejectEntry], num_tombstones: int) -> Counts:
    reasons: Counter[str] = Counter()
    for entry in rejects:
        reasons.update(entry.by_reason)
    accepted = sum(entry.live_rows for entry in shards)
    rejected = sum(entry.num_rows for entry in rejects)
    return Counts(
        listed=accepted + rejected,
        accepted=accepted,
        rejected=rejected,
        rejects_by_reason=dict(sorted(reasons.items())),
        shards=len(shards),
        tombstones=num_tombstones,
        shard_bytes=sum(entry.size_bytes for entry in shards),
    )


def _next_number(index: Location) -> int:
    numbers = [name.partition("-")[0] for name in index.child("snapshots").list_dirs()]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=0)


def _scratch_parent(index: Location, run_id: str) -> str | None:
    """Sorted pieces lie beside the run when it is on a disk, where a killed run's are found and removed."""
    if not index.is_local:
        return None
    path = Path(index.child("staging", run_id).path)
    with storage_errors(index):
        path.mkdir(parents=True, exist_ok=True)
    return str(path)


def _sync_folders(index: Location, folder: str) -> None:
    """A file survives a power cut only when the folders above it do."""
    if index.is_local:
        root = Path(index.path)
        for path in (root / folder, root / "snapshots", root / "shards", root / "rejects", root):
            if path.is_dir():
                with storage_errors(index):
                    fsync_dir(path)
