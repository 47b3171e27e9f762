"""Tables that cross a process border or come to rest: names, types, and the closed list of rejects.

listing row   what a source says of an image before it was opened (the plan is made of these)
image batch   what the decode stage hands to the encode stage
token batch   what the encode stage hands to the writer
shard row     what is stored; `docs/format.md` specifies it
reject row    an image that could not be used, and why
"""

from __future__ import annotations

from enum import StrEnum

import pyarrow as pa

FORMAT_VERSION = 1


class RejectStage(StrEnum):
    """Where an image was lost."""

    READ = "read"
    DECODE = "decode"
    ENCODE = "encode"


class RejectReason(StrEnum):
    """Why an image was lost: a closed list, so that reports can count by it."""

    MISSING = "missing"  # the listed file or member is not there (any more)
    UNREADABLE = "unreadable"  # it is there, reading it failed
    EMPTY = "empty"  # zero bytes
    UNKNOWN_FORMAT = "unknown_format"  # no decoder recognises the bytes
    TRUNCATED = "truncated"  # the bytes end too early
    CORRUPT = "corrupt"  # a decoder recognises the bytes and cannot decode them
    UNSUPPORTED = "unsupported"  # a known format with a feature no decoder here has
    TOO_MANY_PIXELS = "too_many_pixels"  # above the pixel cap
    TOO_MANY_BYTES = "too_many_bytes"  # above the cap on the encoded file
    BAD_DIMENSIONS = "bad_dimensions"  # zero or negative width or height, or an aspect that resizes to nothing
    NON_FINITE_TOKENS = "non_finite_tokens"  # the backbone or adapter returned NaN or infinity


# Rows are numbered 0.. in the order the source lists them; `row` is the image's name inside one run.
# `container` + `offset` + `length` say where its bytes are; their meaning belongs to the source kind:
#   folder, list  container = file uri, offset = 0, length = -1 (whole file)
#   webdataset    container = tar uri, offset and length of the member's bytes
#   parquet       container = parquet uri, offset = row group, length = row inside it
LISTING_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("container", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
    ]
)

PLAN_SCHEMA = pa.schema([pa.field("row", pa.int64(), nullable=False), *LISTING_SCHEMA])

_SHARED_FIELDS = [
    pa.field("row", pa.int64(), nullable=False),
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("width", pa.int32()),  # pixels of the original image after EXIF orientation
    pa.field("height", pa.int32()),
    pa.field("content_sha256", pa.binary(32)),  # of the encoded bytes as read
    pa.field("reject_stage", pa.string()),  # null for an accepted image
    pa.field("reject_reason", pa.string()),
    pa.field("reject_message", pa.string()),
]


def image_batch_schema(pixel_bytes: int) -> pa.Schema:
    """Decode -> encode. `pixels` is uint8 (H, W, 3) in C order, null for a rejected image."""
    return pa.schema([*_SHARED_FIELDS, pa.field("pixels", pa.binary(pixel_bytes))])


def token_batch_schema(payload_bytes: int, embedding_dim: int) -> pa.Schema:
    """Encode -> write. `tokens` is the codec's payload; `embedding` float16, absent when dim is 0."""
    fields = [*_SHARED_FIELDS, pa.field("tokens", pa.binary(payload_bytes))]
    if embedding_dim:
        fields.append(pa.field("embedding", pa.binary(2 * embedding_dim)))
    return pa.schema(fields)


def shard_schema(payload_bytes: int, embedding_dim: int) -> pa.Schema:
    """A stored shard; see docs/format.md."""
    fields = [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("tokens", pa.binary(payload_bytes), nullable=False),
    ]
    if embedding_dim:
        fields.append(pa.field("embedding", pa.binary(2 * embedding_dim), nullable=False))
    return pa.schema(
        [
            *fields,
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("content_sha256", pa.binary(32), nullable=False),
        ]
    )


REJECT_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        # Where the bytes were listed, so that `retry-rejects` needs no new listing.
        pa.field("container", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
    ]
)
