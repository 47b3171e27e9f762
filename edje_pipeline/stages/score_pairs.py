"""Scores (text, stored image) pairs: dense batches of equal text length, tokens decoded on the device.

Where the time goes in the plain path, and what is left out here: padding and its mask (pairs are
grouped by exact text length), the upload of one token matrix a pair (an image's payload crosses to
the device once and is gathered by index), decoding on the host (the payload is 2 to 48 times smaller
than the tokens), a synchronisation a batch (logits come back once a block).

Shape letters: K distinct images, P payload bytes, M compressed tokens, E joint-encoder width,
n pairs, B pairs of a batch, T distinct texts, L tokens of a text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edje_pipeline.errors import ConfigError, DeviceError
from edje_pipeline.models.cpu_encoder import cpu_encoder
from edje_pipeline.models.dequantize import dequantizer
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.storage.codecs import Codec

PRECISIONS = ("float32", "bfloat16", "int8")
BATCH_TOKENS = {"cpu": 2048, "cuda": 131_072}
"""Tokens of one forward pass. CPU: the activations of a layer stay in the cache. GPU: enough work a kernel."""
INT8_BATCH_TOKENS = 1024
"""The same for int8, whose 32-bit sums make a layer's activations larger: a fifth less CPU time than with 2048."""


class DenseEncoder(Protocol):
    """What is needed of `models.joint_encoder.JointEncoder`."""

    def forward_dense(self, input_ids: Tensor, image_tokens: Tensor, image_index: Tensor | None = None) -> Tensor:
        """(B, L) int64, (U, M, E), which of the U images each pair is about (B,) -> logits (B,)."""


@dataclass(frozen=True)
class TextTokens:
    """Token ids of T texts, one after the other."""

    ids: np.ndarray
    """int32 (sum of lengths,)"""
    offsets: np.ndarray
    """int64 (T + 1,)"""

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> TextTokens:
        """From what a tokenizer returns."""
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(ids) for ids in lists], out=offsets[1:])
        flat = np.fromiter((token for ids in lists for token in ids), np.int32, count=int(offsets[-1]))
        return cls(flat, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 (T,)"""
        return np.diff(self.offsets)

    def rows(self, texts: np.ndarray, length: int) -> np.ndarray:
        """The ids of texts that all have `length` tokens: int64 (len(texts), length)."""
        positions = self.offsets[texts][:, None] + np.arange(length)
        return self.ids[positions].astype(np.int64)


def length_batches(lengths: np.ndarray, max_tokens: int, num_image_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Cuts pairs that are sorted by text length into batches of one length.

    A length's pairs are spread evenly over as few batches as the limit allows: 33 pairs at a limit
    of 32 become 17 and 16, not 32 and 1.

    Args:
        lengths: int (n,), ascending.
        max_tokens: of one batch, text and image tokens together; one pair always fits.
        num_image_tokens: M.

    Yields:
        (start, stop, length)
    """
    if not len(lengths):
        return
    starts = np.flatnonzero(np.diff(lengths, prepend=-1))
    stops = np.append(starts[1:], len(lengths))
    for first, last in zip(starts.tolist(), stops.tolist(), strict=True):
        length = int(lengths[first])
        most = max(1, max_tokens // (length + num_image_tokens + 1))
        num_batches = -(-(last - first) // most)
        edges = np.linspace(first, last, num_batches + 1).astype(np.int64).tolist()
        for start, stop in itertools.pairwise(edges):
            yield start, stop, length


def resolve_device(name: str | None) -> torch.device:
    """`auto` or None: the GPU when there is one.

    Raises:
        DeviceError: CUDA was asked for and there is none.
        ConfigError: an unknown name.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(name))
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in BATCH_TOKENS:
        raise ConfigError(f"device {name!r} is not supported; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {name} was asked for, but {torch.cuda.device_count()} CUDA devices are visible; "
            "use --device cpu, or fix the driver"
        )
    return device


def resolve_precision(name: str | None, device: torch.device) -> str:
    """`auto` or None: bfloat16 on a GPU that computes it, float32 elsewhere.

    Raises:
        ConfigError: an unknown name, or int8 on a GPU.
    """
    if name in (None, "auto"):
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if name not in PRECISIONS:
        raise ConfigError(f"unknown precision {name!r}; expected one of {', '.join(PRECISIONS)}")
    if name == "int8" and device.type != "cpu":
        raise ConfigError(f"precision int8 is for the CPU, the device is {device}; use bfloat16, or --device cpu")
    return str(name)


def prepare_encoder(encoder: nn.Module, device: torch.device, precision: str, *, compiled: bool = False) -> Any:
    """The one place that turns a device and a precision into weights and kernels.

    Compiled: sizes are dynamic, so that a new text length or batch size does not compile again.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    prepared: Any = encoder.eval().to(device=device, dtype=dtype)
    if device.type == "cpu" and dtype == torch.float32 and isinstance(prepared, JointEncoder):
        prepared = cpu_encoder(prepared, precision)
    if compiled:
        prepared.forward_dense = torch.compile(prepared.forward_dense, dynamic=True)
    return prepared


class PairScorer:
    """A joint encoder on its device with the decoder of one index's payloads."""

    def __init__(
        self,
        encoder: nn.Module,
        codec: Codec,
        *,
        device: str | torch.device | None = None,
        precision: str | None = None,
        batch_tokens: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        self.encoder: DenseEncoder = prepare_encoder(encoder, self.device, self.precision, compiled=compiled)
        self.codec = codec
        self.dequantize = dequantizer(codec, self.device, dtype=self.dtype)
        default = INT8_BATCH_TOKENS if self.precision == "int8" else BATCH_TOKENS[self.device.type]
        self.batch_tokens = batch_tokens or default

    @torch.inference_mode()
    def score(
        self, payloads: np.ndarray, image_index: np.ndarray, texts: TextTokens, text_index: np.ndarray
    ) -> np.ndarray:
        """Logits of n pairs.

        Args:
            payloads: uint8 (K, P), writable; each crosses to the device once.
            image_index: int (n,) into `payloads`.
            texts: T tokenized texts.
            text_index: int (n,) into `texts`.

        Returns:
            float32 (n,), in the order of the pairs.
        """
        num_pairs = len(image_index)
        if num_pairs == 0:
            return np.empty(0, np.float32)
        lengths = texts.lengths[text_index]
        order = np.lexsort((image_index, lengths))
        lengths, text_index = lengths[order], text_index[order]
        stored = self._upload(payloads)
        images = image_index[order].astype(np.int64)
        logits = torch.empty(num_pairs, dtype=torch.float32, device=self.device)
        for start, stop, length in length_batches(lengths, self.batch_tokens, self.codec.num_tokens):
            input_ids = self._upload(texts.rows(text_index[start:stop], length))
            # Decoding and embedding depend on the image and the length alone: once per image of the batch.
            used, which = np.unique(images[start:stop], return_inverse=True)
            image_tokens = self.dequantize(stored.index_select(0, self._upload(used)))
            shared = self._upload(which) if len(used) < len(which) else None
            logits[start:stop] = self.encoder.forward_dense(input_ids, image_tokens, shared).float()
        result = np.empty(num_pairs, np.float32)
        result[order] = logits.cpu().numpy()
        return result

    def _upload(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor
