"""Where images come from: a folder, WebDataset tars, Parquet files, or a list of URIs."""

from __future__ import annotations

from edje_pipeline.storage.sources.base import IMAGE_SUFFIXES, ReadFailure, Source, SourceOptions
from edje_pipeline.storage.sources.detect import SOURCES, open_source
from edje_pipeline.storage.sources.read import MAX_IMAGE_BYTES, read_images

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_IMAGE_BYTES",
    "ReadFailure",
    "SOURCES",
    "Source",
    "SourceOptions",
    "open_source",
    "read_images",
]
