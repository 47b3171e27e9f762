"""The joint encoder against transformers' BERT on the same random weights, float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edje_pipeline.models.bert_weights import from_hf_names, to_hf_names
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.models.spec import JointEncoderSpec

transformers = pytest.importorskip("transformers", reason="the reference implementation is a test dependency")

TOLERANCE = 1e-5
# width, layers, heads, mlp
BERT_SIZES = [(32, 2, 4, 64), (48, 3, 3, 96), (64, 1, 8, 256), (384, 6, 12, 1536)]


def reference_bert(sizes, *, max_positions=128, vocab_size=101, seed=0):
    """A random BertModel and JointEncoder with the same weights, and the authors' head on top of the first."""
    torch.manual_seed(seed)
    width, num_layers, num_heads, mlp_dim = sizes
    config = transformers.BertConfig(
        hidden_size=width, num_hidden_layers=num_layers, num_attention_heads=num_heads, intermediate_size=mlp_dim,
        vocab_size=vocab_size, max_position_embeddings=max_positions,
    )  # fmt: skip
    bert = transformers.BertModel(config, add_pooling_layer=True).eval()
    # transformers starts with biases of zero and norms of one, which would hide a mix-up.
    for name, parameter in bert.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2)
        elif "embeddings" not in name:
            nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5)
    head = nn.Linear(width, 1)
    spec = JointEncoderSpec(width, num_layers, num_heads, mlp_dim, vocab_size, max_positions)
    encoder = JointEncoder(spec).eval()
    tensors = from_hf_names(bert.state_dict(), num_layers)
    tensors |= {
        "pooler.dense.weight": bert.pooler.dense.weight, "pooler.dense.bias": bert.pooler.dense.bias,
        "classifier.weight": head.weight, "classifier.bias": head.bias,
    }  # fmt: skip
    encoder.load_state_dict(tensors)
    return bert, head, encoder


def reference_logits(bert, head, texts, image_tokens, sep_id):
    """One pair at a time through transformers, as the authors lay the sequence out; no padding, so no mask."""
    logits = []
    for ids, image in zip(texts, image_tokens, strict=True):
        words = bert.embeddings.word_embeddings
        embeds = torch.cat([words(torch.tensor(ids)), image, words(torch.tensor([sep_id]))])
        types = torch.tensor([0] * len(ids) + [1] * (len(image) + 1))
        output = bert(inputs_embeds=embeds[None], token_type_ids=types[None])
        logits.append(head(output.pooler_output)[0, 0])
    return torch.stack(logits)


def random_texts(num_texts, lengths, sep_id, vocab_size=101, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        [2, *torch.randint(5, vocab_size, (lengths[i % len(lengths)] - 2,), generator=generator).tolist(), sep_id]
        for i in range(num_texts)
    ]


def padded(texts):
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return ids, mask


@pytest.mark.parametrize("sizes", BERT_SIZES, ids=str)
def test_hidden_states_on_text_equal_transformers(sizes):
    bert, _, encoder = reference_bert(sizes)
    worst = 0.0
    with torch.inference_mode():
        for length in (2, 3, 17, 64):
            ids, mask = padded(random_texts(4, [length], 3))
            want = bert(input_ids=ids, attention_mask=mask).last_hidden_state
            worst = max(worst, (encoder.encode_text(ids) - want).abs().max().item())
            worst = max(worst, (encoder.encode_text(ids, mask) - want).abs().max().item())
    print(f"text, {sizes}: max abs difference {worst:.2e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("sizes", BERT_SIZES, ids=str)
@pytest.mark.parametrize("num_image_tokens", [1, 4, 60])
def test_logits_of_pairs_equal_transformers(sizes, num_image_tokens):
    bert, head, encoder = reference_bert(sizes)
    generator = torch.Generator().manual_seed(3)
    texts = random_texts(6, [2, 5, 9, 63], 3)
    images = torch.randn(6, num_image_tokens, sizes[0], generator=generator)
    with torch.inference_mode():
        want = reference_logits(bert, head, texts, images, 3)
        got_padded = encoder.forward_padded(*padded(texts), images)
        got_dense = torch.cat(
            [encoder.forward_dense(torch.tensor([t]), i[None]) for t, i in zip(texts, images, strict=True)]
        )
    assert want.std() > 0.01, "the reference must tell pairs apart, or equality says nothing"
    worst = max((got_padded - want).abs().max().item(), (got_dense - want).abs().max().item())
    print(f"pairs, {sizes}, M={num_image_tokens}: max abs difference {worst:.2e}")
    assert worst <= TOLERANCE


def test_padding_of_the_authors_layout_gives_the_same_logits():
    """They pad behind the image tokens, with a mask; here padding stands between text and image."""
    bert, head, encoder = reference_bert(BERT_SIZES[0])
    texts = random_texts(5, [2, 4, 11], 3)
    images = torch.randn(5, 4, 32, generator=torch.Generator().manual_seed(5))
    longest = max(map(len, texts)) + 5
    words = bert.embeddings.word_embeddings
    embeds = torch.zeros(5, longest, 32)
    types = torch.zeros(5, longest, dtype=torch.int64)
    mask = torch.zeros(5, longest, dtype=torch.int64)
    with torch.inference_mode():
        for row, text in enumerate(texts):
            whole = torch.cat([words(torch.tensor(text)), images[row], words(torch.tensor([3]))])
            embeds[row, : len(whole)], mask[row, : len(whole)] = whole, 1
            embeds[row, len(whole) :] = words(torch.tensor([0]))
            types[row, len(text) : len(whole)] = 1
        want = head(bert(inputs_embeds=embeds, token_type_ids=types, attention_mask=mask).pooler_output)[:, 0]
        got = encoder.forward_padded(*padded(texts), images)
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_hf_names_round_trip_exactly():
    bert, _, encoder = reference_bert(BERT_SIZES[1])
    theirs = to_hf_names(encoder.state_dict())
    want = {name: tensor for name, tensor in bert.state_dict().items() if not name.startswith("pooler.")}
    assert theirs.keys() == want.keys()
    assert all(torch.equal(theirs[name], want[name]) for name in want)


def test_gradients_flow_through_both_paths_alike():
    _, _, encoder = reference_bert(BERT_SIZES[0])
    ids = torch.tensor(random_texts(3, [6], 3))
    gradients = []
    for forward in (encoder.forward_dense, lambda i, x: encoder.forward_padded(i, torch.ones_like(i), x)):
        images = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
        forward(ids, images).sum().backward()
        gradients.append(images.grad)
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
