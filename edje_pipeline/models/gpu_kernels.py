"""Two Triton kernels for the joint encoder on a GPU: what PyTorch does in two passes over memory, in one.

At a width of 384 a layer moves more than it computes: GELU after a matrix product and the sum before
a LayerNorm each read and write whole activations again. Both are computed here where the numbers are
already in registers, in float32.

Shape letters: R rows (pairs x sequence), I inputs, O outputs, E width.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, INNER = 128, 128, 64
"""Of the tile of a product that one program computes."""
GROUP = 8
"""Row tiles that go through all column tiles together, so that the weights stay in the cache."""
SQRT_HALF = 0.7071067811865476


@triton.jit
def _linear_gelu_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, num_rows, num_outputs,
    num_inputs: tl.constexpr, bm: tl.constexpr, bn: tl.constexpr, bk: tl.constexpr, grouped: tl.constexpr,
    half_root: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(num_rows, bm), tl.cdiv(num_outputs, bn)
    group = program // (grouped * tiles_n)
    first_m = group * grouped
    size_m = min(tiles_m - first_m, grouped)
    tile_m = first_m + (program % (grouped * tiles_n)) % size_m
    tile_n = (program % (grouped * tiles_n)) // size_m
    rows = (tile_m * bm + tl.arange(0, bm)).to(tl.int64)
    columns = tile_n * bn + tl.arange(0, bn)
    inner = tl.arange(0, bk)
    row_ok, column_ok = rows[:, None] < num_rows, columns[None, :] < num_outputs
    x_tile = x_ptr + rows[:, None] * num_inputs + inner[None, :]
    w_tile = w_ptr + columns[None, :] * num_inputs + inner[:, None]
    total = tl.zeros((bm, bn), dtype=tl.float32)
    for _ in range(0, num_inputs, bk):
        total = tl.dot(tl.load(x_tile, mask=row_ok, other=0.0), tl.load(w_tile, mask=column_ok, other=0.0), total)
        x_tile += bk
        w_tile += bk
    total += tl.load(b_ptr + columns, mask=columns < num_outputs, other=0.0).to(tl.float32)[None, :]
    total = 0.5 * total * (1.0 + tl.erf(total * half_root))
    y_tile = y_ptr + rows[:, None] * num_outputs + columns[None, :]
    tl.store(y_tile, total.to(y_ptr.dtype.element_ty), mask=row_ok & column_ok)


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


def linear_gelu(x: Tensor, weight_oi: Tensor, bias_o: Tensor) -> Tensor:
    """Exact GELU of a linear map: (..., I) -> (..., O). I must be a multiple of INNER."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    num_rows, num_outputs = rows.shape[0], weight_oi.shape[0]
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(num_rows, ROWS) * triton.cdiv(num_outputs, COLUMNS),)
    _linear_gelu_kernel[grid](
        rows, weight_oi, bias_o, out, num_rows, num_outputs,
        num_inputs=rows.shape[1], bm=ROWS, bn=COLUMNS, bk=INNER, grouped=GROUP, half_root=SQRT_HALF,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out.view(*x.shape[:-1], num_outputs)


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
