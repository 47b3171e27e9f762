"""Batches in threads: all are done, errors come out, the caller's threads stay as they were."""

from __future__ import annotations

import threading

import pytest
import torch

from edje_pipeline.stages import side_by_side
from edje_pipeline.stages.side_by_side import SideBySide


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _batches_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "WORTH_S", 0.0)


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
    if 1 < num_threads <= count:
        assert seen == {(True, 1), (False, 1)}  # the first two decide whether the others are
    else:  # too few for every thread, or one thread: by all of torch's, here
        assert seen == {(True, 2)}
    assert torch.get_num_threads() == 2


def test_toy_batches_stay_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "WORTH_S", 60.0)
    pool, done = SideBySide(3), []
    for _ in range(2):
        pool.run(lambda number: done.append((number, threading.current_thread() is threading.main_thread())), 5)
    assert done == [(number, True) for number in range(5)] * 2


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
