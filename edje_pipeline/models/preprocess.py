"""PreprocessSpec from what each library publishes next to its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.spec import PreprocessSpec

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ResizeMode = Literal["squash", "shortest", "longest"]

TIMM_CROP_MODES: dict[str, ResizeMode] = {"center": "shortest", "squash": "squash", "border": "longest"}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def triple(value: Any) -> tuple[float, float, float]:
    """Three floats from a list or tuple."""
    first, second, third = (float(x) for x in value)
    return first, second, third


def square(value: Any) -> tuple[int, int]:
    """(height, width) from one side or a pair."""
    if isinstance(value, int):
        return value, value
    height, width = (int(x) for x in value)
    return height, width


def interpolation(name: str) -> Interpolation:
    """Checks the name of a resampling filter."""
    if name not in INTERPOLATIONS:
        raise ConfigError(f"interpolation {name!r} is not supported; expected one of {', '.join(INTERPOLATIONS)}")
    return cast("Interpolation", name)


def from_timm_config(data: Mapping[str, Any], *, image_size: Any = None) -> PreprocessSpec:
    """From `timm.data.resolve_data_config`, for timm's evaluation transform."""
    mode = str(data["crop_mode"])
    if mode not in TIMM_CROP_MODES:
        raise ConfigError(f"timm crop_mode {mode!r} is not supported; expected one of {', '.join(TIMM_CROP_MODES)}")
    return PreprocessSpec(
        image_size=square(image_size if image_size is not None else tuple(data["input_size"][1:])),
        resize_mode=TIMM_CROP_MODES[mode],
        crop_pct=float(data["crop_pct"]),
        interpolation=interpolation(str(data["interpolation"])),
        mean=triple(data["mean"]),
        std=triple(data["std"]),
    )
