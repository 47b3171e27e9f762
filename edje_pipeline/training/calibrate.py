"""A fresh adapter made fit for its surroundings, before the first step.

Backbones differ in the scale of their tokens by factors of ten, and a BERT expects what stands in place
of a word to be of a word embedding's size: with both off, the first hundreds of steps go into scales.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.adapter import CompressedAdapter, LocalAdapter, TokenAdapter

SMALLEST_STD = 1e-6


@torch.no_grad()
def calibrate_adapter(adapter: TokenAdapter, vision_tokens: Tensor, word_std: float) -> None:
    """Folds the standardisation of the vision tokens into the first linear maps; scales the last one.

    Afterwards the adapter sees tokens of mean 0 and standard deviation 1 in every channel, and its own
    output has mean about 0 and standard deviation `word_std`.

    Args:
        adapter: not trained yet; changed in place.
        vision_tokens: a sample, (n, N, D).
        word_std: standard deviation of the joint encoder's word embeddings.

    Raises:
        ConfigError: an adapter of a kind that is not known here.
    """
    if isinstance(adapter, CompressedAdapter):
        first, last = [adapter.key, adapter.value], adapter.projection
    elif isinstance(adapter, LocalAdapter):
        first, last = [adapter.mlp.fc1], adapter.mlp.fc2
    else:
        raise ConfigError(f"a {type(adapter).__name__} cannot be calibrated; leave calibrate-adapter out")
    flat = vision_tokens.float().flatten(0, 1)
    mean, std = flat.mean(dim=0), flat.std(dim=0).clamp(min=SMALLEST_STD)
    for linear in first:
        _standardise_input(linear, mean, std)
    last.bias.zero_()
    last.weight.mul_(word_std / adapter(vision_tokens.float()).std().clamp(min=SMALLEST_STD))


def _standardise_input(linear: nn.Linear, mean: Tensor, std: Tensor) -> None:
    """W ((x - mean) / std) + b as W' x + b'."""
    linear.weight.div_(std)
    linear.bias.sub_(linear.weight @ mean)
