"""Whole numbers with one scale a token: half and a quarter of float16, no training needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edje_pipeline.storage.codecs.checks import checked_payload, checked_shape, checked_tokens
from edje_pipeline.storage.codecs.description import description

MAX_HALF = 65504.0
"""The largest finite float16, so the largest scale."""


def token_scales(largest: np.ndarray, levels: int) -> np.ndarray:
    """The float16 scales of tokens whose largest magnitudes are `largest` (float32, any shape).

    The quotient is rounded to the nearest half, and to the one above where the nearest is so small
    that the largest value would not fit any more (only below about 1e-3, where halves are coarse).
    """
    scales = (largest / np.float32(levels)).astype("<f2")
    too_small = scales.astype(np.float32) * np.float32(levels + 0.5) < largest
    # For positive halves the next larger one has the next larger bit pattern.
    return (scales.view("<u2") + too_small.astype("<u2")).view("<f2")


@dataclass(frozen=True)
class ScaledCodec:
    """What int8 and int4 share: symmetric codes -levels..levels and a float16 scale a token.

    A value is `code * scale`, computed in float32. A token of zeros has scale 0. Magnitudes up to
    65504 x levels fit.
    """

    num_tokens: int
    dim: int
    name: ClassVar[str]
    kind: ClassVar[str]
    levels: ClassVar[int]
    is_lossy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checked_shape(self.num_tokens, self.dim)

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's codes."""
        raise NotImplementedError

    @property
    def payload_bytes(self) -> int:
        return self.num_tokens * (self.code_bytes + 2)

    @property
    def fingerprint(self) -> str:
        return str(self.to_dict()["fingerprint"])

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        values = checked_tokens(
            tokens, name=self.name, num_tokens=self.num_tokens, dim=self.dim, limit=MAX_HALF * self.levels
        )
        scales = self.scales(values)
        steps = scales.astype(np.float32)[..., None]
        quotients = np.divide(values, steps, out=np.zeros_like(values), where=steps > 0)
        codes = np.clip(np.rint(quotients), -self.levels, self.levels).astype(np.int8)
        packed = self.pack(codes).reshape(len(values), self.num_tokens * self.code_bytes)
        return np.concatenate([packed, scales.view(np.uint8)], axis=1)

    def decode(self, payload: np.ndarray) -> np.ndarray:
        payload = checked_payload(payload, name=self.name, payload_bytes=self.payload_bytes)
        split = self.num_tokens * self.code_bytes
        packed = payload[:, :split].reshape(len(payload), self.num_tokens, self.code_bytes)
        scales = np.ascontiguousarray(payload[:, split:]).view("<f2").astype(np.float32)
        # A damaged scale (NaN, infinity) must give NaN for `verify` to find, not a warning.
        with np.errstate(invalid="ignore"):
            return self.unpack(packed).astype(np.float32) * scales[..., None]

    def scales(self, values: np.ndarray) -> np.ndarray:
        """(n, M, E) float32 -> (n, M) float16."""
        return token_scales(np.abs(values).max(axis=-1), self.levels)

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """(n, M, E) int8 -> (n, M, code_bytes) uint8."""
        raise NotImplementedError

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """The inverse of `pack`."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return description(self)


@dataclass(frozen=True)
class Int8Codec(ScaledCodec):
    """1 byte a value and 2 bytes a token: `scale = max|x| / 127`.

    Payload of one image: M x E codes (int8, C order), then M scales (little-endian float16);
    `P = M (E + 2)`. The code -128 is never written. Error: at most half a scale a value.
    """

    name: ClassVar[str] = "int8"
    kind: ClassVar[str] = "int8"
    levels: ClassVar[int] = 127

    @property
    def code_bytes(self) -> int:
        return self.dim

    def pack(self, codes: np.ndarray) -> np.ndarray:
        return codes.view(np.uint8)

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        return packed.view(np.int8)


@dataclass(frozen=True)
class Int4Codec(ScaledCodec):
    """Half a byte a value and 2 bytes a token: `scale = max|x| / 7`.

    Payload of one image: M times ceil(E / 2) bytes of codes, then M scales (little-endian float16);
    `P = M (ceil(E / 2) + 2)`. A nibble holds code + 8 (1..15; 0 is never written); value 2i of a token
    is in the low nibble of byte i, value 2i + 1 in the high one; with odd E the last high nibble is 8.
    """

    name: ClassVar[str] = "int4"
    kind: ClassVar[str] = "int4"
    levels: ClassVar[int] = 7

    @property
    def code_bytes(self) -> int:
        return (self.dim + 1) // 2

    def pack(self, codes: np.ndarray) -> np.ndarray:
        nibbles = (codes + 8).astype(np.uint8)
        if self.dim % 2:
            nibbles = np.concatenate([nibbles, np.full_like(nibbles[..., :1], 8)], axis=-1)
        return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        nibbles = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:2], 2 * self.code_bytes)
        return nibbles[..., : self.dim].astype(np.int8) - np.int8(8)
