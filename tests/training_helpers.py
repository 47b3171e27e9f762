"""A tiny corpus and model for tests of training: real modules, arithmetic small enough for a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from edje_pipeline.models.checkpoint import ModelDirectory
from edje_pipeline.models.random_model import write_random_model
from edje_pipeline.training.batches import Corpus
from edje_pipeline.training.data import Captions
from edje_pipeline.training.heads import TrainingHeads
from edje_pipeline.training.objective import Learner
from edje_pipeline.training.recipe import LossWeights, NegativeSpec, Phase, Recipe
from edje_pipeline.training.sampler import PairSampler, nearest_texts
from edje_pipeline.training.trainer import TrainState

COLOURS = {"red": (220, 40, 30), "green": (40, 170, 60), "blue": (40, 60, 210), "yellow": (240, 220, 40)}
SHAPES = ("circle", "square", "cross")


class ArrayTokens:
    """A token source in memory."""

    def __init__(self, image_ids: tuple[str, ...], tokens: np.ndarray) -> None:
        self.image_ids = image_ids
        self._tokens = tokens

    def tokens(self, positions: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        del views
        return self._tokens[positions]

    def pooled(self, positions: np.ndarray) -> np.ndarray | None:
        return self._tokens[positions].mean(axis=1)


def tiny_captions(num_images: int = 12) -> Captions:
    """Images named by colour and shape, two captions each."""
    names = [(colour, shape) for colour in COLOURS for shape in SHAPES][:num_images]
    return Captions(
        tuple(f"{colour}-{shape}.png" for colour, shape in names),
        tuple((f"a {colour} {shape}", f"{shape} in {colour}") for colour, shape in names),
    )


def tiny_corpus(model: ModelDirectory, num_images: int = 12, embedding_dim: int = 16) -> Corpus:
    """Tokens from a fixed generator; text embeddings too, so nothing here needs a text tower."""
    captions = tiny_captions(num_images)
    rng = np.random.default_rng(7)
    spec = model.spec.backbone
    tokens = rng.standard_normal((len(captions), spec.num_vision_tokens, spec.width)).astype(np.float32)
    texts = rng.standard_normal((len(captions.texts), embedding_dim)).astype(np.float32)
    images = rng.standard_normal((len(captions), embedding_dim)).astype(np.float32)
    return Corpus(
        captions,
        ArrayTokens(captions.image_ids, tokens),
        np.arange(len(captions)),
        texts / np.linalg.norm(texts, axis=1, keepdims=True),
        images / np.linalg.norm(images, axis=1, keepdims=True),
        model.load_tokenizer(),
    )


def tiny_learner(model: ModelDirectory, embedding_dim: int = 16) -> Learner:
    """Adapter and joint encoder of a random model, heads from a fixed seed."""
    encoder = model.load_joint_encoder()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        heads = TrainingHeads(encoder, embedding_dim)
    return Learner(model.load_adapter(), encoder, heads).requires_grad_(True)


def tiny_recipe(**changes: object) -> Recipe:
    """A warm-up of 8 steps and 12 steps of the full objective."""
    everything = LossWeights(itm=1.0, mlm=1.0, recovery=0.5)
    phases = (
        Phase("warm-up", 8, batch_size=6, learning_rate=1e-3, weights=LossWeights(contrastive=1.0), neighbours=0.4),
        Phase("itm", 12, batch_size=8, accumulation=2, learning_rate=1e-3, weights=everything,
              negatives=NegativeSpec(num_hard=1, num_random=2, pool=1), token_dropout=0.3),
    )  # fmt: skip
    return Recipe(phases, **{"log_every": 1, "checkpoint_every": 5, **changes})  # type: ignore[arg-type]


def tiny_state(model: ModelDirectory, out: Path, **changes: object) -> TrainState:
    """A run of `tiny_recipe` on the tiny corpus."""
    corpus = tiny_corpus(model)
    sampler = PairSampler(corpus.captions, 0, nearest_texts(corpus.text_embeddings, 5))
    return TrainState(tiny_learner(model), corpus, sampler, out, {"recipe": "tiny"}, **changes)  # type: ignore[arg-type]


def tiny_model(directory: Path) -> ModelDirectory:
    """The random model that the helpers above are made for."""
    return write_random_model(directory, size="tiny", seed=0)


def draw_shapes(folder: Path, num_copies: int = 2) -> Path:
    """Real images of coloured shapes and a caption file beside them; returns the caption file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for copy in range(num_copies):
        for colour, rgb in COLOURS.items():
            for shape in SHAPES:
                picture = Image.new("RGB", (48, 48), (255, 255, 255))
                draw = ImageDraw.Draw(picture)
                left, top = rng.integers(4, 14, 2).tolist()
                box = (left, top, left + 28, top + 28)
                if shape == "circle":
                    draw.ellipse(box, fill=rgb)
                elif shape == "square":
                    draw.rectangle(box, fill=rgb)
                else:
                    draw.line(box, fill=rgb, width=8)
                    draw.line((box[0], box[3], box[2], box[1]), fill=rgb, width=8)
                name = f"{colour}-{shape}-{copy}.png"
                picture.save(folder / name)
                lines.append(json.dumps({"image_id": name, "captions": [f"a {colour} {shape}"]}))
    captions = folder.parent / "captions.jsonl"
    captions.write_text("\n".join(lines) + "\n")
    return captions


def write_tiny_bert(directory: Path, width: int = 32) -> Path:
    """A Hugging Face BERT directory with random weights, as a joint encoder's or sentence encoder's start."""
    from safetensors.torch import save_file

    from edje_pipeline.models.bert_weights import to_hf_names
    from edje_pipeline.models.layout import joint_encoder_shapes
    from edje_pipeline.models.random_model import random_tensors
    from edje_pipeline.models.spec import JointEncoderSpec
    from edje_pipeline.models.tokenizer import Tokenizer
    from edje_pipeline.models.words import word_pieces

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_vocab(word_pieces())
    spec = JointEncoderSpec(
        width=width, num_layers=2, num_heads=4, mlp_dim=64, vocab_size=tokenizer.vocab_size - 1, max_positions=128
    )
    save_file(to_hf_names(random_tensors(joint_encoder_shapes(spec), 1, "bert")), directory / "model.safetensors")
    (directory / "tokenizer.json").write_text(tokenizer.to_json())
    config = {
        "model_type": "bert", "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "vocab_size": spec.vocab_size, "max_position_embeddings": 128, "hidden_act": "gelu",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory
