"""Reads a Hugging Face model directory: config.json, preprocessor_config.json, safetensors or a state dict."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from edje_pipeline.errors import ModelError, ModelNotFoundError
from edje_pipeline.models.families import CLIP, DINOV2, SIGLIP
from edje_pipeline.models.preprocess import FAMILY_DEFAULTS, from_hf_config
from edje_pipeline.models.spec import PreprocessSpec
from edje_pipeline.models.tensor_files import read_tensors

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILE = "model.safetensors.index.json"

MODEL_TYPES = {
    "siglip": SIGLIP.name,
    "siglip_vision_model": SIGLIP.name,
    "clip": CLIP.name,
    "clip_vision_model": CLIP.name,
    "dinov2": DINOV2.name,
}
"""`model_type` of config.json -> family. Siglip2Model (variable resolution, `siglip2`) has another architecture."""

# What a config.json leaves out has the value of the configuration class.
SIGLIP_DEFAULTS = {
    "image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
CLIP_DEFAULTS = {**SIGLIP_DEFAULTS, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
DINOV2_DEFAULTS = {**SIGLIP_DEFAULTS, "patch_size": 14, "hidden_act": "gelu", "mlp_ratio": 4, "use_swiglu_ffn": False}
CLIP_PROJECTION_DIM = 512


@dataclass(frozen=True)
class HfModel:
    """What a directory declares, weights not yet read."""

    directory: Path
    family: str
    options: dict[str, Any]
    preprocess: PreprocessSpec
    config: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the directory's weight files."""
        return read_directory_tensors(self.directory)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelNotFoundError: not there. ModelError: not a JSON object.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"no {path.name} in {path.parent}; expected a Hugging Face model directory")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_directory_tensors(directory: Path) -> dict[str, Tensor]:
    """Weights in one file, or in the parts that an index names."""
    index = directory / INDEX_FILE
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        tensors: dict[str, Tensor] = {}
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{index} names {name!r}, which is not a file of its own directory")
            tensors.update(read_tensors(directory / name))
        return tensors
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return read_tensors(directory / name)
    raise ModelNotFoundError(f"no weights in {directory}; expected {INDEX_FILE} or {' or '.join(WEIGHT_FILES)}")


def read_hf_model(directory: Path) -> HfModel:
    """What a directory of SiglipModel, CLIPModel or Dinov2Model declares.

    Raises:
        ModelError: another kind of model.
    """
    config = read_json(directory / "config.json")
    declared = str(config.get("model_type", ""))
    family = MODEL_TYPES.get(declared)
    if family is None:
        raise ModelError(
            f"{directory}/config.json has model_type {declared!r}; supported: {', '.join(sorted(MODEL_TYPES))}"
        )
    options = OPTIONS_OF[family](config)
    path = directory / "preprocessor_config.json"
    if path.is_file():
        preprocess = from_hf_config(read_json(path))
    else:
        size = options["image_size"] if family != DINOV2.name else FAMILY_DEFAULTS[family].image_size[0]
        preprocess = FAMILY_DEFAULTS[family].at_size(size)
    if family == DINOV2.name:
        # Its position table is resized to the images, not the images to the table.
        options["image_size"] = preprocess.image_size[0]
    elif preprocess.image_size != (options["image_size"],) * 2:
        raise ModelError(
            f"{directory}: preprocessor_config.json makes images of {preprocess.image_size}, "
            f"config.json expects {options['image_size']}"
        )
    return HfModel(directory, family, options, preprocess, config)


def _sizes(vision: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_size": int(vision["image_size"]),
        "patch_size": int(vision["patch_size"]),
        "width": int(vision["hidden_size"]),
        "num_layers": int(vision["num_hidden_layers"]),
        "num_heads": int(vision["num_attention_heads"]),
        "mlp_dim": int(vision["intermediate_size"]),
        "activation": str(vision["hidden_act"]),
        "norm_eps": float(vision["layer_norm_eps"]),
    }


def siglip_options(config: dict[str, Any]) -> dict[str, Any]:
    """Trunk options from a SigLIP config.json, whole model or vision tower alone."""
    return _sizes({**SIGLIP_DEFAULTS, **config.get("vision_config", config)})


def clip_options(config: dict[str, Any]) -> dict[str, Any]:
    """Trunk options from a CLIP config.json, whole model or vision tower alone."""
    vision = {**CLIP_DEFAULTS, **config.get("vision_config", config)}
    return {**_sizes(vision), "projection_dim": int(config.get("projection_dim", CLIP_PROJECTION_DIM))}


def dinov2_options(config: dict[str, Any]) -> dict[str, Any]:
    """Trunk options from a DINOv2 config.json."""
    vision = {**DINOV2_DEFAULTS, **config}
    hidden = int(vision["hidden_size"] * vision["mlp_ratio"])
    swiglu = bool(vision["use_swiglu_ffn"])
    if swiglu:
        # Gate and value together: timm counts both halves.
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 * 2
    return {**_sizes({**vision, "intermediate_size": hidden}), "swiglu": swiglu}


OPTIONS_OF: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    SIGLIP.name: siglip_options,
    CLIP.name: clip_options,
    DINOV2.name: dinov2_options,
}
