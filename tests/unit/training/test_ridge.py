"""The closed form against a solution by hand and against plain least squares."""

from __future__ import annotations

import numpy as np
import pytest

from edje_pipeline.errors import ShapeMismatchError, TrainingError
from edje_pipeline.training.ridge import choose_penalty, fit_ridge


def test_one_dimension_by_hand() -> None:
    # Standardised x is -1, 1; the slope on it is 2 * 3 / (2 + penalty * 2) = 3 / (1 + penalty).
    found = fit_ridge(np.array([[1.0], [5.0]]), np.array([[0.0], [6.0]]), penalty=0.5)
    slope = 3 / 1.5 / 2
    assert found.weight[0, 0] == pytest.approx(slope)
    assert found.bias[0] == pytest.approx(3 - slope * 3)


def test_small_penalty_is_least_squares() -> None:
    rng = np.random.default_rng(0)
    inputs, targets = rng.standard_normal((50, 4)), rng.standard_normal((50, 3))
    found = fit_ridge(inputs, targets, 1e-9)
    design = np.hstack([inputs, np.ones((50, 1))])
    expected = np.linalg.lstsq(design, targets, rcond=None)[0]
    np.testing.assert_allclose(found.weight, expected[:4].T, atol=1e-5)
    np.testing.assert_allclose(found.bias, expected[4], atol=1e-5)


def test_embeddings_are_unit_and_constant_inputs_harmless() -> None:
    rng = np.random.default_rng(1)
    inputs = np.hstack([rng.standard_normal((20, 3)), np.full((20, 1), 7.0)])
    found = fit_ridge(inputs, rng.standard_normal((20, 5)), 0.1)
    np.testing.assert_allclose(np.linalg.norm(found.embed(inputs), axis=1), 1, atol=1e-6)
    assert np.abs(found.weight[:, 3]).max() == 0


def test_noise_asks_for_a_larger_penalty() -> None:
    rng = np.random.default_rng(2)
    inputs = rng.standard_normal((120, 100))
    truth = rng.standard_normal((100, 4))
    clean, groups = inputs @ truth, np.arange(120)
    noisy = clean[:, :1] * 0.2 + 5 * rng.standard_normal((120, 4))
    assert choose_penalty(inputs, clean, groups) < choose_penalty(inputs, noisy, groups)


def test_bad_input() -> None:
    with pytest.raises(ShapeMismatchError, match="3 pooled vectors, 2 targets"):
        fit_ridge(np.ones((3, 2)), np.ones((2, 2)), 1.0)
    with pytest.raises(TrainingError, match="1 image"):
        fit_ridge(np.ones((1, 2)), np.ones((1, 2)), 1.0)
