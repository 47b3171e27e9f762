"""CUDA graphs of a forward pass, one for each text length: a replay costs one launch instead of hundreds.

The kernels of a batch small enough for the GPU's cache are shorter than their launches from Python.
A graph has fixed sizes, so a batch is copied into buffers that hold the most pairs a length allows;
rows of the buffers beyond the batch hold an older batch and their logits are not looked at.

What bounds the memory: the buffers serve all lengths; all graphs lie in one pool, where a later one
reuses what an earlier one freed, as none runs beside another; at most `MAX_GRAPHS` are recorded. Where
recording fails, the plain pass goes on alone.

Shape letters: b pairs of a batch, B the most pairs of a length, L tokens of a text, U images, M
tokens of an image, E width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

FILLED = 0.75
"""Batches smaller than this share of B are not worth the wasted rows."""
RECORD_AFTER = 3
"""Full batches of a length before its pass is recorded: short runs need none."""
MAX_GRAPHS = 32
"""Lengths that are recorded, the first that come often: captions have fewer, and a graph holds memory for good."""


PLAIN_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of passes that are not recorded, which come in a new shape nearly every time. Without cuDNN's attention, the
fastest by 110 us a layer, but it plans anew for each shape, which others saw take 0.4 s; it was not measured here."""


class Recording(Protocol):
    """What is needed of `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Runs the recorded pass over what the buffers hold now."""


class LengthGraphs:
    """Runs forward passes on a GPU, by replay where it can. Calls must come from one thread at a time."""

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        num_tokens: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        batch_tokens: int,
        *,
        compiled: bool = False,
    ) -> None:
        """
        Args:
            forward: as `JointEncoder.forward_dense`.
            batch_tokens: text and image tokens of a batch, at most.
            compiled: `forward` is: its attention is chosen when it is compiled.
        """
        self._forward = forward
        self._num_tokens, self._batch_tokens = num_tokens, batch_tokens
        most = max(1, batch_tokens // (num_tokens + 2))
        self._is_compiled = compiled
        with torch.inference_mode():  # as the plain pass's tensors are: one form, compiled once
            self._ids = torch.zeros(batch_tokens, dtype=torch.int64, device=device)
            self._images = torch.zeros((most, num_tokens, width), dtype=dtype, device=device)
            self._logits = torch.zeros(most, device=device)
        self._stream: Any = None
        self._pool: Any = None
        self._graphs: dict[int, Recording] = {}
        self._seen: Counter[int] = Counter()
        self._has_failed = False

    @property
    def num_recorded(self) -> int:
        """Lengths that are replayed."""
        return len(self._graphs)

    def forward_into(self, out: Tensor, input_ids: Tensor, images: Tensor, image_index: Tensor | None) -> None:
        """Logits of a batch into `out` (b,); the rest as `JointEncoder.forward_dense` takes it."""
        num_pairs, length = input_ids.shape
        most = self._batch_tokens // (length + self._num_tokens + 1)
        graph = self._graph_of(length, most) if FILLED * most <= num_pairs <= most else None
        if graph is None:
            # One image a pair here too: what is compiled is compiled for one form only.
            filled = images if image_index is None else images.index_select(0, image_index)
            with nullcontext() if self._is_compiled else sdpa_kernel(PLAIN_ATTENTION):
                out.copy_(self._forward(input_ids, filled, None))
            return
        self._ids[: num_pairs * length].view(num_pairs, length).copy_(input_ids)
        filled = self._images[:num_pairs]
        if image_index is None:
            filled.copy_(images)
        else:
            torch.index_select(images, 0, image_index, out=filled)
        graph.replay()
        out.copy_(self._logits[:num_pairs])

    def _graph_of(self, length: int, most: int) -> Recording | None:
        """The length's graph, recorded now if its turn has come; None: the plain pass is to do."""
        if length in self._graphs:
            return self._graphs[length]
        self._seen[length] += 1
        if self._has_failed or len(self._graphs) >= MAX_GRAPHS or self._seen[length] <= RECORD_AFTER:
            return None
        try:
            self._graphs[length] = self._record(most, length)
        except Exception as error:  # noqa: BLE001  # the plain pass, next, raises what is not recording's fault
            # Once is enough: a recording that broke off can leave PyTorch's allocator and random numbers, of which
            # scoring draws none, in recording mode.
            self._has_failed = True
            logger.warning("no CUDA graphs, scoring goes on without (%s: %s)", type(error).__name__, error)
            return None
        return self._graphs[length]

    def _pass(self, most: int, length: int) -> None:
        """The forward pass over the first `most` rows of the buffers; its logits lie in `_logits`."""
        input_ids = self._ids[: most * length].view(most, length)
        self._logits[:most].copy_(self._forward(input_ids, self._images[:most], None))

    def _record(self, most: int, length: int) -> Recording:
        device = self._ids.device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            self._pass(most, length)  # compiles what is compiled at the first call, which a recording may not do
            self._stream.synchronize()
            # Not `torch.cuda.graph`: it collects garbage of the whole process each time.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._pass(most, length)
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph
