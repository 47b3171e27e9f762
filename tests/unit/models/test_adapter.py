"""Adapters: shapes, errors, and the layout that the driver checks files against."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edje_pipeline.errors import ConfigError, ShapeMismatchError
from edje_pipeline.models.adapter import create_adapter
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.models.layout import adapter_shapes, joint_encoder_shapes
from edje_pipeline.models.random_model import random_tensors
from edje_pipeline.models.spec import AdapterSpec, JointEncoderSpec

COMPRESSED = AdapterSpec("compressed", 48, 32, 4, num_heads=3, mlp_dim=64)
LOCAL = AdapterSpec("local", 48, 32, 16, num_heads=3, mlp_dim=64)
PLACED = replace(COMPRESSED, num_key_positions=16)
ALL = pytest.mark.parametrize("spec", [COMPRESSED, LOCAL, PLACED], ids=["compressed", "local", "placed"])


@ALL
def test_layout_is_the_modules_own(spec):
    adapter = create_adapter(spec)
    assert adapter_shapes(spec) == {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}


def test_joint_encoder_layout_is_the_modules_own():
    spec = JointEncoderSpec(width=32, num_layers=2, num_heads=4, mlp_dim=64, vocab_size=11, max_positions=9)
    shapes = {name: tuple(tensor.shape) for name, tensor in JointEncoder(spec).state_dict().items()}
    assert joint_encoder_shapes(spec) == shapes


def test_number_of_tokens_out():
    compressed, local = create_adapter(COMPRESSED), create_adapter(LOCAL)
    with torch.inference_mode():
        assert compressed(torch.randn(2, 9, 48)).shape == (2, 4, 32)
        assert local(torch.randn(2, 16, 48)).shape == (2, 16, 32)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (COMPRESSED, (2, 16, 47), r"compressed adapter takes vision tokens \(B, N, 48\), got \(2, 16, 47\)"),
        (COMPRESSED, (16, 48), "got"),
        (PLACED, (2, 15, 48), r"compressed adapter takes vision tokens \(B, 16, 48\), got \(2, 15, 48\)"),
        (LOCAL, (2, 15, 48), r"local adapter takes vision tokens \(B, 16, 48\), got \(2, 15, 48\)"),
    ],
)
def test_wrong_tokens_are_refused(spec, shape, message):
    with pytest.raises(ShapeMismatchError, match=message):
        create_adapter(spec)(torch.zeros(shape))


def test_key_positions_start_as_nothing_and_then_tell_places_apart():
    torch.manual_seed(0)
    plain, placed = create_adapter(COMPRESSED).eval(), create_adapter(PLACED).eval()
    placed.load_state_dict(plain.state_dict() | {"key_positions": torch.zeros(1, 16, 48)})
    tokens = torch.randn(2, 16, 48)
    with torch.inference_mode():
        assert torch.equal(placed(tokens), plain(tokens))
        # Without positions the order of the tokens means nothing.
        torch.testing.assert_close(plain(tokens.flip(1)), plain(tokens))
        placed.key_positions.normal_()
        assert (placed(tokens.flip(1)) - placed(tokens)).abs().max() > 0.01


def test_wrong_specs_are_refused():
    with pytest.raises(ConfigError, match="width 48 is not a multiple of its 5 heads"):
        create_adapter(AdapterSpec("compressed", 48, 32, 4, num_heads=5))
    with pytest.raises(ConfigError, match="'pooling' is not known"):
        create_adapter(AdapterSpec("pooling", 48, 32, 4))  # type: ignore[arg-type]


@pytest.mark.gpu
@ALL
def test_adapter_on_cuda_equals_cpu(spec):
    adapter = create_adapter(spec).eval()
    adapter.load_state_dict(random_tensors(adapter_shapes(spec), 0, "adapter"))
    tokens = torch.randn(32, 16, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = adapter(tokens)
        got = adapter.cuda()(tokens.cuda()).cpu()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_key_positions_are_part_of_the_fingerprint_where_there_are_any():
    # Taken from the version before key positions: indexes made then must still fit their model.
    assert COMPRESSED.fingerprint == "7b87bb1a7a5640b7353c9ad33be5de13babe5d3199cacece135a27c949ad2059"
    assert len({COMPRESSED.fingerprint, PLACED.fingerprint, replace(PLACED, num_key_positions=9).fingerprint}) == 3
