"""One micro-batch -> every loss that the phase asks for. (Paper section 3.4.)

Shape letters: G pairs of the gathered batch, B of them this worker's own, U images in use, P scored
pairs, N vision tokens, D backbone width, M compressed tokens, E joint-encoder width, L text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edje_pipeline.errors import TrainingError
from edje_pipeline.models.adapter import TokenAdapter
from edje_pipeline.models.joint_encoder import JointEncoder
from edje_pipeline.storage.codecs import Codec
from edje_pipeline.training import losses
from edje_pipeline.training.hard_negatives import PairPlan, plan_pairs
from edje_pipeline.training.heads import TrainingHeads, mask_text, read_as_sentence
from edje_pipeline.training.quantization import straight_through
from edje_pipeline.training.recipe import Phase


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokenizer that the objective needs."""

    pad: int
    cls: int
    sep: int
    mask: int


@dataclass(frozen=True)
class MicroBatch:
    """Pairs of all workers with what is frozen about them, on the learner's device."""

    vision_tokens: Tensor
    """(G, N, D)"""
    input_ids: Tensor
    """(G, L) int64, padded on the right."""
    attention_mask: Tensor
    """(G, L) bool"""
    text_embeddings: Tensor
    """(G, C) unit length; frozen."""
    similarity: Tensor
    """(G, G) text i against image j by frozen embeddings, for choosing hard negatives."""
    forbidden: Tensor
    """(G, G) bool, see `hard_negatives.forbidden_pairs`."""
    own: Tensor
    """(B,) int64: the positions this worker is responsible for."""
    vocabulary: Tensor
    """(W,) int64, ascending: every word piece of the corpus, special tokens left out."""


class Learner(nn.Module):
    """All that is trained: adapter, joint encoder, heads. The backbone is not here: it is frozen."""

    def __init__(self, adapter: TokenAdapter, encoder: JointEncoder, heads: TrainingHeads) -> None:
        super().__init__()
        self.adapter = adapter
        self.encoder = encoder
        self.heads = heads

    def set_dropout(self, probability: float) -> None:
        """Of the joint encoder, at all its places."""
        for module in self.encoder.modules():
            if hasattr(module, "dropout"):
                module.dropout = probability  # type: ignore[assignment]


@dataclass(frozen=True)
class Teacher:
    """The trained local variant: all tokens, frozen."""

    adapter: TokenAdapter
    encoder: JointEncoder

    @torch.no_grad()
    def tokens(self, vision_tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, E)."""
        found: Tensor = self.adapter(vision_tokens)
        return found

    @torch.no_grad()
    def logits(self, batch: MicroBatch, plan: PairPlan) -> Tensor:
        """(P,) logits of the planned pairs."""
        images, position = torch.unique(plan.image_p, return_inverse=True)
        device = batch.vision_tokens.device
        tokens = self.adapter(batch.vision_tokens[images.to(device)])[position.to(device)]
        text = plan.text_p.to(device)
        logits: Tensor = self.encoder(batch.input_ids[text], batch.attention_mask[text], tokens)
        return logits


def compute_losses(
    learner: Learner,
    batch: MicroBatch,
    phase: Phase,
    ids: SpecialIds,
    generator: torch.Generator,
    *,
    mask_fraction: float = 0.5,
    teacher: Teacher | None = None,
    codec: Codec | None = None,
) -> dict[str, Tensor]:
    """Scalars by name, for every part whose weight is above 0; unweighted.

    Raises:
        TrainingError: distillation without a teacher, or a batch without usable negatives.
    """
    weights, device = phase.weights, batch.vision_tokens.device
    plan = None
    if weights.itm or weights.distillation:
        plan = plan_pairs(batch.similarity, batch.forbidden, batch.own, phase.negatives, generator)
    own = batch.own.to(device)
    tokens, row_of = _image_tokens(learner, batch, plan, phase, codec, generator)
    found: dict[str, Tensor] = {}
    if plan is not None:
        text = plan.text_p.to(device)
        logits = learner.encoder(
            batch.input_ids[text], batch.attention_mask[text], tokens[row_of[plan.image_p.to(device)]]
        )
        if weights.itm:
            by_image = losses.itm_loss(logits[plan.image_lists.to(device)], plan.image_valid.to(device))
            by_text = losses.itm_loss(logits[plan.text_lists.to(device)], plan.text_valid.to(device))
            found["itm"] = (by_image + by_text) / 2
        if weights.distillation:
            if teacher is None:
                raise TrainingError("distillation has a weight but there is no teacher; give one with --teacher")
            found["distillation"] = losses.distillation_loss(logits, teacher.logits(batch, plan))
    if weights.mlm:
        found["mlm"] = _mlm(learner, batch, tokens[row_of[own]], ids, mask_fraction, generator)
    if weights.recovery:
        assert learner.heads.text_projection is not None
        first = learner.encoder.encode_text(batch.input_ids[own], batch.attention_mask[own])[:, 0]
        found["recovery"] = losses.recovery_loss(learner.heads.text_projection(first), batch.text_embeddings[own])
    if weights.contrastive:
        read = read_as_sentence(learner.encoder, learner.heads, tokens[row_of[own]], ids.cls)
        found["contrastive"] = losses.contrastive_loss(
            read, batch.text_embeddings, batch.forbidden.to(device)[own], own, phase.temperature
        )
    if weights.words:
        found["words"] = _words(learner, batch, tokens[row_of[own]])
    if weights.tokens:
        if teacher is None:
            raise TrainingError("token distillation has a weight but there is no teacher; give one with --teacher")
        found["tokens"] = losses.token_loss(tokens[row_of[own]], teacher.tokens(batch.vision_tokens[own]))
    return found


def total_loss(found: dict[str, Tensor], phase: Phase) -> Tensor:
    """The weighted sum."""
    parts = [getattr(phase.weights, name) * loss for name, loss in found.items()]
    return torch.stack(parts).sum()


def _image_tokens(
    learner: Learner,
    batch: MicroBatch,
    plan: PairPlan | None,
    phase: Phase,
    codec: Codec | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Adapter tokens (U, M, E) of the images in use, and (G,) which row of them an image is (else -1)."""
    device = batch.vision_tokens.device
    used = torch.unique(torch.cat([batch.own.cpu(), plan.image_p]) if plan is not None else batch.own.cpu())
    row_of = torch.full((len(batch.vision_tokens),), -1, dtype=torch.long)
    row_of[used] = torch.arange(len(used))
    vision = drop_tokens(batch.vision_tokens[used.to(device)], phase.token_dropout, generator)
    tokens: Tensor = learner.adapter(vision)
    if codec is not None:
        tokens = straight_through(tokens, codec)
    return tokens, row_of.to(device)


