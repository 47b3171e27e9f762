"""Reading tokens: answers planted in embeddings, attention and logits are found again."""

from __future__ import annotations

import pytest
import torch

from edje_pipeline.errors import ShapeMismatchError
from edje_pipeline.models.adapter import CompressedAdapter, create_adapter
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.models.layout import adapter_shapes, joint_encoder_shapes
from edje_pipeline.models.random_model import random_tensors
from edje_pipeline.models.spec import AdapterSpec, JointEncoderSpec
from edje_pipeline.models.token_reading import (
    Grid,
    is_readable,
    logits_without,
    nearest_words,
    over_grid,
    patch_grid,
    readable_vocabulary,
    token_attention,
)
from edje_pipeline.models.tokenizer import Tokenizer
from edje_pipeline.models.untrained import is_untrained
from edje_pipeline.models.words import word_pieces

COMPRESSED = AdapterSpec("compressed", 48, 32, 4, num_heads=3, mlp_dim=64)
LOCAL = AdapterSpec("local", 48, 32, 16, num_heads=3, mlp_dim=64)


def random_adapter(spec: AdapterSpec, seed: int = 0):
    adapter = create_adapter(spec).eval()
    adapter.load_state_dict(random_tensors(adapter_shapes(spec), seed, "adapter"))
    return adapter


def random_encoder() -> JointEncoder:
    spec = JointEncoderSpec(width=32, num_layers=2, num_heads=4, mlp_dim=64, vocab_size=40, max_positions=60)
    encoder = JointEncoder(spec).eval()
    encoder.load_state_dict(random_tensors(joint_encoder_shapes(spec), 0, "joint_encoder"))
    return encoder


def test_a_token_that_is_a_words_embedding_is_read_as_that_word():
    tokenizer = Tokenizer.from_vocab(word_pieces())
    table = torch.randn(tokenizer.vocab_size, 32, generator=torch.Generator().manual_seed(1))
    ids = [tokenizer.encode([word])[0][1] for word in ("apple", "castle")]
    words = nearest_words(3.5 * table[ids], readable_vocabulary(tokenizer, table), top_k=3)
    assert [row[0].text for row in words] == ["apple", "castle"]
    for row in words:
        assert row[0].cosine == pytest.approx(1.0, abs=1e-5)
        assert len(row) == 3
        assert row[0].cosine > row[1].cosine >= row[2].cosine
    # Against a plain computation, for a direction that is no word.
    vocabulary = readable_vocabulary(tokenizer, table)
    token = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    cosines = torch.cosine_similarity(token, vocabulary.embeddings)
    assert [word.text for word in nearest_words(token, vocabulary, 5)[0]] == [
        vocabulary.words[i] for i in cosines.argsort(descending=True)[:5]
    ]


@pytest.mark.parametrize(
    ("word", "plain", "with_pieces"),
    [
        ("apple", True, True), ("1984", True, True), ("café", True, True), ("猫", True, True),
        ("##ing", False, True), ("##!", False, False), ("##", False, False),
        ("[unused7]", False, False), ("[CLS]", False, False), ("!", False, False), ("...", False, False),
        ("a", False, False), ("7", False, False), ("", False, False),
    ],
)  # fmt: skip
def test_what_counts_as_a_word(word, plain, with_pieces):
    assert is_readable(word) is plain
    assert is_readable(word, pieces=True) is with_pieces


def test_special_tokens_and_rows_without_an_embedding_are_left_out():
    tokenizer = Tokenizer.from_vocab(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", "cat", "##s", "dog"])
    table = torch.eye(10)
    assert readable_vocabulary(tokenizer, table).words == ("cat", "dog")
    assert readable_vocabulary(tokenizer, table, pieces=True).words == ("cat", "##s", "dog")
    # `<image>` is a special token of the tokenizer, and a short table ends before `dog`.
    assert readable_vocabulary(tokenizer, table[:8]).words == ("cat",)


def test_weights_times_values_are_the_modules_output():
    adapter = random_adapter(COMPRESSED)
    assert isinstance(adapter, CompressedAdapter)
    vision = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3))
    attention = adapter.attention
    with torch.inference_mode():
        key, value = adapter.key(vision), adapter.value(vision)
        want = attention(adapter.query, key, value)
        from edje_pipeline.models.token_reading import head_weights

        weights = head_weights(attention, adapter.query, key)
        third = 2 * 48
        mapped = torch.nn.functional.linear(
            value, attention.in_proj_weight[third:], attention.in_proj_bias[third:]
        ).view(2, 9, 3, 16)
        got = attention.out_proj(torch.einsum("bhmn,bnhd->bmhd", weights, mapped).flatten(2))
        averaged = token_attention(adapter, vision)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert averaged is not None
    assert averaged.shape == (2, 4, 9)
    torch.testing.assert_close(averaged, weights.mean(dim=1))
    torch.testing.assert_close(averaged.sum(-1), torch.ones(2, 4))


