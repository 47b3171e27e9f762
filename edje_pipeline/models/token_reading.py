"""What an adapter's tokens say and where they look: pure functions on tensors, for reading a model, not for running it.

The words are the paper's own analysis: each token next to the word embeddings that the joint encoder
would have looked up at its place. Weights of attention come from a second, plain computation, since the
fused one of adapter.py does not give them out; a test holds the two together.

Shape letters: B batch, N vision tokens, M image tokens, D backbone width, E joint-encoder width, H heads,
V vocabulary words, L text tokens, S = L + M + 1.
"""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edje_pipeline.models.adapter import CompressedAdapter, LatentAttention, TokenAdapter
from edje_pipeline.models.joint_encoder import IMAGE_TYPE, TEXT_TYPE, JointEncoder
from edje_pipeline.models.tokenizer import Tokenizer

MAX_PREFIX_TOKENS = 9
"""[CLS] and register tokens that may stand before the patches; published backbones have up to that many."""
CONTINUATION = "##"
PAIRS_AT_ONCE = 32


# -- words --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """The words that a token may be read as, with their embeddings."""

    words: tuple[str, ...]
    embeddings: Tensor
    """float32 (V, E), of length 1."""


def readable_vocabulary(tokenizer: Tokenizer, word_embeddings: Tensor, *, pieces: bool = False) -> Vocabulary:
    """The part of a WordPiece vocabulary that a person can read.

    Args:
        tokenizer: whose ids are the rows of the embeddings.
        word_embeddings: (ids, E).
        pieces: take continuation pieces (`##ing`) too.
    """
    content = json.loads(tokenizer.to_json())
    special = {token["content"] for token in content.get("added_tokens", ()) if token.get("special")}
    ids = {
        word: number
        for word, number in content["model"]["vocab"].items()
        if number < len(word_embeddings) and word not in special and is_readable(word, pieces=pieces)
    }
    rows = word_embeddings.detach()[torch.tensor(list(ids.values()), dtype=torch.long)].float()
    return Vocabulary(tuple(ids), F.normalize(rows, dim=-1))


def is_readable(word: str, *, pieces: bool = False) -> bool:
    """Whether an entry of a vocabulary says something: no `[unused7]`, no punctuation, no lone letter.

    A single character counts where it is a word of its own, as ideographs are.
    """
    if word.startswith(CONTINUATION):
        return pieces and word.removeprefix(CONTINUATION).isalnum()
    if (word.startswith("[") and word.endswith("]") and len(word) > 1) or not any(map(str.isalnum, word)):
        return False
    return len(word) > 1 or unicodedata.name(word, "").startswith("CJK UNIFIED")


@dataclass(frozen=True)
class Word:
    """A vocabulary word and its nearness to a token."""

    text: str
    cosine: float


def nearest_words(tokens: Tensor, vocabulary: Vocabulary, top_k: int) -> list[list[Word]]:
    """Tokens (M, E) -> for each its `top_k` words by cosine, the nearest first; equal ones in vocabulary order."""
    cosines = F.normalize(tokens.float(), dim=-1) @ vocabulary.embeddings.to(tokens.device).T
    values, order = cosines.sort(dim=-1, descending=True, stable=True)
    return [
        [Word(vocabulary.words[column], value) for column, value in zip(columns, row, strict=True)]
        for columns, row in zip(order[:, :top_k].tolist(), values[:, :top_k].tolist(), strict=True)
    ]


# -- attention ----------------------------------------------------------------------------------------


