"""The model and the pairs of the scoring benchmarks: MiniLM-L12 sizes, 64 image tokens, captions.

With a Hugging Face BERT directory (`--bert`) its layers are the encoder's, taken round again where
it has fewer, its tokenizer cuts the texts, an image's tokens are the word embeddings of one of its
captions, and the head is a ridge regression of "this caption belongs to that image": logits that
mean something, so that the agreement of two precisions means something. Without it all weights are
random, which times the same and says nothing of agreement.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edje_pipeline.models.bert_weights import load_hf_bert
from edje_pipeline.models.checkpoint import ModelDirectory, save_model
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.models.tokenizer import Tokenizer

NUM_TOKENS = 64
WORDS = ("a", "red", "apple", "on", "the", "table", "dog", "cat", "small", "big", "old", "house", "two", "people")


@dataclass
class Material:
    """What the sides score."""

    model: ModelDirectory
    tokens: np.ndarray
    """float16 (images, M, E)"""
    queries: list[str]
    described: str


def make_material(
    folder: Path,
    *,
    num_images: int,
    num_queries: int,
    num_layers: int = 12,
    bert: Path | None = None,
    captions: Path | None = None,
) -> Material:
    """Writes the model; see the module docstring."""
    small = write_random_model(folder / "small", size="demo", num_compressed_tokens=NUM_TOKENS, image_size=32)
    rng = np.random.default_rng(0)
    texts = read_captions(captions, num_images, rng)
    queries = [pair[1] for pair in texts[:num_queries]]
    if bert is None:
        spec = replace(small.spec.joint_encoder, num_layers=num_layers, vocab_size=30_523, max_positions=512)
        encoder, tokenizer = random_encoder(JointEncoder(spec)), small.load_tokenizer()
        tokens = rng.standard_normal((num_images, NUM_TOKENS, spec.width), np.float32).astype(np.float16)
        described = "random weights"
    else:
        tokenizer = Tokenizer.from_file(bert / "tokenizer.json")
        encoder, own_layers = stacked_encoder(bert, num_layers, tokenizer.vocab_size)
        tokens = word_tokens(encoder, tokenizer, [pair[0] for pair in texts])
        fit_head(encoder, tokenizer, tokens, [pair[1] for pair in texts], rng)
        described = f"weights of {bert.parent.name}/{bert.name} ({own_layers} layers), head fitted to captions"
    spec = replace(small.spec, joint_encoder=replace(encoder.spec, weights_sha256=""))
    model = save_model(
        folder / "model",
        spec,
        backbone=small.file("backbone.safetensors"),
        adapter=small.file("adapter.safetensors"),
        joint_encoder=encoder,
        tokenizer=tokenizer.to_json(),
        text_tower=small.file("text_tower.safetensors") if spec.text_tower else None,
    )
    return Material(model, tokens, queries, f"{encoder.spec.num_layers} layers, {described}")


def read_captions(path: Path | None, num_images: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two sentences about each image: of a JSONL file of `captions`, or random words of the same lengths."""
    if path is None:
        return [tuple(" ".join(rng.choice(WORDS, rng.integers(6, 20))) for _ in range(2)) for _ in range(num_images)]  # type: ignore[misc]
    rows = [json.loads(line)["captions"] for line in path.read_text().splitlines()]
    pairs = [(row[0], row[1]) for row in rows] + [(row[2], row[3]) for row in rows]
    assert len(pairs) >= num_images, f"{path} has {len(pairs)} pairs of captions, {num_images} are needed"
    return pairs[:num_images]


def random_encoder(encoder: JointEncoder) -> JointEncoder:
    """Weights as BERT starts with, twice as large, so that the layers do something."""
    torch.manual_seed(0)
    for name, value in encoder.named_parameters():
        if value.ndim > 1:
            nn.init.normal_(value, std=0.04)
        elif "norm" not in name:
            nn.init.zeros_(value)
    return encoder.eval()


def stacked_encoder(bert: Path, num_layers: int, vocab_size: int) -> tuple[JointEncoder, int]:
    """An encoder of `num_layers` from a BERT that may have fewer, and how many those were."""
    spec, tensors = load_hf_bert(bert, vocab_size=vocab_size)
    own = spec.num_layers
    kept = {name: value for name, value in tensors.items() if not name.startswith("layers.")}
    for number in range(num_layers):
        prefix = f"layers.{number % own}."
        kept |= {
            name.replace(prefix, f"layers.{number}."): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
    encoder = JointEncoder(replace(spec, num_layers=num_layers))
    encoder.load_state_dict(kept)
    return encoder.eval(), own


def word_tokens(encoder: JointEncoder, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Word embeddings of the texts, repeated to NUM_TOKENS: float16 (n, M, E)."""
    rows = [np.resize(ids[1:-1], NUM_TOKENS) for ids in tokenizer.encode(texts)]
    return encoder.word_embeddings.weight.detach().numpy()[np.stack(rows)].astype(np.float16)


@torch.inference_mode()
def fit_head(
    encoder: JointEncoder, tokenizer: Tokenizer, tokens: np.ndarray, texts: list[str], rng: np.random.Generator
) -> None:
    """Ridge regression of the classifier on pooled [CLS]: 1 for an image's own caption, 0 for three others."""
    lists, images = tokenizer.encode(texts), torch.from_numpy(tokens).float()
    pooled, wanted = [], []

    def keep(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        pooled.append(output)

    hook = encoder.pooler.register_forward_hook(keep)
    for number in range(min(len(lists), 60)):
        others = rng.choice(np.delete(np.arange(len(lists)), number), 3, replace=False)
        chosen = [number, *others.tolist()]
        encoder.forward_dense(torch.tensor([lists[number]] * 4), images[chosen])
        wanted.append(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    hook.remove()
    features, target = torch.cat(pooled).double(), torch.cat(wanted).double()
    mean = features.mean(0)
    centred = features - mean
    gram = centred.T @ centred + 10.0 * torch.eye(features.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.T @ (target - target.mean()))
    encoder.classifier.weight.copy_(weight[None])
    encoder.classifier.bias.copy_((target.mean() - mean @ weight)[None])
