"""The CPU's encoder against the plain one: float32 equal, int8 near and independent of the batch."""

from __future__ import annotations

import pytest
import torch

from edje_pipeline.errors import DeviceError
from edje_pipeline.models import cpu_encoder as module
from edje_pipeline.models.cpu_encoder import (
    BLOCK_INPUTS,
    HALVES_MAX,
    Int8Linear,
    OneDnnLinear,
    check_int8,
    cpu_encoder,
    num_blocks,
    quantize_rows,
    split_rows,
)
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.models.layout import joint_encoder_shapes
from edje_pipeline.models.random_model import random_tensors
from edje_pipeline.models.spec import JointEncoderSpec

SPEC = JointEncoderSpec(width=64, num_layers=3, num_heads=4, mlp_dim=128, vocab_size=50, max_positions=60)


def plain_encoder() -> JointEncoder:
    encoder = JointEncoder(SPEC)
    encoder.load_state_dict(random_tensors(joint_encoder_shapes(SPEC), 0, "test"))
    return encoder.eval()


def some_pairs(num_pairs: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(4, 50, (num_pairs, length), generator=generator)
    return ids, torch.randn(3, 8, 64, generator=generator), torch.randint(0, 3, (num_pairs,), generator=generator)


@pytest.mark.parametrize("length", [2, 9, 33])
def test_float32_equals_the_plain_path(length: int) -> None:
    encoder = plain_encoder()
    fast = cpu_encoder(encoder, "float32")
    ids, images, index = some_pairs(7, length)
    with torch.inference_mode():
        plain = encoder.forward_padded(ids, torch.ones_like(ids), images[index])
        assert plain.std() > 0.02
        torch.testing.assert_close(fast.forward_dense(ids, images, index), plain, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            fast.forward_padded(ids, torch.ones_like(ids), images[index]), plain, atol=1e-5, rtol=0
        )


def test_the_mask_counts_in_the_cpu_layers() -> None:
    encoder = plain_encoder()
    fast = cpu_encoder(encoder, "float32")
    ids, images, index = some_pairs(4, 9)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.inference_mode():
        expected = encoder.forward_padded(ids, mask, images[index])
        unmasked = encoder.forward_padded(ids, torch.ones_like(ids), images[index])
        torch.testing.assert_close(fast.forward_padded(ids, mask, images[index]), expected, atol=1e-5, rtol=0)
    assert (expected - unmasked).abs().max() > 1e-3


def test_int8_is_near_float32_and_orders_alike() -> None:
    encoder = plain_encoder()
    fast = cpu_encoder(encoder, "int8")
    ids, images, index = some_pairs(64, 9)
    with torch.inference_mode():
        plain, found = encoder.forward_dense(ids, images, index), fast.forward_dense(ids, images, index)
    assert 0 < (plain - found).abs().max() < 0.1 * plain.std()
    ranks = torch.stack([plain.argsort().argsort(), found.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.998
    assert plain.argmax() == found.argmax()


def test_of_int8_only_the_rounding_of_the_weights_is_left() -> None:
    encoder, rounded = plain_encoder(), plain_encoder()
    maps = [module for module in rounded.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert len(maps) == 4 * SPEC.num_layers
    for linear in maps:
        quantized, scale = quantize_rows(linear.weight.detach())
        linear.weight.data = quantized * scale
    ids, images, index = some_pairs(64, 9)
    with torch.inference_mode():
        expected = rounded.forward_dense(ids, images, index)
        found = cpu_encoder(encoder, "int8").forward_dense(ids, images, index)
        plain = encoder.forward_dense(ids, images, index)
    of_weights, of_activations = (plain - expected).abs().max(), (found - expected).abs().max()
    assert of_activations < 0.02 * of_weights  # with activations of 8 bits they are as large as each other


def test_an_int8_logit_does_not_depend_on_its_batch() -> None:
    fast = cpu_encoder(plain_encoder(), "int8")
    ids, images, index = some_pairs(16, 9)
    images[2] *= 50  # an outlier would change the scale of a whole tensor
    with torch.inference_mode():
        together = fast.forward_dense(ids, images, index)
        alone = torch.cat([fast.forward_dense(ids[n : n + 1], images[index[n : n + 1]]) for n in range(len(ids))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_encoder_given_is_left_as_it_was() -> None:
    encoder = plain_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    fast = cpu_encoder(encoder, "int8")
    assert encoder.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert fast.word_embeddings is encoder.word_embeddings  # the largest table is not held twice


@pytest.mark.parametrize("gelu", [False, True])
def test_linear_maps(gelu: bool) -> None:
    torch.manual_seed(0)
    weight, bias, inputs = torch.randn(48, 32), torch.randn(48), torch.randn(2, 5, 32)
    expected = torch.nn.functional.linear(inputs, weight, bias)
    expected = torch.nn.functional.gelu(expected) if gelu else expected
    torch.testing.assert_close(OneDnnLinear(weight, bias, gelu=gelu)(inputs), expected, atol=1e-5, rtol=1e-5)
    # Rounding of the weights: half a step of about 2 / 127, summed over 32 inputs of variance one.
    torch.testing.assert_close(Int8Linear(weight, bias, gelu=gelu)(inputs), expected, atol=0.15, rtol=0)


def test_int8_is_exact_where_nothing_is_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (16, 24), generator=generator).float()
    inputs = torch.randint(-127, 128, (5, 24), generator=generator).float()
    weight[:, 0], inputs[:, 0] = 127, -127
    expected = inputs.double() @ weight.double().t() + 1
    torch.testing.assert_close(Int8Linear(weight, torch.ones(16))(inputs).double(), expected, atol=0.05, rtol=1e-6)


@pytest.mark.parametrize(
    ("num_inputs", "expected"), [(1, 1), (64, 1), (384, 1), (386, 2), (768, 2), (1536, 4), (3072, 8)]
)
def test_blocks_are_equal_and_small_enough(num_inputs: int, expected: int) -> None:
    assert num_blocks(num_inputs) == expected
    assert num_inputs % expected == 0
    assert num_inputs // expected <= BLOCK_INPUTS


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_fit_32_bits(sign: int) -> None:
    # The worst case of one block: every weight and every activation at its limit.
    weight, inputs = torch.full((16, BLOCK_INPUTS), sign * 127.0), torch.full((2, BLOCK_INPUTS), float(HALVES_MAX))
    expected = float(sign * 127 * HALVES_MAX * BLOCK_INPUTS)
    torch.testing.assert_close(
        Int8Linear(weight, torch.zeros(16))(inputs), torch.full((2, 16), expected), rtol=1e-6, atol=0
    )


def test_blocks_have_scales_of_their_own() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(32, 768), torch.randn(9, 768)
    weight[:, :384] *= 1e-3  # would round to nothing under one scale a row
    inputs[:, 384:] = 0
    expected = torch.nn.functional.linear(inputs, weight)
    found = Int8Linear(weight, torch.zeros(32))(inputs)
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("count", [1, 3])
def test_rows_are_split_to_half_a_step_of_16_bits(count: int) -> None:
    rows = torch.randn(20, 96) * torch.logspace(-6, 6, 20)[:, None]
    rows[3], rows[4, 0] = 0, 0
    halves, scale = split_rows(rows, count)
    assert halves.dtype == torch.int8
    assert halves.shape == (count, 40, 96 // count)
    high, low = halves.double().chunk(2, dim=1)
    restored = (256 * high + low).transpose(0, 1).reshape(20, 96) * scale.double()
    assert bool(((restored - rows).abs() <= 0.51 * scale).all())
    assert bool((scale <= rows.abs().amax(1, keepdim=True).clamp_min(1e-33) / 32_000).all())


def test_rows_are_quantized_to_half_a_step() -> None:
    rows = torch.randn(20, 64) * torch.logspace(-6, 6, 20)[:, None]
    quantized, scale = quantize_rows(rows)
    assert quantized.dtype == torch.int8
    assert bool((quantized.abs().amax(1) == 127).all())
    assert bool(((quantized * scale - rows).abs() <= 0.501 * scale).all())


def test_a_row_of_zeros_stays_zero() -> None:
    quantized, scale = quantize_rows(torch.zeros(2, 8))
    assert not quantized.any()
    assert bool(torch.isfinite(scale).all())


def test_a_row_that_is_not_finite_is_not_hidden() -> None:
    layer = Int8Linear(torch.randn(4, 8), torch.zeros(4))
    for value in (float("nan"), float("inf")):
        rows = torch.ones(1, 8)
        rows[0, 3] = value
        assert not torch.isfinite(layer(rows)).all()


def test_a_processor_whose_sums_overflow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_int8()  # this one is right
    exact = torch._int_mm
    check_int8.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: exact(a, b).clamp(-32768, 32767))
    try:
        with pytest.raises(DeviceError, match="VNNI"):
            cpu_encoder(plain_encoder(), "int8")
    finally:
        check_int8.cache_clear()


def test_without_onednn_float32_is_the_plain_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = plain_encoder()
    monkeypatch.setattr(module, "has_onednn", lambda: False)
    assert cpu_encoder(encoder, "float32") is encoder
