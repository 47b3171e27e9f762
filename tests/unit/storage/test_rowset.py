"""RowSet against a plain Python set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje_pipeline.storage.rowset import RowSet

ranges_strategy = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda x: (x[0], x[0] + x[1])))


@given(ranges_strategy, ranges_strategy)
def test_equals_a_set_of_numbers(ranges: list[tuple[int, int]], asked: list[tuple[int, int]]) -> None:
    rows = RowSet.from_ranges(ranges)
    plain = {row for start, end in ranges for row in range(start, end)}
    assert rows.num_rows == len(plain)
    assert {row for start, end in rows for row in range(start, end)} == plain
    assert all(end < start for (_, end), (start, _) in zip(rows.ranges, rows.ranges[1:], strict=False))
    assert rows.overlaps(asked) == any(row in plain for start, end in asked for row in range(start, end))
    missing = {row for start, end in rows.missing(50) for row in range(start, end)}
    assert missing == set(range(50)) - plain
    assert all((row in rows) == (row in plain) for row in range(75))


@pytest.mark.parametrize("bad", [(3, 3), (4, 2), (-1, 2)])
def test_refuses_an_empty_or_reversed_range(bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not a range of rows"):
        RowSet.from_ranges([bad])


def test_touching_ranges_become_one() -> None:
    assert RowSet.from_ranges([(0, 2), (4, 6), (2, 4)]).ranges == [(0, 6)]