def head_weights(attention: LatentAttention, query_1md: Tensor, key_bnd: Tensor) -> Tensor:
    """The attention weights of every head, (B, H, M, N); each row sums to 1."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)

    def heads(values: Tensor, part: int) -> Tensor:
        projected = F.linear(values, weights[part], biases[part])
        return projected.view(*values.shape[:2], attention.num_heads, -1).transpose(1, 2)

    query, key = heads(query_1md, 0), heads(key_bnd, 1)
    return (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)


def token_attention(adapter: TokenAdapter, vision_tokens: Tensor) -> Tensor | None:
    """Where each compressed token looks, heads averaged: (B, N, D) -> (B, M, N). None: the adapter does not attend."""
    adapter.check(vision_tokens)
    if not isinstance(adapter, CompressedAdapter):
        return None
    return head_weights(adapter.attention, adapter.query, adapter.keys(vision_tokens)).mean(dim=1)


@dataclass(frozen=True)
class Grid:
    """How vision tokens lie on the image, row by row."""

    rows: int
    columns: int
    num_prefix_tokens: int = 0
    """Tokens before the patches that stand for no place ([CLS], registers)."""


def patch_grid(num_tokens: int, image_size: tuple[int, int]) -> Grid | None:
    """The grid of N vision tokens over an image of (height, width) pixels; None when they form none.

    Patches are square, with one stride down and across; where it does not divide a side, patch embeddings
    round down and feature maps up. The fewest prefix tokens win, since the backbones here drop them already.
    """
    height, width = image_size
    for num_prefix in range(min(MAX_PREFIX_TOKENS, num_tokens - 1) + 1):
        num_patches = num_tokens - num_prefix
        pairs = [(rows, num_patches // rows) for rows in range(1, num_patches + 1) if num_patches % rows == 0]
        fitting = [(rows, columns) for rows, columns in pairs if _has_stride(height, rows, width, columns)]
        if fitting:
            rows, columns = min(fitting, key=lambda pair: abs(math.log(height * pair[1] / (width * pair[0]))))
            return Grid(rows, columns, num_prefix)
    return None


def _has_stride(height: int, rows: int, width: int, columns: int) -> bool:
    """Whether some stride cuts the height into `rows` and the width into `columns`, rounded the same way."""
    low, high = max(height / (rows + 1), width / (columns + 1)), min(height / rows, width / columns)
    rounds_down = low < high
    low = max(height / rows, width / columns)
    high = min(side / (num - 1) if num > 1 else math.inf for side, num in ((height, rows), (width, columns)))
    return rounds_down or low < high


def over_grid(weights: Tensor, grid: Grid) -> Tensor:
    """(..., N) -> (..., rows, columns), prefix tokens left out."""
    return weights[..., grid.num_prefix_tokens :].reshape(*weights.shape[:-1], grid.rows, grid.columns)


# -- what a token does for a text ---------------------------------------------------------------------


@torch.inference_mode()
def logits_without(encoder: JointEncoder, input_ids: Tensor, image_tokens: Tensor) -> tuple[float, Tensor]:
    """A pair's logit, and what it would be with each image token hidden in turn.

    A hidden token keeps its place and nobody may attend to it, in any layer: taking it out instead would
    move all later tokens to other position embeddings and measure that.

    Args:
        encoder: in eval mode.
        input_ids: (L,) `[CLS] text [SEP]`.
        image_tokens: (M, E).

    Returns:
        The logit, and float32 (M,) logits on the CPU.
    """
    num_text, num_image = len(input_ids), len(image_tokens)
    length = num_text + num_image + 1
    words = encoder.word_embeddings(input_ids)
    summed = torch.cat([words, image_tokens.to(encoder.dtype), words[-1:]])
    types = torch.full((length,), IMAGE_TYPE, device=input_ids.device)
    types[:num_text] = TEXT_TYPE
    hidden_se = encoder.embedding_norm(
        summed + encoder.position_embeddings.weight[:length] + encoder.type_embeddings(types)
    )
    # Row 0 hides nothing, row m + 1 hides image token m.
    visible = torch.ones(num_image + 1, length, dtype=torch.bool, device=input_ids.device)
    image = torch.arange(num_image, device=input_ids.device)
    visible[image + 1, num_text + image] = False
    logits = []
    for start in range(0, len(visible), PAIRS_AT_ONCE):
        mask = visible[start : start + PAIRS_AT_ONCE]
        hidden = hidden_se.expand(len(mask), -1, -1)
        for layer in encoder.layers:
            hidden = layer(hidden, mask)
        logits.append(encoder.score(hidden[:, 0]))
    found = torch.cat(logits).cpu()
    return float(found[0]), found[1:]
