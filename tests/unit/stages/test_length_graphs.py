"""Replays by a stand-in that runs the pass on the CPU; the CUDA graphs themselves where there is a GPU."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from edje_pipeline.stages.length_graphs import MAX_GRAPHS, RECORD_AFTER, LengthGraphs

NUM_TOKENS, WIDTH, BATCH_TOKENS = 3, 8, 400
CPU = torch.device("cpu")


def toy_forward(input_ids: Tensor, images: Tensor, image_index: Tensor | None) -> Tensor:
    assert image_index is None
    return input_ids.float().sum(1) + images.float().sum((1, 2))


class PassOnCpu:
    """Replays as a graph does: over whatever the buffers hold, all rows of them."""

    def __init__(self, graphs: CpuGraphs, most: int, length: int) -> None:
        self.graphs, self.sizes, self.num_replays = graphs, (most, length), 0

    def replay(self) -> None:
        self.num_replays += 1
        self.graphs._pass(*self.sizes)


class CpuGraphs(LengthGraphs):
    def _record(self, most: int, length: int) -> PassOnCpu:
        return PassOnCpu(self, most, length)


def make(kind: type[LengthGraphs], device: torch.device = CPU) -> LengthGraphs:
    return kind(toy_forward, NUM_TOKENS, WIDTH, torch.float32, device, BATCH_TOKENS)


@torch.inference_mode()
def run_batches(graphs: LengthGraphs, length: int, count: int, device: torch.device = CPU) -> None:
    """Batches of a length, of full and nearly full size, with and without shared images, against the plain pass."""
    most = BATCH_TOKENS // (length + NUM_TOKENS + 1)
    for number in range(count):
        num_pairs = max(1, most - number % 2)
        # Drawn on the CPU: after a recording that broke off CUDA's own generator refuses.
        ids = torch.randint(1, 50, (num_pairs, length)).to(device)
        images = torch.randn(num_pairs, NUM_TOKENS, WIDTH).to(device)
        index = None if number % 3 else torch.randint(0, num_pairs, (num_pairs,)).to(device)
        out = torch.empty(num_pairs, device=device)
        graphs.forward_into(out, ids, images, index)
        torch.testing.assert_close(out, toy_forward(ids, images if index is None else images[index], None))


def test_replays_give_what_the_plain_pass_gives() -> None:
    graphs = make(CpuGraphs)
    for _ in range(2):
        for length in (2, 5, 3):
            run_batches(graphs, length, RECORD_AFTER + 4)
    assert graphs.num_recorded == 3
    assert all(graph.num_replays > RECORD_AFTER for graph in graphs._graphs.values())  # type: ignore[attr-defined]


@pytest.mark.slow
def test_plain_and_recorded_passes_are_compiled_as_one_form() -> None:
    counter = CompileCounter()
    compiled = torch.compile(toy_forward, backend=counter, dynamic=True)
    graphs = CpuGraphs(compiled, NUM_TOKENS, WIDTH, torch.float32, CPU, BATCH_TOKENS, compiled=True)
    for length in (4, 5, 3):
        run_batches(graphs, length, RECORD_AFTER + 2)
    assert graphs.num_recorded == 3
    assert counter.frame_count == 1


def test_small_batches_are_not_replayed() -> None:
    graphs = make(CpuGraphs)
    for _ in range(RECORD_AFTER + 3):
        ids, images, out = torch.ones(3, 2, dtype=torch.int64), torch.randn(3, NUM_TOKENS, WIDTH), torch.empty(3)
        graphs.forward_into(out, ids, images, None)  # 66 would fit
    assert graphs.num_recorded == 0


def test_the_number_of_graphs_is_bounded() -> None:
    graphs = make(CpuGraphs)
    for length in range(1, MAX_GRAPHS + 12):
        run_batches(graphs, length, RECORD_AFTER + 1)
    assert graphs.num_recorded == MAX_GRAPHS
    run_batches(graphs, MAX_GRAPHS + 5, 3)


def test_where_recording_fails_the_plain_pass_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(LengthGraphs):
        num_tries = 0

        def _record(self, most: int, length: int) -> PassOnCpu:
            self.num_tries += 1
            raise RuntimeError("capture refused")

    graphs = make(Broken)
    with caplog.at_level(logging.WARNING):
        for length in (2, 4):
            run_batches(graphs, length, RECORD_AFTER + 3)
    assert (graphs.num_recorded, graphs.num_tries) == (0, 1)  # type: ignore[attr-defined]
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graphs, scoring goes on without (RuntimeError: capture refused)"
    ]


def test_errors_of_the_pass_itself_are_raised() -> None:
    def wrong(input_ids: Tensor, images: Tensor, image_index: Tensor | None) -> Tensor:
        raise ValueError("wrong weights")

    graphs = LengthGraphs(wrong, NUM_TOKENS, WIDTH, torch.float32, CPU, BATCH_TOKENS)
    ids, images = torch.ones(66, 2, dtype=torch.int64), torch.randn(66, NUM_TOKENS, WIDTH)
    for _ in range(RECORD_AFTER + 2):
        with pytest.raises(ValueError, match="wrong weights"):
            graphs.forward_into(torch.empty(66), ids, images, None)


@pytest.mark.gpu
def test_graphs_of_many_lengths_hold_bounded_memory() -> None:
    device = torch.device("cuda")
    graphs = make(LengthGraphs, device)
    with torch.inference_mode():
        for length in range(1, MAX_GRAPHS + 4):
            run_batches(graphs, length, RECORD_AFTER + 2, device)
        before = torch.cuda.memory_reserved()
        for length in range(1, MAX_GRAPHS + 12):
            run_batches(graphs, length, RECORD_AFTER + 2, device)
    assert graphs.num_recorded == MAX_GRAPHS
    assert torch.cuda.memory_reserved() == before


@pytest.mark.gpu
def test_a_pass_that_cannot_be_recorded_runs_plain_on_a_gpu() -> None:
    def waits(input_ids: Tensor, images: Tensor, image_index: Tensor | None) -> Tensor:
        assert input_ids.max().item() < 50  # waits for the GPU, which a recording may not do
        return toy_forward(input_ids, images, image_index)

    device = torch.device("cuda")
    graphs = LengthGraphs(waits, NUM_TOKENS, WIDTH, torch.float32, device, BATCH_TOKENS)
    with torch.inference_mode():
        run_batches(graphs, 2, RECORD_AFTER + 4, device)
    assert graphs.num_recorded == 0
