"""The joint encoder's layers with our own kernels for a GPU: an experiment, chosen by `kernels="own"`.

A sum and its LayerNorm are one pass (`gpu_kernels`), GELU happens inside the matrix product;
attention is PyTorch's. What was measured, and how far the scores are from PyTorch's own layers, is in
docs/performance.md.

Shape letters: B batch, S sequence, E width.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

from edje_pipeline.errors import DeviceError
from edje_pipeline.models.bert_layers import BertLayer
from edje_pipeline.models.joint_encoder import JointEncoder

TENSOR_CORES = (8, 0)
"""Compute capability from which bfloat16 products run on tensor cores."""


class GpuBertLayer(BertLayer):
    """`BertLayer` for inference without dropout.

    GELU is the tanh form, the only one that cuBLAS applies inside the product; it is off by at most 5e-4.
    """

    def __init__(self, layer: BertLayer) -> None:
        torch.nn.Module.__init__(self)
        self.num_heads, self.dropout = layer.num_heads, 0.0
        for name, module in layer.named_children():
            self.add_module(name, module)

    def _finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        from edje_pipeline.models.gpu_kernels import add_norm

        first, last = self.attention_norm, self.mlp_norm
        hidden = add_norm(self.attention_output(attended), residual, first.weight, first.bias, first.eps)
        rows = hidden.view(-1, hidden.shape[-1])
        raised = torch._addmm_activation(self.mlp_in.bias, rows, self.mlp_in.weight.t(), use_gelu=True)  # noqa: SLF001
        lowered = F.linear(raised, self.mlp_out.weight, self.mlp_out.bias).view(hidden.shape)
        return add_norm(lowered, hidden, last.weight, last.bias, last.eps)


def gpu_encoder(encoder: JointEncoder) -> JointEncoder:
    """The same encoder with the layers above; weights are shared.

    Args:
        encoder: on its GPU, in bfloat16, in eval mode.

    Raises:
        DeviceError: the kernels cannot run here.
    """
    weight = encoder.classifier.weight
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < TENSOR_CORES:
        raise DeviceError(
            f"own kernels need a GPU of compute capability 8.0 or more, the encoder is on {weight.device}; "
            "use --kernels torch"
        )
    if not has_triton():
        raise DeviceError("own kernels need Triton, which is not installed here; use --kernels torch")
    return encoder.with_layers(GpuBertLayer(layer) for layer in encoder.layers).eval()  # type: ignore[arg-type]


def has_triton() -> bool:
    """Whether Triton is installed; PyTorch brings it along on Linux with CUDA."""
    return importlib.util.find_spec("triton") is not None
