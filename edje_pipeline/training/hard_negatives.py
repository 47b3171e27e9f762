"""In-batch negatives of image-text pairs, hard ones by the similarity of frozen embeddings.

A negative must be wrong: captions of the same image and images with the same caption are excluded.
Both directions: wrong images for a text, wrong texts for an image. (Paper section 3.4.)

Shape letters: B positives of this worker, G positives of the gathered batch, K negatives, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edje_pipeline.errors import TrainingError
from edje_pipeline.training.recipe import NegativeSpec


@dataclass(frozen=True)
class PairPlan:
    """Which (text, image) pairs of the gathered batch to score, each once, and which lists they form."""

    text_p: Tensor
    """(P,) int64, index into the gathered texts."""
    image_p: Tensor
    """(P,) int64, index into the gathered images."""
    image_lists: Tensor
    """(B, 1 + K) int64 into the pairs: a text with its image in column 0, then wrong images."""
    text_lists: Tensor
    """(B, 1 + K) int64 into the pairs: an image with its text in column 0, then wrong texts."""
    image_valid: Tensor
    """(B, 1 + K) bool, False where the batch held too few admissible negatives."""
    text_valid: Tensor


def forbidden_pairs(images_g: Tensor, texts_g: Tensor, captions_gc: Tensor) -> Tensor:
    """(G, G) bool: True where text i may not serve as a negative of image j, nor text j of image i.

    Args:
        images_g: which image each position is.
        texts_g: which text each position is.
        captions_gc: every caption of each position's image, padded with -1: a text that was not drawn
            for an image this time may still describe it.
    """
    is_caption = (texts_g[:, None, None] == captions_gc[None]).any(dim=2)
    return is_caption | is_caption.T | (images_g[:, None] == images_g[None])


def plan_pairs(
    similarity_gg: Tensor, forbidden_gg: Tensor, own_b: Tensor, spec: NegativeSpec, generator: torch.Generator
) -> PairPlan:
    """Draws the negatives.

    Args:
        similarity_gg: (G, G) text i against image j by the frozen embeddings.
        forbidden_gg: from `forbidden_pairs`.
        own_b: (B,) positions of this worker's positives in the gathered batch.
        spec: how many, how hard.
        generator: on the CPU.

    Raises:
        TrainingError: the batch has fewer other pairs than negatives were asked for, or none admissible.
    """
    num_gathered = len(similarity_gg)
    if num_gathered - 1 < spec.num:
        raise TrainingError(
            f"{spec.num} negatives were asked for, a batch of {num_gathered} pairs has {num_gathered - 1} others; "
            f"use a batch of at least {spec.num + 1} or fewer negatives"
        )
    similarity, forbidden, own = similarity_gg.float().cpu(), forbidden_gg.cpu(), own_b.cpu()
    images = _draw(similarity[own], forbidden[own], spec, generator)
    texts = _draw(similarity.T[own], forbidden.T[own], spec, generator)
    if not (images[1].any() and texts[1].any()):
        raise TrainingError(
            f"a batch of {num_gathered} pairs holds no wrong pair: all share an image or a caption; "
            "use more different images or a larger batch"
        )
    own_column = own[:, None]
    text_of = torch.cat(
        [own_column.expand(-1, 1 + spec.num).reshape(-1), torch.cat([own_column, texts[0]], 1).reshape(-1)]
    )
    image_of = torch.cat(
        [torch.cat([own_column, images[0]], 1).reshape(-1), own_column.expand(-1, 1 + spec.num).reshape(-1)]
    )
    valid = torch.cat([_with_positive(images[1]).reshape(-1), _with_positive(texts[1]).reshape(-1)])
    # A pair wanted by several lists is scored once: a whole matrix of B x B pairs costs B x B, not twice that.
    keys, position = torch.unique((text_of * num_gathered + image_of)[valid], return_inverse=True)
    index = torch.zeros(len(valid), dtype=torch.long)
    index[valid] = position
    image_lists, text_lists = index.view(2, len(own), -1)
    return PairPlan(
        keys // num_gathered, keys % num_gathered, image_lists, text_lists,
        _with_positive(images[1]), _with_positive(texts[1]),
    )  # fmt: skip


def _with_positive(valid_bk: Tensor) -> Tensor:
    return torch.cat([valid_bk.new_ones(len(valid_bk), 1), valid_bk], dim=1)


def _draw(
    similarity_bg: Tensor, forbidden_bg: Tensor, spec: NegativeSpec, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Chosen columns (B, K) and whether each is admissible."""
    ranked = similarity_bg.masked_fill(forbidden_bg, float("-inf"))
    noise = torch.rand(ranked.shape, generator=generator)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    pool = order[:, : max(spec.pool, spec.num_hard)]
    shuffled = noise.gather(1, pool).argsort(dim=1)
    hard = pool.gather(1, shuffled)[:, : spec.num_hard]
    if spec.pool > spec.num_hard:
        # An inadmissible place of the pool must not push out an admissible one.
        hard = _admissible_first(pool.gather(1, shuffled), forbidden_bg)[:, : spec.num_hard]
    taken = forbidden_bg.scatter(1, hard, True) if spec.num_hard else forbidden_bg
    random = noise.masked_fill(taken, float("-inf")).argsort(dim=1, descending=True)[:, : spec.num_random]
    random_valid = ~taken.gather(1, random)
    hard_valid = ~forbidden_bg.gather(1, hard)
    return torch.cat([hard, random], dim=1), torch.cat([hard_valid, random_valid], dim=1)


def _admissible_first(columns_bk: Tensor, forbidden_bg: Tensor) -> Tensor:
    is_bad = forbidden_bg.gather(1, columns_bk)
    return columns_bk.gather(1, is_bad.long().argsort(dim=1, stable=True))
