"""Sorting pairs in bounded memory equals sorting them at once, whatever the limit and the pieces they come in."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje_pipeline.pipeline import pair_sort
from edje_pipeline.pipeline.pair_sort import PAIR_SCHEMA, Geometry, PairSorter, sort_pairs
from edje_pipeline.storage.location import Location

SHARDS = ((7, 3), (1, 4), (10, 4))
"""Rows and rows of a row group of three shards; the last row group of two of them is short."""


def geometry() -> Geometry:
    rows, group_rows = np.array([r for r, _ in SHARDS]), np.array([g for _, g in SHARDS])
    groups = -(-rows // group_rows)
    return Geometry(np.append(0, np.cumsum(rows)), np.append(0, np.cumsum(groups)), group_rows)


def pairs_of(rows: list[tuple[int, int]]) -> pa.Table:
    """(query, place) -> PAIR_SCHEMA; the number of a pair is its first-stage score."""
    places = np.array([place for _, place in rows], np.int64)
    first = geometry().first_row
    shards = np.searchsorted(first, places, side="right") - 1
    columns = [[query for query, _ in rows], shards, places - first[shards], np.arange(len(rows))]
    return pa.table(columns, PAIR_SCHEMA.names).cast(PAIR_SCHEMA)


num_places = sum(rows for rows, _ in SHARDS)
rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, num_places - 1)), max_size=80)


@settings(max_examples=150, deadline=None)
@given(rows, st.integers(1, 30), st.integers(1, 9), st.integers(1, 6))
def test_ranges_equal_one_sort(
    rows: list[tuple[int, int]], memory_pairs: int, piece_rows: int, row_group_rows: int
) -> None:
    table, shape = pairs_of(rows), geometry()
    expected, expected_places = sort_pairs(table, shape)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_sort, "RUN_ROW_GROUP_ROWS", row_group_rows)
        sorter = PairSorter(shape, Location.parse(str(Path(folder) / "spill")), memory_pairs)
        for start in range(0, len(rows), piece_rows):
            sorter.add(table.slice(start, piece_rows))
        found = list(sorter.ranges())
        sorter.remove_runs()
        assert not list(Path(folder).rglob("*.parquet"))
    assert pa.concat_tables(part for part, _ in found).equals(expected)
    np.testing.assert_array_equal(np.concatenate([places for _, places in found]), expected_places)
    groups = [shape.groups_of_places(places) for _, places in found if len(places)]
    counts = np.bincount(shape.groups_of_places(expected_places)) if rows else np.zeros(1, int)
    if counts.max() * (1 + len(rows) // memory_pairs) < 2 * memory_pairs:  # however often pairs repeat in runs
        for before, after in itertools.pairwise(groups):
            assert before[-1] < after[0]  # a row group lies in one range
    if len(found) > 1:
        # Counted are the pairs of every run, each without repeats within it: at least the distinct ones.
        largest_group = int(np.bincount(shape.groups_of_places(expected_places)).max())
        assert all(part.num_rows <= memory_pairs + largest_group for part, _ in found)


def test_a_row_group_of_many_times_the_limit_is_cut_by_its_rows() -> None:
    rows = 1000
    shape = Geometry(np.array([0, rows]), np.array([0, 1]), np.array([rows]))
    with tempfile.TemporaryDirectory() as folder:
        sorter = PairSorter(shape, Location.parse(str(Path(folder) / "spill")), 500)
        for query in range(10):
            columns = [[query] * rows, [0] * rows, np.arange(rows), [0.0] * rows]
            sorter.add(pa.table(columns, PAIR_SCHEMA.names).cast(PAIR_SCHEMA))
        found = list(sorter.ranges())
    assert sum(part.num_rows for part, _ in found) == 10 * rows
    assert max(part.num_rows for part, _ in found) <= 500
    for (_, before), (_, after) in itertools.pairwise(found):
        assert before[-1] < after[0]  # an image lies in one range


def test_a_place_of_each_group() -> None:
    shape = geometry()
    places = np.arange(num_places)
    groups = shape.groups_of_places(places)
    assert [shape.place_of_group(group) for group in range(int(groups[-1]) + 1)] == np.unique(
        groups, return_index=True
    )[1].tolist()
    assert shape.place_of_group(int(groups[-1]) + 1) == num_places
