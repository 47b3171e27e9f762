"""A set of plan rows as sorted, disjoint, half-open ranges: what a run has finished, in little memory."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

Range = tuple[int, int]


class RowSet:
    """Rows 0.. as ranges [start, end). Its size grows with the number of gaps, not of rows."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    @classmethod
    def from_ranges(cls, ranges: Iterable[Sequence[int]]) -> RowSet:
        """Ranges in any order, overlapping or not."""
        rows = cls()
        rows.add(ranges)
        return rows

    def add(self, ranges: Iterable[Sequence[int]]) -> None:
        """Adds every row of `ranges`; ranges that touch become one.

        Raises:
            ValueError: a range is empty, reversed or negative.
        """
        for start, end in ranges:
            if start < 0 or end <= start:
                raise ValueError(f"[{start}, {end}) is not a range of rows; expected 0 <= start < end")
            first = bisect_left(self._ends, start)  # the first range that ends at or after our start
            last = bisect_right(self._starts, end)  # one past the last range that starts at or before our end
            if first < last:
                start = min(start, self._starts[first])  # noqa: PLW2901
                end = max(end, self._ends[last - 1])  # noqa: PLW2901
            self._starts[first:last] = [start]
            self._ends[first:last] = [end]

    def overlaps(self, ranges: Iterable[Sequence[int]]) -> bool:
        """True when one of the ranges shares a row with this set."""
        for start, end in ranges:
            first = bisect_right(self._ends, start)
            if first < len(self._starts) and self._starts[first] < end:
                return True
        return False

    def missing(self, total: int) -> list[Range]:
        """The ranges of [0, total) that are not in the set, in order."""
        gaps: list[Range] = []
        position = 0
        for start, end in self:
            if start >= total:
                break
            if start > position:
                gaps.append((position, start))
            position = max(position, end)
        if position < total:
            gaps.append((position, total))
        return gaps

    @property
    def num_rows(self) -> int:
        """How many rows are in the set."""
        return sum(self._ends) - sum(self._starts)

    @property
    def ranges(self) -> list[Range]:
        """The ranges in order."""
        return list(self)

    def __contains__(self, row: int) -> bool:
        position = bisect_right(self._starts, row) - 1
        return position >= 0 and row < self._ends[position]

    def __iter__(self) -> Iterator[Range]:
        return iter(zip(self._starts, self._ends, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowSet) and self.ranges == other.ranges

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RowSet({self.num_rows} rows in {len(self._starts)} ranges)"
