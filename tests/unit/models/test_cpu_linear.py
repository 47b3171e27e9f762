"""Frozen linear maps against the modules they stand for."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from edje_pipeline.models import cpu_linear
from edje_pipeline.models.cpu_linear import FrozenLinear, has_onednn, with_frozen_linears
from edje_pipeline.models.random_model import write_random_model

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN")


def vit(activation: type[nn.Module] = nn.GELU) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", act_layer=activation, **TINY).eval()


class TanhGelu(nn.GELU):
    def __init__(self) -> None:
        super().__init__(approximate="tanh")


@needs_onednn
@pytest.mark.parametrize("activation", [nn.GELU, TanhGelu, nn.ReLU])
def test_a_vit_gives_the_same_tokens(activation):
    plain = vit(activation)
    frozen = with_frozen_linears(copy.deepcopy(plain))
    swapped = [module for module in frozen.modules() if isinstance(module, FrozenLinear)]
    assert len(swapped) == 8  # two blocks: qkv, projection, two maps of the MLP
    assert sum(module.gelu is not None for module in swapped) == (0 if activation is nn.ReLU else 2)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(pixels), plain(pixels), atol=1e-5, rtol=0)


@needs_onednn
def test_names_and_gradients_stay():
    plain = vit()
    frozen = with_frozen_linears(copy.deepcopy(plain))
    assert frozen.state_dict().keys() == plain.state_dict().keys()
    pixels = torch.randn(2, 3, 32, 32)
    for network in (plain, frozen):
        network(pixels).square().sum().backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in frozen.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad)


@needs_onednn
def test_no_bias_no_rows_and_other_types():
    plain = nn.Sequential(nn.Linear(8, 4, bias=False), nn.ReLU())
    frozen = with_frozen_linears(copy.deepcopy(plain))
    assert isinstance(frozen[0], FrozenLinear)
    with torch.inference_mode():
        for rows in (torch.randn(5, 8), torch.randn(2, 3, 8), torch.randn(0, 8), torch.randn(8, 5).T):
            torch.testing.assert_close(frozen(rows), plain(rows))
        half = torch.randn(5, 8).bfloat16()
        assert torch.equal(frozen.bfloat16()(half), plain.bfloat16()(half))


def test_attention_that_reads_its_weights_is_left_alone():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    values = torch.randn(2, 5, 8)
    with torch.inference_mode():
        before = attention(values, values, values)[0]
        after = with_frozen_linears(attention)(values, values, values)[0]
    assert not any(isinstance(module, FrozenLinear) for module in attention.modules())
    assert torch.equal(before, after)


def test_without_onednn_nothing_changes(monkeypatch):
    monkeypatch.setattr(cpu_linear, "has_onednn", lambda: False)
    assert not any(isinstance(module, FrozenLinear) for module in with_frozen_linears(vit()).modules())


def test_a_whole_backbone_and_adapter(tmp_path):
    model = write_random_model(tmp_path / "model")
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    found = []
    for change in (lambda module: module, with_frozen_linears):
        backbone, adapter = change(model.load_backbone()), change(model.load_adapter())
        with torch.inference_mode():
            tokens, embedding = backbone(pixels)
            found.append((adapter(tokens), embedding))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)
