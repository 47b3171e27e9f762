"""The joint encoder's layers for inference on a GPU, with the fused kernels of `gpu_kernels`.

Shape letters: B batch, S sequence, E width.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

from edje_pipeline.models.bert_layers import BertLayer
from edje_pipeline.models.joint_encoder import JointEncoder

TENSOR_CORES = (8, 0)
"""Compute capability from which bfloat16 products run on tensor cores."""


class GpuBertLayer(BertLayer):
    """`BertLayer` for inference: GELU inside the product, the sum inside the LayerNorm. Takes no dropout."""

    def __init__(self, layer: BertLayer) -> None:
        torch.nn.Module.__init__(self)
        self.num_heads, self.dropout = layer.num_heads, 0.0
        for name, module in layer.named_children():
            self.add_module(name, module)

    def _finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        from edje_pipeline.models.gpu_kernels import add_norm, linear_gelu

        first, last = self.attention_norm, self.mlp_norm
        hidden = add_norm(self.attention_output(attended), residual, first.weight, first.bias, first.eps)
        raised = linear_gelu(hidden, self.mlp_in.weight, self.mlp_in.bias)
        lowered = F.linear(raised, self.mlp_out.weight, self.mlp_out.bias)
        return add_norm(lowered, hidden, last.weight, last.bias, last.eps)


def gpu_encoder(encoder: JointEncoder) -> JointEncoder:
    """The same encoder with the layers above where they work, else as it is; weights are shared.

    Args:
        encoder: on its device, in its dtype, in eval mode.
    """
    weight = encoder.classifier.weight
    fits = weight.dtype == torch.bfloat16 and weight.is_cuda and encoder.spec.width % 64 == 0
    if not fits or not has_triton() or torch.cuda.get_device_capability(weight.device) < TENSOR_CORES:
        return encoder
    return encoder.with_layers(GpuBertLayer(layer) for layer in encoder.layers).eval()  # type: ignore[arg-type]


def has_triton() -> bool:
    """Whether Triton is installed; PyTorch brings it along on Linux with CUDA."""
    return importlib.util.find_spec("triton") is not None
