"""What a codec is: a frozen value that turns a token matrix into a payload of fixed size and back."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Codec(Protocol):
    """Shapes: n images, M compressed tokens an image, E values a token, P payload bytes an image.

    Implementations are frozen dataclasses: equal values encode equally, in every process.
    The numpy path here is the reference; `models/dequantize.py` mirrors `decode` on the device.
    """

    @property
    def name(self) -> str:
        """The spec a user types: `float16`, `int8`, `int4`, `pq16`."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def payload_bytes(self) -> int:
        """P, the same for every image."""

    @property
    def is_lossy(self) -> bool:
        """False when `decode(encode(x))` equals `x` rounded to float16."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides what bytes `encode` writes."""

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        """(n, M, E) float16 or float32 -> (n, P) uint8.

        Raises:
            CodecError: wrong shape, or values that are not finite or overflow the codec's range.
        """

    def decode(self, payload: np.ndarray) -> np.ndarray:
        """(n, P) uint8 -> (n, M, E) float32."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; arrays (codebooks) are left out and named by their fingerprint."""
