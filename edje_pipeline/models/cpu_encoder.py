"""The joint encoder for the CPU: oneDNN's float32 kernels, or int8 weights with integer products.

Nine tenths of a pass are four matrix products a layer. PyTorch sends float32 products to MKL, which
leaves half of an AMD processor idle (it takes its AVX2 path there); oneDNN, which PyTorch ships as
well and uses for bfloat16 and int8, does not.

For int8 both sides of a product are integers. Weights have a scale for every output channel and
block of at most 384 inputs. Activations are 16-bit integers with **one scale a token**, so that a
pair's logit depends on the pair alone, never on what else is in its batch. A 16-bit integer is two
int8 halves, 256 high + low: one int8 product over twice as many rows. One half alone is 1.5 times as
fast, but changes the first image of 1 query in 20 (docs/log.md; benchmarks/score_accuracy.py).

Shape letters: B batch, S sequence, R rows (B x S), E width, I inputs, O outputs, K blocks of inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edje_pipeline.errors import DeviceError
from edje_pipeline.models.bert_layers import BertLayer
from edje_pipeline.models.cpu_linear import NO_POST_OP, has_onednn
from edje_pipeline.models.joint_encoder import JointEncoder

INT8_MAX = 127
HALVES_MAX = 256 * INT8_MAX + 127
"""The largest 16-bit value whose high half, rounded to the nearest, is an int8 of at most 127."""
BLOCK_INPUTS = 384
"""Inputs that share a weight's scale. At most 516, or 256 high + low does not fit 32 bits; the MLP's second map has
its largest inputs in a few channels, and one scale for all 1,536 doubles the error of its weights."""
EXACT_GELU: tuple[str, list[float], str] = ("gelu", [], "none")


class MakeLinear(Protocol):
    """Builds a linear map for inference."""

    def __call__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> nn.Module:
        """weight (O, I), bias (O,); `gelu` applies the exact GELU to the result."""


class OneDnnLinear(nn.Module):
    """`F.linear` by oneDNN, GELU fused: the operator that PyTorch's own compiler emits for a linear map."""

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight_oi", weight.detach().contiguous(), persistent=False)
        self.register_buffer("bias_o", bias.detach().contiguous(), persistent=False)
        self.post_op = EXACT_GELU if gelu else NO_POST_OP

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight_oi, self.bias_o, *self.post_op)  # noqa: SLF001
        return out


