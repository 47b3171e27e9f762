"""The encode worker when two threads call it, as Ray does."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest

from edje_pipeline.pipeline import workers
from edje_pipeline.stages import encode


def test_one_forward_pass_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, guard = 0, 0, threading.Lock()

    def slow(table: pa.Table, encoder: Any, image_size: Any) -> pa.Table:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with guard:
            running -= 1
        return table

    monkeypatch.setattr(encode, "encode_table", slow)
    monkeypatch.setattr(workers, "make_encoder", lambda job: None)
    monkeypatch.setattr(workers, "_image_size", lambda job: (1, 1))
    worker = workers.EncodeWorker(None)  # type: ignore[arg-type]
    table = pa.table({"row": [1, 2]})
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: next(worker(table)), range(8)))
    assert most == 1
    seconds = [part.column("metric_encode_s").to_pylist()[0] * 2 for part in done]
    assert all(0.015 < value < 0.5 for value in seconds)  # a call's own time, not that of waiting for its turn
