"""Scores (text, stored image) pairs: dense batches of equal text length, tokens decoded on the device.

Where the time goes in the plain path, and what is left out here: padding and its mask (pairs are
grouped by exact text length), the upload of one token matrix a pair (an image's payload crosses to
the device once and is gathered by index), decoding on the host (the payload is 2 to 48 times smaller
than the tokens), a copy or a synchronisation a batch (a call's inputs cross in four copies, its
logits come back in one, and the next call may be launched before they do).

Shape letters: K distinct images, P payload bytes, M compressed tokens, E joint-encoder width,
n pairs, B pairs of a batch, T distinct texts, L tokens of a text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edje_pipeline.errors import ConfigError, DeviceError
from edje_pipeline.models.cpu_encoder import cpu_encoder
from edje_pipeline.models.dequantize import dequantizer
from edje_pipeline.models.gpu_encoder import gpu_encoder
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.stages.length_graphs import LengthGraphs
from edje_pipeline.stages.side_by_side import SideBySide
from edje_pipeline.storage.codecs import Codec

PRECISIONS = ("float32", "bfloat16", "int8")
BatchSizes = Literal["even", "full", "powers"]
KERNELS = ("torch", "own")
"""Layers on a GPU: PyTorch's, or those of `models.gpu_encoder`, an experiment."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 131_072}
"""Tokens of one forward pass. CPU: the activations of a layer stay in the cache. GPU: enough work a kernel."""
INT8_BATCH_TOKENS = 512
"""The same for int8, whose 32-bit sums make a layer's activations several times larger."""


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


