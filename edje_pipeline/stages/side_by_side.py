"""Batches on a CPU, each in a thread of its own, instead of one batch by all of torch's threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

WORTH_S = 0.02
"""Seconds of a batch below which threads only get into each other's way: Python lets one of them speak at a time, and
a toy model has little else to do."""


class SideBySide:
    """Runs batches on a CPU in threads, each by one of torch's own: 1.1 to 2.4 times as fast as one by all of them.

    A batch fits the cache of one core, and threads with a batch each do not wait for one another after every
    operator. What a batch gives does not depend on the number of threads (docs/performance.md, Threads).
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None
        self._is_worth_it: bool | None = None

    def run(self, work: Callable[[int], None], count: int) -> None:
        """Calls `work` with 0 to count - 1. Fewer than threads go one after the other, by all of torch's threads."""
        if self._num_threads == 1 or count < self._num_threads:
            for number in range(count):
                work(number)
            return
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            first = self._decide(work)
            if not self._is_worth_it:
                for number in range(first, count):
                    work(number)
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(
                    self._num_threads, "edje-batch", initializer=torch.set_num_threads, initargs=(1,)
                )
            # Inference mode is each thread's own.
            for _ in self._pool.map(torch.inference_mode()(work), range(first, count)):
                pass
        finally:
            torch.set_num_threads(before)

    def _decide(self, work: Callable[[int], None]) -> int:
        """Times the second batch of the first call, whose first one warms up; returns how many are done."""
        if self._is_worth_it is not None:
            return 0
        work(0)
        started = time.perf_counter()
        work(1)
        self._is_worth_it = time.perf_counter() - started > WORTH_S
        return 2
