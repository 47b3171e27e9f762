"""Validation inside a training run: recall after reranking the first stage's best, text to image.

A quick number to steer by; `evaluate` gives the full tables from an index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from edje_pipeline.models.tokenizer import Tokenizer
from edje_pipeline.storage.codecs import Codec
from edje_pipeline.training.batches import pad_ids
from edje_pipeline.training.data import Captions
from edje_pipeline.training.objective import Learner
from edje_pipeline.training.quantization import straight_through
from edje_pipeline.training.token_source import TokenSource

CHUNK = 64
MAX_QUERIES = 500


@dataclass
class Validator:
    """Fixed queries over fixed images: every caption's first text, candidates by the frozen first stage."""

    captions: Captions
    source: TokenSource
    positions: np.ndarray
    """(n,) int64, of the captioned images in the source."""
    text_embeddings: np.ndarray
    """(T, C) of `captions.texts`."""
    image_embeddings: np.ndarray
    """(n, C) first-stage embeddings."""
    tokenizer: Tokenizer
    pool: int = 10

    def __post_init__(self) -> None:
        first = [int(numbers[0]) for numbers in self.captions.text_numbers]
        queries = np.array(list(dict.fromkeys(first)), np.int64)
        chosen = np.sort(np.random.default_rng(0).permutation(len(queries))[:MAX_QUERIES])
        self.queries = queries[chosen]
        self.pool = min(self.pool, len(self.captions))
        scores = self.text_embeddings[self.queries] @ self.image_embeddings.T
        self.candidates = np.argsort(-scores, axis=1, kind="stable")[:, : self.pool]
        owners = [set(numbers.tolist()) for numbers in self.captions.text_numbers]
        self.is_right = np.array(
            [
                [int(text) in owners[image] for image in row]
                for text, row in zip(self.queries, self.candidates, strict=True)
            ]
        )
        self._ids = self.tokenizer.encode([self.captions.texts[text] for text in self.queries])

    @torch.no_grad()
    def run(self, learner: Learner, device: torch.device, codec: Codec | None = None) -> dict[str, float]:
        """Recall in percent: first stage, reranked, and the ceiling that the pool sets."""
        was_training = learner.training
        learner.eval()
        used, inverse = np.unique(self.candidates, return_inverse=True)
        parts = []
        for start in range(0, len(used), CHUNK):
            vision = torch.from_numpy(self.source.tokens(self.positions[used[start : start + CHUNK]])).to(device)
            tokens = learner.adapter(vision.float())
            parts.append(tokens if codec is None else straight_through(tokens, codec))
        tokens = torch.cat(parts)
        logits = []
        image_rows = torch.from_numpy(inverse.reshape(self.candidates.shape)).to(device)
        step = max(1, CHUNK // self.pool)
        for start in range(0, len(self.queries), step):
            ids, mask = pad_ids(self._ids[start : start + step], self.tokenizer.pad_id)
            rows = image_rows[start : start + step]
            repeated = [part.to(device).repeat_interleave(self.pool, dim=0) for part in (ids, mask)]
            scores = learner.encoder(*repeated, tokens[rows.flatten()])
            logits.append(scores.float().view(len(rows), self.pool).cpu().numpy())
        learner.train(was_training)
        best = np.concatenate(logits).argmax(axis=1)
        right = self.is_right
        return {
            "val_first_stage_r1": 100 * float(right[:, 0].mean()),
            "val_rerank_r1": 100 * float(right[np.arange(len(right)), best].mean()),
            "val_pool_recall": 100 * float(right.any(axis=1).mean()),
        }