def test_planted_attention_is_found_and_a_local_adapter_has_none():
    adapter = random_adapter(COMPRESSED)
    with torch.no_grad():
        # Keys are the vision tokens themselves, and latent 2 asks for what stands at place 5.
        adapter.key.weight.copy_(torch.eye(48))
        adapter.attention.in_proj_weight[:96].copy_(torch.cat([torch.eye(48)] * 2))
        vision = torch.randn(1, 16, 48, generator=torch.Generator().manual_seed(4))
        adapter.query[0, 2] = 20 * vision[0, 5]
        weights = token_attention(adapter, vision)
    assert weights is not None
    assert int(weights[0, 2].argmax()) == 5
    assert float(weights[0, 2, 5]) > 0.9
    assert token_attention(random_adapter(LOCAL), torch.zeros(1, 16, 48)) is None
    with pytest.raises(ShapeMismatchError):
        token_attention(adapter, torch.zeros(1, 16, 47))


@pytest.mark.parametrize(
    ("num", "size", "grid"),
    [
        (196, (224, 224), Grid(14, 14)),
        (197, (224, 224), Grid(14, 14, 1)),
        (261, (224, 224), Grid(16, 16, 5)),
        (49, (224, 224), Grid(7, 7)),
        (729, (384, 384), Grid(27, 27)),
        (98, (224, 112), Grid(14, 7)),
        (98, (112, 224), Grid(7, 14)),
        (6, (64, 80), Grid(2, 3)),  # a stride of 32 that does not divide 80
        (1, (32, 32), Grid(1, 1)),
    ],
)
def test_grids_of_patches(num, size, grid):
    assert patch_grid(num, size) == grid


def test_tokens_that_form_no_grid():
    assert patch_grid(80, (224, 224)) is None
    weights = torch.arange(10.0).view(2, 5)
    assert over_grid(weights, Grid(2, 2, 1)).tolist() == [[[1, 2], [3, 4]], [[6, 7], [8, 9]]]


def test_nothing_hidden_is_the_dense_logit_and_a_hidden_token_is_without_effect():
    encoder = random_encoder()
    generator = torch.Generator().manual_seed(5)
    ids, tokens = torch.tensor([2, 7, 9, 11, 3]), torch.randn(40, 32, generator=generator)
    logit, without = logits_without(encoder, ids, tokens)
    with torch.inference_mode():
        dense = encoder.forward_dense(ids[None], tokens[None])
    assert logit == pytest.approx(float(dense[0]), abs=1e-4)
    assert without.shape == (40,)
    assert float((without - logit).abs().min()) > 0
    # Whatever stands at the place of a hidden token, the logit is the same; the others' change.
    changed = tokens.clone()
    changed[35] += 5 * torch.randn(32, generator=generator)
    _, without_changed = logits_without(encoder, ids, changed)
    assert float(without_changed[35]) == pytest.approx(float(without[35]), abs=1e-5)
    assert float((without_changed - without).abs()[:35].min()) > 1e-4


@pytest.mark.parametrize("spec", [COMPRESSED, LOCAL], ids=lambda spec: spec.kind)
def test_a_step_of_training_is_noticed(spec):
    torch.manual_seed(0)
    vision = torch.randn(2, 16, 48)
    for adapter in (create_adapter(spec), random_adapter(spec), random_adapter(spec, 3)):
        assert is_untrained(adapter)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
        adapter(vision).square().mean().backward()
        optimizer.step()
        assert not is_untrained(adapter)
