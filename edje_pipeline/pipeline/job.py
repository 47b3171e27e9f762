"""What every worker of a run must know: small, picklable, the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edje_pipeline.models.spec import PreprocessSpec
from edje_pipeline.storage.codecs.base import Codec
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.shards import row_group_rows_for

UNIT_BYTES = 64 << 20
"""Decoded pixels of a unit: one block of the object store. Larger blocks wait longer and spill sooner."""
SHARD_BYTES = 256 << 20
MAX_UNIT_ROWS = 256
GPU_BATCH = 64
"""The usual micro-batch of a GPU: large units are whole multiples of it, whatever will run them."""


@dataclass(frozen=True)
class Job:
    """A run's constants."""

    index: Location
    run_id: str
    plan_dir: Location
    codec: Codec
    embedding_dim: int
    unit_rows: int
    shard_rows: int
    source: dict[str, Any] = field(default_factory=dict)
    """`Source.to_dict()`; empty for a run that reads no images."""
    plan_generation: int = 0
    model: str = ""
    """What `open_model` takes; a directory all workers can see."""
    preprocess: PreprocessSpec | None = None
    use_adapter: bool = True
    """False for the variant that stores vision tokens."""
    max_pixels: int = 0
    max_bytes: int = 0
    reduced_jpeg: bool = False
    device: str = "cpu"
    precision: str = "auto"
    compile_model: bool = False
    batch_size: int = 16
    num_threads: int = 1
    """Torch threads of each encode worker; physical cores divided by workers."""
    old_snapshot: str = ""
    """Snapshot whose shards are read, for runs that start from stored tokens."""
    old_index: Location | None = None

    @property
    def row_group_rows(self) -> int:
        return row_group_rows_for(self.codec.payload_bytes)


def choose_unit_rows(pixel_bytes: int, batch_size: int, num_images: int | None = None) -> int:
    """Rows of a unit: whole micro-batches, about UNIT_BYTES of pixels, at most MAX_UNIT_ROWS.

    A small corpus (`num_images`) gets at least eight units, so that its stages overlap.
    """
    rows = min(UNIT_BYTES // max(pixel_bytes, 1), MAX_UNIT_ROWS)
    if num_images is not None:
        rows = min(rows, max(num_images // 8, 1))
    step = max(batch_size, GPU_BATCH if rows >= GPU_BATCH and GPU_BATCH % batch_size == 0 else 1)
    return max(rows // step, 1) * step


def choose_shard_rows(payload_bytes: int, num_rows: int) -> int:
    """Rows of a shard: at most SHARD_BYTES of tokens, and at most a sixty-fourth of the run.

    A receipt stands for a whole shard, so a crash costs at most the shards in the making: this keeps
    that below a few per cent of the run, however small it is.
    """
    by_size = max(SHARD_BYTES // payload_bytes, 1)
    return int(max(min(by_size, -(-num_rows // 64)), min(by_size, 16)))
