"""Training with faiss: our assignment is faiss's, a rotation pays, few tokens are no error."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from edje_pipeline.errors import CodecError
from edje_pipeline.storage.codecs import train_pq


def correlated(num_images: int, seed: int) -> np.ndarray:
    """Tokens whose variance lies in few directions, as real ones' does; float32 (n, 4, 16)."""
    mixing = np.random.default_rng(7).normal(size=(16, 16)) * np.geomspace(3, 0.05, 16)[:, None]
    return (np.random.default_rng(seed).normal(size=(num_images, 4, 16)) @ mixing).astype(np.float32)


@pytest.mark.parametrize("kind", ["pq", "opq"])
def test_codes_are_those_of_faiss(kind: str) -> None:
    codec = train_pq(correlated(200, 0), 4, kind)
    reference = faiss.ProductQuantizer(16, 4, 8)
    faiss.copy_array_to_vector(codec.codebook.arrays["centroids"].ravel(), reference.centroids)
    tokens = correlated(50, 1)
    points = (tokens - codec.codebook.arrays["mean"]).reshape(-1, 16)
    if codec.rotation is not None:
        points = points @ codec.rotation.T
    expected = reference.compute_codes(np.ascontiguousarray(points)).reshape(50, -1)
    assert (codec.encode(tokens) == expected).mean() > 0.999


def test_rotation_is_orthogonal_and_pays() -> None:
    train, held = correlated(400, 0), correlated(50, 1)
    plain, rotated = train_pq(train, 4, "pq"), train_pq(train, 4, "opq")
    assert rotated.rotation is not None
    np.testing.assert_allclose(rotated.rotation @ rotated.rotation.T, np.eye(16), atol=1e-5)
    lost = [np.linalg.norm(codec.decode(codec.encode(held)) - held) for codec in (plain, rotated)]
    assert lost[1] < 0.8 * lost[0]


def test_seed_decides() -> None:
    sample = correlated(100, 0)
    assert train_pq(sample, 4, seed=1) == train_pq(sample, 4, seed=1)
    assert train_pq(sample, 4, seed=1) != train_pq(sample, 4, seed=2)


@pytest.mark.parametrize("kind", ["pq", "opq"])
def test_equal_tokens_are_no_error(kind: str) -> None:
    sample = np.ones((2, 4, 16), np.float32)
    codec = train_pq(sample, 4, kind)
    np.testing.assert_allclose(codec.decode(codec.encode(sample)), sample, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "num_bytes", "kind", "match"),
    [((0, 4, 16), 4, "pq", "n >= 1"), ((4, 16), 4, "pq", "n >= 1"), ((2, 4, 16), 5, "pq", "divisor"),
     ((2, 4, 16), 0, "pq", "divisor"), ((2, 4, 16), 4, "rq", "no trained codec")],
)  # fmt: skip
def test_refuses(shape: tuple[int, ...], num_bytes: int, kind: str, match: str) -> None:
    with pytest.raises(CodecError, match=match):
        train_pq(np.ones(shape, np.float32), num_bytes, kind)


def test_refuses_nan() -> None:
    sample = np.ones((3, 4, 16), np.float32)
    sample[1, 0, 0] = np.nan
    with pytest.raises(CodecError, match="image 1 of this batch"):
        train_pq(sample, 4)
