"""What a writer finds when it takes the lock: open runs, and runs killed after their publish."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edje_pipeline.errors import CorruptionError
from edje_pipeline.storage.cleanup import files_below, remove_files, remove_tree
from edje_pipeline.storage.faults import crash_point
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import Manifest, find_manifest, is_safe_path, read_head, read_json
from edje_pipeline.storage.snapshot_files import lookup_parts, read_rejects, read_shards


def open_runs(index: Location) -> list[dict[str, Any]]:
    """The `run.json` of every unfinished extraction, oldest first."""
    return [run for run in _staged(index) if run.get("kind") == "run"]


def staged_run_ids(index: Location) -> list[str]:
    """Names of all folders in staging/, whatever is in them."""
    return [name for name in index.child("staging").list_dirs() if is_safe_path(name)]


def _staged(index: Location) -> Iterator[dict[str, Any]]:
    for name in staged_run_ids(index):
        try:
            run = read_json(index.child("staging", name, "run.json"))
        except FileNotFoundError:
            continue
        except CorruptionError:
            continue  # nothing can be resumed from it; the next publish removes the folder
        if run.get("run_id") == name and isinstance(run.get("fingerprints"), dict):
            yield {"config": {}, **run}


@dataclass(frozen=True)
class PublishedRun:
    """A run that was killed after its manifest swap and is tidied up now."""

    manifest: Manifest
    fingerprints: dict[str, str]
    """With which it was begun; those of the manifest may say more (a codebook trained on the way)."""


def finish_published(index: Location) -> PublishedRun | None:
    """Completes what a killed writer left: to be called with the lock held, before anything else.

    Returns:
        The run of the current manifest if it was still in staging: it was killed between the manifest
        swap and the end of its clean-up. Else None.
    """
    manifest = find_manifest(index)
    names = staged_run_ids(index)
    if manifest is not None and manifest.run_id in names:
        begun = next((run for run in open_runs(index) if run["run_id"] == manifest.run_id), None)
        remove_leftovers(index, manifest)
        return PublishedRun(manifest, begun["fingerprints"] if begun else manifest.fingerprints)
    resumable = {run["run_id"] for run in open_runs(index)}
    for name in names:
        if name not in resumable:  # killed before run.json, or an edit (delete) that was cut off
            remove_unpublished_snapshots(index, name)
            remove_tree(index, f"staging/{name}")
    return None


def remove_unpublished_snapshots(index: Location, run_id: str) -> None:
    """Removes snapshot folders that a run of this id wrote without reaching the manifest swap."""
    manifest = find_manifest(index)
    for name in index.child("snapshots").list_dirs():
        if name.endswith(f"-{run_id}") and (manifest is None or manifest.snapshot != name):
            remove_tree(index, f"snapshots/{name}")


def remove_leftovers(index: Location, manifest: Manifest) -> list[str]:
    """Removes files that no snapshot names, then the staging folder of the published run.

    Files of other unfinished runs stay. The staging folder goes last, so that a kill in here is
    recognised and the clean-up done again.
    """
    crash_point("publish.cleaning")
    try:
        needed = referenced_files(index, manifest)
    except CorruptionError:
        # An older snapshot cannot say what it needs, so nothing may go; `verify` reports it, `prune` drops it.
        _remove_staging(index, manifest.run_id)
        return []
    unfinished = tuple(run["run_id"] for run in open_runs(index) if run["run_id"] != manifest.run_id)

    def is_needed(path: str) -> bool:
        name = path.rpartition("/")[2]
        # A temporary name is `.tmp-<unique>-<the end of the target's name>`.
        return path in needed or any(run_id in name for run_id in unfinished)

    removed = []
    for folder in ("shards", "rejects"):
        removed += remove_files(index, folder, is_needed=is_needed)
    _remove_staging(index, manifest.run_id)
    crash_point("publish.cleaned")
    return removed


def _remove_staging(index: Location, run_id: str) -> None:
    """`run.json` goes last: it says with which inputs the run was begun."""
    for part in ("plan", "receipts"):
        remove_tree(index, f"staging/{run_id}/{part}")
    remove_tree(index, f"staging/{run_id}")


def referenced_files(index: Location, manifest: Manifest) -> set[str]:
    """Every path that the current or another stored snapshot names: memory grows with files, not images."""
    needed: set[str] = set()
    for head in stored_snapshots(index, manifest):
        needed |= files_needed_by(index, head)
    return needed


def files_needed_by(index: Location, head: Manifest) -> set[str]:
    """Every path that one snapshot names, its own head included."""
    paths = {entry.path for entry in read_shards(index, head)}
    paths |= {entry.path for entry in read_rejects(index, head)}
    paths |= {part.path for part in lookup_parts(index, head)}
    paths |= {ref.path for ref in head.files.values()}
    paths.add(f"snapshots/{head.snapshot}/head.json")
    return paths


def stored_snapshots(index: Location, manifest: Manifest) -> list[Manifest]:
    """Heads of all published snapshots, oldest first, the current one included."""
    staged = staged_run_ids(index)
    heads = []
    for name in index.child("snapshots").list_dirs():
        if name == manifest.snapshot:
            heads.append(manifest)
        elif any(name.endswith(f"-{run_id}") for run_id in staged if run_id != manifest.run_id):
            continue  # being written
        elif index.child("snapshots", name, "head.json").exists():
            heads.append(read_head(index, name))
    return heads


def unreferenced_files(index: Location, manifest: Manifest) -> list[str]:
    """Files in shards/ and rejects/ that no snapshot and no unfinished run accounts for."""
    needed = referenced_files(index, manifest)
    staged = staged_run_ids(index)
    found = [path for folder in ("shards", "rejects") for path in files_below(index, folder)]
    return [path for path in found if path not in needed and not any(run_id in path for run_id in staged)]
