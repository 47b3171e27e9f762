"""Fits the linear map from a backbone's pooled vector into a text tower's space: ridge regression.

Shape letters: n captioned images, P pooled width, De embedding width.
"""

from __future__ import annotations

import numpy as np
import torch

from edje_pipeline.errors import ModelError, ShapeMismatchError
from edje_pipeline.models.backbone import Backbone

MATRIX_NDIM = 2


def ridge(pooled: np.ndarray, targets: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Least squares with a penalty on the weights, not on the bias.

    Args:
        pooled: (n, P).
        targets: (n, De).
        strength: The penalty, relative to the mean variance of a pooled component times n.

    Returns:
        weight (De, P) and bias (De,), float32, so that `pooled @ weight.T + bias` is near `targets`.
    """
    inputs, outputs = pooled.astype(np.float64), targets.astype(np.float64)
    input_mean, output_mean = inputs.mean(axis=0), outputs.mean(axis=0)
    centred = inputs - input_mean
    gram = centred.T @ centred
    gram[np.diag_indices_from(gram)] += strength * np.trace(gram) / len(gram)
    weight = np.linalg.solve(gram, centred.T @ (outputs - output_mean)).T
    return weight.astype(np.float32), (output_mean - weight @ input_mean).astype(np.float32)


def pooled_vectors(backbone: Backbone, pixels: torch.Tensor) -> np.ndarray:
    """What stands before the map: uint8 pixels (B, H, W, 3) -> (B, P) float32."""
    with torch.inference_mode():
        _, pooled = backbone.trunk(backbone.normalise(pixels).to(backbone.dtype))
    if pooled is None:
        raise ModelError(f"backbone {backbone.spec.source} has no pooled vector to map")
    values: np.ndarray = pooled.float().cpu().numpy()
    return values


def fit_embedding_map(backbone: Backbone, pooled: np.ndarray, text_embeddings: np.ndarray, *, strength: float) -> None:
    """Fits and sets the map of a backbone made with `embedding_map`, in place.

    Args:
        backbone: With a map of the text tower's width (`make-model --sentence-encoder`).
        pooled: (n, P) of `pooled_vectors`.
        text_embeddings: (n, De), of each image's text (or the mean over its texts).
        strength: See `ridge`; 0.1 suits a few thousand images.

    Raises:
        ModelError: the backbone has no map. ShapeMismatchError: the arrays do not fit it or each other.
    """
    linear = backbone.embedding_map
    if linear is None:
        raise ModelError(f"backbone {backbone.spec.source} was made without embedding_map")
    expected = (len(pooled), linear.in_features), (len(pooled), linear.out_features)
    if pooled.ndim != MATRIX_NDIM or (pooled.shape, text_embeddings.shape) != expected:
        raise ShapeMismatchError(
            f"the embedding map takes pooled vectors and text embeddings of shapes {expected}, "
            f"got {pooled.shape} and {text_embeddings.shape}"
        )
    weight, bias = ridge(pooled, text_embeddings, strength)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
        linear.bias.copy_(torch.from_numpy(bias))
