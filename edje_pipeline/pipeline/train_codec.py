"""Trains the codebook of a pq codec on the tokens of a sample of images, and says what it costs.

The error is measured on images that were not trained on, whenever the sample allows it.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edje_pipeline.errors import CodecError
from edje_pipeline.progress import format_bytes, format_duration
from edje_pipeline.storage.arrow import numpy_from_fixed_binary
from edje_pipeline.storage.codecs import (
    Codec,
    codec_to_bytes,
    is_coarser,
    needs_codebook,
    payload_bytes_for,
    resolve,
    train_pq,
    trained_spec,
)
from edje_pipeline.storage.index import Index
from edje_pipeline.storage.location import Location

SAMPLE_TOKENS = 131_072
"""Twice what training uses: the rest makes the mean of each place and the held-out images."""
MIN_SAMPLE_IMAGES, MAX_SAMPLE_IMAGES = 256, 4096
MAX_ROW_GROUPS = 64
"""Read for a sample, so that a large index costs no more than 64 x 8 MB."""
HELD_OUT_FRACTION = 0.1
MIN_HELD_OUT = 8


@dataclass(frozen=True)
class ReconstructionError:
    """How far decoded tokens are from what was encoded."""

    relative: float
    """Root of the summed squared error over the root of the summed squares of the tokens."""
    cosine: float
    """Mean over tokens of the cosine between original and decoded."""


@dataclass(frozen=True)
class TrainCodecResult:
    """What `train-codec` did."""

    codec: str
    fingerprint: str
    path: str
    num_tokens: int
    dim: int
    payload_bytes: int
    float16_bytes: int
    num_images_trained: int
    num_images_measured: int
    measured_on_trained: bool
    """True when the sample was too small to hold images out; the error is then too good."""
    error: ReconstructionError
    wall_s: float

    @property
    def exit_code(self) -> int:
        return 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        held_out = "the training images themselves" if self.measured_on_trained else "images not trained on"
        smaller = self.float16_bytes / self.payload_bytes
        size = f"{self.payload_bytes:,} an image, {smaller:.1f} x less than float16"
        return "\n".join(
            [
                f"codec        {self.codec}, {self.num_tokens} tokens of {self.dim} values",
                f"bytes        {size} ({format_bytes(self.float16_bytes)})",
                f"error        relative {self.error.relative:.4f}, cosine {self.error.cosine:.4f}",
                f"             on {self.num_images_measured:,} {held_out}",
                f"trained on   {self.num_images_trained:,} images in {format_duration(self.wall_s)}",
                f"fingerprint  {self.fingerprint[:16]}",
                f"codebook     {self.path}",
            ]
        )


def default_sample_images(num_tokens: int) -> int:
    """Images to draw for training when the user names no number."""
    return min(max(-(-SAMPLE_TOKENS // num_tokens), MIN_SAMPLE_IMAGES), MAX_SAMPLE_IMAGES)


def train_from_tokens(tokens: np.ndarray, spec: str, seed: int = 0) -> Codec:
    """The codec `spec` for images like these; specs that need no codebook are resolved as they are.

    Args:
        tokens: (n, M, E) float16 or float32, finite, n >= 1.
        spec: `opq16`, `pq48`, `float16`, ...
        seed: of every random choice.

    Raises:
        CodecError: no such codec, or a sample that it cannot be trained on.
    """
    if tokens.ndim != 3 or not len(tokens):
        raise CodecError(f"training {spec} needs tokens of shape (n, M, E) with n >= 1; got {tokens.shape}")
    _, num_tokens, dim = tokens.shape
    if not needs_codebook(spec):
        return resolve(spec, num_tokens=num_tokens, dim=dim)
    kind, num_bytes = trained_spec(spec, dim=dim)
    return train_pq(tokens, num_bytes, kind, seed=seed)


def reconstruction_error(codec: Codec, tokens: np.ndarray) -> ReconstructionError:
    """Encodes and decodes (n, M, E) tokens and compares."""
    wanted = np.asarray(tokens, np.float32)
    found = codec.decode(codec.encode(wanted))
    total = float(np.sqrt(np.square(wanted, dtype=np.float64).sum()))
    error = float(np.sqrt(np.square(found - wanted, dtype=np.float64).sum()))
    norms = np.linalg.norm(wanted, axis=-1) * np.linalg.norm(found, axis=-1)
    cosines = np.divide((wanted * found).sum(axis=-1), norms, out=np.ones_like(norms), where=norms > 0)
    return ReconstructionError(error / total if total else 0.0, float(cosines.mean()))


def sample_tokens(index: Index, num_images: int, seed: int = 0) -> np.ndarray:
    """Tokens (n, M, E) float32 of up to `num_images` live images, out of at most 64 random row groups.

    The same snapshot and seed give the same sample.

    Raises:
        CodecError: the index holds no image.
    """
    rng = np.random.default_rng(seed)
    groups = [
        (view.number, group, min(view.entry.row_group_rows, view.entry.num_rows - group * view.entry.row_group_rows))
        for view in index.iter_shards()
        for group in range(view.num_row_groups)
    ]
    pieces: list[np.ndarray] = []
    # Small groups first: what they cannot give is asked of the larger ones after them.
    chosen = sorted((groups[i] for i in rng.permutation(len(groups))[:MAX_ROW_GROUPS]), key=lambda found: found[2])
    left = num_images
    for position, (shard, group, num_rows) in enumerate(chosen):
        first = group * index.shards[shard].row_group_rows
        alive = np.setdiff1d(np.arange(num_rows), index.dead_rows(shard) - first)
        share = -(-left // (len(chosen) - position))
        rows = np.sort(rng.permutation(alive)[:share])
        if len(rows):
            column = index.read_row_group(shard, group, ["tokens"]).column("tokens")
            pieces.append(numpy_from_fixed_binary(column)[rows])
            left -= len(rows)
    if not pieces:
        raise CodecError(f"{index.location} holds no image to train on; extract some first")
    return index.codec.decode(np.concatenate(pieces))


def train_from_index(
    index_uri: str, spec: str, out: str | None, *, num_images: int | None = None, seed: int = 0
) -> TrainCodecResult:
    """Trains `spec` on a sample of an index and writes the codebook to `out`.

    Args:
        index_uri: directory or URI.
        spec: `pq16`, `opq16`, `opq48`, ...
        out: the file; None for `<spec>-<fingerprint>.safetensors` in the working directory.
        num_images: in the sample; None for `default_sample_images`.
        seed: of the sample and of the training.

    Raises:
        CodecError: nothing to train, or the stored tokens are coarser than the codec asked for.
    """
    index = Index.open(index_uri)
    stored = index.manifest.tokens
    wanted_bytes = payload_bytes_for(spec, num_tokens=stored.num_tokens, dim=stored.dim)
    trained_spec(spec, dim=stored.dim)
    if is_coarser(index.codec, wanted_bytes):
        raise CodecError(
            f"the tokens of {index.location} are stored as {stored.codec} ({stored.payload_bytes:,} bytes an image), "
            f"coarser than {spec} ({wanted_bytes:,} bytes); train on a float16 index"
        )
    tokens = sample_tokens(index, num_images or default_sample_images(stored.num_tokens), seed)
    return train_and_write(tokens, spec, out, seed=seed)


def train_from_corpus(
    corpus: str,
    model: str,
    spec: str,
    out: str | None,
    *,
    num_images: int | None = None,
    seed: int = 0,
    source: str = "auto",
    quiet: bool = False,
) -> TrainCodecResult:
    """Trains `spec` on the first images of a corpus, extracted into a temporary float16 index.

    Args:
        corpus: as `extract` takes it.
        model: directory, `hf:org/name` or bundled name.
        spec: as in `train_from_index`.
        out: as in `train_from_index`.
        num_images: listed images to use; None for `default_sample_images`.
        seed: of the training.
        source: kind of the corpus.
        quiet: no progress.

    Raises:
        EdjeError: whatever `run_extract` or `train_from_index` raise.
    """
    from edje_pipeline.models.checkpoint import open_model
    from edje_pipeline.pipeline.extract import ExtractConfig, run_extract
    from edje_pipeline.pipeline.runner import ExecutorOptions

    adapter = open_model(model).spec.adapter
    payload_bytes_for(spec, num_tokens=adapter.num_compressed_tokens, dim=adapter.output_dim)
    trained_spec(spec, dim=adapter.output_dim)
    wanted = num_images or default_sample_images(adapter.num_compressed_tokens)
    with tempfile.TemporaryDirectory(prefix="edje-codec-") as folder:
        config = ExtractConfig(
            corpus=corpus,
            index=f"{folder}/index",
            model=model,
            variant="float16",
            source=source,
            limit=wanted,
            executor=ExecutorOptions(executor="local"),
            quiet=quiet,
        )
        run_extract(config)
        return train_from_index(config.index, spec, out, num_images=wanted, seed=seed)


def train_and_write(tokens: np.ndarray, spec: str, out: str | None, *, seed: int = 0) -> TrainCodecResult:
    """Splits a sample (n, M, E), trains on one part, measures on the other, writes the codebook."""
    num_held_out = int(len(tokens) * HELD_OUT_FRACTION)
    split = np.random.default_rng(seed).permutation(len(tokens))
    enough = num_held_out >= MIN_HELD_OUT
    trained, measured = (tokens[split[num_held_out:]], tokens[split[:num_held_out]]) if enough else (tokens, tokens)
    started = time.monotonic()
    codec = train_from_tokens(trained, spec, seed)
    wall_s = time.monotonic() - started
    target = Location.parse(out or f"{spec}-{codec.fingerprint[:12]}.safetensors")
    target.write_bytes(codec_to_bytes(codec))
    return TrainCodecResult(
        codec=codec.name,
        fingerprint=codec.fingerprint,
        path=str(target),
        num_tokens=codec.num_tokens,
        dim=codec.dim,
        payload_bytes=codec.payload_bytes,
        float16_bytes=2 * codec.num_tokens * codec.dim,
        num_images_trained=len(trained),
        num_images_measured=len(measured),
        measured_on_trained=not enough,
        error=reconstruction_error(codec, measured),
        wall_s=wall_s,
    )
