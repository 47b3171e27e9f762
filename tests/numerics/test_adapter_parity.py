"""The token adapters against torch.nn blocks put together from the formulas of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edje_pipeline.models.adapter import create_adapter
from edje_pipeline.models.spec import AdapterSpec

ADAPTER_TOLERANCE = 1e-5


class ReferenceCompressed(nn.Module):
    """H = MHA(latents, K(V), V(V)); H + MLP(LayerNorm(H)); linear. No residual around the attention."""

    def __init__(self, width, num_latents, mlp_dim, output_dim, num_heads, eps):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, num_latents, width))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_dim), "fc2": nn.Linear(mlp_dim, width)})
        self.projection = nn.Linear(width, output_dim)

    def forward(self, vision_tokens):
        latents = self.query.repeat(len(vision_tokens), 1, 1)
        hidden, _ = self.attention(latents, self.key(vision_tokens), self.value(vision_tokens))
        mlp = self.mlp["fc2"](nn.GELU()(self.mlp["fc1"](self.layernorm(hidden))))
        return self.projection(hidden + mlp)


def disturb(module, seed):
    """Random biases and norms too: torch starts many of them at zero or one, which would hide a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.mark.parametrize(
    ("width", "num_latents", "mlp_dim", "output_dim", "num_heads", "num_vision"),
    [(48, 4, 64, 32, 3, 16), (64, 1, 128, 64, 16, 9), (96, 64, 200, 24, 6, 5), (256, 32, 512, 384, 4, 49)],
)
def test_compressed_adapter_equals_torch_blocks(width, num_latents, mlp_dim, output_dim, num_heads, num_vision):
    torch.manual_seed(0)
    reference = ReferenceCompressed(width, num_latents, mlp_dim, output_dim, num_heads, 1e-6).eval()
    disturb(reference, 1)
    spec = AdapterSpec("compressed", width, output_dim, num_latents, num_heads, mlp_dim, 1e-6)
    adapter = create_adapter(spec).eval()
    adapter.load_state_dict(reference.state_dict())
    tokens = torch.randn(3, num_vision, width)
    with torch.inference_mode():
        want, got = reference(tokens), adapter(tokens)
    assert got.shape == (3, num_latents, output_dim)
    print(f"compressed {width}: max abs difference {(got - want).abs().max():.2e}")
    torch.testing.assert_close(got, want, atol=ADAPTER_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("width", "mlp_dim", "output_dim", "num_vision"), [(48, 64, 32, 16), (256, 8192, 384, 4)])
def test_local_adapter_equals_torch_blocks(width, mlp_dim, output_dim, num_vision):
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(width, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, output_dim)).eval()
    disturb(reference, 2)
    adapter = create_adapter(AdapterSpec("local", width, output_dim, num_vision, mlp_dim=mlp_dim)).eval()
    names = {"0": "mlp.fc1", "2": "mlp.fc2"}
    adapter.load_state_dict(
        {names[key.split(".")[0]] + "." + key.split(".")[1]: value for key, value in reference.state_dict().items()}
    )
    tokens = torch.randn(3, num_vision, width)
    with torch.inference_mode():
        torch.testing.assert_close(adapter(tokens), reference(tokens), atol=ADAPTER_TOLERANCE, rtol=0)


def test_the_norm_epsilon_of_the_spec_is_used():
    """Latents with almost no variance: there eps decides the output."""
    outputs = []
    for eps in (1e-6, 1e-2):
        torch.manual_seed(0)
        adapter = create_adapter(AdapterSpec("compressed", 32, 16, 2, 4, 64, eps)).eval()
        with torch.inference_mode():
            outputs.append(adapter(torch.full((1, 4, 32), 1e-3)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
