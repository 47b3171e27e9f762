"""`estimate`: what an extraction will take, from a short measured probe.

Each stage is timed alone on this machine; the total assumes that decoding and encoding overlap: on a
GPU the slower one decides, on a CPU they share the cores and add up.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.hub import default_model
from edje_pipeline.pipeline.image_run import DEFAULT_BATCH, ComputeOptions
from edje_pipeline.pipeline.job import Job
from edje_pipeline.pipeline.model_choice import Choice, choose
from edje_pipeline.pipeline.stages import Machine, available_cpus
from edje_pipeline.progress import format_bytes, format_duration
from edje_pipeline.storage.codecs import Float16Codec
from edje_pipeline.storage.location import Location
from edje_pipeline.storage.schema import LISTING_SCHEMA, PLAN_SCHEMA
from edje_pipeline.storage.sources import Source, SourceOptions, open_source, read_images

SYNTHETIC_SIZE = (640, 480)
ROW_BYTES = 120
"""Stored besides tokens and embedding: id, sizes, content hash, footers."""


@dataclass(frozen=True)
class EstimateConfig:
    """Everything that `run_estimate` needs."""

    corpus: str | None = None
    """What to list and sample; None with `num_images`: synthetic images are timed."""
    num_images: int | None = None
    """Images in all; None: the corpus is counted."""
    model: str = field(default_factory=default_model)
    """Directory, Hub id or bundled name."""
    variant: str | None = None
    """As for extract."""
    source: str = "auto"
    """As for extract."""
    source_options: SourceOptions = field(default_factory=SourceOptions)
    """As for extract."""
    num_probe: int = 48
    """Images to measure."""
    num_gpus: int | None = None
    """GPUs to reckon with; None: those of this machine."""
    num_cpus: int | None = None
    """Cores to reckon with; None: those of this machine."""
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    """Batch size and precision."""
    seed: int = 0
    """Of the choice of images."""

    def __post_init__(self) -> None:
        """Raises ConfigError when there is nothing to count."""
        if self.corpus is None and self.num_images is None:
            raise ConfigError("estimate needs a CORPUS to list, or --num-images N")
        if self.num_probe < 1 or (self.num_images is not None and self.num_images < 1):
            raise ConfigError("--num-probe and --num-images are numbers above 0")


@dataclass(frozen=True)
class EstimateResult:
    """Images, seconds, bytes, device hours."""

    description: str
    num_images: int
    num_probed: int
    probed_rejects: int
    decode_s_per_image: float
    """One core."""
    encode_s_per_image: float
    """One encoder: a GPU, or the threads of one CPU worker."""
    device: str
    num_devices: int
    num_cpus: int
    images_per_s: float
    total_s: float
    device_hours: float
    read_bytes: int
    stored_bytes: int
    payload_bytes: int
    slowest_stage: str
    variant: str

    @property
    def exit_code(self) -> int:
        return 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        rejects = f", {self.probed_rejects} rejected" if self.probed_rejects else ""
        devices = f"{self.num_devices} {self.device}" + ("" if self.device == "cpu" else "s")
        decode_ms, encode_ms = self.decode_s_per_image * 1e3, self.encode_s_per_image * 1e3
        hardware = f"{devices}, {self.num_cpus} cores; {self.slowest_stage} decides"
        lines = {
            "corpus": self.description,
            "images": f"{self.num_images:,}",
            "probe": f"{self.num_probed} images{rejects}: decode {decode_ms:.1f} ms, encode {encode_ms:.1f} ms",
            "speed": f"{self.images_per_s:,.1f} images/s ({hardware})",
            "time": format_duration(self.total_s),
            "device hours": f"{self.device_hours:,.2f}",
            "bytes to read": format_bytes(self.read_bytes),
            "bytes to store": f"{format_bytes(self.stored_bytes)} ({self.payload_bytes:,} B an image, {self.variant})",
        }
        return "\n".join(f"{name:<15} {value}" for name, value in lines.items())


def run_estimate(config: EstimateConfig) -> EstimateResult:
    """Lists, samples and measures.

    Raises:
        SourceError, ModelError, DeviceError: as extract would.
    """
    choice = choose(config.model, config.variant)
    if config.corpus is not None:
        source = open_source(config.corpus, config.source, options=config.source_options)
        sample, counted = _sample(source, config)
        blobs: list[Any] = list(read_images(source.to_dict(), sample))
        description = source.describe()
    else:
        description, counted = "synthetic 640 x 480 JPEG", 0
        sample, made = _synthetic(config.num_probe)
        blobs = list(made)
    num_images = config.num_images or counted
    if not num_images or not sample.num_rows:
        raise ConfigError(f"{description}: there is no image to measure")
    machine = Machine(config.num_cpus or available_cpus(), _num_gpus(config.num_gpus))
    decode_s, pixels, num_rejected = _time_decode(sample, blobs, choice, config)
    encode_s = _time_encode(pixels, choice, config, machine)
    return _result(choice, machine, description, num_images, blobs, decode_s, encode_s, num_rejected)


def _result(
    choice: Choice, machine: Machine, description: str, num_images: int, blobs: list[Any],
    decode_s: float, encode_s: float, num_rejected: int,
) -> EstimateResult:  # fmt: skip
    encode_rate = machine.num_encoders / max(encode_s, 1e-9)
    decode_rate = machine.num_cpus / max(decode_s, 1e-9)
    # On a CPU both want the same cores.
    rate = min(encode_rate, decode_rate) if machine.num_gpus else 1 / (1 / encode_rate + 1 / decode_rate)
    sizes = [len(blob) for blob in blobs if isinstance(blob, bytes)]
    total_s = num_images / rate
    num_devices = machine.num_gpus or machine.num_encoders
    return EstimateResult(
        description=description,
        num_images=num_images,
        num_probed=len(blobs),
        probed_rejects=num_rejected,
        decode_s_per_image=decode_s,
        encode_s_per_image=encode_s,
        device="GPU" if machine.num_gpus else "cpu",
        num_devices=num_devices,
        num_cpus=machine.num_cpus,
        images_per_s=rate,
        total_s=total_s,
        device_hours=total_s * num_devices / 3600,
        read_bytes=int(num_images * (sum(sizes) / max(len(sizes), 1))),
        stored_bytes=num_images * (choice.payload_bytes + 2 * choice.embedding_dim + ROW_BYTES),
        payload_bytes=choice.payload_bytes,
        slowest_stage="encode" if encode_rate <= decode_rate else "decode",
        variant=choice.variant,
    )


def _num_gpus(asked: int | None) -> int:
    import torch

    return torch.cuda.device_count() if asked is None else asked


def _sample(source: Source, config: EstimateConfig) -> tuple[pa.Table, int]:
    """A random sample of the listing, and its length. With `num_images` only the start is listed."""
    rng = random.Random(config.seed)
    kept: list[dict[str, Any]] = []
    num_listed = 0
    for row in _rows(source):
        if len(kept) < config.num_probe:
            kept.append(row)
        elif config.num_images is not None:
            break
        else:
            place = rng.randrange(num_listed + 1)
            if place < config.num_probe:
                kept[place] = row
        num_listed += 1
    table = pa.Table.from_pylist(kept, LISTING_SCHEMA)
    return table.add_column(0, PLAN_SCHEMA.field("row"), pa.array(range(len(kept)), pa.int64())), num_listed


def _rows(source: Source) -> Iterator[dict[str, Any]]:
    for batch in source.list_batches():
        yield from batch.to_pylist()


def _synthetic(num_images: int) -> tuple[pa.Table, list[bytes]]:
    import io

    from PIL import Image

    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    coarse.resize(SYNTHETIC_SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    names = [f"synthetic-{number}" for number in range(num_images)]
    zeros = [0] * num_images
    table = pa.table([list(range(num_images)), names, names, names, zeros, zeros], schema=PLAN_SCHEMA)
    return table, [buffer.getvalue()] * num_images


def _time_decode(
    sample: pa.Table, blobs: list[Any], choice: Choice, config: EstimateConfig
) -> tuple[float, np.ndarray, int]:
    """Seconds an image on one core, pixels of the accepted ones (n, H, W, 3), and the number of rejects."""
    from edje_pipeline.stages.decode import decode_batch
    from edje_pipeline.storage.arrow import numpy_from_fixed_binary

    spec = choice.model.spec.preprocess
    limits = (config.compute.max_pixels, config.compute.max_bytes)
    decode_batch(
        sample.slice(0, 1), blobs[:1], spec, max_pixels=limits[0], max_bytes=limits[1]
    )  # imports and tables of Pillow
    started = time.perf_counter()
    table = decode_batch(sample, blobs, spec, max_pixels=limits[0], max_bytes=limits[1])
    seconds = (time.perf_counter() - started) / sample.num_rows
    accepted = np.asarray(table.column("reject_reason").is_null())
    pixels = numpy_from_fixed_binary(table.column("pixels").combine_chunks()).reshape(-1, *spec.image_size, 3)
    if not accepted.any():
        return seconds, np.zeros((1, *spec.image_size, 3), np.uint8), len(accepted)
    return seconds, pixels[accepted], int((~accepted).sum())


def _time_encode(pixels: np.ndarray, choice: Choice, config: EstimateConfig, machine: Machine) -> float:
    """Seconds an image of one encoder, warm; whole batches only."""
    from edje_pipeline.pipeline.workers import make_encoder

    device = "cuda" if machine.num_gpus else "cpu"
    batch_size = config.compute.batch_size or DEFAULT_BATCH[device]
    with tempfile.TemporaryDirectory(prefix="edje-estimate-") as folder:
        job = Job(
            index=Location.parse(folder),
            run_id="estimate",
            plan_dir=Location.parse(folder),
            codec=Float16Codec(choice.num_tokens, choice.dim),
            embedding_dim=choice.embedding_dim,
            unit_rows=batch_size,
            shard_rows=batch_size,
            model=choice.location,
            preprocess=choice.model.spec.preprocess,
            use_adapter=choice.use_adapter,
            device=device,
            precision=config.compute.precision,
            compile_model=config.compute.compile_model,
            batch_size=batch_size,
            num_threads=machine.threads_per_encoder,
        )
        encoder = make_encoder(job)
        num_images = max(len(pixels) // batch_size, 1) * batch_size
        images = np.resize(pixels, (num_images, *pixels.shape[1:]))
        encoder.encode(images[:batch_size])
        started = time.perf_counter()
        encoder.encode(images)
        return (time.perf_counter() - started) / num_images
