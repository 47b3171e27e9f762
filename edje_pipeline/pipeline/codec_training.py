"""Trains a codebook on the first images of a run, once; a resumed run finds it in staging."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edje_pipeline.errors import CodecError
from edje_pipeline.pipeline.job import Job
from edje_pipeline.pipeline.model_choice import Choice
from edje_pipeline.pipeline.runner import Execution, units_of
from edje_pipeline.pipeline.stages import extract_stages
from edje_pipeline.pipeline.train_codec import default_sample_images, train_from_tokens
from edje_pipeline.storage.arrow import numpy_from_fixed_binary
from edje_pipeline.storage.codecs import Codec, Float16Codec, codec_to_bytes, read_codec_file
from edje_pipeline.storage.staging import Staging

MIN_SAMPLE = 256
SAMPLE_PART = 20
"""At most a twentieth of the corpus is computed twice for a codebook, once there are enough images."""


def staged_codec(
    staging: Staging, job: Job, choice: Choice, execution: Execution, *, num_rows: int, say: Callable[[str], None]
) -> Codec:
    """The codec of an unfinished run, trained now if it is not there yet."""
    place = staging.plan_dir.child("codec.safetensors")
    if place.exists():
        return read_codec_file(place)
    wanted = min(default_sample_images(choice.num_tokens), max(MIN_SAMPLE, num_rows // SAMPLE_PART), num_rows)
    say(
        f"no codebook was given: training {choice.codec_spec} on the first {wanted:,} images "
        "(`--codebook FILE` uses one of yours)"
    )
    tokens = _first_tokens(job, choice, execution, wanted)
    codec = train_from_tokens(tokens, choice.codec_spec)
    place.write_bytes(codec_to_bytes(codec))
    return codec


def _first_tokens(job: Job, choice: Choice, execution: Execution, wanted: int) -> np.ndarray:
    """Tokens (n, M, E) float32 of the accepted images among the first `wanted` rows, in plan order.

    Raises:
        CodecError: none of them could be used.
    """
    plain = Float16Codec(choice.num_tokens, choice.dim)
    sample_job = replace(job, codec=plain)
    stages = [stage for stage in extract_stages(sample_job, execution.machine) if stage.name != "write"]
    rows, payloads = [], []
    for table in execution.run(stages, sample_job, units_of([(0, wanted)], job.unit_rows)):
        accepted = table.filter(table.column("reject_reason").is_null())
        rows.append(accepted.column("row").to_numpy())
        payloads.append(numpy_from_fixed_binary(accepted.column("tokens")))
    if not rows or not sum(len(part) for part in rows):
        raise CodecError(
            f"none of the first {wanted:,} images could be used, so there is nothing to train {choice.codec_spec} on; "
            "give a codebook with --codebook, or look at the corpus"
        )
    order = np.argsort(np.concatenate(rows))
    return plain.decode(np.concatenate(payloads)[order])
