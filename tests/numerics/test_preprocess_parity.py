"""Pixels equal those of the backbone's own preprocessing, bit for bit.

References: timm.data.create_transform on an image its datasets have converted to RGB, and
open_clip.image_transform on the image as opened.
"""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from edje_pipeline.models.spec import PreprocessSpec
from edje_pipeline.stages.decode import decode_batch
from edje_pipeline.storage.schema import PLAN_SCHEMA
from tests.shared_data import shared_path

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(1, 1), (7, 5), (32, 32), (33, 32), (31, 64), (64, 48), (101, 37), (37, 211), (223, 225), (500, 333), (3, 90)]
TIMM_MODES = {"squash": "squash", "shortest": "center", "longest": "border"}


def ours(data: bytes, spec: PreprocessSpec) -> np.ndarray:
    rows = pa.table([[0], ["a"], ["a"], [""], [0], [-1]], schema=PLAN_SCHEMA)
    row = decode_batch(rows, [data], spec).to_pylist()[0]
    assert row["reject_reason"] is None, row["reject_message"]
    return np.frombuffer(row["pixels"], np.uint8).reshape(*spec.image_size, 3)


def normalised(pixels: np.ndarray, spec: PreprocessSpec) -> torch.Tensor:
    """(3, H, W) float32 as the device does it: over 255, minus mean, over std."""
    values = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    return (values - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def noise(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng((seed, *size))
    rgb = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, size, np.uint16))
    if mode in ("LA", "RGBA"):
        image = rgb.convert(mode)
        image.putalpha(Image.fromarray(rng.integers(0, 256, size, np.uint8)))
        return image
    return rgb.quantize(64) if mode == "P" else rgb.convert(mode)


def timm_reference(image: Image.Image, spec: PreprocessSpec) -> tuple[np.ndarray, torch.Tensor]:
    options: dict[str, Any] = {
        "input_size": (3, *spec.image_size),
        "interpolation": spec.interpolation,
        "mean": spec.mean,
        "std": spec.std,
        "crop_pct": spec.crop_pct,
        "crop_mode": TIMM_MODES[spec.resize_mode],
    }
    image = image.convert("RGB")
    return create_transform(**options, normalize=False)(image).permute(1, 2, 0).numpy(), create_transform(**options)(
        image
    )


TIMM_CASES = itertools.product(
    ["squash", "shortest", "longest"], [1.0, 0.875, 0.95], ["bicubic", "bilinear"], [(32, 32), (31, 31), (32, 48)]
)


@pytest.mark.parametrize(
    ("mode", "crop_pct", "interpolation", "image_size"),
    [*TIMM_CASES, ("shortest", 0.9, "lanczos", (32, 32)), ("squash", 1.0, "nearest", (45, 32))],
)
def test_equal_to_timm(mode: Any, crop_pct: float, interpolation: Any, image_size: tuple[int, int]) -> None:
    spec = PreprocessSpec(
        image_size, mode, crop_pct, interpolation, MEAN, STD, fill=tuple(round(255 * value) for value in MEAN)
    )
    for size in SIZES:
        image = noise(size)
        if mode == "longest" and max(size) / min(size) > 29:
            continue  # timm itself fails where a side resizes to nothing
        pixels, tensor = timm_reference(image, spec)
        found = ours(png(image), spec)
        np.testing.assert_array_equal(found, pixels, err_msg=str(size))
        assert torch.equal(normalised(found, spec), tensor), size


@pytest.mark.parametrize("mode", ["squash", "shortest", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("image_size", [32, 31])
@pytest.mark.parametrize("kind", ["RGB", "L", "P", "RGBA", "LA", "1", "I;16"])
def test_equal_to_open_clip(mode: Any, interpolation: Any, image_size: int, kind: str) -> None:
    spec = PreprocessSpec((image_size, image_size), mode, 1.0, interpolation, MEAN, STD, fill=7, rgb_conversion="last")
    transform = open_clip.image_transform(
        image_size, False, MEAN, STD, resize_mode=mode, interpolation=interpolation, fill_color=7
    )
    for size in [(7, 5), (32, 32), (31, 64), (101, 37), (223, 225), (60, 211)]:
        data = png(noise(size, kind))
        with Image.open(io.BytesIO(data)) as image:
            expected = transform(image)
        assert torch.equal(normalised(ours(data, spec), spec), expected), (size, kind)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    image_size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mode=st.sampled_from(["squash", "shortest"]),
    crop_pct=st.sampled_from([1.0, 0.875, 0.9, 0.965]),
)
def test_equal_to_timm_for_any_size(
    size: tuple[int, int], image_size: tuple[int, int], mode: Any, crop_pct: float
) -> None:
    spec = PreprocessSpec(image_size, mode, crop_pct, "bicubic", MEAN, STD)
    image = noise(size)
    np.testing.assert_array_equal(ours(png(image), spec), timm_reference(image, spec)[0])


def test_equal_on_real_photographs() -> None:
    spec = PreprocessSpec((64, 64), "shortest", 0.875, "bicubic", MEAN, STD)
    for path in sorted(shared_path("photos", "images").glob("*.jpg"))[:20]:
        with Image.open(path) as image:
            pixels, _ = timm_reference(image, spec)
        np.testing.assert_array_equal(ours(path.read_bytes(), spec), pixels, err_msg=path.name)


@pytest.mark.filterwarnings("ignore")
def test_equal_to_open_clip_on_odd_images() -> None:
    spec = PreprocessSpec((32, 32), "squash", 1.0, "bicubic", MEAN, STD, rgb_conversion="last")
    transform = open_clip.image_transform(32, False, MEAN, STD, resize_mode="squash")
    compared = 0
    for path in sorted(shared_path("odd-images", "pillow").iterdir()):
        data = path.read_bytes()
        rows = pa.table([[0], ["a"], ["a"], [""], [0], [-1]], schema=PLAN_SCHEMA)
        row = decode_batch(rows, [data], spec).to_pylist()[0]
        if row["reject_reason"] is not None:
            continue
        with Image.open(io.BytesIO(data)) as image:
            if image.getexif().get(0x0112, 1) != 1:
                continue
            try:
                expected = transform(image)
            except ValueError:
                continue  # the reference has no conversion for this mode
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(32, 32, 3)
        assert torch.equal(normalised(pixels, spec), expected), path.name
        compared += 1
    assert compared > 120
