"""Training of product quantizers with faiss; the only file that imports it, and only when called."""

from __future__ import annotations

from typing import Any

import numpy as np

from edje_pipeline.errors import CodecError
from edje_pipeline.storage.codecs.checks import checked_tokens
from edje_pipeline.storage.codecs.codebook import Codebook
from edje_pipeline.storage.codecs.integer import MAX_HALF
from edje_pipeline.storage.codecs.product_quantizer import NUM_CENTROIDS, ProductCodec

MAX_TRAINING_TOKENS = 65_536
"""256 a centroid, faiss's own limit: more cost time and change nothing measurable."""
KMEANS_ITERATIONS = 25
ROTATION_ROUNDS = 10
"""Rounds of: assign, best rotation for the assignment (Procrustes), 4 steps of k-means."""
ROTATION_KMEANS_ITERATIONS = 4


def train_pq(sample: np.ndarray, num_bytes: int, kind: str = "pq", *, seed: int = 0) -> ProductCodec:
    """Trains the codec `<kind><num_bytes>` on the tokens of some images.

    The same sample and seed give the same codebook on the same machine. Below 256 tokens the codebook
    holds the tokens themselves.

    Args:
        sample: (n, M, E) float16 or float32, finite.
        num_bytes: m, bytes a token; a divisor of E.
        kind: `pq` or `opq`.
        seed: of the choice of tokens and of k-means.

    Raises:
        CodecError: an empty or unusable sample, or a `num_bytes` that does not divide E.
    """
    spec = f"{kind}{num_bytes}"
    if kind not in ("pq", "opq"):
        raise CodecError(f"there is no trained codec of kind {kind!r}; choose pq or opq")
    if sample.ndim != 3 or not len(sample):
        raise CodecError(f"training {spec} needs tokens of shape (n, M, E) with n >= 1; got {sample.shape}")
    _, num_tokens, dim = sample.shape
    if num_bytes < 1 or dim % num_bytes:
        raise CodecError(f"codec {spec} cuts a token into {num_bytes} equal parts; choose a divisor of {dim}")
    values = checked_tokens(sample, name=spec, num_tokens=num_tokens, dim=dim, limit=MAX_HALF)
    mean = values.mean(axis=0, dtype=np.float64).astype(np.float32)
    points = (values - mean).reshape(-1, dim)
    if len(points) > MAX_TRAINING_TOKENS:
        chosen = np.random.default_rng(seed).choice(len(points), MAX_TRAINING_TOKENS, replace=False)
        points = points[np.sort(chosen)]
    if len(points) < NUM_CENTROIDS:
        # faiss wants as many points as centroids; repeated points give repeated centroids.
        points = np.resize(points, (NUM_CENTROIDS, dim))
    arrays = {"mean": mean}
    if kind == "pq":
        arrays["centroids"] = _centroids(_fit(points, num_bytes, KMEANS_ITERATIONS, seed))
    else:
        arrays["rotation"], arrays["centroids"] = _fit_rotated(points, num_bytes, seed)
    return ProductCodec(Codebook(spec, num_tokens, dim, arrays))


def _fit(points: np.ndarray, num_bytes: int, iterations: int, seed: int, start: Any = None) -> Any:
    """A faiss ProductQuantizer trained on points (t, E), from the centroids of `start` if given."""
    import faiss

    quantizer = faiss.ProductQuantizer(points.shape[1], num_bytes, 8)
    quantizer.cp.niter = iterations
    quantizer.cp.seed = seed
    quantizer.cp.min_points_per_centroid = 1
    if start is not None:
        faiss.copy_array_to_vector(faiss.vector_to_array(start.centroids), quantizer.centroids)
        quantizer.train_type = faiss.ProductQuantizer.Train_hot_start
    quantizer.train(np.ascontiguousarray(points))
    return quantizer


def _fit_rotated(points: np.ndarray, num_bytes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotation (E, E) and centroids: optimized product quantization, from the balanced start.

    Source: Ge, He, Ke, Sun, "Optimized Product Quantization" (2013), the parametric solution as the
    start of the non-parametric one.
    """
    axes = _balanced_axes(points, num_bytes)
    quantizer = _fit(points @ axes, num_bytes, KMEANS_ITERATIONS, seed)
    for _ in range(ROTATION_ROUNDS):
        rotated = np.ascontiguousarray(points @ axes)
        nearest = quantizer.decode(quantizer.compute_codes(rotated))
        left, _, right = np.linalg.svd(points.T.astype(np.float64) @ nearest)
        axes = (left @ right).astype(np.float32)
        quantizer = _fit(points @ axes, num_bytes, ROTATION_KMEANS_ITERATIONS, seed, quantizer)
    return np.ascontiguousarray(axes.T), _centroids(quantizer)


def _balanced_axes(points: np.ndarray, num_bytes: int) -> np.ndarray:
    """Principal axes as columns (E, E), dealt to the subspaces so that the products of variances are alike."""
    variances, axes = np.linalg.eigh(np.cov(points.T.astype(np.float64)))
    order = np.argsort(variances)[::-1]
    logs = np.log(np.maximum(variances, max(float(variances.max()), 1e-30) * 1e-9))
    logs -= logs.min()
    capacity = points.shape[1] // num_bytes
    groups: list[list[int]] = [[] for _ in range(num_bytes)]
    totals = np.zeros(num_bytes)
    for axis in order:
        open_groups = [group for group in range(num_bytes) if len(groups[group]) < capacity]
        group = min(open_groups, key=lambda candidate: (totals[candidate], candidate))
        groups[group].append(int(axis))
        totals[group] += logs[axis]
    return np.ascontiguousarray(axes[:, [axis for group in groups for axis in group]], np.float32)


def _centroids(quantizer: Any) -> np.ndarray:
    """(m, 256, E/m) float32 out of faiss."""
    import faiss

    flat = faiss.vector_to_array(quantizer.centroids)
    return np.array(flat.reshape(quantizer.M, NUM_CENTROIDS, -1), np.float32)
