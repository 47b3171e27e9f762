"""A BERT layer for inference and training: fused QKV, scaled dot product attention, exact GELU, post-norm.

Follows the original BERT (Devlin et al. 2018) and gives what `transformers.BertModel` gives on the
same weights (tests/numerics/test_bert_parity.py).

Shape letters: B batch, S sequence, H heads, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, norm_eps: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp_in = nn.Linear(width, mlp_dim)
        self.mlp_out = nn.Linear(mlp_dim, width)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, hidden_bse: Tensor, key_mask_bs: Tensor | None = None) -> Tensor:
        """(B, S, E) -> (B, S, E).

        Args:
            hidden_bse: the layer's input.
            key_mask_bs: bool, True where a position may be attended to; None when all may.
        """
        query, key, value = (self._heads(part) for part in self.qkv(hidden_bse).chunk(3, dim=-1))
        return self._finish(hidden_bse, self._attend(query, key, value, key_mask_bs))

    def forward_first(self, hidden_bse: Tensor) -> Tensor:
        """The layer's output at the first position only: (B, S, E) -> (B, 1, E).

        Keys and values are needed everywhere; the query, the output projection and the feed-forward
        block (two thirds of a layer's work) only where the output is.
        """
        width = hidden_bse.shape[-1]
        first = hidden_bse[:, :1]
        weight, bias = self.qkv.weight, self.qkv.bias
        query = self._heads(F.linear(first, weight[:width], bias[:width]))
        key, value = (self._heads(part) for part in F.linear(hidden_bse, weight[width:], bias[width:]).chunk(2, dim=-1))
        return self._finish(first, self._attend(query, key, value, None))

    def _heads(self, tensor_bse: Tensor) -> Tensor:
        """(B, S, E) -> (B, H, S, E/H), a view."""
        batch, length, width = tensor_bse.shape
        return tensor_bse.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask_bs: Tensor | None) -> Tensor:
        mask = None if key_mask_bs is None else key_mask_bs[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        return attended.transpose(1, 2).flatten(2)

    def _finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        attended = F.dropout(self.attention_output(attended), self.dropout, self.training)
        hidden = self.attention_norm(residual + attended)
        mlp = F.dropout(self.mlp_out(F.gelu(self.mlp_in(hidden))), self.dropout, self.training)
        normed: Tensor = self.mlp_norm(hidden + mlp)
        return normed


class BertPooler(nn.Module):
    """tanh of a linear map of [CLS]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, first_be: Tensor) -> Tensor:
        """(B, E) -> (B, E)."""
        return torch.tanh(self.dense(first_be))
