"""Batches in threads: all are done, errors come out, the caller's threads stay as they were."""

from __future__ import annotations

import threading

import pytest
import torch

from edje_pipeline.stages.side_by_side import SideBySide


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("num_threads", "count"), [(1, 5), (3, 2), (3, 3), (3, 40)])
def test_every_batch_is_done_once_in_inference_mode(num_threads: int, count: int) -> None:
    torch.set_num_threads(2)
    done, inside, seen, guard = [], set(), set(), threading.Lock()

    def work(number: int) -> None:
        with guard:
            done.append(number)
            inside.add(torch.is_inference_mode_enabled())
            seen.add((threading.get_ident() == main, torch.get_num_threads()))

    main = threading.get_ident()
    with torch.inference_mode():
        SideBySide(num_threads).run(work, count)
    assert sorted(done) == list(range(count))
    assert inside == {True}
    # Too few for every thread, or one thread: by all of torch's, here.
    assert seen == ({(False, 1)} if 1 < num_threads <= count else {(True, 2)})
    assert torch.get_num_threads() == 2


def test_an_error_comes_out_and_the_threads_stay_usable() -> None:
    torch.set_num_threads(2)
    pool = SideBySide(2)

    def work(number: int) -> None:
        if number == 3:
            raise ValueError("batch 3")

    for _ in range(2):
        with pytest.raises(ValueError, match="batch 3"):
            pool.run(work, 8)
        assert torch.get_num_threads() == 2
    pool.run(lambda number: None, 8)
