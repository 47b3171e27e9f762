"""The closed-form start against what the teacher's averaged tokens are."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from edje_pipeline.errors import ConfigError
from edje_pipeline.models.adapter import TokenAdapter, create_adapter
from edje_pipeline.models.spec import AdapterSpec
from edje_pipeline.models.token_reading import token_attention
from edje_pipeline.training.local_start import place_codes, start_from_local
from edje_pipeline.training.losses import average_tokens, token_loss


def adapters(num_vision: int, num_tokens: int, **changes: int) -> tuple[TokenAdapter, TokenAdapter, torch.Tensor]:
    torch.manual_seed(0)
    local = create_adapter(AdapterSpec("local", 32, 24, num_vision, num_heads=2, mlp_dim=128))
    sizes = {"num_heads": 2, "mlp_dim": 192, "num_key_positions": num_vision, **changes}
    adapter = create_adapter(AdapterSpec("compressed", 32, 24, num_tokens, **sizes))
    # As behind a backbone's last norm.
    vision = layer_norm(torch.randn(160, num_vision, 32), (32,))
    vision = vision * torch.linspace(0.5, 3, 32) + torch.linspace(-2, 2, 32)
    return adapter, local, vision


@pytest.mark.parametrize(("num", "dim"), [(16, 16), (16, 24), (9, 4), (12, 12), (12, 5)])
def test_place_codes_are_unit_vectors_nearest_to_themselves(num, dim):
    codes = place_codes(num, dim)
    assert codes.shape == (num, dim)
    products = codes @ codes.T
    torch.testing.assert_close(products.diagonal(), torch.ones(num))
    assert torch.equal(products.argmax(dim=1), torch.arange(num))
    if dim >= num:
        torch.testing.assert_close(products, torch.eye(num), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("num_vision", "num_tokens"), [(16, 16), (16, 4), (16, 8), (12, 3)])
def test_latents_look_at_their_cells_and_give_the_teachers_tokens(num_vision, num_tokens):
    adapter, local, vision = adapters(num_vision, num_tokens)
    before = token_loss(adapter(vision), local(vision)).item()
    start_from_local(adapter, local, vision[:128])
    cells = average_tokens(torch.eye(num_vision)[None], num_tokens)[0]
    looked = token_attention(adapter, vision[128:])
    assert looked is not None
    inside = (looked * (cells > 0)).sum(dim=-1)
    assert inside.min() > 0.9
    unseen = token_loss(adapter(vision[128:]), local(vision[128:])).item()
    # Random patches have nothing in common: much of their teacher tokens' average is not in the patches' average.
    assert unseen < (0.02 if num_vision == num_tokens else 0.4)
    assert before > 0.9


def test_everything_can_still_be_learned():
    adapter, local, vision = adapters(16, 4)
    start_from_local(adapter, local, vision)
    token_loss(adapter(vision), local(vision)).backward()
    assert all(bool(parameter.grad.any()) for name, parameter in adapter.named_parameters() if name != "key.bias")


def test_what_cannot_be_started_says_so():
    adapter, local, vision = adapters(16, 4, num_key_positions=0)
    with pytest.raises(ConfigError, match="make the model with --key-positions"):
        start_from_local(adapter, local, vision)
    adapter, local, vision = adapters(16, 4, mlp_dim=127)
    with pytest.raises(ConfigError, match="has 127 units, the teacher's 128; make the model with --mlp-dim 128"):
        start_from_local(adapter, local, vision)
    with pytest.raises(ConfigError, match="needs a compressed adapter and a local one as teacher"):
        start_from_local(local, local, vision)
