"""Pairs of a step -> tensors on the device.

Shape letters: G pairs of the gathered batch, L text tokens, C embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edje_pipeline.models.tokenizer import Tokenizer
from edje_pipeline.training.collective import Collective
from edje_pipeline.training.data import Captions
from edje_pipeline.training.hard_negatives import forbidden_pairs
from edje_pipeline.training.objective import MicroBatch
from edje_pipeline.training.sampler import PairBatch
from edje_pipeline.training.token_source import TokenSource


def pad_ids(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Lists of ids -> (G, L) int64 padded on the right, and bool (G, L), True where there is text."""
    length = max(len(row) for row in ids)
    padded = torch.full((len(ids), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(ids), length), dtype=torch.bool)
    for row, values in enumerate(ids):
        padded[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = True
    return padded, mask


@dataclass
class Corpus:
    """What is frozen about the pairs: captions, their ids and embeddings, the images' embeddings and tokens."""

    captions: Captions
    source: TokenSource
    positions: np.ndarray
    """(n,) int64: where each captioned image stands in the source."""
    text_embeddings: np.ndarray
    """float32 (T, C), unit length."""
    image_embeddings: np.ndarray | None
    """float32 (n, C) in the space of the texts; None: hard negatives are chosen by text similarity."""
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self._ids = self.tokenizer.encode(list(self.captions.texts))
        special = {self.tokenizer.pad_id, self.tokenizer.cls_id, self.tokenizer.sep_id, self.tokenizer.unk_id}
        used = sorted({piece for ids in self._ids for piece in ids} - special)
        self._vocabulary = torch.tensor(used or [self.tokenizer.unk_id], dtype=torch.int64)
        most = max(len(numbers) for numbers in self.captions.text_numbers)
        self._captions_of = np.full((len(self.captions), most), -1, np.int64)
        for row, numbers in enumerate(self.captions.text_numbers):
            self._captions_of[row, : len(numbers)] = numbers

    def micro_batch(self, pairs: PairBatch, collective: Collective, device: torch.device) -> MicroBatch:
        """The tensors of one micro-batch. Each worker reads its own images' tokens; they are then gathered."""
        own = np.arange(collective.rank, len(pairs.images), collective.num_workers)
        tokens = torch.from_numpy(self.source.tokens(self.positions[pairs.images[own]], pairs.views[own])).to(device)
        ids, mask = pad_ids([self._ids[text] for text in pairs.texts], self.tokenizer.pad_id)
        texts = torch.from_numpy(self.text_embeddings[pairs.texts])
        images = texts if self.image_embeddings is None else torch.from_numpy(self.image_embeddings[pairs.images])
        return MicroBatch(
            vision_tokens=collective.gather(tokens).float(),
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            text_embeddings=texts.to(device),
            similarity=texts @ images.T,
            forbidden=forbidden_pairs(
                torch.from_numpy(pairs.images), torch.from_numpy(pairs.texts),
                torch.from_numpy(self._captions_of[pairs.images]),
            ),
            own=torch.from_numpy(own),
            vocabulary=self._vocabulary.to(device),
        )  # fmt: skip

    def describe(self, pairs: PairBatch, most: int = 4) -> str:
        """The images of a batch for a message."""
        names = [repr(self.captions.image_ids[int(image)]) for image in pairs.images[:most]]
        return ", ".join(names) + (f" and {len(pairs.images) - most} more" if len(pairs.images) > most else "")
