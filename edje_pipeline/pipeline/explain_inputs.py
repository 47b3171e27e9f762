"""The images that `explain` was asked for: single files, or image ids of a corpus, as the model sees them.

H W: input size of the backbone, pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from edje_pipeline.models.spec import PreprocessSpec
from edje_pipeline.stages.decode import decode_batch
from edje_pipeline.storage import files
from edje_pipeline.storage.arrow import numpy_from_fixed_binary
from edje_pipeline.storage.schema import PLAN_SCHEMA, RejectReason
from edje_pipeline.storage.sources import open_source
from edje_pipeline.storage.sources.base import WHOLE_FILE, ReadFailure
from edje_pipeline.storage.sources.read import Blob, read_images

READ_ROWS = 16
"""Images in memory at a time."""


@dataclass(frozen=True)
class SeenImage:
    """An image after the model's preprocessing, or why there is none."""

    name: str
    """The file or image_id as it was given."""
    pixels: np.ndarray | None
    """uint8 (H, W, 3)"""
    reason: str = ""
    message: str = ""


def read_files(names: Sequence[str], spec: PreprocessSpec) -> Iterator[SeenImage]:
    """Image files by path or URI, in the given order; a bad one is a value, not an error."""
    for start in range(0, len(names), READ_ROWS):
        chunk = names[start : start + READ_ROWS]
        uris = [files.absolute_uri(name) for name in chunk]
        rows = _rows([(name, uri, uri, 0, WHOLE_FILE) for name, uri in zip(chunk, uris, strict=True)])
        kinds = [_kind_problem(uri) for uri in uris]
        blobs = read_images({"kind": "folder"}, rows)
        yield from _decode(rows, [problem or blob for problem, blob in zip(kinds, blobs, strict=True)], spec)


def read_ids(names: Sequence[str], corpus: str, spec: PreprocessSpec) -> Iterator[SeenImage]:
    """Images of a corpus by image_id, in the given order.

    Raises:
        SourceError, ConfigError: the corpus cannot be listed.
    """
    source = open_source(corpus)
    wanted = set(names)
    found: dict[str, tuple[str, str, str, int, int]] = {}
    for batch in source.list_batches():
        for row in batch.filter(pc.is_in(batch.column("image_id"), pa.array(names))).to_pylist():
            found.setdefault(row["image_id"], tuple(row.values()))
        if len(found) == len(wanted):
            break
    absent = ReadFailure(RejectReason.MISSING, f"the corpus {corpus} has no image of this id")
    for start in range(0, len(names), READ_ROWS):
        chunk = names[start : start + READ_ROWS]
        present = iter(read_images(source.to_dict(), _rows([found[name] for name in chunk if name in found])))
        rows = _rows([found.get(name, (name, "", "", 0, WHOLE_FILE)) for name in chunk])
        yield from _decode(rows, [next(present) if name in found else absent for name in chunk], spec)


def _kind_problem(uri: str) -> ReadFailure | None:
    kind = files.kind_of(uri)
    if kind == "missing":
        return ReadFailure(RejectReason.MISSING, "there is no such file")
    if kind == "dir":
        return ReadFailure(
            RejectReason.UNREADABLE, "this is a folder; give image files, or the folder as --corpus with image ids"
        )
    return None


def _rows(entries: Sequence[tuple[str, str, str, int, int]]) -> pa.Table:
    columns = list(zip(*entries, strict=True)) or [()] * 5
    return pa.table([range(len(entries)), *columns], schema=PLAN_SCHEMA)


def _decode(rows: pa.Table, blobs: Sequence[Blob], spec: PreprocessSpec) -> Iterator[SeenImage]:
    decoded = decode_batch(rows, blobs, spec)
    for number, row in enumerate(decoded.drop_columns(["pixels"]).to_pylist()):
        if row["reject_reason"] is not None:
            yield SeenImage(row["image_id"], None, row["reject_reason"], row["reject_message"])
            continue
        flat = numpy_from_fixed_binary(decoded.column("pixels").slice(number, 1))
        yield SeenImage(row["image_id"], flat.reshape(*spec.image_size, 3))
