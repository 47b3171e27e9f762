"""The encode worker when several threads call it, as Ray does: one forward pass at a time, packing beside it."""

from __future__ import annotations

import faulthandler
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from edje_pipeline.pipeline import threads, workers
from edje_pipeline.stages import encode
from edje_pipeline.stages.encode import Encoder
from edje_pipeline.storage.codecs import Float16Codec

PAUSE_S = 0.03


class Gauge:
    """How many threads are inside at once."""

    def __init__(self) -> None:
        self.inside, self.most, self._guard = 0, 0, threading.Lock()

    def __enter__(self) -> None:
        with self._guard:
            self.inside += 1
            self.most = max(self.most, self.inside)

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self.inside -= 1


class SlowBackbone(torch.nn.Module):
    """The first pixels as tokens, after a pause."""

    def __init__(self) -> None:
        super().__init__()
        self.gauge = Gauge()

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        with self.gauge:
            time.sleep(PAUSE_S)
        return pixels.flatten(1)[:, :32].reshape(-1, 4, 8).float(), None


class SlowCodec(Float16Codec):
    """Float16 after a pause; says whether a forward pass ran meanwhile."""

    def __init__(self, gauge: Gauge) -> None:
        super().__init__(4, 8)
        self.gauge, self.beside = gauge, 0

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        time.sleep(PAUSE_S / 2)
        self.beside += self.gauge.inside
        time.sleep(PAUSE_S / 2)
        return super().encode(tokens)


def test_one_forward_pass_at_a_time_and_packing_beside_it() -> None:
    backbone = SlowBackbone()
    codec = SlowCodec(backbone.gauge)
    encoder = Encoder(backbone=backbone, adapter=None, codec=codec, embedding_dim=0, micro_batch_size=4)
    encoder._side_by_side = None  # as on a GPU
    pixels = np.random.default_rng(0).integers(0, 255, (8, 6, 4, 4, 3), dtype=np.uint8)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(encoder.encode, pixels))
    assert backbone.gauge.most == 1
    assert codec.beside > 0
    for one, encoded in zip(pixels, found, strict=True):
        want = one.reshape(6, -1)[:, :32].reshape(6, 4, 8).astype(np.float16)
        np.testing.assert_array_equal(codec.decode(encoded.payload), want)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_micro_batches_side_by_side_on_a_cpu(num_threads: int) -> None:
    """Two callers, as ray's two threads: no more forward passes at once than torch may use threads."""
    backbone, before = SlowBackbone(), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        encoder = Encoder(
            backbone=backbone, adapter=None, codec=Float16Codec(4, 8), embedding_dim=0, micro_batch_size=4
        )
        pixels = np.random.default_rng(0).integers(0, 255, (4, 23, 4, 4, 3), dtype=np.uint8)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(encoder.encode, pixels))
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert min(num_threads, 2) <= backbone.gauge.most <= num_threads
    for one, encoded in zip(pixels, found, strict=True):
        want = one.reshape(23, -1)[:, :32].reshape(23, 4, 8).astype(np.float16)
        np.testing.assert_array_equal(Float16Codec(4, 8).decode(encoded.payload), want)


def test_stacks_are_written_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads.dump_stacks_if_asked()
    monkeypatch.setenv("EDJE_STACKS_DIR", str(tmp_path / "stacks"))
    monkeypatch.setattr(threads, "STACKS_EVERY_S", 0.05)
    try:
        threads.dump_stacks_if_asked()
        deadline = time.monotonic() + 10
        while "test_stacks_are_written_when_asked" not in "".join(
            path.read_text() for path in (tmp_path / "stacks").iterdir()
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        faulthandler.cancel_dump_traceback_later()


def test_seconds_of_tables_that_overlap_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gauge = Gauge()

    def slow(table: pa.Table, encoder: Any, image_size: Any) -> pa.Table:
        with gauge:
            time.sleep(PAUSE_S)
        return table

    monkeypatch.setattr(encode, "encode_table", slow)
    monkeypatch.setattr(workers, "make_encoder", lambda job: None)
    monkeypatch.setattr(workers, "_image_size", lambda job: (1, 1))
    started = time.perf_counter()
    worker = workers.EncodeWorker(SimpleNamespace(compile_model=False))  # type: ignore[arg-type]
    table = pa.table({"row": [1, 2]})
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: next(worker(table)), range(8)))
    elapsed = time.perf_counter() - started
    assert gauge.most > 1
    total = {name: sum(sum(part.column(f"metric_{name}").to_pylist()) for part in done)
             for name in ("encode_s", "encode_wait_s")}  # fmt: skip
    assert total["encode_s"] > 2 * PAUSE_S * 0.9
    assert total["encode_s"] + total["encode_wait_s"] < elapsed + PAUSE_S
