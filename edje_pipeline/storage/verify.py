"""Proves an index, or says what is wrong with it, one problem a line."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from edje_pipeline.errors import CodecError, CorruptionError, EdjeError, StorageError
from edje_pipeline.progress import ProgressReport, format_bytes, format_duration
from edje_pipeline.storage.codecs import Codec, load_codec
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.manifest import MANIFEST_NAME, Manifest, find_manifest, read_head, read_manifest
from edje_pipeline.storage.parquet_io import reading
from edje_pipeline.storage.recovery import open_runs, unreferenced_files
from edje_pipeline.storage.shards import RejectEntry, ShardEntry
from edje_pipeline.storage.snapshot_files import LookupPart, lookup_parts, read_rejects, read_shards, read_tombstones
from edje_pipeline.storage.verify_rows import Problem, RowChecks


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and every problem found."""

    index: str
    snapshot: str
    quick: bool
    problems: tuple[Problem, ...]
    num_images: int
    num_rejects: int
    num_shards: int
    size_bytes: int
    wall_s: float
    unfinished_runs: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        return not self.problems

    @property
    def exit_code(self) -> int:
        return 1 if self.problems else 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "snapshot": self.snapshot,
            "mode": "quick" if self.quick else "full",
            "good": self.is_good,
            "num_images": self.num_images,
            "num_rejects": self.num_rejects,
            "num_shards": self.num_shards,
            "size_bytes": self.size_bytes,
            "wall_s": round(self.wall_s, 3),
            "unfinished_runs": list(self.unfinished_runs),
            "problems": [problem.to_dict() for problem in self.problems],
        }

    def to_text(self) -> str:
        lines = [f"problem: {problem.to_text()}" for problem in self.problems]
        lines += [f"note: run {run} is unfinished; run its command again to finish it" for run in self.unfinished_runs]
        what = "sizes, footers and lists" if self.quick else "every byte and every row"
        verdict = "good" if self.is_good else f"{len(self.problems)} problems"
        lines.append(
            f"{self.index} ({self.snapshot}): {verdict}. Checked {what} of {self.num_images:,} images,\n"
            f"{self.num_rejects:,} rejects, {self.num_shards:,} shards, {format_bytes(self.size_bytes)} "
            f"in {format_duration(self.wall_s)}."
        )
        return "\n".join(lines)


@dataclass
class _Lists:
    """What could be read of a snapshot; None where its list is damaged."""

    shards: list[ShardEntry] | None = None
    rejects: list[RejectEntry] | None = None
    parts: list[LookupPart] | None = None
    tombstones: Any = None
    problems: list[Problem] = field(default_factory=list)


def verify(
    index: Location,
    *,
    snapshot: str | None = None,
    quick: bool = False,
    progress: Callable[[int], ProgressReport] | None = None,
) -> VerifyReport:
    """Checks a snapshot against everything it says of itself.

    Args:
        index: root of the index.
        snapshot: the current one unless named.
        quick: sizes, footers and lists only; else every byte is hashed and every row decoded.
        progress: makes a display for a number of files; called once.

    Raises:
        IndexNotFoundError, FormatVersionError: there is nothing that could be verified.
        StorageError: the store cannot be reached: no verdict.
    """
    started = time.monotonic()
    try:
        manifest = read_head(index, snapshot) if snapshot else read_manifest(index)
    except CorruptionError as error:
        problem = Problem("manifest", MANIFEST_NAME, str(error))
        return VerifyReport(str(index), "", quick, (problem,), 0, 0, 0, 0, time.monotonic() - started)
    lists = _read_lists(index, manifest)
    problems = lists.problems
    if not snapshot:
        problems += _check_head(index, manifest)
    problems += _check_counts(manifest, lists)
    codec, found = _check_codec(index, manifest)
    problems += found
    rows = RowChecks(index, manifest, codec, quick=quick)
    num_files = sum(len(group or ()) for group in (lists.shards, lists.rejects, lists.parts))
    display = progress(num_files) if progress else ProgressReport("verify", num_files, unit="files", quiet=True)
    display.start()
    for found_here in rows.run(lists.shards, lists.rejects, lists.parts, lists.tombstones):
        problems += found_here
        display.update(1, problems=len(problems))
    display.stop()
    problems += _check_extra(index, manifest)
    counts = manifest.counts
    return VerifyReport(
        index=str(index),
        snapshot=manifest.snapshot,
        quick=quick,
        problems=tuple(problems),
        num_images=counts.accepted,
        num_rejects=counts.rejected,
        num_shards=counts.shards,
        size_bytes=counts.shard_bytes,
        wall_s=time.monotonic() - started,
        unfinished_runs=tuple(run["run_id"] for run in open_runs(index)),
    )


