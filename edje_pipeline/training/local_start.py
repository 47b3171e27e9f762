"""A compressed adapter that begins where a trained local adapter stands, in closed form.

Not in the paper, whose compressed adapters start from noise and a hundred million pairs. Each latent attends
to the cell of patches whose teacher tokens it shall average (`losses.token_loss`); behind the attention stands
the teacher's own hidden layer; the last map is a least-squares fit to the teacher's tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.adapter import CompressedAdapter, TokenAdapter
from edje_pipeline.training.losses import average_tokens

SHARPNESS = 8.0
"""Logit of a patch in a latent's own cell over that of a far one: e^8 leaves the others a few percent in all."""
RIDGE = 0.03
"""Of the hidden units' mean variance; keeps the last map from following a small sample."""
RESIDUAL_SHARE = 0.25
"""Size of the projection's weights: the residual reaches them too, and the last map has to take it away again."""
SMALLEST_STD = 1e-6


@torch.no_grad()
def start_from_local(adapter: TokenAdapter, local: TokenAdapter, vision_bnd: Tensor) -> None:
    """Writes the start into `adapter`.

    Args:
        adapter: compressed, with key positions, changed in place. (A linear map finds a patch's place from its
            DINOv2 token in 55 % of the cases only: without positions there is no such start.)
        local: the trained teacher over the same vision tokens.
        vision_bnd: a sample, (B, N, D); a few hundred images.

    Raises:
        ConfigError: adapters of other kinds, no key positions, or a hidden layer smaller than the teacher's.
    """
    if not isinstance(adapter, CompressedAdapter) or local.spec.kind != "local":
        raise ConfigError("a start from the local teacher needs a compressed adapter and a local one as teacher")
    if adapter.key_positions is None:
        raise ConfigError(
            "a start from the local teacher needs an adapter with key positions; make the model with --key-positions"
        )
    if adapter.spec.mlp_dim < local.spec.mlp_dim:
        raise ConfigError(
            f"the adapter's hidden layer has {adapter.spec.mlp_dim} units, the teacher's {local.spec.mlp_dim}; "
            f"make the model with --mlp-dim {local.spec.mlp_dim} to start from this teacher"
        )
    vision = vision_bnd.float()
    flat = vision.flatten(0, 1)
    mean, std = flat.mean(dim=0), flat.std(dim=0).clamp(min=SMALLEST_STD)
    _attend_to_cells(adapter, vision.shape[1])
    _pass_values_on(adapter, mean, std)
    _take_hidden_layer(adapter, local, vision, mean, std)
    _fit_last_map(adapter, vision, average_tokens(local(vision), adapter.spec.num_compressed_tokens))


def place_codes(num: int, dim: int) -> Tensor:
    """(num, dim), rows of length 1: the lowest cosines over a square grid, over a line where `num` is no square.

    Places near each other have similar codes; with `dim` >= `num` different places are orthogonal.
    """
    side = math.isqrt(num)
    if side * side == num:
        line = _cosines(side)
        waves = torch.einsum("an,bm->nmab", line, line).reshape(num, side, side)
        order = torch.tensor([a * side + b for a, b in _frequencies(side)])
        codes = waves.flatten(1)[:, order]
    else:
        codes = _cosines(num).T
    codes = F.pad(codes[:, :dim], (0, max(0, dim - codes.shape[1])))
    return F.normalize(codes, dim=1)


def _frequencies(side: int) -> list[tuple[int, int]]:
    return sorted(((a, b) for a in range(side) for b in range(side)), key=lambda ab: (ab[0] ** 2 + ab[1] ** 2, ab))


def _cosines(length: int) -> Tensor:
    """The orthonormal DCT-II basis, (frequency, place)."""
    frequency, place = torch.arange(length).float(), torch.arange(length) + 0.5
    basis = torch.cos(math.pi * frequency[:, None] * place / length) * math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    return basis


