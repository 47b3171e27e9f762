"""Encoded images to the backbone's input size, on the CPU, with Pillow alone.

Every row that goes in comes out, with pixels or with the reason why not: a bad image never raises.
This module holds the one place that may catch everything, since decoders of hostile files do raise
everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageFile

from edje_pipeline.models.spec import PreprocessSpec
from edje_pipeline.stages.decode_errors import BadDimensionsError, PixelCapError, describe_failure
from edje_pipeline.stages.image_formats import MAX_PIXELS_OF_FORMAT, decodable_formats
from edje_pipeline.stages.preprocess import preprocess, resized_size
from edje_pipeline.stages.quiet_decoders import silence_decoders
from edje_pipeline.storage.arrow import fixed_binary_from_numpy
from edje_pipeline.storage.schema import RejectReason, RejectStage, image_batch_schema
from edje_pipeline.storage.sources.base import ReadFailure

MAX_PIXELS = 89_478_485
"""Pillow's own limit: an image of that size decodes in about a gigabyte."""
MAX_BYTES = 256 << 20

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


def decode_batch(
    rows: pa.Table,
    blobs: Sequence[bytes | ReadFailure],
    spec: PreprocessSpec,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    reduced_jpeg: bool = False,
) -> pa.Table:
    """Plan rows and their bytes to `image_batch_schema`, in the same order.

    Args:
        rows: PLAN_SCHEMA, n rows.
        blobs: n encoded images, or why they could not be read.
        spec: the backbone's transform; pixels are uint8 (H, W, 3) of its `image_size`.
        max_pixels: images above are rejected by their header, before they are decoded.
        max_bytes: cap on one encoded image.
        reduced_jpeg: decode JPEGs at 1/2, 1/4 or 1/8 where that is still larger than the resize's result:
            faster, with slightly different pixels.
    """
    num_rows = rows.num_rows
    pixels = np.zeros((num_rows, *spec.image_size, 3), np.uint8)
    widths: list[int | None] = [None] * num_rows
    heights: list[int | None] = [None] * num_rows
    digests: list[bytes | None] = [None] * num_rows
    rejects: list[tuple[RejectStage, RejectReason, str] | None] = [None] * num_rows
    silence_decoders()
    with _pillow_limits(max_pixels):
        for position, blob in enumerate(blobs):
            if isinstance(blob, ReadFailure):
                rejects[position] = (RejectStage.READ, blob.reason, blob.message)
                continue
            digests[position] = hashlib.sha256(blob).digest()
            early = _check_bytes(blob, max_bytes)
            if early is not None:
                rejects[position] = (RejectStage.READ, *early)
                continue
            try:
                size = decode_image(blob, spec, pixels[position], max_pixels=max_pixels, reduced_jpeg=reduced_jpeg)
            # The per-image border: one bad image must not take its block down, whatever its decoder raises.
            except Exception as error:  # noqa: BLE001
                pixels[position] = 0
                rejects[position] = (RejectStage.DECODE, *describe_failure(error, blob))
            else:
                heights[position], widths[position] = size
    mask = np.array([reject is not None for reject in rejects], dtype=bool)
    schema = image_batch_schema(spec.pixel_bytes)
    return pa.table(
        [
            rows.column("row"),
            rows.column("image_id"),
            rows.column("uri"),
            pa.array(widths, pa.int32()),
            pa.array(heights, pa.int32()),
            pa.array(digests, pa.binary(32)),
            pa.array([reject and reject[0].value for reject in rejects], pa.string()),
            pa.array([reject and reject[1].value for reject in rejects], pa.string()),
            pa.array([reject and reject[2] for reject in rejects], pa.string()),
            fixed_binary_from_numpy(pixels, mask),
        ],
        schema=schema,
    )


def decode_image(
    data: bytes, spec: PreprocessSpec, out: np.ndarray, *, max_pixels: int = MAX_PIXELS, reduced_jpeg: bool = False
) -> tuple[int, int]:
    """Decodes one image into `out`, uint8 (H, W, 3); returns the original's upright (height, width).

    Raises:
        Exception: whatever Pillow's decoders raise; `describe_failure` gives it a reason.
    """
    with Image.open(io.BytesIO(data), formats=decodable_formats()) as image:
        _check_size(image, max_pixels)
        announced = image.size
        reduced = False
        if reduced_jpeg and image.format in ("JPEG", "MPO"):
            reduced = _reduce(image, spec)
        image.load()
        _check_size(image, max_pixels)  # ICO, ICNS and PSD learn their size only now
        method = _orientation(image)
        upright = image.transpose(_UPRIGHT[method]) if method in _UPRIGHT else image
        original = announced if reduced else image.size
        width, height = (original[1], original[0]) if method in _SIDEWAYS else original
        target = resized_size((height, width), spec)
        if target[0] * target[1] > max_pixels:
            raise PixelCapError(
                f"{width} x {height} pixels would be resized to {target[1]} x {target[0]}, "
                f"more than the {max_pixels:,} pixels allowed"
            )
        out[...] = preprocess(upright, spec, target)
    return height, width


def _check_bytes(blob: bytes, max_bytes: int) -> tuple[RejectReason, str] | None:
    if not blob:
        return RejectReason.EMPTY, "the file has no bytes"
    if len(blob) > max_bytes:
        return (
            RejectReason.TOO_MANY_BYTES,
            f"the encoded image has {len(blob):,} bytes, more than the {max_bytes:,} allowed",
        )
    return None


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise BadDimensionsError(f"the header announces {width} x {height} pixels")
    limit = min(max_pixels, MAX_PIXELS_OF_FORMAT.get(image.format or "", max_pixels))
    if width * height > limit:
        raise PixelCapError(f"the header announces {width} x {height} pixels, more than the {limit:,} allowed")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; damaged EXIF means 1: the picture itself is fine."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  (Pillow's EXIF parser raises struct.error, SyntaxError, KeyError, ...)
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _reduce(image: Image.Image, spec: PreprocessSpec) -> bool:
    """Asks libjpeg for the smallest scale that is still at least the resize's result."""
    method = _orientation(image)
    width, height = image.size
    target = resized_size((width, height) if method in _SIDEWAYS else (height, width), spec)
    needed = target if method in _SIDEWAYS else (target[1], target[0])
    return image.draft(None, needed) is not None and image.size != (width, height)


_limits_lock = threading.Lock()
_limits_users: list[contextlib.ExitStack] = []


@contextlib.contextmanager
def _pillow_limits(max_pixels: int) -> Iterator[None]:
    """Pillow's process-wide settings for the length of a batch; the last user of several threads restores them.

    The pixel limit also reaches images inside images (ICO, ICNS), truncated files fail, and warnings of
    decoders are dropped: what matters of them is the verdict.
    """
    with _limits_lock:
        stack = contextlib.ExitStack()
        if not _limits_users:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            stack.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
            # Pillow raises above twice its limit.
            Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _limits_users.append(stack)
    try:
        yield
    finally:
        with _limits_lock:
            _limits_users.remove(stack)
            if _limits_users:
                _limits_users[0].push(stack.pop_all().__exit__)
            else:
                stack.close()
