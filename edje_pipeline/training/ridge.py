"""The first stage of a backbone without a text tower: a linear map of its pooled vector into sentence space.

Ridge regression in closed form; the result is the backbone's `embedding_map`, so that `retrieve` and
the choice of hard negatives use it like any other embedding.

Shape letters: n images, R pooled width, C sentence-embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edje_pipeline.errors import ShapeMismatchError, TrainingError

PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Tried by `choose_penalty`, as multiples of the mean variance of the standardised inputs, which is one."""
FOLDS = 5


@dataclass(frozen=True)
class LinearMap:
    """y = x @ weight.T + bias, as torch's Linear keeps it."""

    weight: np.ndarray
    """float32 (C, R)"""
    bias: np.ndarray
    """float32 (C,)"""
    penalty: float

    def embed(self, pooled: np.ndarray) -> np.ndarray:
        """(n, R) -> unit float32 (n, C)."""
        mapped = pooled @ self.weight.T + self.bias
        return mapped / np.linalg.norm(mapped, axis=1, keepdims=True).clip(1e-12)


def fit_ridge(pooled: np.ndarray, targets: np.ndarray, penalty: float) -> LinearMap:
    """Least squares with an L2 penalty on standardised inputs, solved in float64.

    Args:
        pooled: (n, R).
        targets: (n, C), usually the mean of an image's caption embeddings.
        penalty: relative to n.

    Raises:
        ShapeMismatchError: different numbers of rows. TrainingError: fewer than two images.
    """
    if len(pooled) != len(targets):
        raise ShapeMismatchError(f"{len(pooled)} pooled vectors, {len(targets)} targets; expected one for each image")
    if len(pooled) < 2:
        raise TrainingError(f"a map cannot be fitted to {len(pooled)} image; give more")
    inputs, outputs = pooled.astype(np.float64), targets.astype(np.float64)
    centre, spread, middle = inputs.mean(axis=0), inputs.std(axis=0), outputs.mean(axis=0)
    spread[spread < 1e-8] = 1.0  # A constant input says nothing and must not be blown up.
    standard = (inputs - centre) / spread
    gram = standard.T @ standard + penalty * len(standard) * np.eye(standard.shape[1])
    solved = np.linalg.solve(gram, standard.T @ (outputs - middle))
    weight = (solved / spread[:, None]).T
    return LinearMap(weight.astype(np.float32), (middle - weight @ centre).astype(np.float32), penalty)


def choose_penalty(pooled: np.ndarray, targets: np.ndarray, groups: np.ndarray, *, seed: int = 0) -> float:
    """The penalty of `PENALTIES` whose map ranks left-out images best (mean reciprocal rank of the own target).

    Args:
        pooled: (n, R).
        targets: (n, C).
        groups: (n,) ints; images of one group (same caption) are left out together, otherwise a map
            that only remembers would look good.
        seed: of the split into folds.
    """
    names = np.unique(groups)
    if len(names) < FOLDS:
        return 0.1
    fold_of = dict(zip(names.tolist(), np.random.default_rng(seed).permutation(len(names)) % FOLDS, strict=True))
    folds = np.array([fold_of[group] for group in groups.tolist()])
    scores = dict.fromkeys(PENALTIES, 0.0)
    unit = targets / np.linalg.norm(targets, axis=1, keepdims=True).clip(1e-12)
    for fold in range(FOLDS):
        train, test = folds != fold, folds == fold
        for penalty in PENALTIES:
            found = fit_ridge(pooled[train], targets[train], penalty).embed(pooled[test])
            similarity = found @ unit[test].T
            ranks = 1 + (similarity > np.diag(similarity)[:, None]).sum(axis=1)
            scores[penalty] += float((1 / ranks).sum())
    return max(PENALTIES, key=lambda penalty: scores[penalty])
