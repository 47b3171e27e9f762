"""Small modules that training needs and scoring does not: they are not part of a model directory.

Shape letters: B batch, L text tokens, E joint-encoder width, V vocabulary, C text-embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edje_pipeline.models.joint_encoder import JointEncoder


class MlmHead(nn.Module):
    """BERT's masked-language-model head; the last map is the word embedding itself, with a bias."""

    def __init__(self, width: int, vocab_size: int, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden_te: Tensor, word_embeddings_ve: Tensor) -> Tensor:
        """(T, E) -> (T, V)."""
        return F.linear(self.norm(F.gelu(self.dense(hidden_te))), word_embeddings_ve, self.bias)


class TrainingHeads(nn.Module):
    """The MLM head, and the projections into the space of the frozen text embedding."""

    def __init__(self, encoder: JointEncoder, embedding_dim: int) -> None:
        """Args: encoder: gives the sizes. embedding_dim: C; 0 when there are no text embeddings."""
        super().__init__()
        spec = encoder.spec
        self.mlm = MlmHead(spec.width, spec.vocab_size, spec.norm_eps)
        self.text_projection = nn.Linear(spec.width, embedding_dim) if embedding_dim else None
        self.image_projection = nn.Linear(spec.width, embedding_dim) if embedding_dim else None
        if self.image_projection is not None and embedding_dim == spec.width:
            # A sentence encoder of the joint encoder's own width is its usual start: begin as the identity.
            nn.init.eye_(self.image_projection.weight)
            nn.init.zeros_(self.image_projection.bias)


def read_as_sentence(encoder: JointEncoder, heads: TrainingHeads, image_tokens: Tensor, cls_id: int) -> Tensor:
    """Image tokens (B, M, E) read as if they were a sentence -> (B, C), for the contrastive warm-up.

    The mean over all positions, as sentence encoders pool.
    """
    assert heads.image_projection is not None
    hidden = encoder.encode_images(image_tokens, cls_id)
    projected: Tensor = heads.image_projection(hidden.mean(dim=1))
    return projected


def mask_text(
    input_ids: Tensor, is_word: Tensor, fraction: float, mask_id: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Replaces a fraction of each text's words by `[MASK]`, at least one where there is a word.

    Args:
        input_ids: (B, L) on the CPU.
        is_word: bool (B, L), False for [CLS], [SEP] and padding.
        fraction: of the words, rounded to the nearest count.
        mask_id: the id put in their place.
        generator: on the CPU.

    Returns:
        The masked ids and a bool (B, L), True where a word was masked.
    """
    noise = torch.rand(input_ids.shape, generator=generator).masked_fill(~is_word, 2.0)
    count = (is_word.sum(dim=1) * fraction).round().clamp(min=1)
    place = noise.argsort(dim=1).argsort(dim=1)
    chosen = (place < count[:, None]) & is_word
    return input_ids.masked_fill(chosen, mask_id), chosen
