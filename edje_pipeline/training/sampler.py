"""Which pairs make the batch of a step: a pure function of (seed, phase, step), so that a resumed run
sees exactly the batches the killed one would have seen, without stored state.

An epoch visits every image once; `neighbours` of a batch are extra images whose captions are near
those of the rest, because a small random batch holds no hard negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edje_pipeline.errors import TrainingError
from edje_pipeline.training.data import Captions
from edje_pipeline.training.recipe import Phase

NUM_NEIGHBOURS = 48
CHUNK_ROWS = 1024


@dataclass(frozen=True)
class PairBatch:
    """Pairs of a global step, all workers and micro-batches together."""

    images: np.ndarray
    """(G,) int64, positions in the corpus."""
    texts: np.ndarray
    """(G,) int64, positions in `Captions.texts`."""
    views: np.ndarray
    """(G,) int64, which view of each image; 0 is the image as it is."""

    def part(self, number: int, of: int) -> PairBatch:
        """Every `of`-th pair from `number` on: a worker's or a micro-batch's share."""
        return PairBatch(self.images[number::of], self.texts[number::of], self.views[number::of])


def nearest_texts(embeddings: np.ndarray, num: int = NUM_NEIGHBOURS) -> np.ndarray:
    """Positions of the most similar other texts: unit float32 (T, C) -> int32 (T, min(num, T - 1))."""
    total = len(embeddings)
    num = min(num, total - 1)
    nearest = np.empty((total, num), np.int32)
    for start in range(0, total, CHUNK_ROWS):
        scores = embeddings[start : start + CHUNK_ROWS] @ embeddings.T
        rows = np.arange(len(scores))
        scores[rows, start + rows] = -np.inf
        nearest[start : start + CHUNK_ROWS] = np.argpartition(-scores, num - 1, axis=1)[:, :num]
    return nearest


def confused_texts(
    text_embeddings: np.ndarray, image_embeddings: np.ndarray, captions: Captions, num: int = NUM_NEIGHBOURS
) -> np.ndarray:
    """Texts whose images the first stage takes for a text's own: what the joint encoder will have to tell apart.

    Args:
        text_embeddings: unit float32 (T, C).
        image_embeddings: (n, C), of the first stage.
        captions: the corpus; an image stands for its first caption.
        num: images looked at for each text.

    Returns:
        int32 (T, min(num, n)). A text's own name can be among them; the sampler leaves seen images out.
    """
    first = np.array([int(numbers[0]) for numbers in captions.text_numbers], np.int32)
    num = min(num, len(first))
    found = np.empty((len(text_embeddings), num), np.int32)
    for start in range(0, len(text_embeddings), CHUNK_ROWS):
        scores = text_embeddings[start : start + CHUNK_ROWS] @ image_embeddings.T
        found[start : start + CHUNK_ROWS] = first[np.argpartition(-scores, num - 1, axis=1)[:, :num]]
    return found


class PairSampler:
    """See the module docstring."""

    def __init__(
        self, captions: Captions, seed: int, neighbours: np.ndarray | None = None, *, num_views: int = 1
    ) -> None:
        """Args: captions: the corpus. seed: of the run. neighbours: (T, K) texts near each text, where a phase wants
        them: from `nearest_texts` and `confused_texts`. num_views: of each image."""
        self.captions = captions
        self.num_views = num_views
        self.seed = seed
        self.neighbours = neighbours
        self._images_of_text: list[list[int]] = [[] for _ in captions.texts]
        for image, numbers in enumerate(captions.text_numbers):
            for number in numbers:
                self._images_of_text[number].append(image)
        self._epoch: tuple[int, int, np.ndarray] = (-1, -1, np.empty(0, np.int64))

    def batch(self, phase: Phase, phase_number: int, step: int, num_pairs: int) -> PairBatch:
        """The pairs of step `step` (from 0) of a phase; images are distinct where the corpus has enough.

        Raises:
            TrainingError: the batch is larger than the corpus.
        """
        total = len(self.captions)
        if num_pairs > total:
            raise TrainingError(
                f"phase {phase.name!r} asks for {num_pairs} different images a step, the corpus has {total}; "
                "use a smaller batch-size"
            )
        rng = np.random.default_rng([self.seed, phase_number, step, 1])
        num_near = int(num_pairs * phase.neighbours) if self.neighbours is not None else 0
        images = list(self._from_epochs(phase_number, step * (num_pairs - num_near), num_pairs - num_near))
        texts = [self._caption_of(image, phase, rng) for image in images]
        seen = set(images)
        self._add_neighbours(images, texts, seen, num_near, phase, rng)
        order = rng.permutation(len(images))
        # A stream of its own: with one view or eight, the same pairs are drawn.
        views = np.random.default_rng([self.seed, phase_number, step, 2]).integers(self.num_views, size=len(images))
        return PairBatch(np.array(images, np.int64)[order], np.array(texts, np.int64)[order], views)

    def _add_neighbours(
        self, images: list[int], texts: list[int], seen: set[int], num: int, phase: Phase, rng: np.random.Generator
    ) -> None:
        attempts = 0
        while num > 0:
            attempts += 1
            if attempts > 20 * len(self.captions):
                raise TrainingError("the corpus has too few different neighbours for this batch-size; lower neighbours")
            if attempts <= 50 * num and self.neighbours is not None:
                anchor = texts[int(rng.integers(len(texts)))]
                text = int(rng.choice(self.neighbours[anchor]))
                image = int(rng.choice(self._images_of_text[text]))
            else:
                # A tight cluster of texts may be used up; any other image then fills the place.
                image = int(rng.integers(len(self.captions)))
            if image in seen:
                continue
            seen.add(image)
            images.append(image)
            texts.append(self._caption_of(image, phase, rng))
            num -= 1

    def _caption_of(self, image: int, phase: Phase, rng: np.random.Generator) -> int:
        numbers = self.captions.text_numbers[image]
        return int(numbers[0] if phase.captions == "first" else rng.choice(numbers))

    def _from_epochs(self, phase_number: int, start: int, num: int) -> np.ndarray:
        """`num` distinct positions from the endless row of shuffled epochs, from place `start` on."""
        total = len(self.captions)
        epoch, offset = divmod(start, total)
        taken = self._order(phase_number, epoch)[offset : offset + num]
        if len(taken) < num:
            # Over the seam, images of the old epoch's tail would appear twice in one batch: skip those.
            following = self._order(phase_number, epoch + 1)
            fresh = following[~np.isin(following, taken)]
            taken = np.concatenate([taken, fresh[: num - len(taken)]])
        return taken

    def _order(self, phase_number: int, epoch: int) -> np.ndarray:
        if self._epoch[:2] != (phase_number, epoch):
            rng = np.random.default_rng([self.seed, phase_number, epoch, 0])
            self._epoch = (phase_number, epoch, rng.permutation(len(self.captions)))
        return self._epoch[2]