def drop_tokens(vision_tokens: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Leaves out a random part of at most `largest` of each image's tokens, the same count for all.

    A local adapter expects all its tokens: there `token_dropout` must be 0.
    """
    if largest <= 0:
        return vision_tokens
    num_images, num_tokens, width = vision_tokens.shape
    share = float(torch.rand((), generator=generator)) * largest
    kept = max(1, round(num_tokens * (1 - share)))
    order = torch.rand(num_images, num_tokens, generator=generator).argsort(dim=1)[:, :kept].sort(dim=1).values
    return vision_tokens.gather(1, order.to(vision_tokens.device)[..., None].expand(-1, -1, width))


def _mlm(
    learner: Learner,
    batch: MicroBatch,
    tokens_bme: Tensor,
    ids: SpecialIds,
    fraction: float,
    generator: torch.Generator,
) -> Tensor:
    own = batch.own.to(batch.input_ids.device)
    input_ids, mask = batch.input_ids[own], batch.attention_mask[own]
    is_word = (mask & (input_ids != ids.cls) & (input_ids != ids.sep)).cpu()
    masked, chosen = mask_text(input_ids.cpu(), is_word, fraction, ids.mask, generator)
    if not chosen.any():
        raise TrainingError("no caption of the batch has a word to mask for MLM; give captions with words")
    hidden = learner.encoder.encode_pair(masked.to(input_ids.device), mask, tokens_bme)[:, : input_ids.shape[1]]
    chosen = chosen.to(input_ids.device)
    predicted = learner.heads.mlm(hidden[chosen], learner.encoder.word_embeddings.weight)
    return losses.mlm_loss(predicted, input_ids[chosen])


def _words(learner: Learner, batch: MicroBatch, tokens_bme: Tensor) -> Tensor:
    input_ids = batch.input_ids[batch.own.to(batch.input_ids.device)]
    rows = torch.searchsorted(batch.vocabulary, input_ids).clamp(max=len(batch.vocabulary) - 1)
    is_word = batch.vocabulary[rows] == input_ids
    # The words stay where the language model knows them: only the image tokens move.
    words = learner.encoder.word_embeddings.weight.detach()[batch.vocabulary]
    return losses.words_loss(tokens_bme, words, rows, is_word)
