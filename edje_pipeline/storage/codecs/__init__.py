"""Codecs: token matrices to payloads of fixed size and back, in numpy."""

from __future__ import annotations

from edje_pipeline.storage.codecs.base import Codec
from edje_pipeline.storage.codecs.checks import non_finite_rows
from edje_pipeline.storage.codecs.codebook import Codebook
from edje_pipeline.storage.codecs.codebook_io import load_codec, read_codec_file, save_codec
from edje_pipeline.storage.codecs.float16 import Float16Codec
from edje_pipeline.storage.codecs.integer import Int4Codec, Int8Codec
from edje_pipeline.storage.codecs.registry import VARIANTS, Variant, needs_codebook, resolve

__all__ = [
    "VARIANTS",
    "Codebook",
    "Codec",
    "Float16Codec",
    "Int4Codec",
    "Int8Codec",
    "Variant",
    "load_codec",
    "needs_codebook",
    "non_finite_rows",
    "read_codec_file",
    "resolve",
    "save_codec",
]
