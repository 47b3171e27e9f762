"""Tokens from images and from the cache are the backbone's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edje_pipeline.errors import InputFileError
from edje_pipeline.models.backbone import Backbone
from edje_pipeline.training import token_source
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


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_model(tmp_path_factory.mktemp("views") / "model").load_backbone()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views") / "images"
    draw_shapes(folder, num_copies=1)
    return folder


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal up to a batch's size and float16."""
    return one.shape == other.shape and bool(np.allclose(one.astype(np.float32), other.astype(np.float32), atol=5e-3))


def test_cached_views(tmp_path: Path, images: Path, backbone: Backbone) -> None:
    source = ImageTokens(str(images), backbone, seed=5)
    everything = np.arange(12)
    cached = cache_tokens(source, tmp_path / "one", "f", num_views=3)
    plain = source.tokens(everything)
    assert near(cached.tokens(everything), plain)
    assert near(cached.tokens(everything, np.zeros(12, np.int64)), plain)
    by_view = [cached.tokens(everything, np.full(12, view)) for view in range(3)]
    for view in (1, 2):
        assert near(by_view[view], source.tokens(everything, np.full(12, view)))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        distance = np.abs(by_view[one].astype(np.float32) - by_view[other].astype(np.float32)).max(axis=(1, 2))
        assert distance.min() > 0.05
    positions, views = np.array([4, 4, 0, 11, 4]), np.array([2, 0, 1, 2, 2])
    mixed = cached.tokens(positions, views)
    for row, (position, view) in enumerate(zip(positions, views, strict=True)):
        assert np.array_equal(mixed[row], by_view[view][position])
    assert near(mixed, source.tokens(positions, views))
    again = cache_tokens(ImageTokens(str(images), backbone, seed=5), tmp_path / "two", "f", num_views=3)
    assert np.array_equal(again.tokens(everything, np.full(12, 2)), by_view[2])
    other_seed = ImageTokens(str(images), backbone, seed=6)
    assert not near(other_seed.tokens(everything, np.full(12, 1)), by_view[1])
    assert near(other_seed.tokens(everything, np.full(12, 0)), plain)


def test_pooled_vectors_are_those_of_the_image_as_it_is(tmp_path: Path, images: Path, backbone: Backbone) -> None:
    source = ImageTokens(str(images), backbone)
    cached = cache_tokens(source, tmp_path / "cache", "f", num_views=2)
    positions = np.array([7, 2])
    found, expected = cached.pooled(positions), source.pooled(positions)
    assert found is not None
    assert expected is not None
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_mix_of_views_in_one_pass(images: Path, backbone: Backbone) -> None:
    source = ImageTokens(str(images), backbone)
    positions, views = np.array([1, 2, 3]), np.array([0, 1, 0])
    pixels = source.pixels(positions)
    before = pixels.copy()
    tokens, _ = source.encode(pixels, positions, views)
    assert np.array_equal(pixels, before)
    plain, _ = source.encode(pixels, positions)
    changed, _ = source.encode(pixels, positions, np.ones(3, np.int64))
    assert near(tokens[[0, 2]], plain[[0, 2]])
    assert near(tokens[1:2], changed[1:2])
    assert not near(tokens[1:2], plain[1:2])


def test_a_run_that_reads_the_cache_keeps_it_while_another_writes_anew(
    tmp_path: Path, images: Path, backbone: Backbone
) -> None:
    source = ImageTokens(str(images), backbone)
    three = cache_tokens(source, tmp_path / "cache", "f1", num_views=3)
    expected = three.tokens(np.arange(12), np.full(12, 2))
    one = cache_tokens(source, tmp_path / "cache", "f2")
    assert np.array_equal(three.tokens(np.arange(12), np.full(12, 2)), expected)
    # One view only: every view is the image as it is.
    assert np.array_equal(one.tokens(np.array([3]), np.array([2])), one.tokens(np.array([3])))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["fingerprint", "pooled.npy", "tokens.npy"]


def test_a_cache_that_failed_is_not_used(tmp_path: Path, backbone: Backbone) -> None:
    draw_shapes(tmp_path / "images", num_copies=1)
    whole = (tmp_path / "images" / "red-cross-0.png").read_bytes()
    (tmp_path / "images" / "red-cross-0.png").write_bytes(b"no image")
    source = ImageTokens(str(tmp_path / "images"), backbone)
    with pytest.raises(InputFileError, match=r"red-cross-0\.png"):
        cache_tokens(source, tmp_path / "cache", "f")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "images" / "red-cross-0.png").write_bytes(whole)
    source = ImageTokens(str(tmp_path / "images"), backbone)
    assert near(cache_tokens(source, tmp_path / "cache", "f").tokens(np.arange(12)), source.tokens(np.arange(12)))


def test_decoded_batches_in_order(images: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_source, "BATCH_IMAGES", 1)  # more batches than are decoded ahead
    source = ImageTokens(str(images), backbone)
    parts = list(source.decoded_batches())
    assert [positions.tolist() for positions, _ in parts] == [[position] for position in range(12)]
    assert np.array_equal(np.concatenate([pixels for _, pixels in parts]), source.pixels(np.arange(12)))


def test_decoded_batches_raise_the_error_of_a_bad_image(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_source, "BATCH_IMAGES", 2)
    draw_shapes(tmp_path / "images", num_copies=1)
    source = ImageTokens(str(tmp_path / "images"), backbone)
    bad = source.image_ids[5]
    (tmp_path / "images" / bad).write_bytes(b"no image")
    seen: list[list[int]] = []
    with pytest.raises(InputFileError, match=f"{bad}.* cannot be used for training"):
        seen.extend(positions.tolist() for positions, _ in source.decoded_batches())
    assert seen == [[0, 1], [2, 3]]