def length_batches(
    lengths: np.ndarray, max_tokens: int, num_image_tokens: int, *, sizes: BatchSizes = "even"
) -> Iterator[tuple[int, int, int]]:
    """Cuts pairs that are sorted by text length into batches of one length.

    A length's pairs are cut into as few batches as the limit allows, or somewhat more with `powers`.

    Args:
        lengths: int (n,), ascending.
        max_tokens: of one batch, text and image tokens together; one pair always fits.
        num_image_tokens: M.
        sizes: `even`: 33 pairs at a limit of 32 become 17 and 16. `full`: 32 and 1; for a GPU, which replays recorded
            passes of full batches and would fill up smaller ones. `powers`: full batches, then powers of two; for
            oneDNN, which compiles and keeps code for every shape it meets: half a gigabyte with every size there is.

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
        if sizes == "powers":
            num_full, rest = divmod(last - first, most)
            counts = [most] * num_full + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
            edges = [first, *(first + np.cumsum(counts)).tolist()]
        elif sizes == "full":
            edges = [*range(first, last, most), last]
        else:
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


def check_kernels(kernels: str, device: torch.device, precision: str, *, compiled: bool = False) -> None:
    """Raises ConfigError: an unknown name, or `own` with a device, precision or compiler it is not for."""
    if kernels not in KERNELS:
        raise ConfigError(f"unknown kernels {kernels!r}; expected one of {', '.join(KERNELS)}")
    if kernels == "own" and (device.type != "cuda" or precision != "bfloat16" or compiled):
        raise ConfigError(
            f"own kernels are for bfloat16 on a GPU without --compile, here are {precision} on {device}"
            f"{' with --compile' if compiled else ''}; use --kernels torch"
        )


def prepare_encoder(
    encoder: nn.Module, device: torch.device, precision: str, *, compiled: bool = False, kernels: str = "torch"
) -> Any:
    """The one place that turns a device, a precision and a choice of kernels into weights and layers.

    Compiled: sizes are dynamic, so that a new text length or batch size does not compile again.

    Raises:
        ConfigError: see `check_kernels`. DeviceError: `own` kernels cannot run here.
    """
    check_kernels(kernels, device, precision, compiled=compiled)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    prepared: Any = encoder.eval().to(device=device, dtype=dtype)
    if device.type == "cpu" and dtype == torch.float32 and isinstance(prepared, JointEncoder):
        prepared = cpu_encoder(prepared, precision)
    elif kernels == "own" and isinstance(prepared, JointEncoder):
        prepared = gpu_encoder(prepared)
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
        kernels: str = "torch",
        use_graphs: bool = True,
    ) -> None:
        """On a CPU as many batches are computed side by side as torch may use threads when this is made.

        Args:
            kernels: see `KERNELS`.
            use_graphs: on a GPU, replay a recorded pass for lengths that come often.
        """
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        self.encoder: DenseEncoder = prepare_encoder(
            encoder, self.device, self.precision, compiled=compiled, kernels=kernels
        )
        self.codec = codec
        self.dequantize = dequantizer(codec, self.device, dtype=self.dtype)
        default = INT8_BATCH_TOKENS if self.precision == "int8" else BATCH_TOKENS[self.device.type]
        self.batch_tokens = batch_tokens or default
        self._side_by_side = SideBySide(torch.get_num_threads() if self.device.type == "cpu" and not compiled else 1)
        self._graphs: LengthGraphs | None = None
        if self.device.type == "cuda" and use_graphs:
            self._graphs = LengthGraphs(
                self.encoder.forward_dense,
                codec.num_tokens,
                codec.dim,
                self.dtype,
                self.device,
                self.batch_tokens,
                compiled=compiled,
            )

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
        return self.launch(payloads, image_index, texts, text_index).result()

    def launch(
        self, payloads: np.ndarray, image_index: np.ndarray, texts: TextTokens, text_index: np.ndarray
    ) -> PendingScores:
        """As `score`, without waiting for a GPU: it works through its queue while the caller does other things."""
        # Streams and events are those of the current device, which is the first one unless it is said otherwise.
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with torch.inference_mode(), on_device:
            return self._launch(payloads, image_index, texts, text_index)

    def _launch(
        self, payloads: np.ndarray, image_index: np.ndarray, texts: TextTokens, text_index: np.ndarray
    ) -> PendingScores:
        lengths = texts.lengths[text_index]
        order = np.lexsort((image_index, lengths))
        batches = list(
            length_batches(
                lengths[order],
                self.batch_tokens,
                self.codec.num_tokens,
                sizes="powers" if self.device.type == "cpu" else "full",
            )
        )
        images = image_index[order].astype(np.int64)
        # Decoding and embedding depend on the image and the length alone: once per image of a batch.
        used, which, edges = distinct_of_batches(images, [start for start, _, _ in batches])
        parts = [texts.rows(text_index[order[start:stop]], length).ravel() for start, stop, length in batches]
        all_ids = self._upload(np.concatenate([np.empty(0, np.int64), *parts]))
        all_used, all_which, stored = self._upload(used), self._upload(which), self._upload(payloads)
        logits = torch.empty(len(order), dtype=torch.float32, device=self.device)
        first_ids = np.cumsum([0, *((stop - start) * length for start, stop, length in batches)]).tolist()

        def run(number: int) -> None:
            start, stop, length = batches[number]
            first, last = edges[number], edges[number + 1]
            input_ids = all_ids[first_ids[number] : first_ids[number + 1]].view(stop - start, length)
            image_tokens = self.dequantize(stored.index_select(0, all_used[first:last]))
            shared = all_which[start:stop] if last - first < stop - start else None
            if self._graphs is not None:
                self._graphs.forward_into(logits[start:stop], input_ids, image_tokens, shared)
            else:
                logits[start:stop] = self.encoder.forward_dense(input_ids, image_tokens, shared).float()

        self._side_by_side.run(run, len(batches))
        return PendingScores(order, logits)

    def _upload(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


class PendingScores:
    """Logits that a device may still be computing."""

    def __init__(self, order: np.ndarray, logits: Tensor) -> None:
        """Args: order: int (n,), the pair of each logit. logits: float32 (n,)."""
        self._order, self._host, self._ready = order, logits, None
        if logits.device.type == "cuda":
            self._host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
            self._host.copy_(logits, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record(torch.cuda.current_stream(logits.device))

    def result(self) -> np.ndarray:
        """float32 (n,), in the order of the pairs; waits until they are there."""
        if self._ready is not None:
            self._ready.synchronize()
        result = np.empty(len(self._order), np.float32)
        result[self._order] = self._host.numpy()
        return result


def distinct_of_batches(images: np.ndarray, starts: Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The distinct images of each batch, one batch after the other.

    Args:
        images: int64 (n,), ascending within a batch.
        starts: where the batches begin in it, ascending.

    Returns:
        int64 (D,): images, each once a batch. int64 (n,): which of its batch's images each entry is.
        Edges into the first, one more than batches.
    """
    fresh = np.ones(len(images), bool)
    fresh[1:] = images[1:] != images[:-1]
    fresh[list(starts)] = True
    place = np.cumsum(fresh) - 1
    edges = place[list(starts)]
    sizes: np.ndarray = np.diff(np.array([*starts, len(images)], np.int64))
    return images[fresh], place - np.repeat(edges, sizes), [*edges.tolist(), int(fresh.sum())]
