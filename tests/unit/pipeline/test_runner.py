"""Units, shard sizes and limits: the arithmetic of a run."""

from __future__ import annotations

import numpy as np
import pytest

from edje_pipeline.errors import RejectLimitError
from edje_pipeline.pipeline.job import SHARD_BYTES, UNIT_BYTES, choose_shard_rows, choose_unit_rows
from edje_pipeline.pipeline.runner import check_reject_limit, units_of
from edje_pipeline.pipeline.workers import ranges_of, row_ranges
from edje_pipeline.storage.rowset import RowSet


def test_units_cover_exactly_the_missing_rows() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        done = RowSet()
        for start in rng.integers(0, 300, 6).tolist():
            done.add([(start, start + int(rng.integers(1, 30)))])
        missing = done.missing(311)
        units = units_of(missing, 32)
        assert len(set(units.column("unit").to_pylist())) == units.num_rows
        covered = RowSet()
        for unit, flat in zip(units.column("unit").to_pylist(), units.column("ranges").to_pylist(), strict=True):
            for start, end in ranges_of(flat):
                assert start // 32 == unit == (end - 1) // 32
                assert not covered.overlaps([(start, end)])
                covered.add([(start, end)])
        assert covered == RowSet.from_ranges(missing)


def test_row_ranges_of_any_order_and_no_repeats() -> None:
    assert row_ranges(np.array([5, 3, 4, 9])) == ((3, 6), (9, 10))
    with pytest.raises(ValueError, match="twice"):
        row_ranges(np.array([1, 2, 1]))


@pytest.mark.parametrize(
    ("pixels", "batch", "images"), [(384 * 384 * 3, 64, None), (3072, 16, 61), (150_528, 24, None)]
)
def test_units_are_whole_batches_and_fit_a_block(pixels: int, batch: int, images: int | None) -> None:
    rows = choose_unit_rows(pixels, batch, images)
    assert rows % batch == 0
    assert rows == batch or rows * pixels <= UNIT_BYTES


def test_shards_stay_below_their_size_and_a_small_part_of_the_run() -> None:
    assert choose_shard_rows(49_152, 10**9) * 49_152 <= SHARD_BYTES
    assert choose_shard_rows(1024, 64_000) == 1000
    assert choose_shard_rows(1024, 10) == 16


def test_reject_limit() -> None:
    check_reject_limit(5, 10, 100, None)
    check_reject_limit(5, 10, 100, 0.05)
    with pytest.raises(RejectLimitError, match="6 of 10"):
        check_reject_limit(6, 10, 100, 0.05)
