"""Pixels to payload bytes in one place: backbone, adapter and codec, fused.

Vision tokens of one image are 24 times its compressed tokens, so they never leave this stage.
Shape letters: B micro-batch, n images of a call, H W pixels, N vision tokens, D backbone width,
M compressed tokens, E adapter output width, P payload bytes, De embedding width.

Every micro-batch is filled up to the same B: the payload of an image does not depend on how many
neighbours it happened to have, so a resumed run writes the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from edje_pipeline.errors import ConfigError, DeviceError, ShapeMismatchError
from edje_pipeline.models.backbone import Backbone
from edje_pipeline.models.cpu_linear import with_frozen_linears
from edje_pipeline.stages.side_by_side import SideBySide
from edje_pipeline.storage.arrow import fixed_binary_from_numpy, numpy_from_fixed_binary
from edje_pipeline.storage.codecs.base import Codec
from edje_pipeline.storage.schema import RejectReason, RejectStage, token_batch_schema

logger = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16", "float16"]
FLOAT16_MAX = 65504.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ConfigError: unknown name.
    """
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if precision not in _DTYPES:
        raise ConfigError(f"precision {precision!r} is not known; choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[precision]


def require_device(name: str) -> torch.device:
    """The device, checked.

    Raises:
        DeviceError: CUDA was asked for and is not there.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(
            "a GPU was asked for, but torch finds no CUDA device on this machine; "
            "run without --num-gpus (or with --num-gpus 0) to use the CPU"
        )
    return torch.device(name)


@dataclass(frozen=True)
class EncodedImages:
    """What `Encoder.encode` returns for n images."""

    payload: np.ndarray
    """uint8 (n, P)"""
    embedding: np.ndarray | None
    """float16 (n, De), L2-normalised before rounding; None when the backbone has none."""
    is_finite: np.ndarray
    """bool (n,): False where tokens or embedding are NaN, infinite or beyond float16."""


@dataclass
class _Pending:
    """A micro-batch on its way back from the device."""

    start: int
    num_images: int
    tokens: Tensor
    embedding: Tensor | None
    is_finite: Tensor
    ready: Any = None
    keep: list[Tensor] = field(default_factory=list)


class Encoder:
    """Holds the models on one device; call `encode` for pixels, `encode_vision_tokens` for stored tokens."""

    def __init__(
        self,
        *,
        backbone: nn.Module | None,
        adapter: nn.Module | None,
        codec: Codec,
        embedding_dim: int,
        device: str = "cpu",
        precision: str = "auto",
        micro_batch_size: int = 16,
        compile_model: bool = False,
    ) -> None:
        """Moves the modules to the device and makes them fit for inference there, in place.

        Args:
            backbone: uint8 (B, H, W, 3) -> tokens (B, N, D) and embedding (B, De) or None; None for an
                encoder of stored vision tokens.
            adapter: (B, N, D) -> (B, M, E); None stores the vision tokens themselves.
            codec: turns (n, M, E) into (n, P).
            embedding_dim: De; 0 leaves the embedding out.
            device: `cpu`, `cuda`, `cuda:1`.
            precision: see `resolve_precision`.
            micro_batch_size: B.
            compile_model: run backbone and adapter through `torch.compile`.
        """
        assert backbone is not None or adapter is not None
        self.device = require_device(device)
        self.dtype = resolve_precision(precision, self.device)
        self.codec, self.embedding_dim = codec, embedding_dim
        self.micro_batch_size = micro_batch_size
        self._backbone = backbone.to(self.device, self.dtype).eval() if backbone is not None else None
        self._adapter = adapter.to(self.device, self.dtype).eval() if adapter is not None else None
        if self.device.type == "cpu" and self.dtype == torch.float32 and not compile_model:
            for module in (self._backbone, self._adapter):
                if module is not None:
                    with_frozen_linears(module)
        self._launching = threading.Lock()
        self._uploads: Any = None
        if self.device.type == "cuda":
            self._uploads = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        # What is compiled is compiled for all of torch's threads.
        on_cpu = self.device.type == "cpu" and not compile_model
        self._side_by_side = SideBySide(torch.get_num_threads()) if on_cpu else None
        self._forward: Callable[[Tensor], tuple[Tensor, Tensor | None, Tensor]] = self._forward_plain
        if compile_model:
            if isinstance(self._backbone, Backbone):
                self._backbone.place_constants(self.device)
            self._forward = torch.compile(self._forward_plain, dynamic=False)

    # -- the models ---------------------------------------------------------------------------------

    def _forward_plain(self, inputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Pixels or vision tokens -> tokens float16 (B, M, E), embedding float16 (B, De), is_finite (B,)."""
        embedding: Tensor | None = None
        if self._backbone is not None:
            tokens, embedding = self._backbone(inputs)
        else:
            tokens = inputs.to(self.dtype)
        if self._adapter is not None:
            tokens = self._adapter(tokens)
        tokens = tokens.float()
        is_finite = (tokens.abs() <= FLOAT16_MAX).flatten(1).all(dim=1)
        if self.embedding_dim and embedding is not None:
            is_finite &= torch.isfinite(embedding).all(dim=1)
            embedding = torch.where(is_finite[:, None], embedding, 0).half()
        else:
            embedding = None
        # Codecs refuse what is not finite; such a row is zeroed here and rejected by its flag.
        # Rounding to float16 first makes a codec change on stored float16 tokens exact.
        tokens = torch.where(is_finite[:, None, None], tokens, 0).half()
        return tokens, embedding, is_finite

    def encode(self, pixels: np.ndarray) -> EncodedImages:
        """uint8 (n, H, W, 3) -> payloads and embeddings of n images."""
        return self._run(pixels)

    def encode_vision_tokens(self, tokens: np.ndarray) -> EncodedImages:
        """Stored vision tokens, float16 (n, N, D), through adapter and codec; no embedding comes out."""
        return self._run(tokens)

    # -- the loop -----------------------------------------------------------------------------------

    def _run(self, inputs: np.ndarray) -> EncodedImages:
        num_images = inputs.shape[0]
        payload = np.zeros((num_images, self.codec.payload_bytes), np.uint8)
        embedding = np.zeros((num_images, self.embedding_dim), np.float16) if self.embedding_dim else None
        is_finite = np.ones(num_images, bool)
        outputs = EncodedImages(payload, embedding, is_finite)
        pending: deque[_Pending] = deque()
        with torch.inference_mode():
            # One caller at a time feeds the device. It lets the next one in before its last micro-batches are
            # done, so that the device finds work while this one's results are fetched and packed.
            with self._launching:
                if self._side_by_side is not None:
                    self._run_side_by_side(inputs, outputs)
                else:
                    self._launch_all(inputs, pending, outputs)
            while pending:
                self._finish(pending.popleft(), outputs)
        return outputs

    def _run_side_by_side(self, inputs: np.ndarray, outputs: EncodedImages) -> None:
        assert self._side_by_side is not None
        size = self.micro_batch_size

        def work(number: int) -> None:
            self._finish(self._launch(inputs, number * size, size), outputs)

        self._side_by_side.run(work, -(-len(inputs) // size))

    def _launch_all(self, inputs: np.ndarray, pending: deque[_Pending], outputs: EncodedImages) -> None:
        start = 0
        while start < len(inputs):
            size = self.micro_batch_size
            try:
                pending.append(self._launch(inputs, start, size))
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                while pending:
                    self._finish(pending.popleft(), outputs)
                torch.cuda.empty_cache()
                self.micro_batch_size = size // 2
                logger.warning("GPU out of memory: batch size lowered from %d to %d", size, size // 2)
                continue
            start += size
            if len(pending) > 1:  # the codec works on one micro-batch while the device computes the next
                self._finish(pending.popleft(), outputs)

    def _launch(self, inputs: np.ndarray, start: int, size: int) -> _Pending:
        part = inputs[start : start + size]
        num_images = part.shape[0]
        shape = (size, *part.shape[1:])
        is_cuda = self.device.type == "cuda"
        if num_images == size and not is_cuda:
            batch = torch.from_numpy(part if part.flags.writeable else part.copy())
        else:
            host = torch.empty(shape, dtype=_torch_dtype(part.dtype), pin_memory=is_cuda)
            host.numpy()[:num_images] = part
            host.numpy()[num_images:] = part[-1]
            batch = host
        tokens, embedding, is_finite = self._forward(self._upload(batch))
        pending = _Pending(start, num_images, tokens, embedding, is_finite, keep=[batch])
        if is_cuda:
            pending.tokens = _to_host(tokens)
            pending.embedding = _to_host(embedding) if embedding is not None else None
            pending.is_finite = _to_host(is_finite)
            pending.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            pending.ready.record(torch.cuda.current_stream(self.device))
        return pending

    def _upload(self, batch: Tensor) -> Tensor:
        """To the device, on a stream of its own: the copy runs beside the forward pass of the batch before."""
        if self._uploads is None:
            return batch
        with torch.cuda.stream(self._uploads):
            on_device = batch.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._uploads)
        on_device.record_stream(computing)
        return on_device

    def _finish(self, pending: _Pending, outputs: EncodedImages) -> None:
        if pending.ready is not None:
            pending.ready.synchronize()
        where = slice(pending.start, pending.start + pending.num_images)
        tokens = pending.tokens[: pending.num_images].numpy()
        expected = (self.codec.num_tokens, self.codec.dim)
        if tokens.shape[1:] != expected:
            raise ShapeMismatchError(f"the model gives tokens of shape {tokens.shape[1:]}, the codec takes {expected}")
        outputs.payload[where] = self.codec.encode(tokens)
        outputs.is_finite[where] = pending.is_finite[: pending.num_images].numpy()
        if outputs.embedding is not None and pending.embedding is not None:
            outputs.embedding[where] = pending.embedding[: pending.num_images].numpy()


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


def encode_table(table: pa.Table, encoder: Encoder, image_size: tuple[int, int]) -> pa.Table:
    """An image batch -> a token batch; columns that neither schema names are handed through.

    Rows that were rejected before keep their reason and get null tokens; rows whose tokens are not
    finite become rejects with reason `non_finite_tokens`. The number and order of rows stay.
    """
    pixel_column = table.column("pixels").combine_chunks()
    pixels = numpy_from_fixed_binary(pixel_column).reshape(-1, *image_size, 3)
    is_accepted = np.asarray(table.column("reject_reason").is_null())
    accepted = np.flatnonzero(is_accepted)
    wanted = pixels if len(accepted) == len(pixels) else pixels[accepted]
    return attach_tokens(table.drop_columns(["pixels"]), accepted, encoder.encode(wanted), encoder.codec)


def attach_tokens(table: pa.Table, accepted: np.ndarray, encoded: EncodedImages, codec: Codec) -> pa.Table:
    """Adds the token columns to the rows `accepted` (int indices) of a table; the others become null."""
    num_rows = table.num_rows
    is_null = np.ones(num_rows, bool)
    is_null[accepted] = ~encoded.is_finite
    embedding_dim = 0 if encoded.embedding is None else encoded.embedding.shape[1]
    bad = accepted[~encoded.is_finite]
    for name, value in (
        ("reject_stage", RejectStage.ENCODE.value),
        ("reject_reason", RejectReason.NON_FINITE_TOKENS.value),
        ("reject_message", "the model returned NaN, infinity, or a value beyond the range of float16"),
    ):
        if len(bad):
            values = table.column(name).to_pylist()
            for row in bad:
                values[row] = value
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    columns = {"tokens": _spread(encoded.payload, accepted, num_rows, is_null)}
    if encoded.embedding is not None:
        columns["embedding"] = _spread(encoded.embedding, accepted, num_rows, is_null)
    schema = token_batch_schema(codec.payload_bytes, embedding_dim)
    extra = [name for name in table.column_names if name not in schema.names]
    arrays = [columns[name] if name in columns else table.column(name) for name in [*schema.names, *extra]]
    fields = [*schema, *(table.schema.field(name) for name in extra)]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _spread(values: np.ndarray, where: np.ndarray, num_rows: int, is_null: np.ndarray) -> pa.Array:
    if len(where) == num_rows:
        return fixed_binary_from_numpy(values, is_null)
    full = np.zeros((num_rows, *values.shape[1:]), values.dtype)
    full[where] = values
    return fixed_binary_from_numpy(full, is_null)
