"""The trained part of a codec, as a frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np


@dataclass(frozen=True, eq=False)
class Codebook:
    """Arrays that a trained codec needs besides its spec.

    `arrays` is read-only in both senses; the codec built from it checks names and shapes.
    """

    spec: str
    """`pq16`, `opq48`: the spec it was trained for."""
    num_tokens: int
    dim: int
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    def __post_init__(self) -> None:
        frozen = {}
        for key, value in self.arrays.items():
            array = np.array(value, order="C")
            array.flags.writeable = False
            frozen[key] = array
        object.__setattr__(self, "arrays", MappingProxyType(frozen))

    def __reduce__(self) -> tuple[type[Codebook], tuple[str, int, int, dict[str, np.ndarray]]]:
        return (Codebook, (self.spec, self.num_tokens, self.dim, dict(self.arrays)))
