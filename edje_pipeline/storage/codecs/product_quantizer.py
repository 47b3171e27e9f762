"""Product quantization: a token becomes m bytes, each the index of a trained centroid of a part of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from edje_pipeline.errors import CodecError
from edje_pipeline.storage.codecs.checks import checked_payload, checked_shape, checked_tokens
from edje_pipeline.storage.codecs.codebook import Codebook
from edje_pipeline.storage.codecs.description import description
from edje_pipeline.storage.codecs.integer import MAX_HALF

NUM_CENTROIDS = 256
"""Of a subspace: one byte."""
_CHUNK_TOKENS = 256
"""Tokens scored against all centroids at once: 256 x 16 x 256 float32 are 4 MB, near the caches."""


@dataclass(frozen=True)
class ProductCodec:
    """m bytes a token: `pqN` in the tokens' own axes, `opqN` after a trained rotation.

    A token x at place i of its image becomes `y = R (x - mean[i])` (R the identity for pq), y is cut
    into m parts of E/m values, and each part is replaced by the index of its nearest centroid
    (Euclidean; the lower index of equals). Centroids whose distances agree to the last bits of
    float32 may be told apart differently by another BLAS or batch size: both are equally near.
    `decode` puts the centroids together and inverts the two steps. The mean is kept for every place
    since an adapter's latents are not interchangeable; on averaged patch tokens, whose places are
    alike, it measured no gain over one shared mean.

    Payload of one image: M x m bytes in C order, `P = M m`.

    Codebook arrays, all float32: `centroids` (m, 256, E/m), `mean` (M, E), and for opq `rotation`
    (E, E), orthogonal, rows are the new axes.
    """

    codebook: Codebook = field(compare=False)
    fingerprint: str = field(init=False)
    is_lossy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checked_shape(self.num_tokens, self.dim)
        subspaces = self.code_bytes
        if self.dim % subspaces:
            raise CodecError(
                f"codec {self.name} cuts a token into {subspaces} equal parts, but {self.dim} values cannot be; "
                f"choose a divisor of {self.dim}"
            )
        wanted = {
            "centroids": (subspaces, NUM_CENTROIDS, self.dim // subspaces),
            "mean": (self.num_tokens, self.dim),
        }
        if self.kind == "opq":
            wanted["rotation"] = (self.dim, self.dim)
        arrays = self.codebook.arrays
        if set(arrays) != set(wanted):
            raise CodecError(f"the codebook of {self.name} has arrays {sorted(arrays)}, expected {sorted(wanted)}")
        for key, shape in wanted.items():
            if arrays[key].shape != shape or arrays[key].dtype != np.float32:
                raise CodecError(
                    f"array {key!r} of the codebook of {self.name} is {arrays[key].dtype} {arrays[key].shape}, "
                    f"expected float32 {shape}"
                )
            if not np.isfinite(arrays[key]).all():
                raise CodecError(f"array {key!r} of the codebook of {self.name} holds NaN or infinity")
        object.__setattr__(self, "fingerprint", description(self, arrays)["fingerprint"])

    @property
    def name(self) -> str:
        return self.codebook.spec

    @property
    def kind(self) -> str:
        return self.name.rstrip("0123456789")

    @property
    def num_tokens(self) -> int:
        return self.codebook.num_tokens

    @property
    def dim(self) -> int:
        return self.codebook.dim

    @property
    def code_bytes(self) -> int:
        """m, bytes of one token."""
        return int(self.name[len(self.kind) :])

    @property
    def payload_bytes(self) -> int:
        return self.num_tokens * self.code_bytes

    @property
    def rotation(self) -> np.ndarray | None:
        """(E, E) or None for the identity."""
        return self.codebook.arrays.get("rotation")

    @cached_property
    def scoring_table(self) -> tuple[np.ndarray, np.ndarray]:
        """Centroids as (m, E/m, 256) and half their squared norms (m, 1, 256), for `encode`."""
        centroids = self.codebook.arrays["centroids"]
        return (
            np.ascontiguousarray(centroids.transpose(0, 2, 1)),
            np.square(centroids).sum(axis=-1)[:, None, :] / np.float32(2),
        )

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        values = checked_tokens(tokens, name=self.name, num_tokens=self.num_tokens, dim=self.dim, limit=MAX_HALF)
        centred = (values - self.codebook.arrays["mean"]).reshape(-1, self.dim)
        codes = np.empty((len(centred), self.code_bytes), np.uint8)
        for start in range(0, len(centred), _CHUNK_TOKENS):
            codes[start : start + _CHUNK_TOKENS] = self._assign(centred[start : start + _CHUNK_TOKENS])
        return codes.reshape(len(values), self.payload_bytes)

    def _assign(self, centred: np.ndarray) -> np.ndarray:
        """(t, E) float32 -> (t, m) uint8.

        The nearest centroid c of y is the one with the largest `y . c - |c|^2 / 2`.
        """
        rotated = centred if self.rotation is None else centred @ self.rotation.T
        parts = rotated.reshape(len(centred), self.code_bytes, -1).transpose(1, 0, 2)
        columns, half_norms = self.scoring_table
        scores = np.matmul(parts, columns)
        scores -= half_norms
        return scores.argmax(axis=-1).T.astype(np.uint8)

    def decode(self, payload: np.ndarray) -> np.ndarray:
        payload = checked_payload(payload, name=self.name, payload_bytes=self.payload_bytes)
        codes = payload.reshape(-1, self.code_bytes)
        rotated = self.codebook.arrays["centroids"][np.arange(self.code_bytes), codes].reshape(len(codes), self.dim)
        centred = rotated if self.rotation is None else rotated @ self.rotation
        return centred.reshape(len(payload), self.num_tokens, self.dim) + self.codebook.arrays["mean"]

    def to_dict(self) -> dict[str, Any]:
        return description(self, self.codebook.arrays)
