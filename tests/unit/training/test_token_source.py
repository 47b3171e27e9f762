"""Tokens from images and from the cache are the backbone's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edje_pipeline.errors import InputFileError
from edje_pipeline.training.token_source import ImageTokens, cache_tokens
from tests.training_helpers import draw_shapes, tiny_model


def test_images_and_cache_agree_with_the_backbone(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "images", num_copies=1)
    backbone = tiny_model(tmp_path / "model").load_backbone()
    source = ImageTokens(str(tmp_path / "images"), backbone)
    assert len(source.image_ids) == 12
    positions = np.array([3, 0, 3])
    tokens, pooled = source.tokens(positions), source.pooled(positions)
    assert np.array_equal(tokens[0], tokens[2])
    assert not np.array_equal(tokens[0], tokens[1])
    assert pooled is not None
    cached = cache_tokens(source, tmp_path / "cache", "f1")
    np.testing.assert_allclose(cached.tokens(positions).astype(np.float32), tokens.astype(np.float32), atol=2e-3)
    found = cached.pooled(positions)
    assert found is not None
    np.testing.assert_allclose(found, pooled, atol=1e-4)
    written = (tmp_path / "cache" / "tokens.npy").stat().st_mtime_ns
    cache_tokens(source, tmp_path / "cache", "f1")
    assert (tmp_path / "cache" / "tokens.npy").stat().st_mtime_ns == written
    cache_tokens(source, tmp_path / "cache", "f2")
    assert (tmp_path / "cache" / "tokens.npy").stat().st_mtime_ns > written
    with torch.no_grad():
        assert source._backbone.spec.width == tokens.shape[2]


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "images", num_copies=1)
    (tmp_path / "images" / "blue-cross-0.png").write_bytes(b"no image")
    source = ImageTokens(str(tmp_path / "images"), tiny_model(tmp_path / "model").load_backbone())
    position = list(source.image_ids).index("blue-cross-0.png")
    with pytest.raises(InputFileError, match=r"blue-cross-0\.png.* cannot be used for training"):
        source.tokens(np.array([position]))
