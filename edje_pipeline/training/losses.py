"""Every part of the training objective as a function of tensors. (Paper section 3.4.)

Shape letters: B positives, K negatives of one positive, P pairs, T masked text positions, V vocabulary,
C embedding width. All are computed in float32 and return a scalar.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

EXCLUDED = float("-inf")
WORD_SCALE = 20.0
"""Multiplies the cosines between image tokens and word embeddings."""


def full_precision(like: Tensor) -> torch.autocast:
    """Keeps matrix products in float32 inside an autocast region: a cosine rounded to bfloat16 and divided by a
    temperature of 0.05 is wrong by 0.1."""
    return torch.autocast(like.device.type, enabled=False)


def itm_loss(logits_bk: Tensor, is_valid_bk: Tensor) -> Tensor:
    """Image-text matching: cross-entropy of the positive in column 0 against the negatives behind it.

    Args:
        logits_bk: (B, 1 + K).
        is_valid_bk: bool (B, 1 + K); False where no admissible negative was found. Column 0 is True.
    """
    logits = logits_bk.float().masked_fill(~is_valid_bk, EXCLUDED)
    return -logits.log_softmax(dim=1)[:, 0].mean()


def mlm_loss(logits_tv: Tensor, labels_t: Tensor) -> Tensor:
    """Masked language modelling: mean cross-entropy over the masked positions."""
    return F.cross_entropy(logits_tv.float(), labels_t)


def recovery_loss(projected_bc: Tensor, target_bc: Tensor) -> Tensor:
    """Text-embedding recovery: mean of 1 - cos(projection of [CLS] on text alone, frozen text embedding)."""
    return (1 - F.cosine_similarity(projected_bc.float(), target_bc.float(), dim=-1)).mean()


def distillation_loss(student_p: Tensor, teacher_p: Tensor) -> Tensor:
    """Binary cross-entropy of the student's logits against the sigmoid of the local teacher's."""
    return F.binary_cross_entropy_with_logits(student_p.float(), teacher_p.float().sigmoid())


def contrastive_loss(
    image_bc: Tensor, text_gc: Tensor, is_same_bg: Tensor, target_b: Tensor, temperature: float
) -> Tensor:
    """InfoNCE of read image tokens against frozen text embeddings, both directions where they are square.

    Args:
        image_bc: (B, C) embeddings of this worker's images; normalised here.
        text_gc: (G, C) text embeddings of the gathered batch, unit length.
        is_same_bg: bool (B, G), True where image and text belong together by image or caption; all but
            the target are left out of the sum.
        target_b: (B,) int64, column of each image's own text.
        temperature: divides the cosines.
    """
    with full_precision(image_bc):
        scores = F.normalize(image_bc.float(), dim=-1) @ text_gc.float().T / temperature
    own = F.one_hot(target_b, scores.shape[1]).bool()
    scores = scores.masked_fill(is_same_bg & ~own, EXCLUDED)
    positive = scores.gather(1, target_b[:, None])[:, 0]
    per_image = (torch.logsumexp(scores, dim=1) - positive).mean()
    # Texts against this worker's images: other workers' images are not known with gradients here.
    per_text = (torch.logsumexp(scores[:, target_b], dim=0) - positive).mean()
    return (per_image + per_text) / 2


def words_loss(tokens_bme: Tensor, words_we: Tensor, rows_bl: Tensor, is_word_bl: Tensor) -> Tensor:
    """Naming: some image token should lie near each word of the caption, among all words of the corpus.

    Not in the paper. It pulls image tokens to where the language model already reads words, so that
    comparing them with a text is a thing it can do; no forward pass of the language model is needed.

    Args:
        tokens_bme: (B, M, E) image tokens.
        words_we: (W, E) word embeddings of the corpus's vocabulary.
        rows_bl: (B, L) int64, which of the W words stands at a text position.
        is_word_bl: bool (B, L), False for positions without a word. Texts without any count as 0.
    """
    with full_precision(tokens_bme):
        cosines = F.normalize(tokens_bme.float(), dim=-1) @ F.normalize(words_we.float(), dim=-1).T
    scores = (WORD_SCALE * cosines).logsumexp(dim=1).log_softmax(dim=-1)
    own = scores.gather(1, rows_bl.masked_fill(~is_word_bl, 0)).masked_fill(~is_word_bl, 0)
    return -(own.sum(dim=1) / is_word_bl.sum(dim=1).clamp(min=1)).mean()


def token_loss(student_bme: Tensor, teacher_bne: Tensor) -> Tensor:
    """Token distillation: compressed tokens against the local teacher's, averaged down to as many.

    Not in the paper. The local teacher's tokens already mean something to its joint encoder; an adapter that
    gives (averages of) the same tokens can go on with that encoder, and learning them takes no pair at all.

    Args:
        student_bme: (B, M, E).
        teacher_bne: (B, N, E), row by row over the image. Averaged over a grid where N and M are squares, else
            over runs of neighbours in that order.

    Returns:
        The mean squared difference as a share of the targets' variance: 1 is no better than their mean.
    """
    target = average_tokens(teacher_bne.float(), student_bme.shape[1])
    centred = target - target.mean(dim=(0, 1))
    return (student_bme.float() - target).square().mean() / centred.square().mean().clamp(min=1e-12)


def average_tokens(tokens_bne: Tensor, num: int) -> Tensor:
    """(B, N, E) -> (B, num, E) by averaging neighbours."""
    side, wanted = math.isqrt(tokens_bne.shape[1]), math.isqrt(num)
    channels_first = tokens_bne.transpose(1, 2)
    if side**2 == tokens_bne.shape[1] and wanted**2 == num:
        grid = channels_first.reshape(*channels_first.shape[:2], side, side)
        maps = F.adaptive_avg_pool2d(grid, (wanted, wanted))
        return maps.flatten(2).transpose(1, 2)
    return F.adaptive_avg_pool1d(channels_first, num).transpose(1, 2)