def _read_lists(index: Location, manifest: Manifest) -> _Lists:
    lists = _Lists()
    readers: dict[str, tuple[str, Callable[[Location, Manifest], Any]]] = {
        "shards": ("shards", read_shards),
        "rejects": ("rejects", read_rejects),
        "ids": ("parts", lookup_parts),
        "tombstones": ("tombstones", read_tombstones),
    }
    for key, (name, reader) in readers.items():
        try:
            setattr(lists, name, reader(index, manifest))
        except CorruptionError as error:
            lists.problems.append(Problem("list", manifest.files[key].path, str(error)))
    return lists


def _check_head(index: Location, manifest: Manifest) -> Iterator[Problem]:
    path = f"snapshots/{manifest.snapshot}/head.json"
    location = index.child(path)
    try:
        with reading(location, "head"):
            same = location.read_bytes(max_bytes=1 << 26) == index.child(MANIFEST_NAME).read_bytes(max_bytes=1 << 26)
    except (CorruptionError, StorageError) as error:
        yield Problem("manifest", path, str(error))
        return
    if not same:
        yield Problem("manifest", MANIFEST_NAME, f"differs from {path}, of which it should be a copy")


def _check_counts(manifest: Manifest, lists: _Lists) -> Iterator[Problem]:
    counts = manifest.counts
    claims: list[tuple[str, int, int]] = [("listed", counts.listed, counts.accepted + counts.rejected)]
    if lists.shards is not None:
        claims += [
            ("shards", counts.shards, len(lists.shards)),
            ("accepted", counts.accepted, sum(entry.live_rows for entry in lists.shards)),
            ("shard_bytes", counts.shard_bytes, sum(entry.size_bytes for entry in lists.shards)),
        ]
        dead = sum(entry.num_rows - entry.live_rows for entry in lists.shards)
        claims.append(("tombstones", counts.tombstones, dead))
        yield from _listed_twice("shards", [entry.path for entry in lists.shards])
    if lists.rejects is not None:
        claims.append(("rejected", counts.rejected, sum(entry.num_rows for entry in lists.rejects)))
        reasons: Counter[str] = Counter()
        for entry in lists.rejects:
            reasons.update(entry.by_reason)
        if dict(reasons) != counts.rejects_by_reason:
            yield Problem(
                "counts",
                MANIFEST_NAME,
                f"rejects_by_reason says {counts.rejects_by_reason}, the reject list {dict(reasons)}",
            )
        yield from _listed_twice("rejects", [entry.path for entry in lists.rejects])
    if lists.parts is not None:
        claims.append(("accepted", counts.accepted, sum(part.num_rows for part in lists.parts)))
    if lists.tombstones is not None:
        claims.append(("tombstones", counts.tombstones, lists.tombstones.num_rows))
    run = manifest.run_counts
    claims.append(("run listed", run.get("listed", 0), run.get("accepted", 0) + run.get("rejected", 0)))
    for name, said, found in claims:
        if said != found:
            yield Problem("counts", MANIFEST_NAME, f"{name} says {said:,}, the lists add up to {found:,}")


def _listed_twice(name: str, paths: list[str]) -> Iterator[Problem]:
    for path, count in Counter(paths).items():
        if count > 1:
            yield Problem("list", path, f"stands {count} times in the list of {name}")


def _check_codec(index: Location, manifest: Manifest) -> tuple[Codec | None, list[Problem]]:
    spec = manifest.tokens
    try:
        codec = load_codec(manifest.codec, index)
    except StorageError:
        raise
    except EdjeError as error:
        return None, [Problem("codec", "codecs", str(error))]
    except FileNotFoundError as error:
        return None, [Problem("codec", "codecs", f"the codebook is missing: {error}")]
    problems = []
    if codec.fingerprint != manifest.fingerprints["codec"]:
        problems.append(
            Problem(
                "codec",
                "codecs",
                f"the stored codec has the fingerprint {codec.fingerprint[:12]}, the manifest names "
                f"{manifest.fingerprints['codec'][:12]}",
            )
        )
    if (codec.num_tokens, codec.dim, codec.payload_bytes) != (spec.num_tokens, spec.dim, spec.payload_bytes):
        problems.append(
            Problem(
                "codec",
                MANIFEST_NAME,
                f"the codec makes {codec.num_tokens} x {codec.dim} tokens of {codec.payload_bytes} bytes, the manifest "
                f"says {spec.num_tokens} x {spec.dim} of {spec.payload_bytes}",
            )
        )
        return None, problems
    return codec, problems


def _check_extra(index: Location, manifest: Manifest) -> Iterator[Problem]:
    try:
        current = find_manifest(index) or manifest
        for path in unreferenced_files(index, current):
            yield Problem("extra", path, "no snapshot names this file; `prune` removes it")
    except (CorruptionError, CodecError) as error:
        yield Problem("snapshot", "snapshots", f"cannot tell which files are in use: {error}")