def _attend_to_cells(adapter: CompressedAdapter, num_vision_tokens: int) -> None:
    """Key and query are the same code in every head; softmax((q . k) / sqrt(head)) picks the cell."""
    assert adapter.key_positions is not None
    num_heads, width = adapter.spec.num_heads, adapter.spec.input_dim
    codes = place_codes(num_vision_tokens, width // num_heads).to(adapter.query)
    cells = average_tokens(codes[None], adapter.spec.num_compressed_tokens)
    # A cell's mean code against the codes in it: as much as a place against itself.
    cells = cells / cells.square().sum(dim=-1, keepdim=True).clamp(min=SMALLEST_STD)
    gain = math.sqrt(SHARPNESS * math.sqrt(width // num_heads))
    adapter.query.copy_((gain * cells).repeat(1, 1, num_heads))
    adapter.key_positions.copy_((gain * codes[None]).repeat(1, 1, num_heads))
    adapter.key.weight.zero_()
    adapter.key.bias.zero_()
    adapter.attention.in_proj_weight.copy_(torch.eye(width).repeat(3, 1))
    adapter.attention.in_proj_bias.zero_()


def _pass_values_on(adapter: CompressedAdapter, mean: Tensor, std: Tensor) -> None:
    adapter.value.weight.copy_(torch.diag(1 / std))
    adapter.value.bias.copy_(-mean / std)
    adapter.attention.out_proj.weight.copy_(torch.eye(len(mean)))
    adapter.attention.out_proj.bias.zero_()


def _latents(adapter: CompressedAdapter, vision: Tensor) -> Tensor:
    latents: Tensor = adapter.attention(adapter.query, adapter.keys(vision), adapter.value(vision))
    return latents


def _take_hidden_layer(
    adapter: CompressedAdapter, local: TokenAdapter, vision: Tensor, mean: Tensor, std: Tensor
) -> None:
    """The teacher's first layer behind the norm, which shall leave a token's size as it was on average."""
    latents = _latents(adapter, vision)
    adapter.layernorm.weight.fill_(float(latents.std(dim=-1).mean()))
    adapter.layernorm.bias.copy_(latents.mean(dim=-1).mean().expand(len(mean)))
    teacher, units = local.get_submodule("mlp.fc1"), local.spec.mlp_dim
    assert isinstance(teacher, torch.nn.Linear)
    adapter.mlp.fc1.weight[:units].copy_(teacher.weight * std)
    adapter.mlp.fc1.bias[:units].copy_(teacher.bias + teacher.weight @ mean)


def _fit_last_map(adapter: CompressedAdapter, vision: Tensor, target: Tensor) -> None:
    """fc2 such that projection(latents + fc2(hidden)) is nearest to the target; the projection itself is a basis."""
    flat = target.flatten(0, 1)
    mean = flat.mean(dim=0)
    _, _, axes = torch.linalg.svd((flat - mean)[:: max(1, len(flat) // 8192)], full_matrices=False)
    axes = axes[: adapter.spec.input_dim]
    scale = RESIDUAL_SHARE * float((flat - mean).std())
    adapter.projection.weight.zero_()
    adapter.projection.weight[:, : len(axes)].copy_(scale * axes.T)
    adapter.projection.bias.copy_(mean)
    latents = _latents(adapter, vision)
    hidden = F.gelu(adapter.mlp.fc1(adapter.layernorm(latents))).flatten(0, 1)
    wanted = torch.zeros_like(latents.flatten(0, 1))
    wanted[:, : len(axes)] = (flat - mean) @ axes.T / scale
    weight, bias = _ridge(hidden, wanted - latents.flatten(0, 1))
    adapter.mlp.fc2.weight.copy_(weight)
    adapter.mlp.fc2.bias.copy_(bias)


def _ridge(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of the least-squares map with an L2 penalty."""
    input_mean, target_mean = inputs.mean(dim=0), targets.mean(dim=0)
    centred = inputs - input_mean
    # Products of many rows in float32, the small system in float64.
    gram = (centred.T @ centred).double()
    gram += RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram)).to(gram)
    weight = torch.linalg.solve(gram, (centred.T @ (targets - target_mean)).double()).T.float()
    return weight, target_mean - weight @ input_mean
