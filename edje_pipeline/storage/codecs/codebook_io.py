"""Codebooks at rest: `INDEX/codecs/<fingerprint>.safetensors`, self-describing and checked when read."""

from __future__ import annotations

import json
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load, save

from edje_pipeline.errors import CodecError, CorruptionError
from edje_pipeline.storage.codecs.base import Codec
from edje_pipeline.storage.codecs.codebook import Codebook
from edje_pipeline.storage.codecs.registry import needs_codebook, resolve
from edje_pipeline.storage.location import Location

MAX_CODEBOOK_BYTES = 256_000_000
"""Far above any real codebook (pq48 of 64 x 384 has 1 MB); bounds what a hostile file can take."""
_METADATA_KEY = "edje_codec"
_FINGERPRINT_LENGTH = 64


def codebook_path(fingerprint: str) -> str:
    """Of a codebook, relative to its index.

    Raises:
        CorruptionError: not a sha256 in hex, so it may not become part of a path.
    """
    if len(fingerprint) != _FINGERPRINT_LENGTH or not set(fingerprint) <= set("0123456789abcdef"):
        raise CorruptionError(f"a codec fingerprint is 64 hexadecimal digits; found {fingerprint[:80]!r}")
    return f"codecs/{fingerprint}.safetensors"


def save_codec(codec: Codec, index: Location) -> dict[str, Any]:
    """Writes the codec's codebook, if it has one, below `index`; returns the manifest's codec entry."""
    entry = codec.to_dict()
    if entry["has_codebook"]:
        target = index.child(*codebook_path(codec.fingerprint).split("/"))
        if not target.exists():
            target.write_bytes(codec_to_bytes(codec))
    return entry


def load_codec(entry: dict[str, Any], index: Location) -> Codec:
    """The codec that a manifest's entry describes.

    Raises:
        CorruptionError: the codebook is missing, cannot be read, or is not the manifest's.
        CodecError: the entry names a codec that does not exist here.
    """
    try:
        spec, num_tokens, dim = str(entry["name"]), int(entry["num_tokens"]), int(entry["dim"])
        wanted = str(entry["fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"the codec entry of the manifest of {index} is incomplete: {error!r}") from error
    if needs_codebook(spec):
        source = index.child(*codebook_path(wanted).split("/"))
        if not source.exists():
            raise CorruptionError(f"the codebook {source} named by the manifest is missing; restore it from a backup")
        codec = codec_from_bytes(source.read_bytes(max_bytes=MAX_CODEBOOK_BYTES), where=str(source))
    else:
        codec = resolve(spec, num_tokens=num_tokens, dim=dim)
    if codec.fingerprint != wanted or (codec.name, codec.num_tokens, codec.dim) != (spec, num_tokens, dim):
        raise CorruptionError(
            f"the codec of {index} is not the manifest's: found {codec.name} {codec.num_tokens} x {codec.dim} "
            f"({codec.fingerprint[:12]}), expected {spec} {num_tokens} x {dim} ({wanted[:12]})"
        )
    return codec


def codec_to_bytes(codec: Codec) -> bytes:
    """A safetensors file of the codebook with the codec's description in its metadata.

    Raises:
        CodecError: the codec has no codebook.
    """
    codebook = getattr(codec, "codebook", None)
    if not isinstance(codebook, Codebook):
        raise CodecError(f"codec {codec.name} has no codebook to save")
    # One metadata key: safetensors keeps several in an order that changes from run to run.
    return save(dict(codebook.arrays), {_METADATA_KEY: json.dumps(codec.to_dict(), sort_keys=True)})


def codec_from_bytes(data: bytes, *, where: str) -> Codec:
    """Reads `codec_to_bytes`; the file describes itself and its fingerprint is checked.

    Raises:
        CorruptionError: not a codebook file, or its arrays are not those of its fingerprint.
    """
    try:
        header_bytes = int.from_bytes(data[:8], "little")
        entry = json.loads(json.loads(data[8 : 8 + header_bytes])["__metadata__"][_METADATA_KEY])
        arrays = load(data)
        spec, num_tokens, dim = str(entry["name"]), int(entry["num_tokens"]), int(entry["dim"])
        codec = resolve(spec, num_tokens=num_tokens, dim=dim, codebook=Codebook(spec, num_tokens, dim, arrays))
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptionError(f"{where} is not a codebook of this program: {error}") from error
    if codec.fingerprint != entry.get("fingerprint"):
        raise CorruptionError(f"the arrays of the codebook {where} do not have the fingerprint it states")
    return codec


def read_codec_file(location: Location) -> Codec:
    """A codebook file as `train-codec --out` writes it.

    Raises:
        CodecError: there is no such file.
        CorruptionError: it is not a codebook.
    """
    if not location.exists():
        raise CodecError(f"there is no codebook at {location}; make one with `edje-pipeline train-codec`")
    return codec_from_bytes(location.read_bytes(max_bytes=MAX_CODEBOOK_BYTES), where=str(location))
