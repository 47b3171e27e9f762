"""Linear maps of a frozen model by oneDNN instead of MKL, on a CPU in float32.

PyTorch sends float32 products to MKL, which takes its AVX2 path on AMD processors and leaves half of them idle; oneDNN,
which PyTorch ships as well, does not. A ViT is nine tenths linear maps, so this about doubles its speed there
(benchmarks/results/backbone_linear_*.md); where MKL is as fast nothing is lost.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PostOp = tuple[str, list[float], str]
NO_POST_OP: PostOp = ("none", [], "")
GELU: dict[str, PostOp] = {"none": ("gelu", [], "none"), "tanh": ("gelu", [], "tanh")}
"""By `nn.GELU.approximate`."""


@cache
def has_onednn() -> bool:
    """Whether PyTorch here has oneDNN's linear map."""
    is_built = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return is_built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FrozenLinear(nn.Linear):
    """`nn.Linear` with the same parameters, and a GELU behind it if asked; without gradients, in float32 on a CPU, by
    oneDNN."""

    def __init__(self, linear: nn.Linear, gelu: nn.GELU | None = None) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.gelu = linear.weight, linear.bias, gelu
        self.post_op = NO_POST_OP if gelu is None else GELU[gelu.approximate]
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """(..., I) -> (..., O)."""
        # The operator has no derivative.
        if torch.is_grad_enabled() or input.dtype != torch.float32 or input.device.type != "cpu" or not input.numel():
            plain = F.linear(input, self.weight, self.bias)
            return plain if self.gelu is None else self.gelu(plain)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, *self.post_op)  # noqa: SLF001
        return out


def with_frozen_linears(module: nn.Module) -> nn.Module:
    """Changes every plain `nn.Linear` below `module`, in place; returns it. Nothing happens without oneDNN.

    Subclasses of `nn.Linear` stay as they are: they mean something else by it (`nn.MultiheadAttention` reads the
    weights of its own and never calls it). timm's MLPs get their GELU fused, a fifteenth of a ViT's time.
    """
    if not has_onednn():
        return module
    from timm.layers import Mlp

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            gelu = getattr(parent, "act", None) if type(parent) is Mlp and name == "fc1" else None
            if isinstance(gelu, nn.GELU):
                setattr(parent, name, FrozenLinear(child, gelu))
                parent.act = nn.Identity()
            else:
                setattr(parent, name, FrozenLinear(child))
    return module
