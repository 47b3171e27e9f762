"""Folding and scaling, checked against the standardised input."""

from __future__ import annotations

import copy

import pytest
import torch

from edje_pipeline.models.adapter import create_adapter
from edje_pipeline.models.spec import AdapterSpec
from edje_pipeline.training.calibrate import calibrate_adapter


@pytest.mark.parametrize(("kind", "num_tokens"), [("compressed", 3), ("local", 6)])
def test_output_scale_and_input_standardisation(kind: str, num_tokens: int) -> None:
    torch.manual_seed(0)
    spec = AdapterSpec(kind, 8, 12, num_tokens, num_heads=2, mlp_dim=16)  # type: ignore[arg-type]
    adapter = create_adapter(spec)
    before = copy.deepcopy(adapter)
    vision = torch.randn(20, 6, 8) * torch.logspace(-2, 2, 8) + torch.arange(8.0)
    with torch.no_grad():
        calibrate_adapter(adapter, vision, word_std=0.05)
        found = adapter(vision)
        assert found.std().item() == pytest.approx(0.05, rel=1e-3)
        flat = vision.flatten(0, 1)
        plain = before((vision - flat.mean(0)) / flat.std(0))
        last = before.projection if kind == "compressed" else before.mlp.fc2
        # The same up to the last map's bias and scale.
        plain = plain - last.bias
        torch.testing.assert_close(found / found.std(), plain / plain.std(), atol=1e-4, rtol=1e-3)
