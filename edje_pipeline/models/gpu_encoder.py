"""The joint encoder's layers for inference on a GPU, with the kernels of `gpu_kernels`.

Shape letters: B batch, S sequence, E width.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

from edje_pipeline.models.bert_layers import BertLayer
from edje_pipeline.models.joint_encoder import JointEncoder

HEAD_SIZES = (16, 32, 64, 128)
"""Widths of a head that the attention kernel's tiles can have."""
TENSOR_CORES = (8, 0)
"""Compute capability from which bfloat16 products run on tensor cores."""


class GpuBertLayer(BertLayer):
    """`BertLayer` for inference; takes no dropout and no mask.

    GELU is the tanh form, which cuBLAS applies inside the product; it is off by at most 5e-4, below
    bfloat16's rounding of the values it is applied to.
    """

    own_attention = True

    def __init__(self, layer: BertLayer) -> None:
        torch.nn.Module.__init__(self)
        self.num_heads, self.dropout = layer.num_heads, 0.0
        for name, module in layer.named_children():
            self.add_module(name, module)

    def forward(self, hidden_bse: Tensor, key_mask_bs: Tensor | None = None) -> Tensor:
        """(B, S, E) -> (B, S, E)."""
        from edje_pipeline.models.gpu_kernels import LONGEST, attention

        if key_mask_bs is not None or hidden_bse.shape[1] > LONGEST or not self.own_attention:
            return super().forward(hidden_bse, key_mask_bs)
        return self._finish(hidden_bse, attention(self.qkv(hidden_bse), self.num_heads))

    def _finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        from edje_pipeline.models.gpu_kernels import add_norm

        first, last = self.attention_norm, self.mlp_norm
        hidden = add_norm(self.attention_output(attended), residual, first.weight, first.bias, first.eps)
        rows = hidden.view(-1, hidden.shape[-1])
        raised = torch._addmm_activation(self.mlp_in.bias, rows, self.mlp_in.weight.t(), use_gelu=True)  # noqa: SLF001
        lowered = F.linear(raised, self.mlp_out.weight, self.mlp_out.bias).view(hidden.shape)
        return add_norm(lowered, hidden, last.weight, last.bias, last.eps)


def gpu_encoder(encoder: JointEncoder) -> JointEncoder:
    """The same encoder with the layers above where they work, else as it is; weights are shared.

    Args:
        encoder: on its device, in its dtype, in eval mode.
    """
    weight = encoder.classifier.weight
    head_size = encoder.spec.width // encoder.spec.num_heads
    fits = weight.dtype == torch.bfloat16 and weight.is_cuda and head_size in HEAD_SIZES
    if not fits or not has_triton() or torch.cuda.get_device_capability(weight.device) < TENSOR_CORES:
        return encoder
    return encoder.with_layers(GpuBertLayer(layer) for layer in encoder.layers).eval()  # type: ignore[arg-type]


def has_triton() -> bool:
    """Whether Triton is installed; PyTorch brings it along on Linux with CUDA."""
    return importlib.util.find_spec("triton") is not None
