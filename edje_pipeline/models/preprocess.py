"""PreprocessSpec from what each library publishes next to its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.spec import PreprocessSpec

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ResizeMode = Literal["squash", "shortest", "longest"]

TIMM_CROP_MODES: dict[str, ResizeMode] = {"center": "shortest", "squash": "squash", "border": "longest"}
RESIZE_MODES = ("squash", "shortest", "longest")
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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
    mean = triple(data["mean"])
    return PreprocessSpec(
        image_size=square(image_size if image_size is not None else tuple(data["input_size"][1:])),
        resize_mode=TIMM_CROP_MODES[mode],
        crop_pct=float(data["crop_pct"]),
        interpolation=interpolation(str(data["interpolation"])),
        mean=mean,
        std=triple(data["std"]),
        fill=(round(255 * mean[0]), round(255 * mean[1]), round(255 * mean[2])) if mode == "border" else 0,
    )


def from_open_clip_config(config: Mapping[str, Any], *, image_size: Any) -> PreprocessSpec:
    """From open_clip's preprocess configuration (`mean`, `std`, `interpolation`, `resize_mode`, `fill_color`)."""
    mode = str(config.get("resize_mode") or "shortest")
    if mode not in RESIZE_MODES:
        raise ConfigError(f"open_clip resize_mode {mode!r} is not supported; expected one of {', '.join(RESIZE_MODES)}")
    return PreprocessSpec(
        image_size=square(image_size),
        resize_mode=cast("ResizeMode", mode),
        interpolation=interpolation(str(config.get("interpolation") or "bicubic")),
        mean=triple(config.get("mean") or OPENAI_MEAN),
        std=triple(config.get("std") or OPENAI_STD),
        fill=int(config.get("fill_color") or 0),
        rgb_conversion="last",
    )


def from_hf_config(config: Mapping[str, Any]) -> PreprocessSpec:
    """From a preprocessor_config.json of a Hugging Face image processor.

    Raises:
        ConfigError: it asks for something that PreprocessSpec cannot say.
    """
    size, crop = config.get("size", {}), config.get("crop_size")
    filters = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    resample = int(config.get("resample", 3))
    if resample not in filters or not config.get("do_resize", True) or config.get("do_normalize", True) is False:
        raise ConfigError(f"this image processor is not supported: resample={resample}, resizing or normalising is off")
    common = PreprocessSpec(
        image_size=(1, 1),
        interpolation=interpolation(filters[resample]),
        mean=triple(config.get("image_mean", OPENAI_MEAN)),
        std=triple(config.get("image_std", OPENAI_STD)),
    )
    crops = bool(config.get("do_center_crop", crop is not None))
    if isinstance(size, Mapping) and {"height", "width"} <= set(size) and not crops:
        return replace(common, image_size=(int(size["height"]), int(size["width"])), resize_mode="squash")
    shortest = int(size["shortest_edge"]) if isinstance(size, Mapping) and "shortest_edge" in size else size
    if not isinstance(shortest, int) or crop is None:
        raise ConfigError(f"this image processor is not supported: size={size}, crop_size={crop}")
    side = square(crop if not isinstance(crop, Mapping) else (crop["height"], crop["width"]))
    return replace(common, image_size=side, resize_mode="shortest", crop_pct=crop_pct(side[0], shortest))


def crop_pct(image_size: int, shortest: int) -> float:
    """The fraction whose division takes `image_size` to `shortest` exactly, rounding down."""
    exact = image_size / shortest
    return exact if math.floor(image_size / exact) == shortest else image_size / (shortest + 0.25)


@dataclass(frozen=True)
class FamilyDefault:
    """Preprocessing of a family where a directory does not say."""

    spec: PreprocessSpec

    @property
    def image_size(self) -> tuple[int, int]:
        return self.spec.image_size

    def at_size(self, side: int) -> PreprocessSpec:
        return replace(self.spec, image_size=(side, side))


FAMILY_DEFAULTS: dict[str, FamilyDefault] = {
    "siglip": FamilyDefault(PreprocessSpec((224, 224), "squash")),
    "clip": FamilyDefault(PreprocessSpec((224, 224), "shortest", mean=OPENAI_MEAN, std=OPENAI_STD)),
    "dinov2": FamilyDefault(PreprocessSpec((224, 224), "shortest", 0.875, mean=IMAGENET_MEAN, std=IMAGENET_STD)),
}