class Int8Linear(nn.Module):
    """A linear map of int8 weights and 16-bit activations: see the module docstring."""

    weight_kio: Tensor
    scale_ko: Tensor
    bias_o: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> None:
        super().__init__()
        num_outputs, num_inputs = weight.shape
        self.num_blocks = num_blocks(num_inputs)
        blocks_oki = weight.detach().float().reshape(num_outputs, self.num_blocks, -1)
        quantized, scale = quantize_rows(blocks_oki.transpose(0, 1).flatten(0, 1))
        # Stored as (O, I) of each block, used as (I, O): the order oneDNN multiplies without a copy.
        weight_koi = quantized.view(self.num_blocks, num_outputs, -1)
        self.register_buffer("weight_kio", weight_koi.transpose(1, 2), persistent=False)
        self.register_buffer("scale_ko", scale.view(self.num_blocks, num_outputs), persistent=False)
        self.register_buffer("bias_o", bias.detach().float().contiguous(), persistent=False)
        self.gelu = gelu

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., I) float32 -> (..., O) float32."""
        halves_kri, scale_r1 = split_rows(inputs.reshape(-1, inputs.shape[-1]), self.num_blocks)
        scaled_ro = self._product(halves_kri, 0)
        for number in range(1, self.num_blocks):
            scaled_ro.add_(self._product(halves_kri, number))
        out = torch.addcmul(self.bias_o, scaled_ro, scale_r1)
        out = out.view(*inputs.shape[:-1], -1)
        return F.gelu(out) if self.gelu else out

    def _product(self, halves_kri: Tensor, number: int) -> Tensor:
        """One block's product with the weights' scales: (R, O) float32."""
        sums = torch._int_mm(halves_kri[number], self.weight_kio[number])  # noqa: SLF001
        high, low = sums.chunk(2)
        return torch.add(low, high, alpha=256).float().mul_(self.scale_ko[number])


def num_blocks(num_inputs: int) -> int:
    """The fewest equal blocks of at most `BLOCK_INPUTS` inputs."""
    return next(count for count in range(-(-num_inputs // BLOCK_INPUTS), num_inputs + 1) if num_inputs % count == 0)


def quantize_rows(rows_ri: Tensor) -> tuple[Tensor, Tensor]:
    """(R, I) -> int8 (R, I) and scales (R, 1) with rows = int8 x scale to half a scale; symmetric, a scale a row."""
    scale_r1 = _scale(rows_ri, INT8_MAX)
    return torch.div(rows_ri, scale_r1).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale_r1


def split_rows(rows_ri: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows as 16-bit integers, cut into halves and blocks.

    Args:
        rows_ri: (R, I) float32.
        count: K, the blocks of inputs; divides I.

    Returns:
        int8 (K, 2 R, I / K), of each block the high halves and then the low ones, and scales (R, 1), with
        rows = (256 high + low) x scale to half a scale.
    """
    num_rows, num_inputs = rows_ri.shape
    scale_r1 = _scale(rows_ri, HALVES_MAX)
    codes = torch.div(rows_ri, scale_r1).round_().to(torch.int16).view(num_rows, count, -1).transpose(0, 1)
    halves = torch.empty(count, 2, num_rows, num_inputs // count, dtype=torch.int8)
    halves[:, 1] = codes  # the low byte, as a signed number: -128 to 127
    halves[:, 0] = codes.add(128).bitwise_right_shift_(8)  # what is left is a multiple of 256
    return halves.flatten(1, 2), scale_r1


def _scale(rows_ri: Tensor, largest: int) -> Tensor:
    # Two passes, both vectorized; the maximum norm of torch.linalg is one, and four times slower.
    scale_r1 = rows_ri.abs().amax(dim=1, keepdim=True).mul_(1 / largest)
    return scale_r1.clamp_min_(torch.finfo(torch.float32).tiny)  # a row of zeros


class CpuBertLayer(nn.Module):
    """`BertLayer` for inference, its linear maps made by `make`; takes what `BertLayer` takes."""

    def __init__(self, layer: BertLayer, make: MakeLinear, *, is_last: bool) -> None:
        """Args: is_last: keep the query apart, so that `forward_first` computes it at one position only."""
        super().__init__()
        self.num_heads = layer.num_heads
        width = layer.qkv.in_features
        sizes = [width, 2 * width] if is_last else [3 * width]
        weights, biases = torch.split(layer.qkv.weight, sizes), torch.split(layer.qkv.bias, sizes)
        self.qkv_parts = nn.ModuleList(make(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        self.attention_output = make(layer.attention_output.weight, layer.attention_output.bias)
        self.mlp_in = make(layer.mlp_in.weight, layer.mlp_in.bias, gelu=True)
        self.mlp_out = make(layer.mlp_out.weight, layer.mlp_out.bias)
        self.attention_norm, self.mlp_norm = layer.attention_norm, layer.mlp_norm

    def forward(self, hidden_bse: Tensor, key_mask_bs: Tensor | None = None) -> Tensor:
        """(B, S, E) -> (B, S, E); the mask is True where a position may be attended to."""
        projected = [part(hidden_bse) for part in self.qkv_parts]
        query, key, value = (projected[0] if len(projected) == 1 else torch.cat(projected, -1)).chunk(3, -1)
        return self._finish(hidden_bse, self._attend(query, key, value, key_mask_bs))

    def forward_first(self, hidden_bse: Tensor) -> Tensor:
        """(B, S, E) -> (B, 1, E), the first position's output; of the last layer only."""
        first = hidden_bse[:, :1].contiguous()
        key, value = self.qkv_parts[1](hidden_bse).chunk(2, -1)
        return self._finish(first, self._attend(self.qkv_parts[0](first), key, value, None))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask_bs: Tensor | None) -> Tensor:
        mask = None if key_mask_bs is None else key_mask_bs[:, None, None, :]
        query, key, value = (self._heads(part) for part in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)

    def _heads(self, part_bse: Tensor) -> Tensor:
        """(B, S, E) -> (B, H, S, E/H), a view."""
        batch, length, _ = part_bse.shape
        return part_bse.view(batch, length, self.num_heads, -1).transpose(1, 2)

    def _finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        hidden = self.attention_norm(self.attention_output(attended).add_(residual))
        out: Tensor = self.mlp_norm(self.mlp_out(self.mlp_in(hidden)).add_(hidden))
        return out


def cpu_encoder(encoder: JointEncoder, precision: str) -> JointEncoder:
    """The same encoder with layers for inference on this CPU; embeddings, pooler and classifier are shared.

    Args:
        encoder: float32, on the CPU, in eval mode.
        precision: `float32` or `int8`.

    Raises:
        DeviceError: int8 was asked for and this processor's int8 products are not exact.
    """
    if precision == "int8":
        check_int8()
        make: Callable[..., nn.Module] = Int8Linear
    elif has_onednn():
        make = OneDnnLinear
    else:
        return encoder
    build = partial(CpuBertLayer, make=make)
    last = len(encoder.layers) - 1
    layers = [build(layer, is_last=number == last) for number, layer in enumerate(encoder.layers)]  # type: ignore[arg-type]
    return encoder.with_layers(layers).eval()


@cache
def check_int8() -> None:
    """Multiplies the largest int8 values there are and compares with integers.

    Processors without VNNI add pairs of int8 products in 16 bits, where the largest do not fit.

    Raises:
        DeviceError: the sums are wrong.
    """
    left, right = torch.full((32, 64), INT8_MAX, dtype=torch.int8), torch.full((64, 32), INT8_MAX, dtype=torch.int8)
    left[1::2], right[:, 1::2] = -INT8_MAX - 1, -INT8_MAX
    expected = left.long() @ right.long()
    if not torch.equal(torch._int_mm(left, right).long(), expected):  # noqa: SLF001
        raise DeviceError(
            "this processor's int8 matrix product overflows (it has no VNNI instructions), so int8 scores "
            "would be wrong; use --precision float32 or bfloat16"
        )
