"""The reference codec: every value as IEEE half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edje_pipeline.storage.codecs.checks import checked_payload, checked_shape, checked_tokens
from edje_pipeline.storage.codecs.description import description

# Values from 65520 on round to infinity; the largest finite half is 65504.
MAX_MAGNITUDE = float(np.nextafter(np.float32(65520), np.float32(0)))


@dataclass(frozen=True)
class Float16Codec:
    """2 bytes a value.

    Payload of one image: M x E little-endian float16 in C order, `P = 2 M E`. A value is rounded to the
    nearest half (ties to even), a relative error of at most 2^-11; magnitudes below 2^-14 lose
    precision gradually and those below 2^-25 become zero. `decode` returns the halves as float32.
    """

    num_tokens: int
    dim: int
    name: ClassVar[str] = "float16"
    kind: ClassVar[str] = "float16"
    is_lossy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checked_shape(self.num_tokens, self.dim)

    @property
    def payload_bytes(self) -> int:
        return 2 * self.num_tokens * self.dim

    @property
    def fingerprint(self) -> str:
        return str(self.to_dict()["fingerprint"])

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        values = checked_tokens(tokens, name=self.name, num_tokens=self.num_tokens, dim=self.dim, limit=MAX_MAGNITUDE)
        return values.astype("<f2").reshape(len(values), self.num_tokens * self.dim).view(np.uint8)

    def decode(self, payload: np.ndarray) -> np.ndarray:
        payload = checked_payload(payload, name=self.name, payload_bytes=self.payload_bytes)
        return payload.view("<f2").astype(np.float32).reshape(len(payload), self.num_tokens, self.dim)

    def to_dict(self) -> dict[str, Any]:
        return description(self)
