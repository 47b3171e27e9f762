"""How a codec is written down: the JSON-able dict of a manifest, and the fingerprint over it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

LAYOUT_VERSION = 1
"""Of the payloads; part of every fingerprint."""


class _Described(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def payload_bytes(self) -> int: ...
    @property
    def is_lossy(self) -> bool: ...


def description(codec: _Described, arrays: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    """The manifest's entry of a codec; `arrays` (codebooks) count in the fingerprint and are left out."""
    fields: dict[str, Any] = {
        "name": codec.name,
        "kind": codec.kind,
        "layout_version": LAYOUT_VERSION,
        "num_tokens": codec.num_tokens,
        "dim": codec.dim,
        "payload_bytes": codec.payload_bytes,
        "is_lossy": codec.is_lossy,
    }
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(arrays or {}):
        array = np.ascontiguousarray((arrays or {})[key])
        digest.update(f"{key}:{array.dtype.str}:{array.shape}:".encode())
        digest.update(array.tobytes())
    return {**fields, "has_codebook": bool(arrays), "fingerprint": digest.hexdigest()}
