"""The token adapter: vision tokens of the backbone's width -> tokens of the joint encoder's width.

Paper section 3.2; names of the weights as in the authors' `vision_projection`.

Shape letters: B batch, N vision tokens, M compressed tokens, D backbone width, E joint-encoder
width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edje_pipeline.errors import ConfigError, ShapeMismatchError
from edje_pipeline.models.spec import AdapterSpec


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, output_dim)

    def forward(self, values: Tensor) -> Tensor:
        mapped: Tensor = self.fc2(F.gelu(self.fc1(values)))
        return mapped


class LatentAttention(nn.Module):
    """Multi-head attention with its own input and output maps; the weights of `nn.MultiheadAttention`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query_1md: Tensor, key_bnd: Tensor, value_bnd: Tensor) -> Tensor:
        """(1, M, D), (B, N, D), (B, N, D) -> (B, M, D)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        # The latents are the same for every image: projected once, then expanded.
        query = self._heads(F.linear(query_1md, weights[0], biases[0])).expand(len(key_bnd), -1, -1, -1)
        key = self._heads(F.linear(key_bnd, weights[1], biases[1]))
        value = self._heads(F.linear(value_bnd, weights[2], biases[2]))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        mixed: Tensor = self.out_proj(attended)
        return mixed

    def _heads(self, tensor: Tensor) -> Tensor:
        batch, length, width = tensor.shape
        return tensor.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)


class TokenAdapter(nn.Module):
    """Common part of the adapters: the spec and the check of the input's shape."""

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__()
        self.spec = spec

    def check(self, vision_tokens: Tensor) -> None:
        """Raises ShapeMismatchError unless the tokens are (B, N, D), with N as the local adapter expects."""
        shape = tuple(vision_tokens.shape)
        wanted = self.spec.num_compressed_tokens if self.spec.kind == "local" else self.spec.num_key_positions
        if len(shape) != 3 or shape[2] != self.spec.input_dim or (wanted and shape[1] != wanted):
            count = wanted or "N"
            raise ShapeMismatchError(
                f"the {self.spec.kind} adapter takes vision tokens (B, {count}, {self.spec.input_dim}), got {shape}"
            )


class CompressedAdapter(TokenAdapter):
    """M learned latents attend over the vision tokens; no residual around the attention.

    Not in the paper: `key_positions` (1, N, D), where the spec asks for them.
    """

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__(spec)
        width = spec.input_dim
        if width % spec.num_heads:
            raise ConfigError(f"adapter width {width} is not a multiple of its {spec.num_heads} heads")
        self.query = nn.Parameter(torch.randn(1, spec.num_compressed_tokens, width))
        self.key = nn.Linear(width, width)
        self.key_positions: nn.Parameter | None = None
        if spec.num_key_positions:
            self.key_positions = nn.Parameter(torch.zeros(1, spec.num_key_positions, width))
        self.value = nn.Linear(width, width)
        self.attention = LatentAttention(width, spec.num_heads)
        self.layernorm = nn.LayerNorm(width, eps=spec.norm_eps)
        self.mlp = Mlp(width, spec.mlp_dim, width)
        self.projection = nn.Linear(width, spec.output_dim)

    def forward(self, vision_tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, E)."""
        self.check(vision_tokens)
        latents = self.attention(self.query, self.keys(vision_tokens), self.value(vision_tokens))
        latents = latents + self.mlp(self.layernorm(latents))
        projected: Tensor = self.projection(latents)
        return projected

    def keys(self, vision_tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D): what the latents are compared with."""
        keys: Tensor = self.key(vision_tokens)
        return keys if self.key_positions is None else keys + self.key_positions


class LocalAdapter(TokenAdapter):
    """An MLP on every vision token: all N are kept (the teacher)."""

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__(spec)
        self.mlp = Mlp(spec.input_dim, spec.mlp_dim, spec.output_dim)

    def forward(self, vision_tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, E)."""
        self.check(vision_tokens)
        mapped: Tensor = self.mlp(vision_tokens)
        return mapped


ADAPTERS: dict[str, type[TokenAdapter]] = {"compressed": CompressedAdapter, "local": LocalAdapter}


def create_adapter(spec: AdapterSpec) -> TokenAdapter:
    """The module a spec describes, with torch's initialisation.

    Raises:
        ConfigError: an unknown kind, or heads that do not divide the width.
    """
    if spec.kind not in ADAPTERS:
        raise ConfigError(f"adapter kind {spec.kind!r} is not known; expected one of {', '.join(ADAPTERS)}")
    return ADAPTERS[spec.kind](spec)
