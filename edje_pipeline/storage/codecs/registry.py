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
from edje_pipeline.storage.codecs.product_quantizer import ProductCodec

_PLAIN: dict[str, type[Float16Codec | Int8Codec | Int4Codec]] = {
    "float16": Float16Codec,
    "int8": Int8Codec,
    "int4": Int4Codec,
}
_TRAINED = re.compile(r"(pq|opq)([1-9][0-9]{0,3})")


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
        "1kb": Variant(64, "compressed", "opq16"),
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
    _trained_parts(spec)
    return True


def _trained_parts(spec: str) -> tuple[str, int]:
    """`opq16` -> ("opq", 16)."""
    match = _TRAINED.fullmatch(spec)
    if match is None:
        raise CodecError(
            f"there is no codec {spec!r}; choose one of {', '.join(_PLAIN)}, or pqN or opqN with N bytes a token "
            "(opq16, pq48)"
        )
    return match[1], int(match[2])


def trained_spec(spec: str, *, dim: int) -> tuple[str, int]:
    """Kind and bytes a token of a trained codec: `opq16` -> ("opq", 16).

    Raises:
        CodecError: not a trained codec, or one whose bytes do not divide the token width.
    """
    if spec in _PLAIN:
        raise CodecError(f"codec {spec} needs no training; use it as it is")
    kind, num_bytes = _trained_parts(spec)
    if dim % num_bytes:
        raise CodecError(f"codec {spec} cuts a token into {num_bytes} equal parts; choose a divisor of {dim}")
    return kind, num_bytes


def payload_bytes_for(spec: str, *, num_tokens: int, dim: int) -> int:
    """P of a codec that may not be trained yet.

    Raises:
        CodecError: no such codec, or it does not fit tokens of `dim` values.
    """
    if needs_codebook(spec):
        return num_tokens * trained_spec(spec, dim=dim)[1]
    return _PLAIN[spec](num_tokens, dim).payload_bytes


def is_coarser(stored: Codec, wanted_payload_bytes: int) -> bool:
    """True when tokens read from `stored` have lost what a payload of `wanted_payload_bytes` could hold.

    Then a rebuild from stored tokens would write a payload that looks finer than it is.
    """
    return stored.is_lossy and stored.payload_bytes < wanted_payload_bytes


def resolve(spec: str, *, num_tokens: int, dim: int, codebook: Codebook | None = None) -> Codec:
    """The codec that `spec` names, for images of `num_tokens` tokens of `dim` values.

    Raises:
        CodecError: no such codec, a missing codebook, or a codebook of another codec.
    """
    if not needs_codebook(spec):
        if codebook is not None:
            raise CodecError(f"codec {spec} takes no codebook; got one for {codebook.spec}")
        return _PLAIN[spec](num_tokens, dim)
    trained_spec(spec, dim=dim)
    if codebook is None:
        raise CodecError(f"codec {spec} needs a codebook; make one with `edje-pipeline train-codec`")
    if (codebook.spec, codebook.num_tokens, codebook.dim) != (spec, num_tokens, dim):
        raise CodecError(
            f"the codebook was trained for {codebook.spec} on {codebook.num_tokens} x {codebook.dim} tokens; "
            f"asked for {spec} on {num_tokens} x {dim}. Train another with `edje-pipeline train-codec`."
        )
    return ProductCodec(codebook)
