"""Codecs: token matrices to payloads of fixed size and back, in numpy."""

from __future__ import annotations

from edje_pipeline.storage.codecs.base import Codec
from edje_pipeline.storage.codecs.checks import non_finite_rows
from edje_pipeline.storage.codecs.codebook import Codebook
from edje_pipeline.storage.codecs.codebook_io import codec_to_bytes, load_codec, read_codec_file, save_codec
from edje_pipeline.storage.codecs.float16 import Float16Codec
from edje_pipeline.storage.codecs.integer import Int4Codec, Int8Codec
from edje_pipeline.storage.codecs.pq_training import train_pq
from edje_pipeline.storage.codecs.product_quantizer import ProductCodec
from edje_pipeline.storage.codecs.registry import (
    VARIANTS,
    Variant,
    is_coarser,
    needs_codebook,
    payload_bytes_for,
    resolve,
    trained_spec,
)

__all__ = [
    "VARIANTS",
    "Codebook",
    "Codec",
    "Float16Codec",
    "Int4Codec",
    "Int8Codec",
    "ProductCodec",
    "Variant",
    "codec_to_bytes",
    "is_coarser",
    "load_codec",
    "needs_codebook",
    "non_finite_rows",
    "payload_bytes_for",
    "read_codec_file",
    "resolve",
    "save_codec",
    "train_pq",
    "trained_spec",
]
