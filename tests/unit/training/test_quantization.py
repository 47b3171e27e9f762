"""Straight-through: the forward pass is the codec's, the gradient is the identity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edje_pipeline.errors import ShapeMismatchError
from edje_pipeline.storage.codecs import resolve, train_pq
from edje_pipeline.training.quantization import straight_through


def test_forward_is_what_a_reader_sees_and_gradient_passes() -> None:
    tokens = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    codec = resolve("int4", num_tokens=4, dim=8)
    seen = straight_through(tokens, codec)
    expected = codec.decode(codec.encode(tokens.detach().numpy()))
    np.testing.assert_allclose(seen.detach().numpy(), expected, atol=1e-6)
    assert not torch.equal(seen, tokens)
    weights = torch.randn(3, 4, 8)
    (seen * weights).sum().backward()
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad, weights)


def test_a_trained_codec() -> None:
    sample = np.random.default_rng(0).standard_normal((40, 4, 8)).astype(np.float32)
    codec = train_pq(sample, 4, seed=0)
    seen = straight_through(torch.from_numpy(sample[:5]), codec)
    np.testing.assert_allclose(seen.numpy(), codec.decode(codec.encode(sample[:5])), atol=1e-6)


def test_other_shape() -> None:
    with pytest.raises(ShapeMismatchError, match="4 x 8 tokens, the adapter gives"):
        straight_through(torch.zeros(1, 5, 8), resolve("int8", num_tokens=4, dim=8))
