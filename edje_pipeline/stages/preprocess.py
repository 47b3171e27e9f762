"""Resize, crop and conversion to RGB with Pillow, equal bit for bit to the torchvision transform.

The arithmetic follows `timm.data.transforms_factory` (evaluation) and `open_clip.transform`, both on
PIL images: torchvision's Resize truncates the long side, their ResizeKeepRatio rounds it, centre crops
round half to even, padding puts the odd pixel right and below.

H, W: height and width in pixels; sizes are (height, width) pairs everywhere but at Pillow's own calls.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageOps

from edje_pipeline.models.spec import PreprocessSpec

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class ImpossibleSizeError(ValueError):
    """The image's shape resizes to nothing, or to far more pixels than an image may have."""


def resized_size(size: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """(height, width) after the resize and before the crop, of an image of (height, width) `size`.

    Raises:
        ImpossibleSizeError: a side would have no pixel left.
    """
    height, width = size
    scaled = tuple(math.floor(side / spec.crop_pct) for side in spec.image_size)
    if spec.resize_mode == "squash":
        return scaled[0], scaled[1]
    if spec.resize_mode == "shortest" and scaled[0] == scaled[1]:
        short, long = min(size), max(size)
        new_long = int(scaled[0] * long / short)
        result = (new_long, scaled[0]) if width <= height else (scaled[0], new_long)
    else:
        ratios = height / scaled[0], width / scaled[1]
        ratio = max(ratios) if spec.resize_mode == "longest" else min(ratios)
        result = round(height / ratio), round(width / ratio)
    if min(result) < 1:
        raise ImpossibleSizeError(
            f"{width} x {height} pixels would become {result[1]} x {result[0]}: the shape is too long and thin"
        )
    return result


def to_rgb(image: Image.Image) -> Image.Image:
    """`image.convert("RGB")`: what timm, open_clip and transformers do.

    16-bit and 32-bit greys are clipped at 255 by it and mostly turn white; that is what the backbone's
    own preprocessing gives, so it is kept.
    """
    if image.mode == "La":  # premultiplied grey, the one mode Pillow converts to RGB only through another
        image = image.convert("LA")
    return image.convert("RGB")


def preprocess(image: Image.Image, spec: PreprocessSpec, target: tuple[int, int]) -> np.ndarray:
    """The backbone's input as uint8 (H, W, 3).

    Args:
        image: decoded and upright.
        spec: the transform.
        target: `resized_size` of the original image; differs from that of `image` after a reduced decode.
    """
    if spec.rgb_conversion == "first":
        image = to_rgb(image)
    if image.size != (target[1], target[0]):
        image = image.resize((target[1], target[0]), FILTERS[spec.interpolation])
    image = _crop_or_pad(image, spec)
    if spec.rgb_conversion == "last":
        image = to_rgb(image)
    return np.asarray(image)


def _crop_or_pad(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    height, width = spec.image_size
    missing_w, missing_h = max(width - image.width, 0), max(height - image.height, 0)
    if missing_w or missing_h:
        border = (missing_w // 2, missing_h // 2, (missing_w + 1) // 2, (missing_h + 1) // 2)
        palette = image.getpalette() if image.mode == "P" else None
        image = ImageOps.expand(image, border=border, fill=_fill(image, spec))
        if palette is not None:
            image.putpalette(palette)
    if image.size == (width, height):
        return image
    top = round((image.height - height) / 2.0)
    left = round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _fill(image: Image.Image, spec: PreprocessSpec) -> int | tuple[int, ...]:
    fill = spec.fill if spec.resize_mode == "longest" else 0
    if not isinstance(fill, int):
        return tuple(fill)
    num_bands = len(image.getbands())
    return (fill,) * num_bands if num_bands > 1 else fill
