"""The ridge map from pooled vectors into a text space."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edje_pipeline.errors import ModelError, ShapeMismatchError
from edje_pipeline.models.backbone import create_backbone, describe
from edje_pipeline.models.embedding_map import fit_embedding_map, pooled_vectors, ridge

SOURCE = "timm:vit_tiny_patch16_224?img_size=32&embed_dim=16&depth=1&num_heads=1&embedding=cls_mean"


def test_a_weak_ridge_finds_the_linear_map_and_a_strong_one_the_mean() -> None:
    generator = np.random.default_rng(0)
    inputs, weight, bias = generator.normal(size=(200, 6)), generator.normal(size=(3, 6)), generator.normal(size=3)
    targets = inputs @ weight.T + bias
    found, offset = ridge(inputs, targets, 1e-9)
    np.testing.assert_allclose(found, weight, atol=1e-5)
    np.testing.assert_allclose(offset, bias, atol=1e-5)
    flat, mean = ridge(inputs, targets, 1e9)
    assert np.abs(flat).max() < 1e-6
    np.testing.assert_allclose(mean, targets.mean(axis=0), atol=1e-5)


def test_fitted_backbone_gives_the_texts_embeddings() -> None:
    torch.manual_seed(0)
    backbone = create_backbone(describe(SOURCE, embedding_map=5)[0])
    pixels = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8)
    pooled = pooled_vectors(backbone, pixels)
    assert pooled.shape == (40, 32)
    # As many images as it takes to interpolate: 33 free values a column, 20 rows.
    texts = np.random.default_rng(1).normal(size=(20, 5)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    fit_embedding_map(backbone, pooled[:20], texts, strength=1e-7)
    with torch.inference_mode():
        embedding = backbone(pixels[:20])[1]
    np.testing.assert_allclose(embedding.numpy(), texts, atol=1e-2)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ModelError, match="made without embedding_map"):
        fit_embedding_map(create_backbone(describe(SOURCE)[0]), np.zeros((2, 32)), np.zeros((2, 5)), strength=1)
    mapped = create_backbone(describe(SOURCE, embedding_map=5)[0])
    with pytest.raises(ShapeMismatchError, match=r"got \(2, 32\) and \(3, 5\)"):
        fit_embedding_map(mapped, np.zeros((2, 32)), np.zeros((3, 5)), strength=1)
    bare = create_backbone(describe(SOURCE.replace("cls_mean", "none"))[0])
    with pytest.raises(ModelError, match="has no pooled vector"):
        pooled_vectors(bare, torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
