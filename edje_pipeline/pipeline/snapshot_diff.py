"""How the ids and rejects of two snapshots differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location

NUM_EXAMPLES = 5


@dataclass(frozen=True)
class SnapshotDiff:
    """Old against new."""

    num_kept: int
    num_lost: int
    num_added: int
    lost_examples: tuple[str, ...]
    added_examples: tuple[str, ...]
    num_rejected_before: int
    num_rejected_after: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def to_lines(self) -> list[str]:
        """For a terminal."""
        lines = [
            f"ids             {self.num_kept:,} kept, {self.num_lost:,} lost, {self.num_added:,} added",
            f"rejects         {self.num_rejected_before:,} before, {self.num_rejected_after:,} now",
        ]
        for label, examples in (("lost", self.lost_examples), ("added", self.added_examples)):
            if examples:
                lines.append(f"{label:<15} {', '.join(examples)}"[:78])
        return lines


def compare_snapshots(location: Location, old: str, new: str) -> SnapshotDiff:
    """Merges the two sorted id lists: memory does not grow with the number of images."""
    before, after = Index.open(location, old), Index.open(location, new)
    kept = 0
    lost: list[str] = []
    added: list[str] = []
    num = {"lost": 0, "added": 0}
    left, right = _ids(before), _ids(after)
    one, two = next(left, None), next(right, None)
    while one is not None or two is not None:
        if one == two:
            kept += 1
            one, two = next(left, None), next(right, None)
        elif two is None or (one is not None and one.encode() < two.encode()):
            num["lost"] += 1
            if len(lost) < NUM_EXAMPLES:
                lost.append(str(one))
            one = next(left, None)
        else:
            num["added"] += 1
            if len(added) < NUM_EXAMPLES:
                added.append(two)
            two = next(right, None)
    return SnapshotDiff(
        kept, num["lost"], num["added"], tuple(lost), tuple(added),
        before.manifest.counts.rejected, after.manifest.counts.rejected,
    )  # fmt: skip


def _ids(index: Index) -> Iterator[str]:
    for piece in index.iter_ids():
        yield from piece.to_pylist()
