"""Whether an adapter still has the values it was created with: its words and attention would mean nothing."""

from __future__ import annotations

import math

import torch

from edje_pipeline.models.adapter import CompressedAdapter, TokenAdapter
from edje_pipeline.models.layout import adapter_shapes
from edje_pipeline.models.random_model import random_tensors

SEEDS = range(8)
"""Of bundled and test models; a model of another seed passes as trained."""


def is_untrained(adapter: TokenAdapter) -> bool:
    """True for torch's initialisation (as `make-model` leaves it) and for `write_random_model`'s numbers.

    Decided by the weights, since no name or card has to tell the truth about them.
    """
    return _as_torch_creates(adapter) or _as_random_models_are(adapter)


def _as_torch_creates(adapter: TokenAdapter) -> bool:
    """A step of any optimiser moves a norm off 1 and 0; linear weights off their uniform range."""
    if isinstance(adapter, CompressedAdapter):
        norm, attention = adapter.layernorm, adapter.attention
        zeros = (norm.bias, attention.in_proj_bias, attention.out_proj.bias)
        return bool((norm.weight == 1).all()) and not any(bool(values.any()) for values in zeros)
    layers = [module for module in adapter.modules() if isinstance(module, torch.nn.Linear)]
    return all(
        float(values.detach().abs().max()) <= 1 / math.sqrt(layer.in_features)
        for layer in layers
        for values in (layer.weight, layer.bias)
    )


def _as_random_models_are(adapter: TokenAdapter) -> bool:
    own = adapter.state_dict()
    biases = {name: shape for name, shape in adapter_shapes(adapter.spec).items() if name.startswith("mlp.fc1.b")}
    return any(
        all(torch.equal(own[name].cpu(), values) for name, values in random_tensors(biases, seed, "adapter").items())
        for seed in SEEDS
    )
