"""The joint encoder's two paths, its inputs' checks, its position table."""

from __future__ import annotations

import pytest
import torch

from edje_pipeline.errors import ConfigError, ShapeMismatchError
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.models.layout import joint_encoder_shapes
from edje_pipeline.models.random_model import random_tensors
from edje_pipeline.models.spec import JointEncoderSpec

SPEC = JointEncoderSpec(width=32, num_layers=3, num_heads=4, mlp_dim=64, vocab_size=50, max_positions=40)


def make_encoder(spec=SPEC, seed=0, dropout=0.0):
    encoder = JointEncoder(spec, dropout=dropout)
    encoder.load_state_dict(random_tensors(joint_encoder_shapes(spec), seed, "test"))
    return encoder.eval()


def make_pairs(num_pairs, length, num_images, num_tokens=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 50, (num_pairs, length), generator=generator)
    ids[:, 0], ids[:, -1] = 2, 3
    images = torch.randn(num_images, num_tokens, 32, generator=generator)
    return ids, images, torch.randint(0, num_images, (num_pairs,), generator=generator)


@pytest.mark.parametrize("length", [2, 3, 8, 33])
def test_dense_equals_padded(length):
    encoder = make_encoder()
    ids, images, index = make_pairs(7, length, 3)
    with torch.inference_mode():
        plain = encoder.forward_padded(ids, torch.ones_like(ids), images[index])
        dense = encoder.forward_dense(ids, images[index])
        shared = encoder.forward_dense(ids, images, index)
    assert plain.std() > 0.05
    torch.testing.assert_close(dense, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)


def test_what_stands_in_the_padding_does_not_matter():
    encoder = make_encoder()
    ids, images, _ = make_pairs(4, 9, 4)
    mask = torch.ones_like(ids)
    mask[1, 5:], ids[1, 4] = 0, 3
    other = ids.clone()
    other[1, 5:] = 17
    with torch.inference_mode():
        first, second = (encoder.forward_padded(i, mask, images) for i in (ids, other))
        alone = encoder.forward_dense(ids[1:2, :5], images[1:2])
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    torch.testing.assert_close(first[1:2], alone, atol=1e-5, rtol=0)


def test_every_image_token_and_its_place_count():
    encoder = make_encoder()
    ids, images, _ = make_pairs(1, 6, 1)
    with torch.inference_mode():
        base = encoder.forward_dense(ids, images)
        for place in range(images.shape[1]):
            changed = images.clone()
            changed[0, place] = images[0, place].flip(0)
            assert (encoder.forward_dense(ids, changed) - base).abs().item() > 1e-4
        assert (encoder.forward_dense(ids, images.flip(1)) - base).abs().item() > 1e-4


def test_logits_are_float32_of_shape_b_in_every_dtype():
    encoder = make_encoder().to(torch.bfloat16)
    ids, images, index = make_pairs(5, 7, 2)
    with torch.inference_mode():
        half = encoder.forward_dense(ids, images, index)
        full = make_encoder().forward_dense(ids, images, index)
    assert half.dtype == torch.float32
    assert half.shape == (5,)
    assert torch.corrcoef(torch.stack([half, full]))[0, 1] > 0.98


def test_hidden_states_of_text_ignore_padding_and_images():
    encoder = make_encoder()
    ids, images, _ = make_pairs(2, 8, 2)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.inference_mode():
        hidden = encoder.encode_text(ids, mask)
        alone = encoder.encode_text(ids[1:2, :5])
        pair = encoder.encode_pair(ids, mask, images)
        read = encoder.encode_images(images, cls_id=2)
    assert pair.shape == (2, 8 + 6 + 1, 32)
    assert read.shape == (2, 7, 32)
    torch.testing.assert_close(hidden[1:2, :5], alone, atol=1e-5, rtol=0)


def test_position_table_is_extended_by_its_last_row():
    encoder = make_encoder()
    ids, images, index = make_pairs(3, 20, 2, num_tokens=30)
    with pytest.raises(ShapeMismatchError, match=r"20 text tokens and 30 image tokens need 51 positions.*has 40"):
        encoder.forward_dense(ids, images, index)
    before = encoder.position_embeddings.weight.detach().clone()
    encoder.extend_positions(51)
    after = encoder.position_embeddings.weight
    assert torch.equal(after[:40], before)
    assert torch.equal(after[40:], before[-1:].expand(11, -1))
    with torch.inference_mode():
        dense = encoder.forward_dense(ids, images, index)
        padded = encoder.forward_padded(ids, torch.ones_like(ids), images[index])
    torch.testing.assert_close(dense, padded, atol=1e-5, rtol=0)
    encoder.extend_positions(10)
    assert len(encoder.position_embeddings.weight) == 51


@pytest.mark.parametrize(
    ("ids_shape", "image_shape"), [((2, 5), (2, 6, 16)), ((2, 5), (3, 6, 32)), ((5,), (2, 6, 32)), ((2, 5), (6, 32))]
)
def test_inputs_that_do_not_fit_are_refused(ids_shape, image_shape):
    encoder = make_encoder()
    ids = torch.ones(ids_shape, dtype=torch.int64)
    with pytest.raises(ShapeMismatchError, match="takes input_ids"):
        encoder.forward_dense(ids, torch.zeros(image_shape))


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="width 32 is not a multiple of its 5 heads"):
        JointEncoder(JointEncoderSpec(width=32, num_heads=5))


def test_dropout_acts_in_training_only():
    encoder = make_encoder(dropout=0.3)
    ids, images, index = make_pairs(3, 6, 2)
    with torch.no_grad():
        still = [encoder.forward_dense(ids, images, index) for _ in range(2)]
        encoder.train()
        moving = [encoder.forward_dense(ids, images, index) for _ in range(2)]
    assert torch.equal(still[0], still[1])
    assert not torch.equal(moving[0], moving[1])


@pytest.mark.gpu
def test_cuda_equals_cpu():
    encoder = make_encoder()
    ids, images, index = make_pairs(64, 12, 9)
    with torch.inference_mode():
        want = encoder.forward_dense(ids, images, index)
        encoder.cuda()
        dense = encoder.forward_dense(ids.cuda(), images.cuda(), index.cuda()).cpu()
        padded = encoder.forward_padded(ids.cuda(), torch.ones_like(ids).cuda(), images[index].cuda()).cpu()
    torch.testing.assert_close(dense, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(padded, want, atol=1e-4, rtol=0)
