"""Two Triton kernels for the joint encoder on a GPU: a sum and its LayerNorm in one, and attention of short sequences.

At a width of 384 a layer moves more than it computes. The sum before a LayerNorm reads and writes
whole activations once more; the attention kernels that PyTorch has are made for long sequences and
run at a fifteenth of the GPU's rate here. Inner sums are float32.

Shape letters: B pairs, S sequence, E width.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 128
"""Tokens of a sequence that the attention kernel takes: all scores of a head lie in registers."""
LOG2_E = 1.4426950408889634


@triton.jit
def _attention_kernel(
    qkv_ptr, out_ptr, length, scale,
    heads: tl.constexpr, size: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    pair, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens, parts = tl.arange(0, padded), tl.arange(0, size)
    ok = tokens[:, None] < length
    width: tl.constexpr = heads * size
    start = qkv_ptr + pair * length * 3 * width + head * size + tokens[:, None] * 3 * width + parts[None, :]
    query = tl.load(start, mask=ok, other=0.0)
    key = tl.load(start + width, mask=ok, other=0.0)
    value = tl.load(start + 2 * width, mask=ok, other=0.0)
    scores = tl.dot(query, tl.trans(key)) * scale
    scores = tl.where(tokens[None, :] < length, scores, -float("inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    total = tl.sum(weights, axis=1)
    result = tl.dot(weights.to(value.dtype), value) / total[:, None]
    place = out_ptr + pair * length * width + head * size + tokens[:, None] * width + parts[None, :]
    tl.store(place, result.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _add_norm_kernel(
    x_ptr, r_ptr, w_ptr, b_ptr, y_ptr, num_rows, eps,
    width: tl.constexpr, bm: tl.constexpr, be: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * bm + tl.arange(0, bm)).to(tl.int64)
    columns = tl.arange(0, be)
    column_ok = columns < width
    ok = (rows[:, None] < num_rows) & column_ok[None, :]
    place = rows[:, None] * width + columns[None, :]
    total = tl.load(x_ptr + place, mask=ok, other=0.0).to(tl.float32)
    total += tl.load(r_ptr + place, mask=ok, other=0.0).to(tl.float32)
    centred = tl.where(column_ok[None, :], total - (tl.sum(total, axis=1) / width)[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / width
    weight = tl.load(w_ptr + columns, mask=column_ok, other=0.0).to(tl.float32)
    bias = tl.load(b_ptr + columns, mask=column_ok, other=0.0).to(tl.float32)
    result = centred * (1.0 / tl.sqrt(variance + eps))[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + place, result.to(y_ptr.dtype.element_ty), mask=ok)


def attention(qkv_bsf: Tensor, num_heads: int, num_warps: int = 8) -> Tensor:
    """Self-attention without a mask: queries, keys and values side by side (B, S, 3 E) -> (B, S, E), S to LONGEST."""
    batch, length, features = qkv_bsf.shape
    width = features // 3
    size = width // num_heads
    qkv = qkv_bsf.contiguous()
    out = torch.empty((batch, length, width), dtype=qkv.dtype, device=qkv.device)
    padded = max(16, triton.next_power_of_2(length))
    _attention_kernel[(batch, num_heads)](
        qkv, out, length, LOG2_E / size**0.5, heads=num_heads, size=size, padded=padded, num_warps=num_warps
    )
    return out


def add_norm(x: Tensor, residual: Tensor, weight_e: Tensor, bias_e: Tensor, eps: float) -> Tensor:
    """LayerNorm of a sum: (..., E), (..., E) -> (..., E)."""
    width = x.shape[-1]
    rows, others = x.reshape(-1, width).contiguous(), residual.reshape(-1, width).contiguous()
    out = torch.empty_like(rows)
    rows_a_program = 4
    _add_norm_kernel[(triton.cdiv(rows.shape[0], rows_a_program),)](
        rows, others, weight_e, bias_e, out, rows.shape[0], eps,
        width=width, bm=rows_a_program, be=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out.view(x.shape)
