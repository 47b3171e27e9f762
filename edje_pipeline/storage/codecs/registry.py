"""From what a user types (`float16`, `int8`, `pq16`, a variant's name) to a codec."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from edje_pipeline.errors import CodecError
from edje_pipeline.storage.codecs.base import Codec
from edje_pipeline.storage.codecs.codebook import Codebook
from edje_pipeline.storage.codecs.float16 import Float16Codec
from edje_pipeline.storage.codecs.integer import Int4Codec, Int8Codec

_PLAIN: dict[str, type[Float16Codec | Int8Codec | Int4Codec]] = {
    "float16": Float16Codec,
    "int8": Int8Codec,
    "int4": Int4Codec,
}
_TRAINED = re.compile(r"(pq|opq|rq)([1-9][0-9]{0,3})")


@dataclass(frozen=True)
class Variant:
    """A named choice of adapter and codec; `--variant NAME`."""

    num_compressed_tokens: int | None
    """M; None where the adapter or the backbone decides."""
    adapter: Literal["compressed", "local"] | None
    """None: the vision tokens themselves are stored."""
    codec: str
    """A codec spec."""


VARIANTS: MappingProxyType[str, Variant] = MappingProxyType(
    {
        "local": Variant(None, "local", "float16"),
        "49kb": Variant(64, "compressed", "float16"),
        "int8": Variant(64, "compressed", "int8"),
        "int4": Variant(64, "compressed", "int4"),
        "1kb": Variant(64, "compressed", "pq16"),
        "raw": Variant(None, None, "float16"),
    }
)


def needs_codebook(spec: str) -> bool:
    """True for specs whose codec must be trained first.

    Raises:
        CodecError: no such codec.
    """
    if spec in _PLAIN:
        return False
    if _TRAINED.fullmatch(spec):
        return True
    raise CodecError(
        f"there is no codec {spec!r}; choose one of {', '.join(sorted(_PLAIN))} "
        "or pqN with N bytes a token (pq16, pq48)"
    )


def resolve(spec: str, *, num_tokens: int, dim: int, codebook: Codebook | None = None) -> Codec:
    """The codec that `spec` names, for images of `num_tokens` tokens of `dim` values.

    Raises:
        CodecError: no such codec, a missing codebook, or a codebook of another codec.
    """
    if not needs_codebook(spec):
        if codebook is not None:
            raise CodecError(f"codec {spec} takes no codebook; got one for {codebook.spec}")
        return _PLAIN[spec](num_tokens, dim)
    raise CodecError(f"codec {spec} needs a codebook; make one with `edje-pipeline train-codec`")
